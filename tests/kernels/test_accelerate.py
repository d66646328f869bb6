"""`accelerate` of somebody else's model: the same numbers, gradients, hooks and back."""

import copy
import gc
import weakref

import pytest
import torch
from eager import randomise
from golden_files import relative_error
from parity import BACKEND, DEVICE
from published import TINY, Checkpointed, idle_layers, problem, require_timm
from torch import nn

from tim_kernels import accelerate, restore, use_backend


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
@pytest.mark.parametrize("timm", [False, True], ids=["", "timm"])
def test_same_numbers_and_back(timm, text, backend):
    model, args = problem(text, timm)
    own = type(model).forward
    expected, expected_zs = model(*args, return_zs=True)
    expected.square().sum().backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    with use_backend(backend):
        report = accelerate(model)
        assert report.fused == [""] and not report.left, str(report)
        assert model.forward.__func__ is not own
        model.zero_grad()
        sample, zs = model(*args, attn_type="fused_attn", return_zs=True, jvp=False)
        sample.square().sum().backward()
        tangents = tuple(torch.ones_like(a) for a in args[:3])
        call = lambda x, t, r: model(x, t, r, args[3])  # noqa: E731
        jvp = torch.func.jvp(call, args[:3], tangents)[1]
    assert relative_error(sample, expected) < 2e-5 and relative_error(zs, expected_zs) < 2e-5
    largest = max(g.norm() for g in gradients.values())
    for name, gradient in gradients.items():
        error = (model.get_parameter(name).grad - gradient).norm()
        assert error / max(gradient.norm(), 1e-3 * largest) < 1e-4, name
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name

    restore(model)
    assert model.forward.__func__ is own
    assert torch.equal(model(*args), expected)
    own_jvp = torch.func.jvp(lambda x, t, r: model(x, t, r, args[3], jvp=True), args[:3], tangents)[
        1
    ]
    assert relative_error(jvp, own_jvp) < 1e-4


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_three_steps_of_training_lead_where_the_model_s_own_lead(text):
    model, args = problem(text, timm=True)
    left_alone, start = copy.deepcopy(model), copy.deepcopy(model)
    assert accelerate(model).fused == [""]
    losses = []
    for network in (model, left_alone):
        optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, eps=1e-6)
        for _ in range(3):
            sample, zs = network(*args, return_zs=True)
            loss = (sample - args[0]).square().mean() + zs.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    assert losses[2] < losses[0]
    torch.testing.assert_close(losses[:3], losses[3:], rtol=1e-5, atol=0)
    ours, theirs, before = (
        nn.utils.parameters_to_vector(network.parameters())
        for network in (model, left_alone, start)
    )
    assert (ours - theirs).norm() < 1e-3 * (theirs - before).norm()


def test_a_block_called_as_published_is_still_the_published_block():
    model, _ = problem(text=False)
    x, c = torch.randn(2, 6, 48, device=DEVICE), torch.randn(2, 1, 48, device=DEVICE)
    turn = torch.ones(6, 24, device=DEVICE), torch.zeros(6, 24, device=DEVICE)
    expected = model.blocks[0](x, c, *turn, c, None, False)
    assert accelerate(model).fused == [""]
    assert torch.equal(model.blocks[0](x, c, *turn, c, None, False), expected)


def test_hooks_on_blocks_run():
    model, args = problem(text=False)
    assert accelerate(model).fused == [""]
    seen = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, inputs, output: seen.append(block))
    model(*args)
    assert seen == list(model.blocks)


