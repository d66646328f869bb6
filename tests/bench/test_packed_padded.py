"""What `python -m benchmarks packed` compares computes the same, and the committed file's numbers
are those of docs/packed.md."""

import json
import re
from pathlib import Path

import pytest
import torch
from eager import randomise
from golden_files import relative_error

from benchmarks.cases.ragged import Boxes, imagenet_sizes
from benchmarks.compare import packed
from tim.models import TiMTransformer2DModel, pack

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/packed.md").read_text()
RESULTS = json.loads((ROOT / "docs/packed/results.json").read_text())
OTHERS = packed.PADDED, packed.ONE_BY_ONE


@pytest.fixture(scope="module")
def boxes():
    return Boxes(2)


def test_digits_have_their_own_sizes(boxes):
    assert len(boxes) == 4000 and (boxes.sizes % 2 == 0).all() and boxes.sizes.max() == 20
    assert len({*map(tuple, boxes.sizes.tolist())}) > 10
    image = boxes[7]["image"]
    assert image.shape[1:] == tuple(boxes.sizes[7]) and image.max() > 0.5 > -1 == image.min()


def test_all_ways_compute_the_same(boxes):
    network = TiMTransformer2DModel(
        input_size=20, patch_size=2, in_channels=1, hidden_size=32, depth=2, encoder_depth=1,
        num_heads=2, num_classes=10, z_dim=None,
    )  # fmt: skip
    randomise(network)
    tokens, packing = pack([boxes[i]["image"] for i in range(0, 4000, 700)], 2)
    t = torch.linspace(0.4, 0.9, len(packing))
    outs, gradients = [], []
    for model in packed.ways(network).values():
        network.zero_grad()
        out = model(tokens, t, t / 2, torch.arange(len(packing)), packing=packing)
        out.square().sum().backward()
        outs.append(out)
        gradients.append(torch.cat([p.grad.flatten() for p in network.parameters()]))
    for out, gradient in zip(outs[1:], gradients[1:], strict=True):
        assert relative_error(out, outs[0]) < 1e-6
        assert relative_error(gradient, gradients[0]) < 2e-6


def test_counted_on_meta_tensors(monkeypatch):
    """A pack costs as many launches as one picture and the FLOPs of each alone."""
    monkeypatch.setattr(packed, "TOKENS", 2048)
    found = packed.counted()
    shape, of_packed = found["pack"], found[packed.PACKED]
    padded, one_by_one = (found[name] for name in OTHERS)
    assert shape["tokens"] <= 2048 < shape["padded"]
    assert of_packed["launches"] == padded["launches"]
    assert one_by_one["launches"] == shape["pictures"] * of_packed["launches"]
    assert of_packed["flops"] == one_by_one["flops"] < padded["flops"]
    assert of_packed["bytes"] < min(padded["bytes"], one_by_one["bytes"])


def test_sizes_are_like_imagenet_s():
    height, width = imagenet_sizes(5000).mean(0)
    assert 440 < width < 490 and 350 < height < 400


def test_the_page_says_what_the_file_says():
    numbers = {float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*\.?\d*", PAGE)}
    counted, clocked, digits = (RESULTS[name] for name in ("counted", "clocked", "digits"))
    for name in (packed.PACKED, *OTHERS):
        row = counted[name]
        needed = row["launches"], round(row["bytes"] / 1e9, 2), round(row["flops"] / 1e12, 2)
        assert {*needed, round(1e3 * row["seconds"], 2)} <= numbers, name
    for task in ("forward", "training step"):
        assert {round(clocked[task][name]["to_packed"], 2) for name in OTHERS} <= numbers
    for pack_of in (counted["pack"], clocked["pack"]):
        assert {*pack_of.values()} <= numbers
    for of in digits.values():
        assert {round(of["time_of_padded"], 2), of[packed.PACKED]["pictures"]} <= numbers
        assert round(100 * of["difference_of_mean_losses"], 1) in numbers
        for name in (packed.PACKED, packed.PADDED):
            own = of[name]["cpu_seconds"], of[name]["denoising"][-1]
            assert {round(own[0]), round(own[1], 3)} <= numbers, name


def test_digits_were_trained_to_the_same_loss_in_less_time():
    """With transitions a network's own derivative is in the loss, which no two runs share for long
    that round otherwise; its course is the same on average."""
    for objective, digits in RESULTS["digits"].items():
        one, other = (digits[name] for name in (packed.PACKED, packed.PADDED))
        assert one["pictures"] == other["pictures"] > 5000 and one["steps"] == other["steps"]
        assert digits["difference_of_mean_losses"] < 0.02
        assert one["cpu_seconds"] < other["cpu_seconds"]
        if objective == "flow matching":
            assert one["denoising"][-1] < 0.7 * one["denoising"][0]
            assert digits["largest_difference_of_losses"] < 0.02
