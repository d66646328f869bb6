"""Gradients of biases that kernels sum on their way: of every layer, exact, and with nothing else
changed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from eager import EagerTiM, randomise
from parity import BACKEND, DERIVATIVE, DEVICE, DTYPES, assert_as_accurate
from torch import nn

from tim_kernels import accelerate, pack, unpack, use_backend
from tim_kernels.network import attentions, forward, layers

pytest.importorskip("diffusers", reason="tim.models needs diffusers")
from tim.models import TiMTransformer2DModel  # noqa: E402

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=24, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip
CLASS, TEXT = {}, dict(cap_feat_dim=7)
OF_MLP = {"mlp.fc1_g", "mlp.fc1_x", "mlp.fc2"}
OF_CLASS = {"attn.qkv", "attn.proj"} | OF_MLP
OF_TEXT = OF_CLASS | {"cross_attn.q", "cross_attn.proj"}


def network(**changes):
    config = TINY | changes
    model = TiMTransformer2DModel(**config)
    model.load_state_dict(randomise(EagerTiM(**config)).state_dict())
    return model.to(DEVICE)


def arguments(model, batch=2, size=(4, 6)):
    g = torch.Generator().manual_seed(batch)
    x, t = torch.randn(batch, 3, *size, generator=g), torch.rand(batch, generator=g) * 0.5 + 0.5
    is_text = not hasattr(model.y_embedder, "embedding_table")
    y = torch.randn(batch, 5, 7, generator=g) if is_text else torch.arange(batch) % 5
    dtype = model.x_embedder.proj.weight.dtype
    cast = (z.to(DEVICE, dtype if z.is_floating_point() else z.dtype) for z in (x, t, t / 2, y))
    return tuple(cast)


def gradients(model, args, backend=BACKEND):
    """The output and the gradient of every parameter."""
    model.zero_grad()
    with use_backend(backend):
        out = model(*args)
        g = torch.Generator().manual_seed(7)
        out.backward(torch.randn(out.shape, generator=g).to(out))
    return out.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def paths(monkeypatch):
    """The layers that gave a path, by their ids."""
    found = []

    def noted(linear, bias_path=layers.bias_path):
        path = bias_path(linear)
        found.extend([linear] if path is not None else [])
        return path

    monkeypatch.setattr(attentions, "bias_path", noted)
    monkeypatch.setattr(layers, "bias_path", noted)
    return found


def names(model, found) -> set[str]:
    """Of the layers of the first block that are among those found."""
    return {n for n, m in model.blocks[0].named_modules() if any(m is each for each in found)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [CLASS, TEXT], ids=["class", "text"])
def test_as_exact_as_eager_and_the_output_bit_for_bit(kind, dtype, paths, monkeypatch):
    model = network(**kind)
    model.to(dtype)
    double = copy.deepcopy(model).double()
    args = arguments(model)
    _, truth = gradients(double, [a.double() if a.is_floating_point() else a for a in args])
    _, plain = gradients(model, args, "reference")
    paths.clear()
    out, ours = gradients(model, args)
    assert names(model, paths) == (OF_TEXT if kind else OF_CLASS)
    again = gradients(model, args)
    assert torch.equal(out, again[0]) and all(torch.equal(again[1][n], ours[n]) for n in ours)

    monkeypatch.setattr(forward, "are_paths_shorter", lambda device: False)
    without, beside = gradients(model, args)
    assert torch.equal(out, without) and ours.keys() == beside.keys() == truth.keys()
    layer_names = OF_TEXT if kind else OF_CLASS
    through = {f"blocks.{i}.{name}.bias" for i in range(2) for name in layer_names}
    for name in ours.keys() - through:
        assert torch.equal(ours[name], beside[name]), name

    def pooled(found):  # of a handful of numbers each, as parts of their lengths
        return torch.cat([found[n].double() / truth[n].norm() for n in sorted(through)])

    assert_as_accurate(*map(pooled, (ours, plain, truth)), DERIVATIVE, "gradients of biases")


@pytest.mark.parametrize(
    "changes, through",
    [
        (dict(distance_aware=False), OF_CLASS),
        (dict(qk_norm=False), OF_CLASS),
        (dict(distance_aware=False, qk_norm=False, **TEXT), OF_TEXT),
    ],
    ids=["no qkv_d", "no norms", "text, neither"],
)
def test_other_networks(changes, through, paths):
    model = network(**changes)
    args = arguments(model)
    _, expected = gradients(model, args, "reference")
    assert not paths
    _, ours = gradients(model, args)
    assert names(model, paths) == through
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


class Adapted(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, 2 * self.bias)


class OwnAttention(type(network().blocks[0].attn)):
    """Knows of no path."""

    def forward(self, x, shifts, rope):
        return super().forward(x, shifts, rope)


def _frozen(block):
    for name in OF_CLASS:
        block.get_submodule(name).bias.requires_grad_(False)


def _without(block):
    for name in OF_CLASS:
        block.get_submodule(name).bias = None


def _adapted(block):
    block.attn.qkv.__class__ = block.mlp.fc2.__class__ = Adapted


def _hooked(block):
    for module in (block.attn, block.mlp):
        module.register_forward_hook(lambda module, args, out: 2 * out)


def _hooked_gate(block):
    block.mlp.fc1_g.register_forward_hook(lambda module, args, out: 2 * out)


def _of_own_class(block):
    block.attn.__class__ = OwnAttention


def _other_norm(block):
    block.attn.q_norm = nn.RMSNorm(block.attn.q_norm.weight.shape[0]).to(DEVICE)


OTHERS = {
    _frozen: set(), _without: set(), _adapted: {"attn.proj", "mlp.fc1_g", "mlp.fc1_x"},
    _hooked: set(), _hooked_gate: {"attn.qkv", "attn.proj"}, _of_own_class: OF_MLP,
    _other_norm: {"attn.proj"} | OF_MLP,
}  # fmt: skip


@pytest.mark.parametrize("change", OTHERS, ids=lambda change: change.__name__.strip("_"))
def test_layers_that_are_more_than_their_weights_are_called(change, paths):
    model = network()
    change(model.blocks[0])
    args = arguments(model)
    _, expected = gradients(model, args, "reference")
    _, ours = gradients(model, args)
    assert names(model, paths) == OTHERS[change]
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [CLASS, TEXT], ids=["class", "text"])
def test_checkpointed_blocks(kind, reentrant):
    model = network(**kind)
    args = arguments(model)
    out, expected = gradients(model, args)
    model.enable_gradient_checkpointing(
        lambda *args: torch.utils.checkpoint.checkpoint(*args, use_reentrant=reentrant)
    )
    args = args[0].requires_grad_(), *args[1:]
    again, ours = gradients(model, args)
    assert torch.equal(out, again)
    for name, gradient in expected.items():  # PyTorch's reentrant form adds up in another order
        torch.testing.assert_close(ours[name], gradient, rtol=1e-5, atol=1e-5, msg=name)


def test_nothing_changes_without_gradients(paths):
    model = network()
    with torch.no_grad(), use_backend(BACKEND):
        model(*arguments(model))
    model.requires_grad_(False)
    with use_backend(BACKEND):
        model(*arguments(model))
    assert not paths


def test_tangents_of_biases_and_of_the_input():
    model = network()
    args = arguments(model)
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def call(parameters, x):
        return torch.func.functional_call(model, parameters, (x, *args[1:]))

    along = {n: torch.ones_like(p) if "bias" in n else torch.zeros_like(p)
             for n, p in parameters.items()}  # fmt: skip
    primals, tangents = (parameters, args[0]), (along, torch.ones_like(args[0]))
    found = []
    for backend in ("reference", BACKEND):
        with use_backend(backend):
            found.append(torch.func.jvp(call, primals, tangents)[1])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_an_accelerated_model_has_them_too(paths):
    from published import problem

    model, args = problem(False)
    _, expected = gradients(model, args)
    assert accelerate(model).fused == [""]
    _, ours = gradients(model, args)
    assert names(model, paths) == OF_CLASS
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("kind", [CLASS, TEXT], ids=["class", "text"])
def test_packed_pictures_have_the_gradients_of_padded_ones(kind, paths):
    model = network(**kind)
    x, *others = args = arguments(model)
    _, expected = gradients(model, args)
    tokens, packing = pack(x, 2)
    paths.clear()
    model.zero_grad()
    with use_backend(BACKEND):
        out = torch.stack(unpack(model(tokens, *others, packing=packing), packing))
        g = torch.Generator().manual_seed(7)
        out.backward(torch.randn(out.shape, generator=g).to(out))
    assert names(model, paths) == (OF_TEXT if kind else OF_CLASS)
    for name, gradient in expected.items():
        ours = model.get_parameter(name).grad
        torch.testing.assert_close(ours, gradient, rtol=1e-4, atol=1e-4, msg=name)


def test_under_autocast(paths, monkeypatch):
    model = network()
    args = arguments(model)
    with torch.autocast(DEVICE, torch.bfloat16):
        out, ours = gradients(model, args)
        assert names(model, paths) == OF_CLASS
        monkeypatch.setattr(forward, "are_paths_shorter", lambda device: False)
        without, expected = gradients(model, args)
    assert torch.equal(out, without)
    for name, gradient in expected.items():
        assert ours[name].dtype == torch.float32
        error = (ours[name] - gradient).norm() / gradient.norm()
        assert error < (2e-2 if name.endswith("bias") else 1e-6), name
