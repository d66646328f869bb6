"""Somebody else's model: `eager.EagerTiM` shares names and shapes with TiM, and no code."""

import gc
import weakref

import pytest
import torch
from eager import EagerTiM, randomise
from golden_files import relative_error
from parity import BACKEND, DEVICE
from torch import nn

from tim_kernels import accelerate, restore, use_backend

TINY = dict(
    patch_size=2, in_channels=3, hidden_size=48, encoder_depth=1, depth=2, num_heads=2,
    num_classes=5, z_dim=6, projector_dim=10, lora_hidden_size=8,
)  # fmt: skip


def problem(text: bool, **changes):
    model = randomise(EagerTiM(**TINY | dict(cap_feat_dim=7 if text else None) | changes))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 6, generator=g)
    y = torch.randn(2, 5, 7, generator=g) if text else torch.tensor([1, 5])
    args = x, torch.tensor([0.9, 0.6]), torch.tensor([0.2, 0.6]), y
    return model.to(DEVICE), tuple(argument.to(DEVICE) for argument in args)


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_same_numbers_and_back(text, backend):
    model, args = problem(text)
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


@pytest.mark.parametrize("precision, is_fused", [("ieee", False), ("tf32", True)])
def test_gemms_in_tf32_are_no_difference(precision, is_fused):
    model, _ = problem(text=False)
    model.register_forward_hook(lambda module, args, out: 1.001 * out)  # as far off as TF32
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        assert (accelerate(model).fused == [""]) == is_fused
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def test_a_block_that_is_not_tim_s_is_named_and_left():
    model, args = problem(text=False)
    model.blocks[1].attn.q_norm = nn.RMSNorm(24)
    expected = model(*args)
    report = accelerate(model)
    assert "blocks.1.attn.q_norm" in report.left and "" not in report.fused
    assert "blocks.0.mlp" in report.fused  # what can be is fused all the same
    assert relative_error(model(*args), expected) < 2e-5
    restore(model)
    assert torch.equal(model(*args), expected)


def test_extra_parameters_are_named():
    model, _ = problem(text=False)
    model.blocks[0].layer_scale = nn.Parameter(torch.ones(48))
    report = accelerate(model)
    assert "layer_scale is (48,)" in report.left["blocks.0"]


def test_a_model_that_computes_something_else_is_left():
    class Twice(EagerTiM):
        def forward(self, x, t, r, y, attn_type=None, return_zs=False, jvp=False):
            return 2 * super().forward(x, t, r, y)

    model = randomise(Twice(**TINY))
    report = accelerate(model)
    assert "computes something else" in report.left[""] and "" not in report.fused


def test_what_is_no_tim_at_all():
    report = accelerate(nn.Linear(3, 3))
    assert not report.fused and "not the published tree" in report.left[""]
    with pytest.raises(ValueError, match="not accelerated"):
        restore(nn.Linear(3, 3))


def test_refusals():
    model, _ = problem(text=False)
    with pytest.raises(ValueError, match="new_condition"):
        accelerate(model, new_condition="t+r")
    with pytest.raises(ValueError, match="rope_order"):
        accelerate(model, rope_order="rows")
    assert accelerate(model).fused and "already" in accelerate(model).left[""]
