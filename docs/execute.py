"""Runs the notebooks and keeps in them what they print and draw: `make notebooks`."""

import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> None:
    """Without warnings and bars, which are of a machine and its moment."""
    notebook = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        options = dict(timeout=600, record_timing=False, coalesce_streams=True)
        where = {"metadata": {"path": folder}}
        NotebookClient(notebook, resources=where, **options).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [each for each in cell.outputs if each.get("name") != "stderr"]
            for output in cell.outputs:
                output.get("data", {}).pop("image/jpeg", None)  # of a picture there is a PNG
    notebook.metadata.get("language_info", {}).pop("version", None)
    nbformat.write(notebook, path)


if __name__ == "__main__":
    for path in sorted(Path(__file__).parent.glob("notebooks/*.ipynb")):
        print(path)
        execute(path)
