"""Every preset trains: its network shrunk, its data and encoders those of the golden folders."""

import json

import diffusers
import pytest
import torch
from golden_files import GOLDEN
from omegaconf import OmegaConf
from two_processes import assert_same, error, gradients, gradients_of_one, in_two_processes

from tim import config
from tim.training import loop, parts
from tim.training.log import read_log

FOLDER = GOLDEN / "training"
PRESETS = [name for name in config.presets() if not name.startswith(("mnist", "emoji"))]
WAYS = "ddp", "fsdp2"
NETWORK = {"num_classes": 1000, "class_dropout_prob": 0.1}  # what text networks have beside


def preset(name: str, autoencoder, **training):
    """Everything that it says but sizes and places."""
    cfg, is_text = config.load(name), name == "t2i"
    params = {
        "input_size": 16 if is_text else 4, "patch_size": 8 if is_text else 2,
        "in_channels": 8 if is_text else 4, "hidden_size": 16, "num_heads": 2, "depth": 2,
        "encoder_depth": 1, "z_dim": 32, "projector_dim": 8, "lora_hidden_size": 8,
    }  # fmt: skip
    model = {
        "network": {"params": params | ({"cap_feat_dim": 32} if is_text else {})},
        "enc_dir": str(FOLDER / "radio_tiny.pth.tar"),
        "vae_dir": str(autoencoder),
    }
    root, classes = FOLDER / "t2i", FOLDER / "c2i"
    dataset = {
        "latent_dir": str(classes / "latents"), "image_dir": str(classes / "images"),
        "image_size": 32,
    }  # fmt: skip
    if is_text:
        model |= {"text_encoder_dir": str(FOLDER / "text"), "max_seq_length": 24}
        dataset = {
            "root_dir": str(root), "packed_json": str(root / "bucket_sampler.json"),
            "jsonl_dir": str(root / "data_info.jsonl"),
        }  # fmt: skip
    data = {"dataset": dataset, "dataloader": {"num_workers": 0, "batch_size": 3}}
    run = {"max_train_steps": 2, "learning_rate": 1e-3, **training}
    return OmegaConf.merge(cfg, {"model": model, "data": data, "training": run})


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory):
    """As `save_pretrained` leaves it; for pictures of samples and the text network's latents."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    facts = json.loads((FOLDER / "facts.json").read_text())["autoencoders"]
    folder = tmp_path_factory.mktemp("autoencoders")
    diffusers.AutoencoderDC(**facts["dc"]).save_pretrained(folder / "t2i")
    diffusers.AutoencoderKL(**facts["kl"]).save_pretrained(folder / "c2i")
    return lambda name: folder / ("t2i" if name == "t2i" else "c2i")


@pytest.mark.parametrize("name", PRESETS)
def test_two_steps(tmp_path, name, autoencoder):
    """In bfloat16 with REPA, a sample grid and an export; what is not used is named."""
    loop.train(preset(name, autoencoder(name)), tmp_path)
    (line,) = read_log(tmp_path / "log.jsonl")
    assert line["step"] == 2 and line["projection"] > 0 and line["grad_norm"] > 0
    assert (tmp_path / "samples/step-00000002.png").is_file()
    assert (tmp_path / "model/training.yaml").is_file()


@pytest.fixture(scope="module")
def found(tmp_path_factory, autoencoder):
    folder = tmp_path_factory.mktemp("presets")

    def work(rank, folder):
        found = {}
        for name in PRESETS:
            for way in WAYS:
                cfg = preset(name, autoencoder(name), parallel=way, mixed_precision="no")
                found[name, way] = gradients(cfg, None, folder)
        if rank == 0:
            torch.save(found, folder / "found.pt")

    in_two_processes(folder, work)
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", PRESETS)
def test_gradients_of_two_processes(tmp_path, found, autoencoder, name, way):
    cfg = preset(name, autoencoder(name), mixed_precision="no")
    expected_start, expected = gradients_of_one(cfg, None, tmp_path)
    start, gradient = found[name, way]
    assert_same(start, expected_start)
    assert error(gradient, expected) < 1e-5


def test_pictures_of_your_own(tmp_path, autoencoder):
    """A folder of class folders, whose latents are made in the loop; resumed, to the bit."""
    cfg = preset("b-256", autoencoder("b-256"), max_train_steps=4, checkpointing_steps=2)
    pictures = {"image_dir": str(FOLDER / "c2i/images"), "image_size": 8}
    cfg.data = {"data_type": "imagefolder", "dataset": pictures, "dataloader": cfg.data.dataloader}
    whole = loop.train(cfg, tmp_path / "whole")
    cfg.training.max_train_steps = 2
    loop.train(cfg, tmp_path / "resumed")
    cfg.training.max_train_steps = 4
    resumed = loop.train(cfg, tmp_path / "resumed")
    name = "diffusion_pytorch_model.safetensors"
    assert (whole / name).read_bytes() == (resumed / name).read_bytes()
    cfg.data.dataset.image_size = 16
    with pytest.raises(ValueError, match=r"must be those of imagefolder, \(4, 8, 8\); got \(4, 4"):
        loop.train(cfg, tmp_path / "other")


def test_parts_that_are_missing(tmp_path, autoencoder):
    """In one line each."""
    cfg = preset("t2i", autoencoder("t2i"))
    for change, said in (
        ("model.text_encoder_dir=null", "text_encoder_dir must be a text encoder's folder"),
        ("model.network.params.cap_feat_dim=24", "cap_feat_dim must be 32, the text encoder's"),
        ("model.enc_dir=null", "proj_coeff must be 0, got 1.0: there is no vision encoder"),
        (f"model.enc_dir={tmp_path / 'none.tar'}", "no file .*none.tar: radio"),
        ("model.network.params.in_channels=4", r"must be those of image_ms, \(8, 16, 16\)"),
    ):
        with pytest.raises(ValueError, match=said):
            loop.train(config.override(cfg, [change]), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_captions_are_escaped_as_the_configuration_says(tmp_path, autoencoder):
    """By the text encoder, as the pipeline does that reads the run's configuration."""
    cfg = config.override(preset("t2i", autoencoder("t2i")), ["model.escape_captions=true"])
    loop.train(cfg, tmp_path / "run")
    kept = config.load(tmp_path / "run/config.yaml")
    assert kept.model.escape_captions is True
    built = parts.build(kept, kept.model.network.params | NETWORK, torch.device("cpu"))
    assert built.conditioning.encode.escape_captions
    twice = config.override(cfg, ["data.dataset.escape_captions=true"])
    with pytest.raises(ValueError, match="both escape"):
        loop.train(twice, tmp_path / "twice")
