"""Lays docs/ out in build/docs, which zensical makes the site of: `make docs`.

Notebooks become pages, links go to where their files are on the site, and what a page links to
outside docs/ comes along: code and folders as pages, other files as they are.
"""

import base64
import json
import os
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS, SITE = ROOT / "docs", ROOT / "build/docs"
BESIDE = {ROOT / name: Path(name.lower()) for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
CODE = ".py", ".yaml"


def place(source: Path) -> Path:
    """Where a file or folder of the repository is, from the top of the site."""
    if source == ROOT / "README.md":
        return Path("index.md")
    if source in BESIDE:
        return BESIDE[source]
    if source.is_relative_to(DOCS):
        path = source.relative_to(DOCS)
        return path.with_suffix(".md") if path.suffix == ".ipynb" else path
    path = "files" / source.relative_to(ROOT)
    return path.with_name(f"{path.name}.md") if source.suffix in CODE or source.is_dir() else path


def write(source: Path) -> None:
    """The page of a file or folder, or its copy, unless it is there."""
    target = SITE / place(source)
    if target.exists() or source == ROOT / "README.md":
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix != ".md":
        shutil.copyfile(source, target)
        return
    target.touch()  # pages may link to one another
    made = notebook if source.suffix == ".ipynb" else listing if source.is_dir() else code
    text = source.read_text() if source.suffix == ".md" else made(source)
    target.write_text(linked(text, source))


def linked(text: str, source: Path) -> str:
    """The text of a page with its links as they are on the site."""

    def on_site(match: re.Match) -> str:
        path, mark, heading = match[1].partition("#")
        there = (source.parent / path).resolve()
        if not path or not there.exists() or not there.is_relative_to(ROOT):
            return match[0]
        write(there)
        return f"]({os.path.relpath(place(there), place(source).parent)}{mark}{heading})"

    return re.sub(r"\]\((?!https?:)([^)\s]+)\)", on_site, text)


def notebook(source: Path) -> str:
    """Its cells, and what they printed and drew; pictures are files beside the page."""
    parts = []
    for number, cell in enumerate(json.loads(source.read_text())["cells"]):
        text = "".join(cell["source"])
        parts.append(text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {"text/plain": output.get("text")})
            if "image/png" in data:
                picture = SITE / place(source).with_suffix("") / f"{number}.png"
                picture.parent.mkdir(parents=True, exist_ok=True)
                picture.write_bytes(base64.b64decode(data["image/png"]))
                parts.append(f"![]({source.stem}/{number}.png)")
            else:
                printed = "".join(data["text/plain"]).rstrip()
                parts.append(f"``` {{ .text .output }}\n{printed}\n```")
    shutil.copyfile(source, SITE / place(source).with_suffix(".ipynb"))
    title, *rest = parts
    download = f'<a href="{source.name}" download>The notebook</a>, to run it.'
    return "\n\n".join((title, download, *rest)) + "\n"


def code(source: Path) -> str:
    text, language = source.read_text().rstrip(), source.suffix[1:]
    return f"{_head(source)}````{language}\n{text}\n````\n"


def listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.name[:2] not in ("__", "."))
    return _head(folder) + "\n".join(f"- [{name}]({folder.name}/{name})" for name in names)


def _head(source: Path) -> str:
    return f"---\nsearch: {{exclude: true}}\n---\n\n# {source.relative_to(ROOT)}\n\n"


def main() -> None:
    shutil.rmtree(SITE, ignore_errors=True)
    for file in [*filter(Path.is_file, DOCS.rglob("*")), *BESIDE]:
        if file.suffix not in (".py", ".pyc"):
            write(file)


if __name__ == "__main__":
    main()
