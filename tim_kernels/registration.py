"""How a fused op enters PyTorch: one schema, a fake kernel, gradients, and no silent tangents.

`torch.func.jvp` through a custom operator gives a zero tangent without an error, because the
operator's autograd kernel sees no tensor that requires grad. So every operator here gets an
autograd kernel that refuses a live tangent, and the public functions reach the operators through
an `autograd.Function` with a `jvp`, which is the one route that carries tangents.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("tim_kernels", "DEF")


def has_tangent(*tensors: Tensor | None) -> bool:
    """Whether any of the tensors carries a tangent at the current forward-mode level."""
    return forward_ad._current_level >= 0 and any(
        tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
        for tensor in tensors
    )


def define(schema: str, kernel: Callable, fake: Callable) -> Callable:
    """Register `tim_kernels::<schema>`: `kernel` runs it, `fake` gives the outputs' shapes."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, kernel, device)
    torch.library.register_fake(f"tim_kernels::{name}", fake, lib=LIBRARY)
    op = getattr(torch.ops.tim_kernels, name).default

    def refuse_tangents(keyset, *args):
        if torch._C._is_fwd_grad_enabled():
            _refuse(name, args)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, refuse_tangents, "Autograd", with_keyset=True)
    return op


def _refuse(name: str, args) -> None:
    if has_tangent(*(arg for arg in args if isinstance(arg, Tensor))):
        raise NotImplementedError(
            f"tim_kernels::{name} has no forward derivative inside torch.compile or as a bare "
            "operator: call the public function of tim_kernels in eager mode"
        )
