"""DPG-Bench's scores of answers (arXiv 2403.05135)."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from tim.evaluation.dpg.questions import Question

Answers = Sequence[Sequence[str]]  # (picture, question)


def is_yes(answer: str) -> bool:
    """Whether an answer is yes, however it is written; a longer one is not."""
    return answer.strip().lower().removesuffix(".").rstrip() == "yes"


def counted(questions: Sequence[Question], answers: Sequence[str]) -> list[float]:
    """1 or 0 for each question of a picture: 0 without a yes, or where a parent has 0.

    In the file's order: a parent that comes later is not yet set to 0 by its own.
    """
    scores = _raw(questions, answers)
    for question in questions:
        if any(scores[parent] == 0 for parent in question.parents):
            scores[question.number] = 0.0
    return list(scores.values())


def picture_scores(questions: Sequence[Question], answers: Answers) -> list[float]:
    """The mean of the questions for each picture of an item."""
    return [_mean(counted(questions, of_picture)) for of_picture in answers]


def overall(items: Mapping[str, Sequence[float]]) -> float:
    """The DPG score, 0 to 100: the mean over items of the mean over their pictures."""
    return 100 * _mean([_mean(scores) for scores in items.values()])


def categories(
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, Answers],
    *, last_only: bool = False,
) -> dict[str, dict[str, float]]:  # fmt: skip
    """{"l1": {"entity": …}, "l2": {"entity - whole": …}}: the share of yes, 0 to 100, whatever the
    parents, over all pictures; `last_only` takes the last of each item, as the published code."""
    values: dict[str, dict[str, list[float]]] = {"l1": defaultdict(list), "l2": defaultdict(list)}
    for item, of_item in answers.items():
        for of_picture in of_item[-1:] if last_only else of_item:
            raw = _raw(questions[item], of_picture)
            for question in questions[item]:
                values["l1"][question.broad_category].append(raw[question.number])
                values["l2"][question.category].append(raw[question.number])
    return {
        level: {name: 100 * _mean(of_one) for name, of_one in sorted(of_level.items())}
        for level, of_level in values.items()
    }


def _raw(questions: Sequence[Question], answers: Sequence[str]) -> dict[int, float]:
    return {
        question.number: float(is_yes(answer))
        for question, answer in zip(questions, answers, strict=True)
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
