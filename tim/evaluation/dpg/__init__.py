"""DPG-Bench (arXiv 2403.05135): whether a network answers yes to questions about pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from tim.evaluation import judging, report
from tim.evaluation.dpg import folder as folders
from tim.evaluation.dpg import score
from tim.evaluation.dpg.questions import Question, read
from tim.evaluation.dpg.vqa import VQA
from tim.evaluation.reading import picture
from tim.evaluation.weights import settings_of
from tim.files import replacing
from tim.processes import Processes
from tim.provenance import file_hash

_SHOWN = 16  # items on a sheet
_WANTED = "a picture file of each item"


def evaluate(
    folder: str | Path,
    questions: str | Path,
    output: str | Path,
    vqa: VQA,
    *,
    vqa_name: str | None = None,
    per_prompt: int = 4,
    published_categories: bool = False,
    leave_out: bool = False,
) -> dict[str, Any]:
    """Ask the questions of `dpg_bench.csv` about FOLDER/ITEM.png.

    Writes to the folder `output`: `result.json` (`tim.evaluation.report.write`); `result.txt` and
    `result_detail.txt` as published; `grid.png`, the first items, `worst.png` and `best.png`, those
    of lowest and highest score; in `judged`, what a stopped run has done. Every process of
    torch.distributed's default group takes a share; the result is the same.

    Args:
        vqa: an RGB picture and a question → an answer, such as `BlipVQA.load()`. Scores of
            different ones do not compare; the published are mPLUG's.
        vqa_name: for a function of your own, what it is called in the result.
        per_prompt: pictures of each, 4 as the quarters of its file, or 1.
        published_categories: category scores of the last picture of each item alone.
        leave_out: judge what there is; the counts and settings say what is not.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: pictures are missing, damaged, not RGB or no item's, or what the network
            computes of them is not finite; it names them.
        FileNotFoundError: there is no such folder, or no file of questions.
        BlockingIOError: another run writes to `output`.

    Example::

        evaluate("samples", "dpg_bench.csv", "dpg", BlipVQA.load())
    """
    if per_prompt not in (1, 4):
        raise ValueError(f"per_prompt must be 1 or 4, got {per_prompt!r}")
    folder, here = Path(folder), Processes.here()
    of_item, run = read(questions), report.run_of(folder)
    asked = {
        **settings_of("vqa", vqa, vqa_name),
        "per_prompt": per_prompt, "questions": file_hash(Path(questions)),
    }  # fmt: skip
    found, problems = folders.find(folder, of_item, Path(output))
    with judging.output_folder(output) as output:
        files, damaged = judging.without_damaged(
            found, _uneven if per_prompt == 4 else lambda _: None
        )
        problems += damaged
        if not leave_out:
            judging.refuse(folder, problems, _WANTED)

        def judge(item: str, image: Image.Image) -> list[list[str]]:
            crops = [image.crop(box) for box in boxes(image.size, per_prompt)]
            return [[_text_of(vqa(crop, each.text)) for each in of_item[item]] for crop in crops]

        answers, faults = judging.judged(files, judge, output, asked)
        problems += faults
        if not leave_out:
            judging.refuse(folder, problems, _WANTED)
        result = None
        if here.is_first:
            settings = asked | {
                "category_pictures": "last" if published_categories else "all",
                "left_out": problems,
            }
            result = _write(folder, output, files, of_item, answers, settings, run)
        return here.gather(result)[0]


def check(
    folder: str | Path, questions: str | Path, output: str | Path, *, leave_out: bool = False
) -> None:
    """Raises what `evaluate` would for the names in a folder, before any network is loaded."""
    _, problems = folders.find(Path(folder), read(questions), Path(output))
    if not leave_out:
        judging.refuse(Path(folder), problems, _WANTED)


def boxes(size: tuple[int, int], pictures: int) -> list[tuple[int, int, int, int]]:
    """Where the pictures of a file (width, height) are, row by row: left, top, right, bottom."""
    width, height = size
    if pictures == 1:
        return [(0, 0, width, height)]
    x, y = width // 2, height // 2
    return [(left, top, left + x, top + y) for top in (0, y) for left in (0, x)]


def table(result: Mapping[str, Any]) -> str:
    """The scores as a Markdown table, 0 to 100, and what is missing."""
    settings, counts = result["settings"], result["counts"]
    rows = [("DPG score", _two(result["metrics"]["dpg_score"]))]
    for level in ("l1", "l2"):
        rows += [(name, _two(value)) for name, value in result["breakdown"][level].items()]
    which = "the last picture" if settings["category_pictures"] == "last" else "all pictures"
    lines = [report.table((f"DPG-Bench by {settings['vqa']}", "of 100"), rows)]
    lines.append(f"\n{counts['items']} of {counts['items_asked']} items; categories of {which}")
    return "\n".join(lines)


def _two(value: float) -> str:
    return f"{value:.2f}"


def _text_of(answer: str) -> str:
    if not isinstance(answer, str):
        raise ValueError(f"vqa must answer with a text, got {answer!r}")
    return answer


def _uneven(image: Image.Image) -> str | None:
    """Why a picture is no grid of four."""
    width, height = image.size
    return f"a grid of 4 has even sides, got {width}×{height}" if width % 2 or height % 2 else None


def _write(
    folder: Path, output: Path, files: Mapping[str, Path],
    questions: Mapping[str, Sequence[Question]], answers: Mapping[str, score.Answers],
    settings: Mapping[str, Any], run: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    last_only = settings["category_pictures"] == "last"
    scores = {item: score.picture_scores(questions[item], answers[item]) for item in answers}
    if not scores:
        raise ValueError("no picture was judged: there is no score")
    total = score.overall(scores)
    categories = score.categories(questions, answers, last_only=last_only)
    means = {item: sum(of_item) / len(of_item) for item, of_item in scores.items()}
    lines = [
        f"{files[item]}, {', '.join(map(str, (*scores[item], means[item])))}" for item in scores
    ]
    lines += [f"Model: {folder.name}", "L1 category scores:"]
    lines += [f"\t{name}: {value}" for name, value in categories["l1"].items()]
    lines += ["L2 category scores:", *(f"\t{name}: {v}" for name, v in categories["l2"].items())]
    lines += [f"Image path: {folder}", f"Save results to: {output / 'result.txt'}"]
    lines += [f"DPG-Bench score: {total}"]
    _write_lines(output / "result.txt", lines)
    _write_lines(
        output / "result_detail.txt", _details(files, questions, answers, settings["per_prompt"])
    )
    by_score = sorted(means, key=lambda item: means[item])
    orders = {"grid": [*means], "worst": by_score, "best": by_score[::-1]}
    chosen = {
        title: {item: f"{100 * means[item]:.0f} {item}" for item in items[:_SHOWN]}
        for title, items in orders.items()
    }
    report.sheets(output, chosen, lambda items: [picture(files[item]) for item in items])
    return report.write(
        output / "result.json", "dpg", {"dpg_score": total}, settings=settings,
        counts={
            "items": len(scores), "items_asked": len(questions),
            "pictures": settings["per_prompt"] * len(scores),
            "asked": settings["per_prompt"] * len(questions),
            "questions": sum(len(questions[item]) for item in scores),
            "left_out": len(settings["left_out"]),
        },
        breakdown=categories, run=run,
    )  # fmt: skip


def _details(
    files: Mapping[str, Path], questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, score.Answers], pictures: int,
) -> list[str]:  # fmt: skip
    lines = []
    for item, of_item in answers.items():
        with Image.open(files[item]) as image:
            crops = boxes(image.size, pictures)
        for crop, of_picture in zip(crops, of_item, strict=True):
            for question, answer in zip(questions[item], of_picture, strict=True):
                said = " ".join(answer.split())
                lines.append(f"{files[item]}, {crop}, {question.text}, {said}")
    return lines


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    with replacing(path) as new:
        new.write_text("\n".join(lines) + "\n", encoding="utf-8")
