"""Rectangles on grey whose class is their size, and a detector and colours that see just that.

`python drawn_objects.py FOLDER PROMPTS OUTPUT [N]` judges a folder; the second process of two is
killed at its picture N.
"""

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from tim.data.prompts import geneval
from tim.evaluation.geneval import evaluate
from tim.evaluation.geneval.objects import CLASSES, COLOURS, Detection
from tim.processes import Processes, launched_group

GREY = (153, 153, 153)
LEVELS = dict(
    zip(
        COLOURS,
        [
            (230, 20, 20), (250, 140, 0), (250, 240, 30), (20, 160, 40), (30, 60, 230),
            (120, 20, 150), (250, 160, 200), (110, 60, 20), (0, 0, 0), (255, 255, 255),
        ],
        strict=True,
    )
)  # fmt: skip
PLACES = {"left of": (0, 1), "right of": (2, 1), "above": (1, 0), "below": (1, 2)}
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
RIGHT = {  # of four pictures
    "single_object": 4, "two_object": 3, "counting": 2, "colors": 1, "position": 2, "color_attr": 0
}  # fmt: skip
NAMES = dict(detector_name="rectangles", colours_name="mean")


def draw(metadata: dict, is_right: bool) -> Image.Image:
    """What the prompt asks for, or not quite."""
    canvas = Image.new("RGB", (64, 64), GREY)
    tag, wanted = metadata["tag"], [dict(each) for each in metadata["include"]]
    if not is_right:
        if tag in ("single_object", "two_object"):
            wanted.pop()
        elif tag == "counting":
            wanted[0]["count"] += 1
        elif tag == "colors":
            wanted[0]["color"] = COLOURS[COLOURS.index(wanted[0]["color"]) - 1]
        elif tag == "position":
            wanted[1]["position"] = (OPPOSITE[wanted[1]["position"][0]], 0)
        else:
            wanted[0]["color"], wanted[1]["color"] = (each["color"] for each in wanted[::-1])
    free = [(x, y) for x, y in np.ndindex(3, 3) if tag != "position"]
    for each in wanted:
        width, height = (6 + part for part in divmod(CLASSES.index(each["class"]), 10))
        for _ in range(each["count"]):
            x, y = free.pop(0) if free else PLACES.get(each.get("position", [""])[0], (1, 1))
            x, y = 2 + 20 * x, 2 + 20 * y
            canvas.paste(LEVELS[each.get("color", "red")], (x, y, x + width, y + height))
    return canvas


def detect(picture: Image.Image) -> list[Detection]:
    """Every rectangle, wherever it is."""
    left = (np.array(picture) != GREY).any(-1)
    found = []
    while left.any():
        y, x = np.argwhere(left)[0]
        width = np.argmin(np.append(left[y, x:], False))
        height = np.argmin(np.append(left[y:, x], False))
        mask = np.zeros_like(left)
        mask[y : y + height, x : x + width] = True
        left &= ~mask
        name = CLASSES[(width - 6) * 10 + height - 6]
        found.append(Detection(name, (x, y, x + width, y + height), 0.95, mask))
    return found


def mean_colours(picture: Image.Image, objects, name: str) -> list[str]:
    pixels = np.array(picture).astype(float)
    means = [pixels[each.mask].mean(0) for each in objects]
    return [min(LEVELS, key=lambda c: np.abs(mean - LEVELS[c]).sum()) for mean in means]


def save(folder: Path, prompts: Path | None, per_prompt: int = 4) -> dict[str, bool]:
    """The pictures of every prompt as GenEval wants them, and which are right."""
    truth = {}
    for prompt in geneval(prompts):
        samples = folder / prompt.name / "samples"
        samples.mkdir(parents=True)
        (folder / prompt.name / "metadata.jsonl").write_text(json.dumps(prompt.metadata))
        for i in range(per_prompt):
            path = samples / f"{i:05d}.png"
            truth[str(path)] = i < RIGHT[prompt.metadata["tag"]]
            draw(prompt.metadata, truth[str(path)]).save(path)
    return truth


def main(folder: str, prompts: str, output: str, kill_at: str = "0") -> None:
    seen = 0

    def detector(picture):
        nonlocal seen
        seen += 1
        if seen == int(kill_at) and Processes.here().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return detect(picture)

    with launched_group():
        evaluate(folder, output, detector, mean_colours, prompts=prompts, **NAMES)
        done = Processes.here().gather(seen)
        if Processes.here().is_first:
            Path(output, "seen.json").write_text(json.dumps(done))


if __name__ == "__main__":
    main(*sys.argv[1:])
