"""GenEval (arXiv 2310.11513): whether pictures show the objects that their prompts ask for."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from PIL import Image

from tim.checks import whole
from tim.data.prompts import Prompt
from tim.data.prompts import geneval as read_prompts
from tim.evaluation import judging, report
from tim.evaluation.geneval import folder as folders
from tim.evaluation.geneval import judge as rules
from tim.evaluation.geneval.objects import ColourClassifier, Detection, Detector
from tim.evaluation.geneval.summary import summary
from tim.evaluation.reading import picture
from tim.evaluation.weights import settings_of
from tim.files import replacing
from tim.processes import Processes

_SHOWN = 8  # pictures of each tag on a sheet
Row = dict[str, Any]


def evaluate(
    folder: str | Path,
    output: str | Path,
    detector: Detector,
    colours: ColourClassifier,
    *,
    detector_name: str | None = None,
    colours_name: str | None = None,
    prompts: str | Path | None = None,
    per_prompt: int = 4,
    leave_out: bool = False,
) -> dict[str, Any]:
    """Judge FOLDER/00000/{metadata.jsonl, samples/00000.png …}, four pictures of each prompt.

    Writes to the folder `output`: `result.json` (`tim.evaluation.report.write`), `results.jsonl`, a
    line a picture as published, `grid.png`, `worst.png` and `best.png`, the first pictures of each
    tag, the first wrong and right ones; in `judged`, what a stopped run has done. Every process of
    torch.distributed's default group takes a share; the result is the same.

    Args:
        detector: an RGB picture → `Detection`s, such as `Mask2Former.load()`.
        colours: a picture, objects of a class and its name → a colour each, such as
            `ClipColours.load()`.
        detector_name, colours_name: for functions of your own, what they are called in the result.
        prompts: a JSONL file of another list than GenEval's 553.
        per_prompt: pictures of each prompt.
        leave_out: judge what there is; the counts and settings say what is not.

    Returns:
        What `result.json` holds.

    Raises:
        ValueError: pictures are missing, damaged, not RGB or no prompt's, or what a network
            computes of them is not finite; it names them.
        FileNotFoundError: there is no such folder.
        BlockingIOError: another run writes to `output`.

    Example::

        evaluate("samples", "geneval", Mask2Former.load(), ClipColours.load())
    """
    folder, here = Path(folder), Processes.here()
    listed, run = _listed(prompts), report.run_of(folder)
    found = folders.find(folder, listed, whole("per_prompt", per_prompt, 1), Path(output))
    settings = {
        **settings_of("detector", detector, detector_name),
        **settings_of("colours", colours, colours_name),
        **rules.SETTINGS,
        "prompts": sha256(json.dumps([each.metadata for each in listed]).encode()).hexdigest(),
    }
    with judging.output_folder(output) as output:
        pictures, damaged = judging.without_damaged(found.pictures)
        problems = [*found.problems, *damaged]
        if not leave_out:
            judging.refuse(folder, problems, _wanted(per_prompt))

        def judge(name: str, image: Image.Image) -> Row:
            def colours_of(objects: Sequence[Detection], of: str) -> Sequence[str]:
                return colours(image, objects, of)

            prompt = found.prompts[name]
            return rules.judge(prompt.metadata, detector(image), colours_of)._asdict()

        judged, faults = judging.judged(pictures, judge, output, settings)
        problems += faults
        if not leave_out:
            judging.refuse(folder, problems, _wanted(per_prompt))
        result = None
        if here.is_first:
            rows = [_row(pictures[name], found.prompts[name], judged[name]) for name in judged]
            settings |= {"per_prompt": per_prompt, "left_out": problems}
            result = _write(output, rows, settings, listed, run)
        return here.gather(result)[0]


def check(
    folder: str | Path, output: str | Path, *,
    prompts: str | Path | None = None, per_prompt: int = 4, leave_out: bool = False,
) -> None:  # fmt: skip
    """Raises what `evaluate` would for the names in a folder, before any network is loaded."""
    listed = _listed(prompts)
    found = folders.find(Path(folder), listed, whole("per_prompt", per_prompt, 1), Path(output))
    if not leave_out:
        judging.refuse(Path(folder), found.problems, _wanted(per_prompt))


def table(result: Mapping[str, Any]) -> str:
    """The accuracies as a Markdown table, in per cent, and what is missing."""
    metrics, counts = result["metrics"], result["counts"]
    tasks = result["breakdown"]["accuracy"]
    rows = [(tag, _per_cent(value)) for tag, value in tasks.items()]
    rows += [
        ("overall, mean of the tags", _per_cent(metrics["overall"])),
        ("correct pictures", _per_cent(metrics["correct_pictures"])),
        ("prompts with a correct picture", _per_cent(metrics["correct_prompts"])),
    ]
    lines = [report.table(("GenEval", "%"), rows)]
    settings = result["settings"]
    note = f": {settings['detector_note']}" if "detector_note" in settings else ""
    lines.append(f"\ndetector {settings['detector']}{note}")
    lines.append(f"{counts['pictures']} of {counts['asked']} pictures judged")
    if missing := settings["tags_missing"]:
        lines.append(f"the mean is without {', '.join(missing)}: not GenEval's score")
    return "\n".join(lines)


def _listed(path: str | Path | None) -> list[Prompt]:
    """The prompts, each with rules that can be judged."""
    listed = read_prompts(path)
    for prompt in listed:
        try:
            rules.check(prompt.metadata)
        except (KeyError, TypeError, ValueError) as error:
            reason = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"prompt {prompt.name}, {prompt.text!r}: {reason}") from error
    return listed


def _wanted(per_prompt: int) -> str:
    return f"{per_prompt} pictures of each prompt"


def _per_cent(value: float) -> str:
    return f"{100 * value:.2f}"


def _row(path: Path, prompt: Prompt, judged: Mapping[str, Any]) -> Row:
    """A line as published: metadata and details are JSON within JSON."""
    return {
        "filename": str(path), "tag": prompt.metadata["tag"], "prompt": prompt.text,
        "correct": judged["correct"], "reason": judged["reason"],
        "metadata": json.dumps(prompt.metadata), "details": json.dumps(judged["details"]),
    }  # fmt: skip


def _write(
    output: Path, rows: list[Row], settings: dict[str, Any], prompts: Sequence[Prompt],
    run: dict[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    of_all = summary(rows)
    with replacing(output / "results.jsonl") as new:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        new.write_text("".join(lines), encoding="utf-8")
    tasks = of_all["tasks"]
    tags = dict.fromkeys(prompt.metadata["tag"] for prompt in prompts)
    settings["tags_missing"] = [tag for tag in tags if tag not in tasks]
    chosen = {
        "grid": _shown(rows),
        "worst": _shown([row for row in rows if not row["correct"]]),
        "best": _shown([row for row in rows if row["correct"]]),
    }
    report.sheets(output, chosen, lambda names: [*map(picture, names)])
    return report.write(
        output / "result.json", "geneval",
        {
            "overall": of_all["overall"], "correct_pictures": of_all["correct_images"],
            "correct_prompts": of_all["correct_prompts"],
        },
        settings=settings,
        counts={
            "pictures": of_all["images"], "asked": settings["per_prompt"] * len(prompts),
            "prompts": of_all["prompts"], "prompts_asked": len(prompts),
            "left_out": len(settings["left_out"]), "tags_missing": len(settings["tags_missing"]),
        },
        breakdown={
            "accuracy": {tag: task["score"] for tag, task in tasks.items()},
            "correct": {tag: task["correct"] for tag, task in tasks.items()},
            "pictures": {tag: task["images"] for tag, task in tasks.items()},
        },
        run=run,
    )  # fmt: skip


def _shown(rows: Sequence[Row]) -> dict[str, str]:
    """The first few of each tag, with what is wrong."""
    shown, of_tag = {}, dict[str, int]()
    for row in rows:
        of_tag[row["tag"]] = of_tag.get(row["tag"], 0) + 1
        if of_tag[row["tag"]] <= _SHOWN:
            text = row["prompt"].removeprefix("a photo of ")
            shown[row["filename"]] = text + ": " * bool(row["reason"]) + row["reason"]
    return shown
