"""Lays docs/ out in build/docs, which zensical makes the site of: `make docs`.

Notebooks become pages, links go to where their files are on the site, and files outside docs/ that
a page links to are copied along.
"""

import base64
import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "build/docs"
OUTSIDE = {ROOT / "README.md": "index.md"} | {
    ROOT / name: name.lower() for name in ("CHANGELOG.md", "CONTRIBUTING.md")
}  # pages that lie beside docs/


def place(source: Path) -> Path:
    """Where a file of the repository is, from the top of the site."""
    if source in OUTSIDE:
        return Path(OUTSIDE[source])
    if not source.is_relative_to(DOCS):
        path = Path("files") / source.relative_to(ROOT)
        return path.with_suffix(".txt") if path.suffix in (".md", ".py") else path
    path = source.relative_to(DOCS)
    return path.with_suffix(".md") if path.suffix == ".ipynb" else path


def linked(text: str, source: Path) -> str:
    """The text of a page with its links as they are on the site."""

    def on_site(match: re.Match) -> str:
        path, mark, heading = match[1].partition("#")
        there = (source.parent / path).resolve()
        if not path or not there.is_file():
            return match[0]
        if not there.is_relative_to(DOCS) and there not in OUTSIDE:
            copy(there, SITE / place(there))
        return f"]({os.path.relpath(place(there), place(source).parent)}{mark}{heading})"

    return re.sub(r"\]\((?!https?:)([^)\s]+)\)", on_site, text)


def page(notebook: Path) -> str:
    """A notebook as Markdown, its pictures as files beside it."""
    parts = []
    for number, cell in enumerate(json.loads(notebook.read_text())["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text")})
            if "image/png" in data:
                picture = SITE / place(notebook).with_suffix("") / f"{number}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![]({notebook.stem}/{number}.png)")
            else:
                parts.append(f"``` {{ .text .output }}\n{''.join(data['text/plain']).rstrip()}\n```")
    title, *rest = parts
    download = f"[The notebook]({notebook.name}){{ download }}, to run it."
    return "\n\n".join((title, download, *rest)) + "\n"


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    pages = [path for path in OUTSIDE if path.name != "README.md"]
    for path in [*filter(Path.is_file, DOCS.rglob("*")), *pages]:
        target = SITE / place(path)
        if path.suffix in (".md", ".ipynb"):
            text = page(path) if path.suffix == ".ipynb" else path.read_text()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(linked(text, path))
        if path.suffix not in (".md", ".py", ".pyc"):
            copy(path, SITE / path.relative_to(DOCS))


if __name__ == "__main__":
    main()
