"""The forms in which the models call qk_norm_rope, each with its eager twin, and their inputs."""

import torch
import torch.nn.functional as F
from contract import Problem
from parity import DEVICE, as_tuple, noise

from tim_kernels import rope_tables
from tim_kernels.qk_norm_rope import reference
from tim_kernels.qk_norm_rope.op import qk_norm_rope, qkv_norm_rope


def eager_one(x, weight=None, bias=None, shift=None, at=None):
    if shift is not None:
        x = x + shift.unflatten(-1, x.shape[-2:])[:, None]
    if weight is not None:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)
    if at is None:
        return x
    cos, sin = (table.unsqueeze(-2) for table in rope_tables(at, x.shape[-1]))
    return (x * cos + reference.rotate_pairs(x) * sin).to(x.dtype)


def positions_of(x, positions):
    """What eager PyTorch takes: the positions themselves."""
    n = torch.arange(x.shape[1], device=x.device)
    if "grid" not in positions:
        return positions.get("positions")
    h, w = positions["grid"]
    length = w if positions.get("order") == "grid" else h
    return torch.stack((n % length, n // length), -1)


def both(q, k, *rows, **positions):
    affine, shifts = rows[:4], rows[4:]
    shifts = dict(zip(("q_shift", "k_shift"), shifts, strict=False))
    return qk_norm_rope(q, k, *affine, **shifts, **positions)


def eager_both(q, k, *rows, **positions):
    at = positions_of(q, positions)
    affine, shifts = (rows[:4] or (None,) * 4), (rows[4:] or (None,) * 2)
    return (
        eager_one(q, *affine[:2], shifts[0], at),
        eager_one(k, *affine[2:], shifts[1], at),
    )


def alone(q, *rows, **positions):
    shift = dict(q_shift=rows[2]) if len(rows) == 3 else {}
    return qk_norm_rope(q, None, *rows[:2], **shift, **positions)


def eager_alone(q, *rows, **positions):
    return eager_one(q, *rows, at=positions_of(q, positions))


def packed_qkv(qkv, *rows, **positions):
    affine, shifts = rows[:4], dict(q_shift=rows[4], k_shift=rows[5])
    return qkv_norm_rope(qkv.unflatten(-2, (3, -1)), *affine, **shifts, **positions)


def eager_packed_qkv(qkv, *rows, **positions):
    q, k, v = qkv.unflatten(-2, (3, -1)).unbind(2)
    return *eager_both(q, k, *rows, **positions), v


def shift_alone(q, shift, **positions):
    return qk_norm_rope(q, q_shift=shift, **positions)


def eager_shift_alone(q, shift, **positions):
    return eager_one(q, shift=shift, at=positions_of(q, positions))


FORMS = {  # the op, its eager twin, how many token tensors, affine rows and shifts; is it turned
    "both": (both, eager_both, 2, 4, 2, True),
    "both_unshifted": (both, eager_both, 2, 4, 0, True),
    "both_unnormed": (both, eager_both, 2, 0, 0, True),
    "alone": (alone, eager_alone, 1, 2, 1, True),
    "alone_unturned": (alone, eager_alone, 1, 2, 0, False),
    "packed_qkv": (packed_qkv, eager_packed_qkv, 1, 4, 2, True),
    "shift_alone": (shift_alone, eager_shift_alone, 1, 0, 1, True),
}


def problem(
    form, B=2, grid=(2, 3), H=2, D=24, dtype=torch.float32, cond_dtype=None, is_shared=False,
    **options,
):  # fmt: skip
    """`is_shared` is one shift for all samples; positions given are taken, not the grid."""
    fused, eager, n_tokens, n_affine, n_shifts, is_turned = FORMS[form]
    cond_dtype, N, heads = cond_dtype or dtype, grid[0] * grid[1], 3 * H if "qkv" in form else H
    inputs = [noise(B, N, heads, D, seed=i, dtype=dtype, device=DEVICE) for i in range(n_tokens)]
    shapes = [(D,)] * n_affine + [(1 if is_shared else max(B, 1), H * D)] * n_shifts
    for i, shape in enumerate(shapes):
        inputs.append(noise(*shape, seed=10 + i, dtype=cond_dtype, device=DEVICE))
    if "positions" not in options:
        options["grid"] = grid
    options = options if is_turned else {}

    def twin(*args):
        if cond_dtype != dtype:  # eager LayerNorm wants one dtype
            args = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in args]
        return tuple(out.to(dtype) for out in as_tuple(eager(*args, **options)))

    return Problem(lambda *args: fused(*args, **options), twin, inputs)
