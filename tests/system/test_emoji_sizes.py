"""Emoji cut to what is drawn: sizes of several aspect ratios, batches of each, training on them."""

import json
import math
from collections import Counter

import pytest
import torch
from golden_files import GOLDEN
from omegaconf import OmegaConf
from PIL import Image, ImageChops
from small_emoji import TEXT, small

from tim import data
from tim.data import buckets, emoji
from tim.evaluation import emoji as evaluation
from tim.opening import open_pipeline
from tim.training import loop

WIDE = GOLDEN / "emoji" / "wide.ttf"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    emoji.prepare(folder, WIDE, batch_size=2, trim=True)
    return folder


def sizes(folder):
    """The bucket of each line that trains."""
    return [
        tuple(map(int, line["bucket"][6:].split("x")))
        for line in emoji.read(folder / "captions.jsonl")
    ]


def test_sizes_of_an_area():
    assert buckets.of_area(32, 16) == [(16, 64), (32, 32), (64, 16)]
    for height, width in (found := buckets.of_area(32, 4)):
        assert height % 4 == width % 4 == 0 and (width, height) in found
        assert height * width == pytest.approx(32**2, rel=0.07)


def test_the_rarest_size_gives_way():
    known = [(16, 64), (32, 32), (64, 16)]
    assert buckets.nearest((10, 30), known) == (16, 64)
    assert buckets.nearest((30, 25), known) == (32, 32)
    pictures = [(10, 40)] * 1 + [(40, 40)] * 3 + [(80, 20)] * 2
    assert buckets.filled(pictures, known, 1) == known
    assert buckets.filled(pictures, known, 2) == [(32, 32), (64, 16)]
    assert buckets.filled(pictures, known, 5) == [(32, 32)]
    assert buckets.filled(pictures, known, 9) == [(32, 32)]  # of which none is left out


def test_pictures_are_whole_and_of_their_shape(folder):
    source = emoji.Font(WIDE)
    for each in emoji.known():
        if (drawn := source.drawn(each.sequence)) is None:
            continue
        own = emoji.trimmed(drawn)
        with Image.open(folder / each.file) as picture:
            white = Image.new("RGB", picture.size, "white")
            box = ImageChops.difference(picture, white).point(lambda d: 255 * (d > 12)).getbbox()
            width, height = box[2] - box[0], box[3] - box[1]
            fills = width / picture.width, height / picture.height
            assert max(fills) > 0.9  # nothing but what is drawn
            assert math.log(width / height) == pytest.approx(
                math.log(own.width / own.height), abs=0.2
            )


def test_batches_are_of_one_size_each(folder):
    of_line = sizes(folder)
    assert len({*of_line}) >= 3 and min(Counter(of_line).values()) >= 2
    for number, line in enumerate(emoji.read(folder / "captions.jsonl")):
        with Image.open(folder / line["image_file"]) as picture:
            assert (picture.height, picture.width) == of_line[number]
    packs = json.loads((folder / "batches.json").read_text())
    assert all(len({of_line[number] for number in pack}) == 1 for pack in packs)
    assert {number for pack in packs for number in pack} == {*range(len(of_line))}


def cfg(folder, **changes):
    """A network of patches of 4 px."""
    params = {"patch_size": 4, "hidden_size": 16, "num_heads": 1, "lora_hidden_size": 4}
    network = {"model": {"network": {"params": params | changes}}}
    return OmegaConf.merge(small(folder, max_train_steps=8), network)


def test_training_and_sampling_at_several_sizes(folder, tmp_path, monkeypatch):
    seen, collate = set(), data.CaptionedImages.collate

    def watched(self, items):
        seen.add(tuple(items[0]["image"].shape[1:]))
        return collate(self, items)

    monkeypatch.setattr(data.CaptionedImages, "collate", watched)
    loop.train(cfg(folder), tmp_path)
    assert len(seen & {*sizes(folder)}) >= 3
    pipeline = open_pipeline(tmp_path, text_encoder=TEXT)
    for height, width in ((64, 16), (28, 36)):
        pictures = pipeline("minus", height, width, num_inference_steps=1, output_type="pt").images
        assert pictures.shape == (1, 3, height, width) and torch.isfinite(pictures).all()


def test_sizes_that_are_no_whole_patches(folder, tmp_path):
    with pytest.raises(ValueError, match="sides must be multiples of 16, a token's"):
        loop.train(cfg(folder, patch_size=16), tmp_path)


def test_units_of_buckets(folder):
    files = {"packed_json": folder / "batches.json", "jsonl_dir": folder / "captions.jsonl"}
    with pytest.raises(ValueError, match="at least 32 px, got 'emoji-"):
        data.make("image_ms", {"root_dir": folder} | files)
    with pytest.raises(ValueError, match="unit must be at least 1, got 0"):
        data.make("image_ms", {"root_dir": folder, "unit": 0} | files)


def test_the_evaluation_needs_one_size(folder):
    with pytest.raises(ValueError, match="pictures of one size are needed, got"):
        evaluation.Real(folder)
