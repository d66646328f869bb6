"""The networks that judge: tiny random ones of the real kinds, through transformers."""

import json
import logging

import drawn_objects
import numpy as np
import pytest
import small_judges
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from tim.app.cli import app
from tim.evaluation import weights
from tim.evaluation.clip import Clip, features_of
from tim.evaluation.dpg.vqa import BlipVQA, QwenVQA, load_vqa
from tim.evaluation.geneval import colours
from tim.evaluation.geneval.colours import ClipColours
from tim.evaluation.geneval.detector import Mask2Former
from tim.evaluation.geneval.objects import CLASSES, COLOURS, Detection


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("judges")
    for kind in ("mask2former", "clip", "blip", "qwen"):
        getattr(small_judges, f"save_{kind}")(folder / kind)
    return folder


def noise(width, height, seed=0):
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(levels)


def tim(*arguments):
    return CliRunner().invoke(app, [str(each) for each in ("evaluate", *arguments)])


def test_detections_fit_the_picture(saved):
    detect = Mask2Former.load(saved / "mask2former")
    found = detect(noise(80, 37))
    assert len(found) == 100
    assert all(each.name in CLASSES and each.mask.shape == (37, 80) for each in found)
    scores = [each.score for each in found]
    assert scores == sorted(scores, reverse=True) and 0 < scores[0] < 1
    for each in found:
        rows, columns = np.nonzero(each.mask)
        ends = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else 0
        assert np.array_equal(each.box, np.broadcast_to(ends, 4))
    assert detect.settings["detector"] == str(saved / "mask2former")
    assert len(detect.settings["detector_weights"]) == 8


def test_another_number_of_classes_is_refused(tmp_path):
    folder = small_judges.save_mask2former(tmp_path, num_labels=7)
    with pytest.raises(ValueError, match="must have COCO's 80 classes, got 7"):
        Mask2Former.load(folder)


