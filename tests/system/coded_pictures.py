"""Grids whose quarters are colours that say which item and picture they are, and who reads them.

`python coded_pictures.py FOLDER OUTPUT` answers as the golden answers do.
"""

import json
import sys
from pathlib import Path

from golden_files import GOLDEN
from PIL import Image

from tim.evaluation.dpg import evaluate
from tim.evaluation.dpg.questions import read
from tim.processes import launched_group

QUESTIONS = GOLDEN / "evaluation/dpg.csv"
ANSWERS = json.loads((GOLDEN / "evaluation/dpg_answers.json").read_text())
ITEMS = list(ANSWERS)
NUMBERS = {
    (item, question.text): str(question.number)
    for item, questions in read(QUESTIONS).items()
    for question in questions
}


def answer(picture: Image.Image, question: str) -> str:
    """The golden answer of the one picture that is seen, and only of a whole one."""
    colours = picture.getcolors()
    assert picture.size == (8, 6) and len(colours) == 1
    item, quarter, _ = colours[0][1]
    return ANSWERS[ITEMS[item]][str(quarter)][NUMBERS[ITEMS[item], question]]


def save(folder: Path, pictures: int = 4) -> None:
    folder.mkdir()
    for i, item in enumerate(ITEMS):
        tiles = [Image.new("RGB", (8, 6), (i, quarter, 77)) for quarter in range(pictures)]
        canvas = Image.new("RGB", (16, 12) if pictures == 4 else (8, 6))
        for quarter, tile in enumerate(tiles):
            canvas.paste(tile, (quarter % 2 * 8, quarter // 2 * 6))
        canvas.save(folder / f"{item}.png")


def main(folder: str, output: str) -> None:
    with launched_group():
        evaluate(folder, QUESTIONS, output, answer, vqa_name="reader")


if __name__ == "__main__":
    main(*sys.argv[1:])
