"""The pictures of GenEval's prompts, as they lie in a folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tim.data.prompts import Prompt
from tim.evaluation import report
from tim.evaluation.reading import pictures_folder

WANTED = "FOLDER/00000/{metadata.jsonl, samples/00000.png …}, a folder a prompt"


class Found(NamedTuple):
    pictures: dict[str, Path]  # 00000/samples/00000.png → its file, by number
    prompts: dict[str, Prompt]  # likewise → what it was drawn from
    problems: list[str]  # what is missing, too much or foreign, a line each


def find(folder: Path, prompts: Sequence[Prompt], per_prompt: int, output: Path) -> Found:
    """All that is there of each prompt, whose folder is its number.

    Hidden files and files beside the prompts' folders are passed over.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: there is no folder of a prompt in it, or the result would lie in it.
    """
    pictures_folder(folder)
    report.apart(output, folder)
    found = Found({}, {}, [])
    of_number: dict[int, list[Path]] = {}
    for path in _entries(folder):
        if not path.is_dir():
            continue
        if re.fullmatch("[0-9]+", path.name) and int(path.name) < len(prompts):
            of_number.setdefault(int(path.name), []).append(path)
        else:
            found.problems.append(f"{path.name} is no prompt's number")
    if not of_number:
        raise ValueError(f"{folder} has no folder of a prompt; it must be {WANTED}")
    for number, prompt in enumerate(prompts):
        folders = of_number.get(number, [])
        if not folders:
            found.problems.append(f"{prompt.name} is missing")
        for path in folders[1:]:
            found.problems.append(f"{path.name} is {folders[0].name} once more")
        for path in folders[:1]:
            _add(found, path, prompt, per_prompt)
    return found


def _add(found: Found, folder: Path, prompt: Prompt, per_prompt: int) -> None:
    if reason := _other_metadata(folder / "metadata.jsonl", prompt):
        found.problems.append(f"{folder.name}/metadata.jsonl {reason}")
        return
    samples = folder / "samples"
    pictures = []
    for path in _entries(samples) if samples.is_dir() else []:
        if re.fullmatch(r"[0-9]+\.png", path.name) and path.is_file():
            pictures.append(path)
        else:
            found.problems.append(f"{folder.name}/samples/{path.name} is no NUMBER.png")
    if len(pictures) != per_prompt:
        found.problems.append(f"{folder.name} has {len(pictures)} of {per_prompt} pictures")
    for path in sorted(pictures, key=lambda path: (int(path.stem), path.name))[:per_prompt]:
        name = f"{folder.name}/samples/{path.name}"
        found.pictures[name], found.prompts[name] = path, prompt


def _other_metadata(path: Path, prompt: Prompt) -> str | None:
    try:
        metadata = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "is missing"
    except ValueError as error:
        return f"is no JSON ({error})"
    return None if metadata == prompt.metadata else f"is not that of {prompt.text!r}"


def _entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))
