"""What a user writes: nothing for a type checker to complain of. Never run."""
# pyright: strict

import torch
from torch import Tensor, nn

import tim_kernels as ops
from tim_kernels import Backend, Condition, RopeOrder, Segments


def block(model: nn.Module, x: Tensor, row: Tensor, name: Backend = "auto") -> Tensor:
    ops.set_backend("triton")
    segments = Segments.from_lengths([4, 6], x.device)
    with ops.use_backend(name):
        x, y = ops.gated_residual_ada_layer_norm(x, x, row, row, row, segments=segments)
        y = ops.ada_layer_norm(y, row, row, 1e-5, Segments(segments.cu_seqlens, 6))
        y = ops.gated_residual(x, y, row, segments=segments.to("cuda"))
    return ops.swiglu(y)


def attend(qkv: Tensor, weight: Tensor, order: RopeOrder) -> Tensor:
    q, k, v = ops.qkv_norm_rope(qkv, weight, None, weight, grid=(3, 4), order=order)
    q, k = ops.qk_norm_rope(q, k, order="grid", positions=ops.grid_positions(3, 4, "grid"))
    alone: Tensor = ops.qk_norm_rope(q, None, weight)
    cos, sin = ops.rope_tables(ops.grid_positions(3, 4, order), 32)
    q = ops.attention(q, k, v, scale=0.125, is_causal=True)
    return ops.attention(alone * cos + sin, k, v, key_mask=torch.ones(2, 12, dtype=torch.bool))


def embed(t: Tensor, r: Tensor, w: Tensor, condition: Condition) -> Tensor:
    mlp = ops.TimeMLP(w, w, w, w)
    assert condition in ops.CONDITIONS
    embedding, delta = ops.time_pair_embedding(t, r, mlp, condition="t,r,t-r")
    return embedding + delta + ops.time_pair_embedding(t, r, mlp, mlp, condition)[1]


def train(model: nn.Module, x: Tensor, z: Tensor, t: Tensor) -> Tensor:
    report: ops.Report = ops.accelerate(model, new_condition="t-r", rope_order="grid")
    print(report.fused, report.left, ops.explain(), ops.explain(model))
    x_t, v_t, _ = ops.transition_inputs(x, z, 1 - t, t, -t, t)
    with ops.forward_mode():
        F: Tensor = model(x_t)
    squared, cosine = ops.transition_loss(F, x, z, (t, t, t, t, t), v_t, epsilon=0.005)
    ops.restore(model)
    try:
        return ops.transition_step(x, F, (t, -t, None), F, guidance=1.5) + squared + cosine
    except ops.BackendUnavailable:
        raise SystemExit(1) from None
