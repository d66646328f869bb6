"""The prompts of GenEval, DPG-Bench and MJHQ-30K, each list in an order of its own.

GenEval's ship with the package (MIT, `geneval.LICENSE`); docs/evaluation.md says where the others
are to be had.
"""

import io
import json
from pathlib import Path
from typing import Any, NamedTuple

PAGE = "docs/evaluation.md"  # where data that users bring is named
GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
MJHQ_CATEGORIES = (
    "animals", "art", "fashion", "food", "indoor", "landscape", "logo", "people", "plants",
    "vehicles",
)  # fmt: skip


class Prompt(NamedTuple):
    """What one picture, or four of one prompt, are drawn from."""

    name: str  # of its file or folder, unique within a list
    text: str
    metadata: dict[str, Any]  # as the benchmark gives it


def geneval(path: str | Path | None = None) -> list[Prompt]:
    """GenEval's 553 prompts (arXiv 2310.11513), or those of a JSONL file of the same form.

    A prompt's name is its line number, from 00000.

    Raises:
        ValueError: a line is no JSON object with "tag", "include" and "prompt", or there is none.
        FileNotFoundError: there is no such file.
    """
    path = Path(__file__).with_name("geneval.jsonl") if path is None else _file(path, "GenEval")
    prompts = []
    for number, line in enumerate(io.StringIO(_read(path))):
        where = f"{path}, line {number + 1}"
        metadata = _json(line, where)
        if not isinstance(metadata, dict) or not {"tag", "include", "prompt"} <= metadata.keys():
            raise ValueError(f"{where}: a prompt needs tag, include and prompt, got {line[:80]!r}")
        text = metadata["prompt"]
        prompts.append(Prompt(f"{number:05d}", _text(text, where), metadata))
    return _some(prompts, path)


def dpg(folder: str | Path) -> list[Prompt]:
    """DPG-Bench's prompts (arXiv 2403.05135): a folder of ID.txt, sorted by name.

    Raises:
        ValueError: a file is empty or not UTF-8, or there is none.
        FileNotFoundError: there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder} of DPG-Bench's prompts: see {PAGE}")
    prompts = []
    for path in sorted(folder.glob("*.txt")):
        prompts.append(Prompt(path.stem, _text(_read(path), path), {}))
    return _some(prompts, folder)


def mjhq(path: str | Path) -> list[Prompt]:
    """MJHQ-30K's prompts (arXiv 2402.17245) of its meta_data.json, in the file's order.

    A prompt's name is CATEGORY/ID.

    Raises:
        ValueError: an entry has no category or prompt, or there is none.
        FileNotFoundError: there is no such file.
    """
    path = _file(path, "MJHQ-30K")
    entries = _json(_read(path), path)
    if not isinstance(entries, dict):
        raise ValueError(f"{path} must be a JSON object {{id: {{category, prompt}}}}")
    prompts = []
    for name, entry in entries.items():
        where = f"{path}, {name}"
        if not isinstance(entry, dict) or not {"category", "prompt"} <= entry.keys():
            raise ValueError(f"{where}: an entry needs category and prompt, got {entry!r:.80}")
        full = f"{entry['category']}/{name}"
        if len(Path(full).parts) != 2 or ".." in Path(full).parts:
            raise ValueError(f"{where}: category and id must each name one file, got {full!r}")
        prompts.append(Prompt(full, _text(entry["prompt"], where), entry))
    return _some(prompts, path)


def _file(path: str | Path, benchmark: str) -> Path:
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path} of {benchmark}'s prompts: see {PAGE}")
    return Path(path)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error


def _json(text: str, where: str | Path) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error


def _text(text: Any, where: str | Path) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{where}: the prompt must be a text, got {text!r:.80}")
    return text.strip()


def _some(prompts: list[Prompt], where: Path) -> list[Prompt]:
    if not prompts:
        raise ValueError(f"{where} has no prompts: see {PAGE}")
    return prompts
