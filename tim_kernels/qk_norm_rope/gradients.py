"""Where backward puts dq and dk: in tensors of their own, or where they belong in one dqkv.

`plan(dq_out, dk_out, q, k, *rows_and_tail, dq, dk)` of triton.py and cuda.py makes a function of
the same arguments that fills dq and dk, each None if its gradient does not exist, and returns the
sums of the rows' gradients; or None where it has no kernel for them. For the plan dq and dk have
no memory.
"""

from collections.abc import Callable

import torch


def separate(plan: Callable) -> Callable:
    """The launcher `backward`."""

    def backward(dq_out, dk_out, q, k, *args):
        """(dq, dk, shifts, affine), empty those of dq and dk whose gradient does not exist."""
        fill = plan(dq_out, dk_out, q, k, *args, *map(_without_memory, (dq_out, dk_out)))
        if fill is None:
            return None

        def run(dq_out, dk_out, q, k, *args):
            dq = None if dq_out is None else q.new_empty(q.shape)
            dk = None if dk_out is None else k.new_empty(k.shape)
            sums = fill(dq_out, dk_out, q, k, *args, dq, dk)
            return *(q.new_empty(0) if x is None else x for x in (dq, dk)), *sums

        return run

    return backward


def packed(plan: Callable) -> Callable:
    """The launcher `packed_backward`."""

    def packed_backward(dq_out, dk_out, dv, qkv, *args):
        """(dqkv, shifts, affine)."""
        (q, k, _), slots = qkv.unbind(-3), _without_memory(qkv).unbind(-3)
        fill = plan(dq_out, dk_out, q, k, *args, *_wanted(slots, dq_out, dk_out))
        if fill is None:
            return None

        def run(dq_out, dk_out, dv, qkv, *args):
            dqkv = qkv.new_empty(qkv.shape)
            (q, k, _), slots = qkv.unbind(-3), dqkv.unbind(-3)
            targets = _wanted(slots, dq_out, dk_out)
            sums = fill(dq_out, dk_out, q, k, *args, *targets)
            for slot, target in zip(slots[:2], targets, strict=True):
                if target is None:
                    slot.zero_()
            slots[2].zero_() if dv is None else slots[2].copy_(dv)
            return dqkv, *sums

        return run

    return packed_backward


def _wanted(slots, *gradients) -> list:
    pairs = zip(slots[:2], gradients, strict=True)
    return [None if gradient is None else slot for slot, gradient in pairs]


def _without_memory(x):
    """Contiguous and shaped as x."""
    return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="meta")
