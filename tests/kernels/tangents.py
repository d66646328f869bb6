"""Attention with a tangent, ours and the published eager code's, and the rule ours is held to."""

from unittest.mock import patch

import torch
from eager import attend
from parity import DERIVATIVE, DEVICE, FORWARD, assert_as_accurate, noise

from tim_kernels.attention import op


def inputs(N, M=None, head_dim=8, heads=1, B=1, dtype=torch.float32, k_heads=None):
    """q, k, v and their tangents."""
    M, k_heads = N if M is None else M, k_heads or heads
    sizes = [(B, n, h, head_dim) for n, h in ((N, heads), (M, k_heads), (M, k_heads))] * 2
    return [noise(*s, seed=i, dtype=dtype, device=DEVICE) for i, s in enumerate(sizes)]


def dual(function, inputs):
    """Output and its tangent; a tangent that is None is none."""
    primals, tangents = inputs[:3], inputs[3:]
    live = [i for i, tangent in enumerate(tangents) if tangent is not None]

    def of_live(*duals):
        args = list(primals)
        for i, x in zip(live, duals, strict=True):
            args[i] = x
        return function(*args)

    return torch.func.jvp(
        of_live, tuple(primals[i] for i in live), tuple(tangents[i] for i in live)
    )


def eager(q, k, v):
    return attend(*(x.transpose(1, 2) for x in (q, k, v)), materialise=True).transpose(1, 2)


def check(function, plain, inputs):
    """Hold `function`'s output and tangent to float64 by the rule of parity.py."""
    oracle = dual(plain, [None if x is None else x.double() for x in inputs])
    yardstick = dual(plain, inputs)
    with patch.object(op, "jvp_op", wraps=op.jvp_op) as kernel:
        result = dual(function, inputs)
    assert kernel.call_count == 1
    assert all(ours.dtype == inputs[0].dtype for ours in result)
    for kind, factor, *each in zip(
        ("output", "tangent"), (FORWARD, DERIVATIVE), result, yardstick, oracle, strict=True
    ):
        assert_as_accurate(*each, factor, kind)
