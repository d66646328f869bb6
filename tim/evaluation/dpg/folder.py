"""The pictures of DPG-Bench's items, as they lie in a folder."""

from collections.abc import Collection
from pathlib import Path

from PIL import Image

from tim.evaluation import report
from tim.evaluation.reading import pictures_folder


def find(folder: Path, items: Collection[str], output: Path) -> tuple[dict[str, Path], list[str]]:
    """Each item's picture file, by name, and what is missing, too much or foreign, a line each.

    Hidden files and files that are no pictures by their name are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no picture in it, or the result would lie beside them.
    """
    pictures_folder(folder)
    report.apart(output, folder)
    kinds = Image.registered_extensions()
    found: dict[str, Path] = {}
    problems = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            problems.append(f"{path.name} is a folder")
        elif path.suffix.lower() not in kinds:
            continue
        elif path.stem not in items:
            problems.append(f"{path.name} is no item")
        elif path.stem in found:
            problems.append(f"{path.name} is {found[path.stem].name} once more")
        else:
            found[path.stem] = path
    if not found:
        raise ValueError(f"{folder} has no picture of an item; it must be FOLDER/ITEM.png")
    problems += [f"{item} is missing" for item in items if item not in found]
    return {item: found[item] for item in items if item in found}, problems
