import os
import pickle
import re

import pytest
import safetensors.torch
import torch
from omegaconf import OmegaConf

from tim import checkpoints
from tim.models import TiMTransformer2DModel

CLASS = dict(
    input_size=8,
    patch_size=2,
    in_channels=4,
    hidden_size=32,
    encoder_depth=1,
    depth=2,
    num_heads=2,
    num_classes=10,
    z_dim=12,
    projector_dim=24,
)
TEXT = CLASS | {"cap_feat_dim": 16}


def network(**params) -> TiMTransformer2DModel:
    torch.manual_seed(0)
    model = TiMTransformer2DModel(**params)
    for parameter in model.parameters():  # nothing stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def output(model: TiMTransformer2DModel) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, generator=generator)
    y = torch.tensor([3, 10])
    if model.config.cap_feat_dim is not None:
        y = torch.randn(2, 5, model.config.cap_feat_dim, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5]), y)


def save(state: object, path) -> None:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)


@pytest.fixture(params=[".bin", ".safetensors"])
def path(tmp_path, request):
    return tmp_path / f"weights{request.param}"


@pytest.mark.parametrize("params", [CLASS, TEXT], ids=["class", "text"])
def test_round_trip(path, params):
    model = network(**params)
    save(model.state_dict(), path)
    loaded = checkpoints.load(path, params)
    assert torch.equal(output(loaded), output(model))
    assert not loaded.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in loaded.parameters())
    assert dict(loaded.config) == dict(model.config)


def test_legacy_bin(tmp_path):
    model = network(**CLASS)
    path = tmp_path / "old.bin"
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=False)
    assert torch.equal(output(checkpoints.load(path, CLASS)), output(model))


def test_loaded_weights_do_not_write_to_the_file(path):
    save(network(**CLASS).state_dict(), path)
    before = path.read_bytes()
    with torch.no_grad():
        for parameter in checkpoints.load(path, CLASS).parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_configurations_of_every_form(path, tmp_path):
    model = network(**TEXT)
    save(model.state_dict(), path)
    target = "tim.models.t2i.tim_model.TiM"
    full = {"model": {"network": {"target": target, "params": TEXT}}}
    yaml = tmp_path / "mine.yaml"
    OmegaConf.save(full, yaml)
    for form in (TEXT, OmegaConf.create(TEXT), full, OmegaConf.create(full), yaml, str(yaml)):
        assert torch.equal(output(checkpoints.load(path, form)), output(model))
    assert TEXT["z_dim"] == 12


def test_dtype_and_device(path):
    save(network(**CLASS).bfloat16().state_dict(), path)
    assert {p.dtype for p in checkpoints.load(path, CLASS).parameters()} == {torch.bfloat16}
    loaded = checkpoints.load(path, CLASS, device="cpu", dtype=torch.float32)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


def test_file_without_projector(path):
    model = network(**CLASS)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("projector.")}
    save(state, path)
    config = OmegaConf.create(CLASS)
    loaded = checkpoints.load(path, config)
    assert loaded.projector is None and loaded.config.z_dim is None and config.z_dim == 12
    assert torch.equal(output(loaded), output(model))

    save(state | {"projector.0.bias": torch.zeros(24)}, path)
    with pytest.raises(ValueError, match=r"missing: projector\.0\.weight, projector\.2\.weight"):
        checkpoints.load(path, CLASS)


WRAPPERS = ["_orig_mod", "module", "module._orig_mod", "_fsdp_wrapped_module"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_under_wrappers(path, wrapper):
    """As torch.compile, DDP and FSDP leave them, around the network or its blocks."""
    model = network(**CLASS)
    state = model.state_dict()
    save({f"{wrapper}.{name}": tensor for name, tensor in state.items()}, path)
    assert torch.equal(output(checkpoints.load(path, CLASS)), output(model))
    blocks = {re.sub(r"^(blocks\.\d+)", rf"\1.{wrapper}", name): t for name, t in state.items()}
    save(blocks, path)
    assert torch.equal(output(checkpoints.load(path, CLASS)), output(model))
    save(blocks | {name: tensor.clone() for name, tensor in state.items()}, path)
    with pytest.raises(ValueError, match="with and without module, _orig_mod, "):
        checkpoints.load(path, CLASS)


def test_a_compiled_network_s_weights(path):
    model = network(**CLASS)
    save(torch.compile(model, backend="eager").state_dict(), path)
    assert torch.equal(output(checkpoints.load(path, CLASS)), output(model))


def test_everything_that_does_not_fit_is_listed_at_once(path):
    state = network(**CLASS).state_dict()
    del state["blocks.0.attn.qkv.bias"], state["final_layer.linear.weight"]
    state["blocks.2.attn.qkv.bias"] = torch.zeros(3)
    state["extra"] = torch.zeros(1)
    state["x_embedder.proj.weight"] = torch.zeros(32, 4, 4, 4)
    state["y_embedder.embedding_table.weight"] = torch.zeros(10, 32)
    save(state, path)
    with pytest.raises(ValueError) as caught:
        checkpoints.load(path, CLASS)
    first, missing, unexpected, shapes = str(caught.value).split("\n")
    assert str(path) in first
    assert missing == "missing: blocks.0.attn.qkv.bias, final_layer.linear.weight"
    assert set(re.split(": |, ", unexpected)) == {"unexpected", "blocks.2.attn.qkv.bias", "extra"}
    assert shapes == (
        "mis-shaped: x_embedder.proj.weight (32, 4, 4, 4) for (32, 4, 2, 2), "
        "y_embedder.embedding_table.weight (10, 32) for (11, 32)"
    )


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files_are_refused(path, kept):
    save(network(**CLASS).state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(ValueError, match="truncated or not a") as caught:
        checkpoints.load(path, CLASS)
    assert caught.value.__cause__ is not None


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" * 9, b"<html>Not found</html>", b"{}"])
def test_foreign_files_are_refused(path, content):
    path.write_bytes(content)
    with pytest.raises(ValueError, match="truncated or not a"):
        checkpoints.load(path, CLASS)


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o, protocol=2))]
)
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, writer):
    path, marker = tmp_path / "evil.bin", tmp_path / "ran"
    writer(network(**CLASS).state_dict() | {"payload": Payload(marker)}, path)
    with pytest.raises(ValueError, match="not a .bin file of tensors alone"):
        checkpoints.load(path, CLASS)
    assert not marker.exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.zeros(1)], "must hold a state dict, got list"),
        ({"step": 3, "model": {}}, "got also step: int, model: dict"),
        ({"ids": torch.arange(3)}, "got also ids: Tensor"),
    ],
)
def test_pickles_of_something_else_are_refused(tmp_path, content, message):
    path = tmp_path / "other.bin"
    torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        checkpoints.load(path, CLASS)


def test_paths_that_are_no_weight_file(tmp_path):
    for path in (tmp_path, tmp_path / "model.ckpt"):
        with pytest.raises(ValueError, match=r"a \.safetensors or \.bin file is needed, got"):
            checkpoints.load(path, CLASS)
    with pytest.raises(ValueError, match="there is no file .*nowhere.bin"):
        checkpoints.load(tmp_path / "nowhere.bin", CLASS)


def test_save_pretrained_folder_and_file(tmp_path):
    model = network(**TEXT)
    model.save_pretrained(tmp_path)
    assert torch.equal(output(TiMTransformer2DModel.from_pretrained(tmp_path)), output(model))
    loaded = checkpoints.load(tmp_path / "diffusion_pytorch_model.safetensors", TEXT)
    assert torch.equal(output(loaded), output(model))
