"""GenEval's score of judged pictures."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from tim.data.prompts import GENEVAL_TAGS


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The score of the rows of `results.jsonl`.

    Returns:
        `overall`, the plain mean of the tags' accuracies; `correct_images`, the share of correct
        pictures; `correct_prompts`, that of prompts with one at least; `images` and `prompts`, how
        many there are; `tasks`, {tag: {"score", "correct", "images"}}.

    Raises:
        ValueError: there is no row.
    """
    of_tag: dict[str, list[bool]] = defaultdict(list)
    of_prompt: dict[str, list[bool]] = defaultdict(list)
    for row in rows:
        of_tag[row["tag"]].append(bool(row["correct"]))
        of_prompt[row["metadata"]].append(bool(row["correct"]))
    if not of_tag:
        raise ValueError("no picture was judged: there is no score")
    tasks = {
        tag: {"score": _mean(of_tag[tag]), "correct": sum(of_tag[tag]), "images": len(of_tag[tag])}
        for tag in sorted(of_tag, key=_place)
    }
    return {
        "overall": _mean([task["score"] for task in tasks.values()]),
        "correct_images": _mean([each for of_one in of_tag.values() for each in of_one]),
        "correct_prompts": _mean([any(of_one) for of_one in of_prompt.values()]),
        "images": sum(map(len, of_tag.values())),
        "prompts": len(of_prompt),
        "tasks": tasks,
    }


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values)


def _place(tag: str) -> tuple[int, str]:
    return (GENEVAL_TAGS.index(tag) if tag in GENEVAL_TAGS else len(GENEVAL_TAGS), tag)
