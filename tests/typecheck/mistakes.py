"""What a user may get wrong: a type checker complains of every marked line. Never run."""

from torch import Tensor, nn

import tim_kernels as ops


def mistakes(model: nn.Module, x: Tensor, name: str) -> None:
    ops.set_backend("tritn")  # wrong
    ops.set_backend(name)  # wrong
    with ops.use_backend("gpu"):  # wrong
        pass
    backend: ops.Backend = "pytorch"  # wrong
    ops.qk_norm_rope(x, order="rows")  # wrong
    ops.qk_norm_rope(x, grid=3)  # wrong
    ops.qk_norm_rope(x, None, k_weight=x)  # wrong
    first, second = ops.qkv_norm_rope(x, order="grid")  # wrong
    ops.qkv_norm_rope(x, order="row-major")  # wrong
    ops.grid_positions(3, 4, "upstraem")  # wrong
    ops.time_pair_embedding(x, x, ops.TimeMLP(x, x, x, x), condition="r-t")  # wrong
    ops.accelerate(model, new_condition="t")  # wrong
    ops.accelerate(model, rope_order="rows")  # wrong
    ops.Segments([0, 4, 10], 6)  # wrong
    ops.Segments.from_lengths([1.5])  # wrong
    ops.ada_layer_norm(x, x, x, segments=(x, 6))  # wrong
    ops.attention(x, x, x, causal=True)  # wrong
    ops.explain("cuda")  # wrong
    ops.ada_layer_norm(x, norm="batch")  # wrong
    ops.transition_step(x, x, (x, x))  # wrong
    number: int = ops.swiglu(x)  # wrong
    print(backend, first, second, number)
