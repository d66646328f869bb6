"""Gradients of q and k that belong in one gradient of a packed qkv.

The launcher `packed_backward` takes (dq_out, dk_out, dv, qkv, …) where `backward` takes
(dq_out, dk_out, q, k, …), and makes dqkv, its tensor 0.
"""

from torch import Tensor

from ..launch.calls import Out
from ..launch.views import In

QKV = 3  # the argument


def as_backward(args: tuple) -> tuple:
    """The arguments of `backward`."""
    q, k, _ = args[QKV].unbind(-3)
    return *args[:2], q, k, *args[4:]


def of_qkv(view: In, which: int) -> In:
    """The view of q (0) or k (1), taken of qkv."""

    def change(qkv: Tensor) -> Tensor:
        x = qkv.select(-3, which)
        return x if view.change is None else view.change(x)

    return In(QKV, view.strides, change)


def slot(strides: tuple[int, ...], which: int) -> Out:
    """Where dq (0) or dk (1) belongs in dqkv."""
    return Out(0, strides, lambda dqkv: dqkv.select(-3, which))


def filled(call):
    """`call`, and then what it does not write of dqkv: dv, and zeros for what has no gradient."""

    def run(*args):
        dqkv, *sums = call(*args)
        for which, gradient in ((0, args[0]), (1, args[1]), (2, args[2])):
            if gradient is None:
                dqkv.select(-3, which).zero_()
            elif which == 2:
                dqkv.select(-3, which).copy_(gradient)
        return dqkv, *sums

    return run
