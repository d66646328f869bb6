import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import (
    DEVICE,
    DTYPES,
    assert_adjoint,
    assert_compiles_once,
    assert_gradcheck,
    assert_nonfinite_like_reference,
    assert_parity,
    assert_same_every_run,
    noise,
)

from tim_kernels import Segments, rope_tables
from tim_kernels.backend import use_backend
from tim_kernels.qk_norm_rope import op, reference
from tim_kernels.qk_norm_rope.op import qk_norm_rope, qkv_norm_rope

HEAD_DIMS = (8, 12, 64, 72, 80, 96, 100)


def eager_one(x, weight=None, bias=None, shift=None, places=None):
    if shift is not None:
        x = x + shift.unflatten(-1, x.shape[-2:])[:, None]
    if weight is not None:
        x = F.layer_norm(x, x.shape[-1:], weight, bias, eps=1e-5)
    if places is None:
        return x
    cos, sin = (table.unsqueeze(-2) for table in rope_tables(places, x.shape[-1]))
    return (x * cos + reference.rotate_pairs(x) * sin).to(x.dtype)


def places(x, positions):
    """Positions as the eager twin needs them."""
    n = torch.arange(x.shape[1], device=x.device)
    if "grid" not in positions:
        return positions.get("positions")
    h, w = positions["grid"]
    divisor = w if positions.get("order") == "grid" else h
    return torch.stack((n % divisor, n // divisor), -1)


def both(q, k, *rows, **positions):
    affine, shifts = rows[:4], rows[4:]
    shifts = dict(zip(("q_shift", "k_shift"), shifts, strict=False))
    return qk_norm_rope(q, k, *affine, **shifts, **positions)


def eager_both(q, k, *rows, **positions):
    at = places(q, positions)
    affine, shifts = (rows[:4] or (None,) * 4), (rows[4:] or (None,) * 2)
    return (
        eager_one(q, *affine[:2], shifts[0], at),
        eager_one(k, *affine[2:], shifts[1], at),
    )


def alone(q, *rows, **positions):
    shift = dict(q_shift=rows[2]) if len(rows) == 3 else {}
    return qk_norm_rope(q, None, *rows[:2], **shift, **positions)


def eager_alone(q, *rows, **positions):
    return eager_one(q, *rows, places=places(q, positions))


def packed_qkv(qkv, *rows, **positions):
    affine, shifts = rows[:4], dict(q_shift=rows[4], k_shift=rows[5])
    return qkv_norm_rope(qkv.unflatten(-2, (3, -1)), *affine, **shifts, **positions)


def eager_packed_qkv(qkv, *rows, **positions):
    q, k, v = qkv.unflatten(-2, (3, -1)).unbind(2)
    return *eager_both(q, k, *rows, **positions), v


def shift_alone(q, shift, **positions):
    return qk_norm_rope(q, q_shift=shift, **positions)


def eager_shift_alone(q, shift, **positions):
    return eager_one(q, shift=shift, places=places(q, positions))


FORMS = {  # the op, its eager twin, how many token tensors, affine rows and shifts; is it turned
    "both": (both, eager_both, 2, 4, 2, True),
    "both_unshifted": (both, eager_both, 2, 4, 0, True),
    "both_unnormed": (both, eager_both, 2, 0, 0, True),
    "alone": (alone, eager_alone, 1, 2, 1, True),
    "alone_unturned": (alone, eager_alone, 1, 2, 0, False),
    "packed_qkv": (packed_qkv, eager_packed_qkv, 1, 4, 2, True),
    "shift_alone": (shift_alone, eager_shift_alone, 1, 0, 1, True),
}


def inputs(form, B=2, N=6, H=2, D=24, dtype=torch.float32, row_dtype=None, rows=None):
    *_, tokens, n_affine, n_shifts, _ = FORMS[form]
    inner = 3 * H if form == "packed_qkv" else H
    xs = [noise(B, N, inner, D, seed=i, dtype=dtype, device=DEVICE) for i in range(tokens)]
    row_dtype = row_dtype or dtype
    shapes = [(D,)] * n_affine + [(rows or B, H * D)] * n_shifts
    return xs + [
        noise(*shape, seed=10 + i, dtype=row_dtype, device=DEVICE) for i, shape in enumerate(shapes)
    ]


def bound(form, grid=None, **positions):
    """The op and its eager twin with the form's positions."""
    fused, eager, *_, is_turned = FORMS[form]
    if grid is not None:
        positions["grid"] = grid
    if not is_turned:
        positions = {}
    return (lambda *args: fused(*args, **positions)), (lambda *args: eager(*args, **positions))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    for D in HEAD_DIMS if form == "both" and dtype == torch.bfloat16 else (72,):
        assert_parity(*bound(form, (2, 3)), inputs(form, 1, D=D, dtype=dtype))


@pytest.mark.parametrize("B, h, w, H", [(1, 1, 1, 1), (2, 1, 1, 3), (1, 1, 9, 6), (1, 5, 7, 1)])
@pytest.mark.parametrize("form", ["both", "alone"])
def test_sizes(form, B, h, w, H):
    assert_parity(*bound(form, (h, w), order="grid"), inputs(form, B, h * w, H))


@pytest.mark.parametrize("D", [4, 128, 160, 256])
def test_other_head_dims(D):
    assert_parity(*bound("both", (1, 3)), inputs("both", 1, 3, 1, D))


@pytest.mark.parametrize("H", [12, 20])
def test_many_heads(H):
    assert_parity(*bound("both", (1, 2)), inputs("both", 1, 2, H, 8))


def test_odd_head_dim_without_rotation():
    assert_parity(*bound("alone_unturned"), inputs("alone_unturned", D=7))


@pytest.mark.parametrize("B, N", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form, B, N):
    fused, _ = bound(form, (1, N))
    leaves = [x.requires_grad_() for x in inputs(form, B, N, D=8, rows=max(B, 1))]
    with use_backend("triton"):
        out = fused(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        assert all(o.shape == (B, N, 2, 8) for o in out)
        sum(o.sum() for o in out).backward()
    for leaf in leaves:
        assert leaf.grad is None or not leaf.grad.any()


@pytest.mark.parametrize("form", FORMS)
def test_one_row_for_all_samples_and_mixed_dtypes(form):
    fused, eager = bound(form, (2, 3))
    args = inputs(form, B=3, dtype=torch.bfloat16, row_dtype=torch.float32, rows=1)

    def mixed(*args):  # eager LayerNorm wants one dtype
        out = eager(*(x.to(torch.promote_types(x.dtype, torch.float32)) for x in args))
        out = out if isinstance(out, tuple) else (out,)
        return tuple(o.to(args[0].dtype) for o in out)

    assert_parity(fused, mixed, args)


def test_key_of_another_dtype():
    q, k, *rows = inputs("both")
    with use_backend("triton"):
        new_q, new_k = both(q.half(), k.bfloat16(), *rows, grid=(2, 3))
        plain_k = qk_norm_rope(k.bfloat16(), None, *rows[2:4], grid=(2, 3), q_shift=rows[5])
    assert new_q.dtype == torch.float16 and new_k.dtype == torch.bfloat16
    assert torch.equal(new_k, plain_k)


@pytest.mark.parametrize("order", reference.ORDERS)
@pytest.mark.parametrize("h, w", [(3, 5), (5, 3), (1, 4)])
def test_positions_from_every_source_agree(order, h, w):
    q, k, *rows = inputs("both", N=h * w)
    grid = reference.grid_positions(h, w, order, DEVICE)
    sizes = torch.tensor([[h, w]] * 2, dtype=torch.int32, device=DEVICE)
    sources = (
        dict(grid=(h, w), order=order),
        dict(sizes=sizes, order=order),
        dict(positions=grid),
        dict(positions=grid.int()),
        dict(positions=grid.expand(2, -1, -1)),
    )
    for backend in ("reference", "triton"):
        with use_backend(backend):
            first, *others = [both(q, k, *rows, **source) for source in sources]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_every_sample_with_its_own_positions():
    q, k, *rows = inputs("both", N=3)
    at = torch.tensor([[[0, 1], [7, 2], [3, 3]], [[9, 9], [-4, 0], [1, 2]]], device=DEVICE)
    with use_backend("triton"):
        together = both(q, k, *rows, positions=at)
        for b in range(2):
            shifts = [row[b : b + 1] for row in rows[4:]]
            one = both(q[b : b + 1], k[b : b + 1], *rows[:4], *shifts, positions=at[b])
            assert all(torch.equal(x[b], y[0]) for x, y in zip(together, one, strict=True))


@pytest.mark.parametrize("top", [1023, 4096, 100_003, 2**24 - 1])
def test_far_positions(top):
    at = torch.tensor([[top, 0], [1, top], [top - 1, top - 2], [top // 3, top // 7]], device=DEVICE)
    x = inputs("both_unnormed", N=4, D=72)
    assert_parity(*bound("both_unnormed", positions=at), x)
    with use_backend("triton"):
        cos, sin = qk_norm_rope(torch.tensor([1.0, 0.0]).repeat(36).expand(1, 4, 1, 72).to(DEVICE),
                                positions=at).unflatten(-1, (36, 2)).unbind(-1)  # fmt: skip
    angles = at.float()[..., None] * reference.frequencies(72, DEVICE)
    angles = angles.flatten(-2).double()[None, :, None]
    assert (cos - angles.cos()).abs().max() < 1.2e-7 and (sin - angles.sin()).abs().max() < 1.2e-7


def test_packed_qkv_is_read_in_place():
    H, D = 2, 72
    qkv = noise(2, 6, 3, H, D, device=DEVICE)
    rows = inputs("both", D=D)[2:]
    wide = noise(2, 4 * H * D, seed=9, device=DEVICE)
    rows[4:] = wide[:, : H * D], wide[:, H * D : 2 * H * D]
    q, k, _ = qkv.unbind(2)
    with use_backend("triton"):
        views = both(q, k, *rows, grid=(2, 3))
        dense = both(*(x.contiguous() for x in (q, k, *rows)), grid=(2, 3))
        heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
        swapped = both(*heads_first, *rows, grid=(2, 3))
        gaps = both(q.mT.contiguous().mT, k, *rows, grid=(2, 3))
    for a, *others in zip(views, dense, swapped, gaps, strict=True):
        assert a.is_contiguous() and all(torch.equal(a, b) for b in others)


LENGTHS = [3, 0, 1, 6, 0]


def packed_positions(sizes, order):
    parts = [reference.grid_positions(h, w, order, DEVICE) for h, w in sizes]
    return torch.cat(parts)


@pytest.mark.parametrize("source", ["sizes", "positions", "grid", "none"])
@pytest.mark.parametrize("form", ["both", "alone"])
def test_packed_segments(form, source):
    """Lengths 0 and 1 among others; each segment as if it were alone."""
    cu = torch.tensor([0, 3, 3, 4, 10, 10], dtype=torch.int32, device=DEVICE)
    segments = Segments(cu, max_length=8)
    sizes, order = [(1, 3), (0, 0), (1, 1), (3, 2), (0, 5)], "grid"
    if source == "grid":
        sizes, order = [(2, 9)] * 5, "upstream"
        n = [torch.arange(length, device=DEVICE) for length in LENGTHS]
        at = torch.cat([torch.stack((i % 2, i // 2), -1) for i in n])
    else:
        at = packed_positions(sizes, order)
    positions = dict(
        sizes=dict(sizes=torch.tensor(sizes, dtype=torch.int32, device=DEVICE), order=order),
        positions=dict(positions=at),
        grid=dict(grid=(2, 9), order=order),
        none={},
    )[source]
    fused, eager, tokens, n_affine, *_ = FORMS[form]
    args = inputs(form, B=5)
    args[:tokens] = [noise(10, 2, 24, seed=i, device=DEVICE) for i in range(tokens)]

    def packed(*args):
        return fused(*args, segments=segments, **positions)

    def apart(*args):
        xs, rows = [x[:, None] for x in args[:tokens]], list(args[tokens:])
        index = torch.tensor(LENGTHS, device=DEVICE)
        rows[n_affine:] = [r.repeat_interleave(index, dim=0) for r in rows[n_affine:]]
        where = {} if source == "none" else dict(positions=at[:, None])
        out = eager(*xs, *rows, **where)
        return tuple(o[:, 0] for o in out) if isinstance(out, tuple) else out[:, 0]

    assert_parity(packed, apart, args)


@pytest.mark.parametrize("form", ["both", "packed_qkv", "shift_alone"])
def test_reruns_are_equal_and_derivatives_adjoint(form):
    fused, _ = bound(form, (5, 8))
    args = inputs(form, B=2, N=40, D=12)
    assert_same_every_run(fused, args)
    assert_adjoint(fused, args)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form):
    assert_gradcheck(bound(form, (1, 2))[0], inputs(form, B=1, N=2, D=8))


def test_gradient_of_one_output_only():
    args = inputs("both")
    for i in (0, 1):
        leaves = [x.clone().requires_grad_() for x in args]
        twins = [x.clone().requires_grad_() for x in args]
        with use_backend("triton"):
            both(*leaves, grid=(2, 3))[i].square().sum().backward()
        eager_both(*twins, grid=(2, 3))[i].square().sum().backward()
        for a, b in zip(leaves, twins, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert b.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)


def test_packed_qkv_returns_a_view_and_fills_one_gradient():
    qkv, *rows = inputs("packed_qkv", D=8)
    for used in ((0,), (1, 2), (2,), (0, 1, 2)):
        gradients = []
        for function, backend in ((packed_qkv, "triton"), (eager_packed_qkv, "reference")):
            leaf = qkv.clone().requires_grad_()
            with use_backend(backend):
                outputs = function(leaf, *rows, grid=(2, 3))
                sum(outputs[i].square().sum() for i in used).backward()
            assert outputs[2].data_ptr() == leaf[:, :, 4:].data_ptr()
            gradients.append(leaf.grad)
        assert gradients[0].is_contiguous()
        assert torch.allclose(*gradients, rtol=1e-4, atol=1e-5)


def test_tangent_of_some_inputs_only():
    args = inputs("both")
    fused, eager = bound("both", (2, 3))
    for i, x in enumerate(args):

        def of_one(function, y, i=i):
            return function(*args[:i], y, *args[i + 1 :])

        direction = noise(*x.shape, seed=30 + i, device=DEVICE)
        with use_backend("triton"):
            ours = torch.func.jvp(lambda y: of_one(fused, y), (x,), (direction,))[1]
        theirs = torch.func.jvp(lambda y: of_one(eager, y), (x,), (direction,))[1]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def test_mean_far_from_zero():
    q, k, *rows = inputs("both_unshifted", D=72)
    assert_parity(*bound("both_unshifted", (2, 3)), [q + 1e4, k + 1e4, *rows])


@pytest.mark.parametrize("form", FORMS)
def test_nan_and_infinity(form):
    args = inputs(form, N=4)
    for row, value in ((0, float("nan")), (2, float("inf"))):
        args[0][0, row, 0, 3] = value
    args[-1].flatten(1 if args[-1].ndim > 1 else 0)[..., 5] = float("-inf")
    assert_nonfinite_like_reference(bound(form, (2, 2))[0], args)


@pytest.mark.parametrize("form", ["packed_qkv", "alone_unturned"])
def test_compiles_once_for_all_lengths(form):
    fused, *_, is_turned = FORMS[form]
    calls = [inputs(form, B, h * w, H=5) for B, h, w in ((2, 2, 3), (3, 3, 5), (4, 4, 2))]
    if not is_turned:
        return assert_compiles_once(fused, calls)

    def turned(x, *rest):
        h = x.shape[0]  # so that the grid changes as well
        return fused(x, *rest, grid=(h, x.shape[1] // h))

    assert_compiles_once(turned, calls)


def test_opcheck():
    q, k, *rows = inputs("both", N=3)
    affine, shifts = rows[:4], rows[4:]
    at = torch.tensor([[0, 1], [2, 3], [4, 5]], device=DEVICE)
    sizes = torch.tensor([3, 3], dtype=torch.int32, device=DEVICE)
    with use_backend("triton"):
        for args in (
            (q, k, *affine, *shifts, None, 3, None, 1e-5, None, 0),
            (q, None, *affine[:2], None, None, None, None, None, 0, sizes, 1e-5, None, 0),
        ):
            args = [
                a.detach().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point()
                else a for a in args
            ]  # fmt: skip
            torch.library.opcheck(op.forward_op, tuple(args))
        weights = affine[0], affine[2]
        tail = at, 0, None, 1e-5, None, 0
        torch.library.opcheck(op.backward_op, (q, k, q, k, *weights, *shifts, *tail))
        qkv = torch.stack((q, k, q), dim=2)
        torch.library.opcheck(op.packed_backward_op, (q, k, q, qkv, *weights, *shifts, *tail))
        torch.library.opcheck(op.jvp_op, (q, k, *weights, *shifts, q, k, *affine, *shifts, *tail))


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    form=st.sampled_from(sorted(FORMS)),
    B=st.integers(1, 3),
    h=st.integers(1, 4),
    w=st.integers(1, 4),
    H=st.integers(1, 3),
    D=st.integers(1, 25),
    order=st.sampled_from(reference.ORDERS),
    dtype=st.sampled_from(DTYPES),
    shared=st.booleans(),
)
def test_any_shape(form, B, h, w, H, D, order, dtype, shared):
    args = inputs(form, B, h * w, H, 4 * D, dtype, rows=1 if shared else B)
    assert_parity(*bound(form, (h, w), order=order), args)


def refused(message, *args, **options):
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*args, **options)


def test_refusals():
    q, k, *rows = inputs("both")
    weight, bias = rows[:2]
    at = torch.zeros(6, 2, dtype=torch.int64, device=DEVICE)
    refused(r"k must be shaped as q", q, k[:, 1:])
    refused(r"q must be \(B, N, heads, head_dim\)", q[0])
    refused(r"q must be \(B, N, heads, head_dim\)", q[..., None])
    refused("floating-point", q.long())
    refused(r"q_weight must be \(24,\)", q, None, weight[1:])
    refused("q_bias is given, but no q_weight", q, None, None, bias)
    refused("k_weight is given, but no k", q, None, None, None, weight)
    refused("k_shift is given, but no k", q, k_shift=rows[4])
    refused(r"q_shift must be \(2, 48\) or \(1, 48\)", q, q_shift=rows[4][:, 1:])
    refused(
        "one of positions, grid and sizes, got positions and grid", q, positions=at, grid=(2, 3)
    )
    refused(r"grid must be .* 6; got \(2, 4\)", q, grid=(2, 4))
    refused("order must be one of", q, grid=(2, 3), order="rows")
    refused("multiple of 4", q[..., :6], grid=(2, 3))
    refused(r"positions must be .*int64, \(2, 6, 2\) or \(6, 2\)", q, positions=at[1:])
    refused("positions must be", q, positions=at.float())
    refused("sizes must be torch.int32", q, sizes=at[:2])
    with pytest.raises(ValueError, match=r"qkv must be \(B, N, 3, heads, head_dim\)"):
        qkv_norm_rope(torch.stack((q, k), dim=2))
    segments = Segments(torch.tensor([0, 6], dtype=torch.int32, device=DEVICE), 6)
    refused(r"q must be \(T, heads, head_dim\)", q, segments=segments)
