"""Networks whose products take up what follows them: values and gradients are those of products
alone, and whoever looks on sees everything. References stand for what a GPU runs."""

import pytest
import torch
from parity import noise

from tim_kernels import accelerate, pack
from tim_kernels.linear import op
from tim_kernels.network import layers

pytest.importorskip("diffusers", reason="tim.models needs diffusers")
from published import problem  # noqa: E402
from test_bias_paths import CLASS, TEXT, arguments, network  # noqa: E402


@pytest.fixture
def joined(monkeypatch):
    """Networks here take these products, and the names of those that ran."""
    ran = []
    monkeypatch.setattr(layers, "requested", lambda: "quack")
    monkeypatch.setattr(layers, "takes", lambda x, *weights: not torch.compiler.is_compiling())
    monkeypatch.setattr(layers, "HALVES", (torch.float32, torch.float64, torch.bfloat16))
    monkeypatch.setattr(op, "is_worth", lambda x: x.shape[:-1].numel() > 4)  # not of rows
    monkeypatch.setattr(op, "TILE", 1)
    for each in ("linear_swiglu", "linear_gated_residual", "mlp"):
        function = getattr(op, each)
        monkeypatch.setattr(
            op, each, lambda *a, f=function, **k: ran.append(f.__name__) or f(*a, **k)
        )
    yield ran


def without(monkeypatch, function):
    with monkeypatch.context() as context:
        context.setattr(layers, "takes", lambda x, *weights: False)
        return function()


@pytest.mark.parametrize("changes", [CLASS, TEXT], ids=["class", "text"])
def test_network_without_gradients(changes, joined, monkeypatch):
    """Every block ends three products so, of text four; values are those of the products alone."""
    model = network(**changes).double()
    args = [x.double() if x.is_floating_point() else x for x in arguments(model)]
    with torch.no_grad():
        out = model(*args)
        assert joined.count("linear_gated_residual") == (6 if "cap_feat_dim" in changes else 4)
        of_text = "cap_feat_dim" in changes  # whose embedder ends in SwiGLU, too
        assert joined.count("linear_swiglu") == 2 + of_text and "mlp" not in joined
        expected = without(monkeypatch, lambda: model(*args))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("changes", [CLASS, TEXT], ids=["class", "text"])
@pytest.mark.parametrize("with_paths", [True, False])
def test_gradients_of_a_network(changes, with_paths, joined, monkeypatch):
    monkeypatch.setattr("tim_kernels.network.forward.are_paths_shorter", lambda device: with_paths)
    model = network(**changes).double()
    args = [x.double() if x.is_floating_point() else x for x in arguments(model)]

    def gradients():
        model.zero_grad()
        model(*args).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    found = gradients()
    assert joined == ["mlp"] * (3 if changes else 2)
    wanted = without(monkeypatch, gradients)
    assert found.keys() == wanted.keys()
    for name in found:
        bound = 1e-5 * float(wanted[name].abs().max()) + 1e-7
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=bound, msg=name)


@pytest.mark.parametrize("is_reentrant", [True, False])
def test_blocks_that_are_run_again_in_backward(is_reentrant, joined, monkeypatch):
    """What they give to the next is of the same tensors at both runs, of which PyTorch's reentrant
    form makes the first without a graph."""
    model = network(**TEXT).double()
    x, *args = [x.double() if x.is_floating_point() else x for x in arguments(model)]
    x.requires_grad_()

    def gradients():
        model.zero_grad()
        model(x, *args).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted = without(monkeypatch, gradients)
    model.enable_gradient_checkpointing(
        lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=is_reentrant)
    )
    found = gradients()
    assert found.keys() == wanted.keys()
    for name in found:
        bound = 1e-5 * float(wanted[name].abs().max()) + 1e-7
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=bound, msg=name)
    assert "mlp" in joined


def test_packed_pictures(joined, monkeypatch):
    model = network().double()
    sizes = (4, 6), (2, 2)
    pictures = [noise(3, *size, seed=i, dtype=torch.float64) for i, size in enumerate(sizes)]
    x, packing = pack(pictures, 2)
    t = torch.rand(2, dtype=torch.float64)
    with torch.no_grad():
        out = model(x, t, t / 2, torch.arange(2), packing=packing)
        expected = without(
            monkeypatch, lambda: model(x, t, t / 2, torch.arange(2), packing=packing)
        )
    assert "linear_gated_residual" in joined
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_who_looks_on_sees_everything(joined):
    """A hooked layer or branch is called, and its products end where it does."""
    model, seen = network().double(), []
    args = [x.double() if x.is_floating_point() else x for x in arguments(model)]
    model.blocks[0].mlp.fc1_g.register_forward_hook(lambda *a: seen.append("fc1_g"))
    model.blocks[0].attn.proj.register_forward_hook(lambda *a: seen.append("proj"))
    model.blocks[1].attn.register_forward_hook(lambda *a: seen.append("attn"))
    model.blocks[1].mlp.register_forward_hook(lambda *a: seen.append("mlp"))
    with torch.no_grad():
        model(*args)
    assert seen == ["proj", "fc1_g", "attn", "mlp"]
    assert joined == ["linear_swiglu"]


def test_hooks_on_layers_that_compute_nothing_run(joined):
    """Of somebody's MLP, which is then their own."""
    model, args = problem(text=False, timm=True)
    assert accelerate(model).fused == [""]
    seen = []
    model.blocks[0].mlp.act.register_forward_hook(lambda *a: seen.append("act"))
    model.blocks[1].mlp.drop1.register_forward_hook(lambda *a: seen.append("drop1"))
    with torch.no_grad():
        model(*args)
    assert seen == ["act", "drop1"] and "linear_gated_residual" in joined


def test_anybodys_network(joined, monkeypatch):
    from eager import EagerTiM, randomise
    from test_bias_paths import TINY

    model = randomise(EagerTiM(**TINY)).double()
    args = [x.double() if x.is_floating_point() else x for x in arguments(model)]
    expected = model(*args)
    accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(*args), expected, rtol=1e-6, atol=1e-6)
    assert {"linear_swiglu", "linear_gated_residual"} <= set(joined)
