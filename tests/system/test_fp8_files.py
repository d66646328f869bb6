"""A network in FP8 as a copy, a pickle, a state dict, and in folders."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tim.models import TiMTransformer2DModel
from tim.pipelines import TiMClassPipeline
from tim_kernels import to_fp8


def network(seed: int = 0) -> TiMTransformer2DModel:
    torch.manual_seed(seed)
    sizes = dict(hidden_size=48, num_heads=2, depth=2, encoder_depth=1, num_classes=10)
    model = TiMTransformer2DModel(**sizes, z_dim=None, in_channels=3, input_size=8)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.bfloat16().eval()


@pytest.fixture
def fp8():
    model = network()
    assert to_fp8(model).fused
    return model


@torch.no_grad()
def sample(model) -> torch.Tensor:
    torch.manual_seed(1)
    x, t, r = torch.randn(2, 3, 8, 8).bfloat16(), torch.tensor([0.9, 0.4]), torch.tensor([0.5, 0.0])
    return model(x, t, r, torch.tensor([1, 2]))


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def loaded(model, **options):
    other = network(seed=5)
    to_fp8(other)
    assert not torch.equal(sample(other), sample(model))
    other.load_state_dict(model.state_dict(), **options)
    return other


def loaded_from_a_file(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = network(seed=5)
    to_fp8(other)
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": pickled, "torch.save": saved, "state_dict": loaded,
    "assigned": lambda model: loaded(model, assign=True), "file": loaded_from_a_file,
    "cast": lambda model: copy.deepcopy(model).float().bfloat16(),
}  # fmt: skip


@pytest.mark.parametrize("way", COPIES)
def test_copies_compute_the_same_bits(fp8, way):
    before = sample(fp8)
    other = COPIES[way](fp8)
    assert torch.equal(sample(other), before) and torch.equal(sample(fp8), before)
    with pytest.raises(ValueError, match="a network in FP8 cannot be loaded"):
        other.save_pretrained("nowhere")


def test_state_dicts_of_the_other_kind_are_refused(fp8):
    plain = network()
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\.qkv\.weight"):
        plain.load_state_dict(fp8.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.0\.attn\.qkv\.values"):
        fp8.load_state_dict(plain.state_dict())


def test_a_folder_is_of_the_network_before(tmp_path):
    model = network()
    model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    to_fp8(model)
    with pytest.raises(ValueError, match="save it before to_fp8"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    other = TiMTransformer2DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16).eval()
    to_fp8(other)
    assert torch.equal(sample(other), sample(model))


def test_a_pipeline_with_one(tmp_path):
    pipeline = TiMClassPipeline(network(), vae=None, scheduler=None)
    draw = dict(class_labels=[1], num_inference_steps=2, output_type="pt")
    pipeline.save_pretrained(tmp_path)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    to_fp8(pipeline.transformer)
    with pytest.raises(ValueError, match="a network in FP8"):
        pipeline.save_pretrained(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    other = TiMClassPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    other.transformer.eval()
    to_fp8(other.transformer)
    images = [
        pipe(**draw, generator=torch.Generator().manual_seed(3)).images
        for pipe in (pipeline, other)
    ]
    assert torch.equal(*images)
