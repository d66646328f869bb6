"""GenEval's parts against the golden values of the published code."""

import json

import numpy as np
import pytest
import torch
from golden_files import GOLDEN
from PIL import Image
from safetensors.torch import load_file

from tim.data.prompts import GENEVAL_TAGS, geneval
from tim.evaluation.geneval import detector
from tim.evaluation.geneval.colours import colour_logits, crop, pixels
from tim.evaluation.geneval.judge import check, judge
from tim.evaluation.geneval.objects import CLASSES, COLOURS, Detection
from tim.evaluation.geneval.summary import summary

FOLDER = GOLDEN / "evaluation"
JUDGED = json.loads((FOLDER / "geneval_detections.json").read_text())


@pytest.fixture(scope="module")
def arrays():
    return load_file(FOLDER / "arrays.safetensors")


@pytest.mark.parametrize("case", JUDGED, ids=[case["name"] for case in JUDGED])
def test_judgement(case):
    found = [Detection(each["class"], each["box"], each["score"]) for each in case["detections"]]
    colour_of = {tuple(each["box"]): each.get("color") for each in case["detections"]}

    def colours(objects, name):
        assert {each.name for each in objects} == {name}
        return [colour_of[tuple(each.box)] for each in objects]

    expected = case["expected"]
    correct, reason, details = judge(case["metadata"], found, colours)
    assert correct is expected["correct"] and details == expected["details"]
    assert reason.splitlines() == expected["reason"].splitlines()


def test_summary():
    rows = [json.loads(line) for line in (FOLDER / "geneval_results.jsonl").open()]
    expected = json.loads((FOLDER / "geneval_summary.json").read_text())
    found = summary(rows)
    assert list(found["tasks"]) == list(GENEVAL_TAGS)
    for name in ("images", "prompts"):
        assert found[name] == expected[name]
    for name in ("overall", "correct_images", "correct_prompts"):
        assert found[name] == pytest.approx(expected[name], rel=1e-12)
    assert found["tasks"] == {
        tag: pytest.approx(of, rel=1e-12) for tag, of in expected["tasks"].items()
    }
    without = summary(row for row in rows if row["tag"] != "counting")
    assert f"{without['overall']:.5f}" in expected["printed_without_counting"]
    with pytest.raises(ValueError, match="no picture was judged"):
        summary([])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"count": 0}, "the count of dog must be at least 1, got 0"),
        ({"count": "two"}, "the count of dog must be a whole number"),
        ({"color": "blu"}, "color must be of red, .* got 'blu'"),
        ({"position": ["beside", 0]}, "position must be one of left of, .* got .'beside', 0."),
        ({"position": ["above", 1]}, "the number of an earlier include, got .'above', 1."),
        ({"position": ["above", -1]}, "the number of an earlier include, got .'above', -1."),
        ({"position": "above"}, "too many values"),
    ],
)
def test_rules_that_cannot_be_judged_are_refused(change, message):
    prompt = geneval()[0].metadata | {
        "include": [{"class": "cat", "count": 1}, {"class": "dog", "count": 1} | change]
    }
    with pytest.raises(ValueError, match=message):
        check(prompt)


def test_every_class_and_colour_of_the_prompts_is_known():
    wanted = [
        each
        for prompt in geneval()
        for each in prompt.metadata["include"] + prompt.metadata.get("exclude", [])
    ]
    assert {each["class"] for each in wanted} <= {*CLASSES}
    assert {each["color"] for each in wanted if "color" in each} <= {*COLOURS}
    assert len(CLASSES) == len({*CLASSES}) == 80


def test_colours(arrays):
    logits = colour_logits(arrays["color_text"], arrays["color_image"])
    assert torch.allclose(logits, arrays["color_logits"], rtol=0, atol=1e-4)
    assert torch.equal(logits.argmax(1), arrays["color_logits"].argmax(1))


def test_crops(arrays):
    picture = Image.fromarray(arrays["crop_image"].numpy())
    mask = arrays["crop_mask"].numpy().astype(bool)
    boxes = arrays["crop_boxes"].numpy()
    for i, (box, each) in enumerate([*((box, mask) for box in boxes), (boxes[0], None)]):
        cropped = np.array(crop(picture, Detection("dog", box[:4], box[4], each)))
        assert np.array_equal(cropped, arrays[f"crop_{i}"].numpy()), i


def test_a_crop_is_refused_where_there_is_none():
    picture = Image.new("RGB", (8, 6))
    with pytest.raises(ValueError, match="a box must have an inside, got dog"):
        crop(picture, Detection("dog", (2.2, 1, 2.4, 5), 1.0))
    with pytest.raises(ValueError, match=r"masks must be .* \(6, 8\), got \(8, 6\)"):
        crop(picture, Detection("dog", (0, 0, 4, 4), 1.0, np.ones((8, 6), dtype=bool)))


def test_pixels_are_of_the_middle():
    columns = np.arange(40, dtype=np.uint8)
    wide = Image.fromarray(np.broadcast_to(columns[None, :, None], (10, 40, 3)).copy())
    assert pixels(wide, 10).shape == (3, 10, 10)
    levels = pixels(wide, 10)[0] * 0.26862954 + 0.48145466
    assert torch.allclose(levels * 255, torch.arange(15.0, 25.0).expand(10, 10), atol=1e-4)
    assert pixels(wide.rotate(90, expand=True), 10).shape == (3, 10, 10)


def test_detector_post_processing(arrays):
    padded, resized, original = arrays["detector_sizes"].tolist()
    labels, boxes, masks = detector.objects(
        arrays["detector_class_logits"], arrays["detector_mask_logits"],
        padded, resized, original, most=12,
    )  # fmt: skip
    expected = arrays["detector_boxes"]
    assert torch.allclose(boxes[:, 4], expected[:, 4], rtol=0, atol=1e-5)
    real = expected[:, 4] > 0  # the others' order is chance
    assert 0 < real.sum() < 12
    assert torch.equal(labels[real], arrays["detector_labels"][real])
    assert torch.equal(boxes[real, :4], expected[real, :4])
    assert torch.equal(masks[real], arrays["detector_masks"][real].bool())
    assert not boxes[~real].any() and not masks[~real].any()


@pytest.mark.parametrize(
    "size, resized, padded",
    [
        ((1024, 1024), (800, 800), (800, 800)),
        ((640, 427), (800, 1199), (800, 1216)),  # (width, height) → (height, width)
        ((3000, 500), (222, 1333), (224, 1344)),
    ],
)
def test_detector_inputs(size, resized, padded):
    pixels, before = detector.inputs(Image.new("RGB", size, (124, 116, 104)))
    assert before == resized and pixels.shape == (3, *padded)
    inside = pixels[:, : resized[0], : resized[1]]
    expected = (torch.tensor([124, 116, 104]) - torch.tensor([123.675, 116.28, 103.53])) / (
        torch.tensor([58.395, 57.12, 57.375])
    )
    assert torch.allclose(inside, expected.view(3, 1, 1).expand_as(inside), atol=1e-6)
    assert not pixels[:, resized[0] :].any() and not pixels[:, :, resized[1] :].any()