def test_modules_are_called_as_published():
    model, (x, t, r, y) = problem(text=False)
    c = torch.randn(2, 1, 48, device=DEVICE)
    calls = {
        "x_embedder": (x,), "t_embedder": (t,), "delta_embedder": (t - r,), "y_embedder": (y,),
        "blocks.0.mlp": (torch.randn(2, 6, 48, device=DEVICE),),
        "final_layer": (torch.randn(2, 6, 48, device=DEVICE), c),
    }  # fmt: skip
    expected = {name: model.get_submodule(name)(*args) for name, args in calls.items()}
    assert accelerate(model).fused == [""]
    for name, args in calls.items():
        torch.testing.assert_close(model.get_submodule(name)(*args), expected[name])


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_is_kept(use_reentrant):
    _, args = problem(text=False)
    model = randomise(Checkpointed(use_reentrant, **TINY)).to(DEVICE)
    assert accelerate(model).fused == [""]
    kept = {}
    for model.use_checkpoint in (True, False):
        count = [0]

        def pack(tensor, count=count):
            count[0] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept[model.use_checkpoint] = model(*args), count
    assert kept[True][1][0] < 0.7 * kept[False][1][0]
    assert relative_error(kept[True][0], kept[False][0]) < 1e-6


def test_hooks_on_layers_that_compute_nothing_run():
    model, args = problem(text=False, timm=True)
    expected = model(*args)
    assert accelerate(model).fused == [""]
    seen = []
    for name in ("x_embedder.norm", "blocks.0.mlp.act", "blocks.1.mlp.drop1"):
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
    assert relative_error(model(*args), expected) < 2e-5
    assert set(seen) == {"x_embedder.norm", "blocks.0.mlp.act", "blocks.1.mlp.drop1"}


def test_an_accelerated_model_can_be_forgotten():
    model, _ = problem(text=False)
    assert accelerate(model).fused == [""]
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


def test_a_float32_model_is_tried_without_tf32():
    """cuDNN's default would make its patch convolution something else than our GEMM."""
    model, args = problem(text=False)
    seen = []
    model.x_embedder.register_forward_hook(
        lambda *_: seen.append(torch.backends.cudnn.conv.fp32_precision)
    )
    before = torch.backends.cudnn.conv.fp32_precision
    assert accelerate(model).fused == [""]
    assert seen[0] == "ieee" and torch.backends.cudnn.conv.fp32_precision == before


def test_layers_that_compute_nothing_are_no_obstacle():
    model, args = problem(text=True)
    expected = model(*args)
    model.x_embedder.norm = nn.Identity()
    for block in model.blocks:
        for name, layer in idle_layers().items():
            block.mlp.add_module(name, layer)
    report = accelerate(model)
    assert report.fused == [""], str(report)
    assert relative_error(model(*args), expected) < 2e-5


@pytest.mark.parametrize(
    "name, norm",
    [
        ("blocks.0.norm1", nn.Identity()),
        ("blocks.1.norm2", nn.LayerNorm(48)),
        ("blocks.1.attn.q_norm", nn.RMSNorm(24)),
        ("blocks.0.attn.k_norm", nn.LayerNorm(24, eps=1e-2)),
        ("blocks.0.attn.k_norm", nn.LayerNorm(24, elementwise_affine=False)),
        ("final_layer.norm_final", nn.LayerNorm(48, bias=False)),
    ],
)
def test_norms_of_other_kinds_are_called(name, norm):
    model, args = problem(text=False)
    model.set_submodule(name, norm.to(DEVICE))
    randomise(model)
    expected = model(*args)
    report = accelerate(model)
    assert report.fused == [""], str(report)
    assert relative_error(model(*args), expected) < 2e-5


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_timm_s_layers_one_by_one(backend):
    """A tree that is not TiM's, since a block has timm's plain Mlp."""
    layers = require_timm()
    model, args = problem(text=False, timm=True)
    model.blocks[1].mlp = layers.Mlp(48, 96).to(DEVICE)
    expected = model(*args)
    with use_backend(backend):
        report = accelerate(model)
        assert "blocks.1.mlp" in report.left and "blocks.1.mlp" not in report.fused
        assert {"blocks.0.mlp", "blocks.1.adaLN_modulation"} <= set(report.fused)
        assert relative_error(model(*args), expected) < 2e-5


@pytest.mark.parametrize("size", [8, (4, 6)])
def test_timm_s_embedder_of_one_image_size(size):
    layers = require_timm()
    model, _ = problem(text=False)
    model.x_embedder = layers.PatchEmbed(size, 2, 3, 48).to(DEVICE)
    assert accelerate(model).fused == [""]
