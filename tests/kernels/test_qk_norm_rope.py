import pytest
import torch
from contract import Contract, over, with_gradients
from parity import BACKEND, DEVICE, DTYPES, assert_compiles_once, assert_parity, noise
from qk_norm_rope_forms import FORMS, both, eager_both, problem
from sweep import st

from tim_kernels import Segments
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.qk_norm_rope import op, reference
from tim_kernels.qk_norm_rope.op import qk_norm_rope, qkv_norm_rope

OTHER_HEAD_DIMS = (8, 12, 64, 80, 96, 100)
SIZES = ((1, (1, 1), 1), (2, (1, 1), 3), (1, (1, 9), 6), (1, (5, 7), 1))  # B, grid, H


class TestQKNormRoPE(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], B=1, D=72),
        *over(form="both", dtype=torch.bfloat16, B=1, D=[*OTHER_HEAD_DIMS]),
        *[
            dict(form=form, B=B, grid=grid, H=H, order="grid")
            for form in ("both", "alone")
            for B, grid, H in SIZES
        ],
        *over(form="both", B=1, grid=(1, 3), H=1, D=[4, 128, 160, 256]),
        *over(form="both", B=1, grid=(1, 2), H=[12, 20], D=8),
        dict(form="alone_unturned", D=7),  # an odd head_dim
        *over(form=FORMS, B=3, dtype=torch.bfloat16, cond_dtype=torch.float32, is_shared=True),
    ]
    on_cpu = over(form=FORMS, dtype=[*DTYPES], grid=(4, 8), H=8, D=72)
    empty = [
        *over(form=FORMS, B=0, grid=[(1, 3), (1, 0)], D=8),
        *over(form=FORMS, grid=(1, 0), D=8),
    ]
    layout = over(form=FORMS)
    partial = over(form=FORMS)
    tangent_tolerance = dict(rtol=1e-4, atol=1e-5)
    repeated = over(form=["both", "packed_qkv", "shift_alone"], grid=(5, 8), D=12)
    small = over(form=FORMS, B=1, grid=(1, 2), D=8)
    nonfinite = over(form=FORMS, grid=(2, 2))
    float64 = over(form=FORMS)
    float64_tolerance = 1e-12
    compiled = [
        [
            dict(form=form, B=B, grid=grid, H=5)
            for B, grid in ((2, (2, 3)), (3, (3, 5)), (4, (4, 2)))
        ]
        for form in ("packed_qkv", "alone_unturned")
    ]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        B=st.integers(1, 3),
        grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
        H=st.integers(1, 3),
        D=st.integers(1, 25),
        order=st.sampled_from(reference.ORDERS),
        dtype=st.sampled_from(DTYPES),
        is_shared=st.booleans(),
    )

    def draw(self, data):
        case = super().draw(data)
        return case | dict(D=4 * case["D"])

    def poison(self, inputs):
        inputs[0][0, 0, 0, 3], inputs[0][0, 2, 0, 3] = float("nan"), float("inf")
        inputs[-1].flatten(1 if inputs[-1].ndim > 1 else 0)[..., 5] = float("-inf")

    def test_compiles_once_for_all_lengths(self, compiled):
        function, *_, is_turned = FORMS[compiled[0]["form"]]

        def turned(x, *rest):
            h = x.shape[0]  # so that the grid changes as well
            return function(x, *rest, grid=(h, x.shape[1] // h))

        calls = [problem(**case).inputs for case in compiled]
        assert_compiles_once(turned if is_turned else function, calls)

    def operators(self):
        q, k, *rows = problem("both", grid=(1, 3)).inputs
        affine, shifts = rows[:4], rows[4:]
        weights = affine[0], affine[2]
        sizes = torch.tensor([[1, 3], [3, 1]], dtype=torch.int32, device=DEVICE)
        tail = 1e-5, None, 0
        grid = None, (1, 3), None, "grid"
        yield op.forward_op, with_gradients(q, k, *affine, *shifts, *grid, *tail)
        of_q = q, None, *affine[:2], *[None] * 4
        yield op.forward_op, with_gradients(*of_q, None, None, sizes, "grid", *tail)
        at = torch.tensor([[0, 1], [2, 3], [4, 5]], device=DEVICE)
        tail = at, None, None, "grid", *tail
        yield op.backward_op, (q, k, q, k, *weights, *shifts, *tail)
        qkv = torch.stack((q, k, q), dim=2)
        yield op.packed_backward_op, (q, k, q, qkv, *weights, *shifts, *tail)
        inputs = q, k, *affine, *shifts
        yield op.forward_op.jvp, (*inputs, *tail, *inputs)


def test_key_of_another_dtype():
    q, k, *rows = problem("both").inputs
    with use_backend(BACKEND):
        new_q, new_k = both(q.half(), k.bfloat16(), *rows, grid=(2, 3))
        plain_k = qk_norm_rope(k.bfloat16(), None, *rows[2:4], grid=(2, 3), q_shift=rows[5])
    assert new_q.dtype == torch.float16 and new_k.dtype == torch.bfloat16
    assert torch.equal(new_k, plain_k)


def test_gradient_of_one_output_only():
    args = problem("both").inputs
    for i in (0, 1):
        leaves = [x.clone().requires_grad_() for x in args]
        twins = [x.clone().requires_grad_() for x in args]
        with use_backend(BACKEND):
            both(*leaves, grid=(2, 3))[i].square().sum().backward()
        eager_both(*twins, grid=(2, 3))[i].square().sum().backward()
        for a, b in zip(leaves, twins, strict=True):
            assert (a.grad is None) == (b.grad is None)
            assert b.grad is None or torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(16,), (1, 1, 16), (2, 1, 16)], ids=str)
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_shift_of_every_shape(shape, is_packed):
    """As (2, 16); its gradient comes back in its shape."""
    q, k = (noise(2, 6, 2, 8, seed=i, device=DEVICE) for i in (0, 1))
    weight, shift = noise(8, seed=2, device=DEVICE), noise(*shape, seed=3, device=DEVICE)
    gradients = []
    with use_backend(BACKEND):
        for rows in (shift, shift.reshape(-1, 16).expand(2, 16).clone()):
            rows.requires_grad_()
            if is_packed:
                qkv = torch.stack((q, k, k), dim=2)
                q_out, k_out, _ = qkv_norm_rope(
                    qkv, weight, None, weight, q_shift=rows, k_shift=rows
                )
            else:
                q_out, k_out = qk_norm_rope(q, k, weight, None, weight, q_shift=rows, k_shift=rows)
            (q_out.square() * k_out).sum().backward()
            gradients.append(rows.grad)
    found, expected = gradients
    assert found.shape == shape
    torch.testing.assert_close(found.reshape(-1, 16), expected.sum_to_size(found.numel() // 16, 16))


def test_mean_far_from_zero():
    fused, eager, (q, k, *rows) = problem("both_unshifted", D=72)
    assert_parity(fused, eager, [q + 1e4, k + 1e4, *rows])


def refused(message, *args, **options):
    with pytest.raises(ValueError, match=message):
        qk_norm_rope(*args, **options)


def test_refusals():
    q, k, *rows = problem("both").inputs
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
    segments = Segments(torch.tensor([0, 2], dtype=torch.int32, device=DEVICE), 2)
    refused(r"q must be \(T, heads, head_dim\)", q, segments=segments)
