"""`explain(model)`: what of it is fused as it is now."""

import pytest
import torch
from eager import EagerTiM, randomise
from torch import nn
from torch.nn.utils import parametrize

from tim.models import TiMTransformer2DModel
from tim_kernels import accelerate, explain

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=16, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=None, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


def test_a_model_that_runs_on_the_ops_already():
    assert "as it is" in accelerate(models()[0]).left[""]


def models():
    plain = randomise(EagerTiM(**TINY | dict(z_dim=4)))
    assert accelerate(plain).fused == [""]
    return TiMTransformer2DModel(**TINY), plain


@pytest.fixture(params=["ours", "accelerated"])
def model(request):
    return models()[request.param == "accelerated"]


def lines(model) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in explain(model).splitlines())


def test_all_of_it(model):
    assert lines(model) == {
        name: "fused" for name in ("x_embedder", "blocks.0", "blocks.1", "final_layer")
    }


def norm(layer):
    parametrize.register_parametrization(layer, "weight", nn.Identity())


def hook(layer):
    layer.register_forward_hook(lambda *_: None)


def unweighted(layer):
    layer.register_parameter("weight", None), layer.register_parameter("bias", None)


def replace(layer):
    layer.forward = layer.forward


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("blocks.1.norm2", hook, "norm2 is called, since it has hooks"),
        ("blocks.1.attn.q_norm", norm, "attn.q_norm is called, since it is a Parametrized"),
        (
            "blocks.0.attn.k_norm",
            unweighted,
            "k_norm is called, since it is a LayerNorm without",
        ),
        ("blocks.1.attn.proj", replace, "proj is called, since its forward was replaced"),
        ("blocks.1.attn", hook, "attn: its output is made whole, since it has hooks"),
        ("blocks.1", hook, "its output is made whole, since it has hooks"),
        ("blocks.1.norm1", lambda layer: layer.compile(), "norm1 is called, since it is compiled"),
        ("final_layer", hook, "its output is made whole, since it has hooks"),
        ("x_embedder.proj", hook, "proj is called, since it has hooks"),
    ],
)
def test_what_is_called_and_why(model, name, change, expected):
    change(model.get_submodule(name))
    found = lines(model)
    where = ".".join(name.split(".")[:2]) if name.startswith("blocks") else name.split(".")[0]
    assert expected in found.pop(where)
    assert set(found.values()) == {"fused"}


def test_weights_that_are_no_parameters(model):
    class Quantised(torch.Tensor):
        pass

    proj = model.blocks[0].attn.proj
    proj.weight = nn.Parameter(proj.weight.detach().as_subclass(Quantised), requires_grad=False)
    assert "its weight is a" in lines(model)["blocks.0"]


def test_adapters_on_embedders(model):
    hook(model.t_embedder.mlp[1])
    assert "called" in lines(model)["t_embedder"]


def test_a_model_that_is_not_fused():
    assert "nothing of Linear is fused" in explain(nn.Linear(2, 2))
    model = EagerTiM(**TINY | dict(z_dim=4))
    assert "accelerate(model)" in explain(model)
    model.blocks[1].mlp = nn.Linear(16, 16)
    accelerate(model)
    assert "blocks.0.mlp fused, by itself" in explain(model)
