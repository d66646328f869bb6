"""Common head_dims, for which csrc/qk_norm_rope_staged.cuh has kernels of their own."""

import pytest
import torch
from parity import (
    BACKEND,
    DEVICE,
    assert_adjoint,
    assert_nonfinite_like_reference,
    assert_parity,
    assert_same_every_run,
    noise,
)
from qk_norm_rope_forms import FORMS, eager_packed_qkv, packed_qkv, problem

from tim_kernels import Segments
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.launch import plans
from tim_kernels.qk_norm_rope import reference

# Heads that fill a warp and that do not, of more than one warp, of a block a side.
SIZES = ((72, 16), (72, 5), (64, 12), (64, 20), (128, 1), (128, 10))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize(("D", "H"), SIZES)
def test_heads(D, H):
    assert_parity(*problem("packed_qkv", B=1, grid=(1, 3), H=H, D=D, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_blocks_of_many_tokens(form, dtype, monkeypatch):
    """More than a block makes angles of at a time, and a last one alone."""
    for module in ("shares", "dense"):
        monkeypatch.setattr(f"tim_kernels.launch.{module}.multiprocessors", lambda device: 1)
    with plans.forgotten_around():
        assert_parity(*problem(form, B=2, grid=(5, 7), H=1, D=64, dtype=dtype))


@pytest.mark.parametrize("D", [64, 72])
def test_reruns_are_equal_and_derivatives_adjoint(D):
    fused, _, inputs = problem("packed_qkv", B=1, grid=(3, 7), H=3, D=D)
    assert_adjoint(assert_same_every_run(fused, inputs), inputs)


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity(form):
    fused, _, inputs = problem(form, grid=(2, 2), D=72)
    inputs[0][0, 0, 0, 3], inputs[0][0, 2, 0, 3] = float("nan"), float("inf")
    inputs[-1].flatten(1 if inputs[-1].ndim > 1 else 0)[..., 5] = float("-inf")
    assert_nonfinite_like_reference(fused, inputs)


@pytest.mark.parametrize("order", reference.ORDERS)
def test_packed_segments(order):
    """Samples that are empty or short beside one of several blocks; each has its own grid."""
    sizes = torch.tensor([(1, 3), (0, 0), (1, 1), (7, 3)], dtype=torch.int32, device=DEVICE)
    lengths = sizes.prod(1)
    cu = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).int()
    segments, T = Segments(cu, max_length=24), int(cu[-1])
    at = torch.cat([reference.grid_positions(h, w, order, DEVICE) for h, w in sizes.tolist()])
    qkv, *rows = problem("packed_qkv", B=4, D=72, dtype=torch.bfloat16).inputs
    qkv = noise(T, *qkv.shape[2:], dtype=qkv.dtype, device=DEVICE)

    def packed(*args):
        return packed_qkv(*args, sizes=sizes, order=order, segments=segments)

    def apart(qkv, *rows):
        shifts = [row.repeat_interleave(lengths, dim=0) for row in rows[4:]]
        outputs = eager_packed_qkv(qkv[:, None], *rows[:4], *shifts, positions=at[:, None])
        return tuple(out[:, 0] for out in outputs)

    assert_parity(packed, apart, [qkv, *rows])


@pytest.mark.parametrize("D", [72, 128])
def test_a_mean_far_above_the_deviation(D):
    """Shifts of float32 make it so for some heads: one pass over a head would lose all digits."""
    fused, eager, (q, k, *rows) = problem("both", D=D, dtype=torch.bfloat16)
    rows = [row.float() for row in rows]
    rows[4][..., :D] += 3e4
    dy = [noise(*q.shape, dtype=q.dtype, device=DEVICE) for _ in range(2)]
    made = []
    for op, dtype in ((fused, torch.float32), (eager, torch.float64)):
        inputs = [x if op is fused else x.to(dtype) for x in (q, k, *rows)]
        leaves = [x.detach().requires_grad_() for x in inputs]
        with use_backend(BACKEND):
            out = op(*leaves)
        gradients = [y.to(x.dtype) for x, y in zip(out, dy, strict=True)]
        made.append([*out, *torch.autograd.grad(out, leaves, gradients)])
    for found, exact in zip(*made, strict=True):
        assert (found.double() - exact).norm() < 2**-8 * exact.norm()


@pytest.mark.parametrize("D", [64, 72])
def test_squares_that_overflow(D):
    """Of a head of one large value nothing is left but the bias."""
    fused, eager, (q, k, *rows) = problem("both_unshifted", D=D, dtype=torch.bfloat16)
    with use_backend(BACKEND):
        found = fused(torch.full_like(q, 2.0**70), k, *rows)
    expected = eager(torch.zeros_like(q).double(), *(x.double() for x in (k, *rows)))
    for out, exact in zip(found, expected, strict=True):
        assert (out.double() - exact).norm() < 2**-8 * exact.norm()


def test_what_copies_of_16_bytes_do_not_reach():
    """Views that begin a channel later, which the general kernels read."""
    fused, _, (q, k, *rows) = problem("both", D=72, dtype=torch.bfloat16)
    shifted = [torch.cat((x[..., :1], x), -1)[..., 1:] for x in (q, k)]
    with use_backend(BACKEND):
        for a, b in zip(fused(q, k, *rows), fused(*shifted, *rows), strict=True):
            torch.testing.assert_close(a, b)
