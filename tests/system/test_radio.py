"""The vision encoder under the published names, held against the published code's features."""

import argparse
import logging
import re

import pytest
import torch
from golden_files import GOLDEN, relative_error
from safetensors.torch import load_file

from tim.encoders import repa_targets
from tim.models import radio

FILE = GOLDEN / "training/radio_tiny.pth.tar"


@pytest.fixture(scope="module")
def golden():
    return load_file(GOLDEN / "training/radio.safetensors")


@pytest.fixture(scope="module")
def encoder():
    return radio.load(FILE)


@pytest.fixture
def file():
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(FILE, weights_only=True)


@pytest.mark.parametrize("i", range(4))
def test_features(golden, encoder, i):
    """Square, tall and wide, and as large as the table of positions."""
    if i == 3:
        pictures = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(101))
    else:
        pictures = golden[f"input.{i}"]
    features = encoder(pictures)
    assert relative_error(features, golden[f"features.{i}"]) < 1e-5
    assert not features.requires_grad and not encoder.training


@pytest.mark.parametrize("target, tokens", [("same", (4, 6)), ("grown", (6, 9)), ("half", (2, 3))])
def test_targets(golden, encoder, target, tokens):
    features = repa_targets(encoder, golden["target.batch"], tokens)
    assert relative_error(features, golden[f"target.{target}"]) < 1e-5


def test_targets_are_resized_without_clamping(golden, encoder):
    """What the encoder sees overshoots [0, 1], as it did in training."""
    seen = []
    handle = encoder.register_forward_pre_hook(lambda _, args: seen.extend(args))
    repa_targets(encoder, golden["target.batch"], (2, 3))
    handle.remove()
    torch.testing.assert_close(seen[0], golden["target.half.input"])
    assert seen[0].min() < -0.1 and seen[0].max() > 1.1


def test_features_stay_float32_under_autocast(golden, encoder):
    with torch.autocast("cpu", torch.bfloat16):
        features = encoder(golden["input.1"])
    assert features.dtype == torch.float32
    assert 0 < relative_error(features, golden["features.1"]) < 1e-2


def test_the_published_file_s_layout(tmp_path, caplog):
    """Names and shapes of radio-v2.5-b_half.pth.tar, in half precision, with heads and adaptors
    that are not read."""
    with torch.device("meta"):
        names = {name: value.shape for name, value in radio.Radio().state_dict().items()}
    generator, block = "base_model.patch_generator", "base_model.blocks.11"
    assert names[f"{generator}.embedder.weight"] == (768, 768)
    assert names[f"{generator}.pos_embed"] == (1, 16384, 768)
    assert names[f"{generator}.cls_token.token"] == (8, 768)
    assert names[f"{block}.attn.qkv.weight"] == (2304, 768) and len(names) == 3 + 12 * 12 + 2
    assert names[f"{block}.mlp.fc2.bias"] == names[f"{block}.norm1.weight"] == (768,)
    state = {name: torch.zeros(shape, dtype=torch.half) for name, shape in names.items()}
    state["input_conditioner.norm_std"] += 1
    state |= {"_heads.clip.weight": torch.ones(2), "_feature_projections.sam": torch.ones(2)}
    args = argparse.Namespace(
        model="vit_base_patch16_224", model_kwargs={}, cpe_max_size=2048, register_multiple=8,
        cls_token_per_teacher=True, model_norm=False, spectral_reparam=False, dtype="float32",
    )  # fmt: skip
    torch.save({"state_dict": state, "args": args, "epoch": 3}, tmp_path / "radio.pth.tar")
    with caplog.at_level(logging.DEBUG, "tim.models.radio"):
        encoder = radio.load(tmp_path / "radio.pth.tar")
    assert "not read" in caplog.text and "_heads.clip.weight" in caplog.text
    assert {value.dtype for value in encoder.state_dict().values()} == {torch.float32}
    assert {block.attn.num_heads for block in encoder.base_model.blocks} == {12}
    features = encoder(torch.rand(1, 3, 32, 48))
    assert features.shape == (1, 6, 768) and features.dtype == torch.float32


def test_averaged_weights_are_preferred(tmp_path, file, golden):
    file["state_dict_ema"] = file["state_dict"]
    file["state_dict"] = {name: value + 1 for name, value in file["state_dict"].items()}
    torch.save(file, tmp_path / "radio.pth.tar")
    features = radio.load(tmp_path / "radio.pth.tar")(golden["input.0"])
    assert relative_error(features, golden["features.0"]) < 1e-5


NAMES = "base_model.blocks.1.attn.qkv.bias", "base_model.patch_generator.cls_token.token"


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_weight(tmp_path, file, name):
    del file["state_dict"][name]
    torch.save(file, tmp_path / "radio.pth.tar")
    with pytest.raises(ValueError, match=f"does not fit RADIO-v2.5: .*{re.escape(name)}"):
        radio.load(tmp_path / "radio.pth.tar")


@pytest.mark.parametrize("name", ["base_model.blocks.0.ls1.gamma", NAMES[0]])
def test_a_weight_that_would_change_the_features(tmp_path, file, name):
    file["state_dict"][name] = torch.ones(32)
    torch.save(file, tmp_path / "radio.pth.tar")
    with pytest.raises(ValueError, match=f"does not fit RADIO-v2.5: .*{re.escape(name)}"):
        radio.load(tmp_path / "radio.pth.tar")


@pytest.mark.parametrize(
    "given, message",
    [
        (dict(model_norm=True), "without a last norm, got vit_base_patch16_224, model_norm True"),
        (dict(model="vit_huge_patch14", model_kwargs=None), "got vit_huge_patch14, model_norm Fal"),
    ],
)
def test_another_architecture(tmp_path, file, given, message):
    vars(file["args"]).update(given)
    torch.save(file, tmp_path / "radio.pth.tar")
    with pytest.raises(ValueError, match=message):
        radio.load(tmp_path / "radio.pth.tar")


class Foreign:
    """What unpickling must not make."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [{"args": 3}, [1], {"state_dict": {}, "args": Foreign()}])
def test_another_file(tmp_path, content, capsys):
    path = tmp_path / "radio.pth.tar"
    torch.save(content, path)
    with pytest.raises(ValueError, match=r"radio.pth.tar is damaged or holds other than weights"):
        radio.load(path)
    assert capsys.readouterr().out == ""


def test_no_file_and_half_a_file(tmp_path):
    with pytest.raises(ValueError, match="no file .*: radio-v2.5-b_half.pth.tar of the hub's nvi"):
        radio.load(tmp_path / "nothing.pth.tar")
    path = tmp_path / "radio.pth.tar"
    path.write_bytes(FILE.read_bytes()[:1000])
    with pytest.raises(ValueError, match="radio.pth.tar is damaged"):
        radio.load(path)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 32, 40), (1, 3, 8, 16)])
def test_pictures_of_another_shape(encoder, shape):
    with pytest.raises(ValueError, match="pictures must be .* multiples of 16; got"):
        encoder(torch.zeros(shape))