def test_missing_weights_are_refused(tmp_path):
    """Not filled with random ones: everything would then score 0."""
    folder = small_judges.save_mask2former(tmp_path)
    state = load_file(folder / "model.safetensors")
    name = "class_predictor.weight"
    save_file({k: v for k, v in state.items() if k != name}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=f"1 weights are missing, such as {name}"):
        Mask2Former.load(folder)
    save_file(state | {name: torch.zeros(7, 32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="cannot be loaded as Mask2Former"):
        Mask2Former.load(folder)


def test_colours_are_clips(saved):
    """Of texts and crops one by one, by the model itself."""
    classify = ClipColours.load(saved / "clip")
    picture = noise(40, 30)
    found = [Detection("object", (2, 3, 30, 20), 0.9), Detection("object", (0, 0, 9, 30), 0.8)]
    model, words = classify.model, small_judges.tokenizer()
    expected = []
    for each in found:
        pixels = colours.pixels(picture.crop(each.box), 16)[None]
        similarity = []
        for colour in COLOURS:
            texts = [
                f"a photo of a {colour} object", f"a photo of a {colour}-colored object",
                f"a photo of a {colour} object",
            ]  # fmt: skip
            units = 0
            for text in texts:
                tokens = words(text, return_tensors="pt")
                output = model(tokens.input_ids, pixels, tokens.attention_mask)
                units = units + output.text_embeds
            unit = units / units.norm()
            similarity.append(float((unit * output.image_embeds).sum().detach()))
        expected.append(COLOURS[int(np.argmax(similarity))])
    assert classify(picture, found, "object") == expected


def test_pixels_are_those_of_clips_own_processor():
    own = small_judges.transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=16)
    for size in ((40, 30), (30, 72), (16, 16), (9, 12)):
        picture = noise(*size)
        expected = torch.as_tensor(np.array(own(picture).pixel_values[0]))
        assert torch.allclose(colours.pixels(picture, 16), expected, atol=1e-5), size


@pytest.mark.parametrize("kind", ["blip", "qwen"])
def test_an_answer_of_nan_is_none(saved, kind):
    """The first word of the vocabulary would be taken for it."""
    ask = load_vqa(saved / kind)
    next(p for name, p in ask.model.named_parameters() if "embed" in name).data.fill_(np.nan)
    with pytest.raises(FloatingPointError, match="logits of the answer are not finite"):
        ask(noise(40, 24), "is there a red object ?")


def test_a_colour_of_nan_is_none(saved):
    classify = ClipColours.load(saved / "clip")
    classify.model.visual_projection.weight.data.fill_(np.nan)
    with pytest.raises(FloatingPointError, match="features of colours are not finite"):
        classify(noise(40, 30), [Detection("object", (2, 3, 30, 20), 0.9)], "object")


def test_a_folder_goes_before_a_short_name(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(saved)
    assert load_vqa("blip").settings["vqa"] == "blip"


def test_features_of_transformers_4_and_5():
    features = torch.ones(2, 3)
    output = small_judges.transformers.modeling_outputs.BaseModelOutputWithPooling(
        pooler_output=features
    )
    assert features_of(features) is features and features_of(output) is features


def test_blip_answers(saved):
    ask = load_vqa(saved / "blip")
    assert isinstance(ask, BlipVQA) and ask.settings["vqa"] == str(saved / "blip")
    answers = {ask(noise(20, 24, seed), "is there a red object ?") for seed in range(6)}
    assert len(answers) > 1 and all(isinstance(answer, str) for answer in answers)
    assert answers == {ask(noise(20, 24, seed), "is there a red object ?") for seed in range(6)}


def test_qwen_answers(saved):
    """With the positions of the picture's tokens in rows and columns."""
    ask = load_vqa(saved / "qwen")
    assert isinstance(ask, QwenVQA) and ask.settings["vqa_ask"] == ask.ask
    answers = {ask(noise(40, 24, seed), "is there a red object ?") for seed in range(6)}
    assert len(answers) > 1 and not any("<" in answer for answer in answers)
    side = 2 * 4  # px of a token
    tokens = 40 // side * (24 // side)
    assert int(ask.model.model.rope_deltas.item()) == max(40, 24) // side - tokens
    other = QwenVQA(ask.model, ask.tokenizer, ask.images, "tiny", ask="a {} ?")
    assert other.settings["vqa_ask"] == "a {} ?"
    asked = []
    other.tokenizer = lambda text, **options: asked.append(text) or ask.tokenizer(text, **options)
    other.tokenizer.apply_chat_template = ask.tokenizer.apply_chat_template
    other.tokenizer.decode = ask.tokenizer.decode
    other(noise(40, 24), "red")
    assert asked[0].count("<|image_pad|>") == tokens and "a red ?" in asked[0]


def test_another_kind_is_refused(saved):
    with pytest.raises(ValueError, match="must be one of blip, qwen2_5_vl, its config says clip"):
        load_vqa(saved / "clip")


def test_the_licence_is_said_once(saved, caplog, monkeypatch):
    name = "facebook/mask2former-swin-small-coco-instance"

    class OfTheHub:
        @staticmethod
        def from_pretrained(given, **options):
            assert given == name
            kind = small_judges.transformers.Mask2FormerForUniversalSegmentation
            return kind.from_pretrained(saved / "mask2former", **options)

    monkeypatch.setattr(weights, "_said", set())
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            weights.load(OfTheHub, name)
        Clip(saved / "clip")
    assert any("clip: weights under a licence of their own" in line for line in caplog.messages)
    said = [line for line in caplog.messages if name in line]
    assert said == [f"{name}: weights under CC BY-NC 4.0, for non-commercial use"]


def few(tmp_path):
    lines = ['{"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], '
             '"prompt": "a photo of a red dog"}']  # fmt: skip
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    drawn_objects.save(tmp_path / "pictures", tmp_path / "prompts.jsonl", per_prompt=2)
    return ["geneval", tmp_path / "pictures", "--prompts", tmp_path / "prompts.jsonl",
            "--per-prompt", 2, "--output", tmp_path / "out"]  # fmt: skip


def test_tim_evaluate_geneval(saved, tmp_path):
    networks = ["--detector", saved / "mask2former", "--clip", saved / "clip", "--device", "cpu"]
    command = [*few(tmp_path), *networks]
    result = tim(*command)
    assert result.exit_code == 0, result.output
    assert "mask2former: not mmdetection's weights: scores are near" in result.stdout
    assert "| colors | 0.00 |" in result.stdout and "2 of 2 pictures judged" in result.stdout
    assert result.stdout.strip().endswith(str(tmp_path / "out/result.json"))
    written = json.loads((tmp_path / "out/result.json").read_text())
    assert written["settings"]["detector"] == str(saved / "mask2former")
    assert written["settings"]["colours"] == str(saved / "clip")
    assert tim(*command).stdout == result.stdout
    assert len((tmp_path / "out/judged/process-0.jsonl").read_text().splitlines()) == 2
    (tmp_path / "pictures/00000/samples/00001.png").unlink()
    result = tim(*command)
    assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert "00000 has 1 of 2 pictures (1 in all); --leave-out" in result.stderr
    assert "1 of 2 pictures judged" in tim(*command, "--leave-out").stdout


@pytest.mark.parametrize("missing", ["--detector", "--clip"])
def test_missing_networks_in_one_line(saved, tmp_path, missing):
    networks = {"--detector": saved / "mask2former", "--clip": saved / "clip"}
    networks[missing] = tmp_path / "nowhere"
    result = tim(*few(tmp_path), *(part for pair in networks.items() for part in pair))
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and last.endswith("see docs/evaluation.md")
    assert "nowhere is neither a folder of a network" in last and "Traceback" not in result.output
