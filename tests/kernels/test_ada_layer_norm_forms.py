"""adaLN beyond TiM's: conditioning of each token, weight and bias of the norm, RMSNorm."""

import pytest
import torch
import torch.nn.functional as F
from contract import Contract, Problem, over, with_gradients
from parity import (
    BACKEND,
    DEVICE,
    DTYPES,
    EMULATED,
    as_tuple,
    assert_compiles_once,
    assert_parity,
    noise,
    run,
)
from sweep import st

from tim_kernels import (
    Segments,
    ada_layer_norm,
    gated_residual,
    gated_residual_ada_layer_norm,
)
from tim_kernels.ada_layer_norm import cuda, op
from tim_kernels.dispatch.backend import use_backend

ROW, ALL, TOKEN, CHANNELS = "BC", "1C", "BNC", "C"  # the dimensions of an argument
X = dict(x=TOKEN)
RESIDUAL = dict(x=TOKEN, branch=TOKEN)
AFFINE = dict(weight=CHANNELS, bias=CHANNELS)
FORMS = {
    "token": X | dict(shift=TOKEN, scale=TOKEN),
    "token_residual": RESIDUAL | dict(gate=TOKEN, branch_bias=ROW),
    "token_both": RESIDUAL | dict(gate=TOKEN, shift=TOKEN, scale=TOKEN),
    "token_shift": RESIDUAL | dict(gate=ROW, shift=TOKEN, scale=ROW, branch_bias=ROW),
    "token_scale": RESIDUAL | dict(gate=ROW, shift=ALL, scale=TOKEN, branch_bias=ROW) | AFFINE,
    "affine": X | dict(shift=ROW, scale=ROW) | AFFINE,
    "affine_both": RESIDUAL | dict(gate=ROW, shift=ROW, scale=ALL) | AFFINE,
    "layer": RESIDUAL | AFFINE,
    "rms": X | dict(scale=ROW, weight=CHANNELS),
    "rms_plain": X,
    "rms_both": RESIDUAL | dict(gate=TOKEN, shift=ROW, scale=TOKEN, weight=CHANNELS),
}
MOST = ["token_both", "token_shift", "token_scale", "affine_both", "layer", "rms_both"]


def norm_of(form):
    return "rms" if form.startswith("rms") else "layer"


def fused(x, branch=None, gate=None, shift=None, scale=None, branch_bias=None, **rest):
    if branch is None:
        return ada_layer_norm(x, shift, scale, **rest)
    if rest.pop("has_norm", True):
        return gated_residual_ada_layer_norm(
            x, branch, gate, shift, scale, branch_bias=branch_bias, **rest
        )
    return gated_residual(x, branch, gate, branch_bias, segments=rest.get("segments"))


def eager(
    x, branch=None, gate=None, shift=None, scale=None, branch_bias=None, weight=None, bias=None,
    norm="layer", has_norm=True,
):  # fmt: skip
    """Rows are (B, 1, C) or (1, 1, C), what is of each token (B, N, C)."""
    new = x
    if branch is not None:
        branch = branch if branch_bias is None else branch + branch_bias
        new = x + (branch if gate is None else gate * branch)
    if not has_norm:
        return new
    if norm == "rms":
        y = F.rms_norm(new, x.shape[-1:], weight, eps=1e-6)
        y = y if bias is None else y + bias
    else:
        y = F.layer_norm(new, x.shape[-1:], weight, bias, eps=1e-6)
    y = y if scale is None else y * (1 + scale)
    y = y if shift is None else y + shift
    return y if branch is None else (new, y)


def named(form):
    """Its arguments, and what says which op it is."""
    words = dict(norm=norm_of(form))
    return FORMS[form], dict(has_norm=False) if form == "token_residual" else words


def problem(form, B=2, N=5, C=96, dtype=torch.float32, cond_dtype=None):
    kinds, words = named(form)
    sizes = {ROW: (B, C), ALL: (1, C), TOKEN: (B, N, C), CHANNELS: (C,)}
    inputs = []
    for i, (name, kind) in enumerate(kinds.items()):
        of = dtype if name in RESIDUAL else cond_dtype or dtype
        inputs.append(noise(*sizes[kind], seed=i, dtype=of, device=DEVICE))

    def ours(*inputs):
        return fused(**dict(zip(kinds, inputs, strict=True)), **words)

    def twin(*inputs):
        if cond_dtype:
            inputs = [x.to(cond_dtype) for x in inputs]
        given = dict(zip(kinds, inputs, strict=True))
        given |= {name: given[name][:, None] for name, kind in kinds.items() if kind in (ROW, ALL)}
        out = eager(**given, **words)
        return tuple(each.to(dtype) for each in as_tuple(out))

    return Problem(ours, twin, inputs)


class TestForms(Contract):
    problem = staticmethod(problem)
    parity = [
        *over(form=FORMS, dtype=[*DTYPES], C=100),
        *over(form=MOST, dtype=torch.bfloat16, C=1152, N=3),
        *over(form="token_scale", B=1, N=2, C=[1153, 8192]),
        *over(form=MOST, dtype=torch.bfloat16, cond_dtype=torch.float32),
    ]
    on_cpu = [
        *over(form=MOST, dtype=[*DTYPES], N=16, C=1024),
        *over(form=MOST, dtype=torch.bfloat16, cond_dtype=torch.float32, N=16, C=1024),
    ]
    empty = over(form=MOST, B=[0, 2], N=0, C=8)
    layout = over(form=MOST, B=2, N=7)
    partial = over(form=MOST, B=2, N=3, C=12)
    tangent_tolerance = dict(rtol=1e-4, atol=1e-5)
    repeated = over(form=["token_shift", "token_scale", "rms_both"], B=2, N=40)
    small = over(form=FORMS, B=2, N=2, C=6)
    nonfinite = over(form=MOST, N=4)
    float64 = over(form=FORMS)
    float64_tolerance = 1e-12
    compiled = [
        [dict(form=form, B=B, N=N) for B, N in ((2, 5), (3, 7), (4, 6))]
        for form in ("token_shift", "token_scale", "rms_both")
    ]
    draws = dict(
        form=st.sampled_from(sorted(FORMS)),
        B=st.integers(1, 4),
        N=st.integers(1, 20),
        C=st.integers(3, 200),
        dtype=st.sampled_from(DTYPES),
    )

    def poison(self, inputs):
        inputs[0][0, 0, 3], inputs[0][0, 2, 3] = float("nan"), float("inf")
        inputs[-1].flatten()[-1] = float("-inf")

    def operators(self):
        for form in ("token_scale", "rms_both"):
            kinds, _ = named(form)
            given = dict(zip(kinds, problem(form, N=3, C=24).inputs, strict=True))
            given["norm_bias"], given["bias"] = given.get("bias"), given.get("branch_bias")
            names = ("x", "branch", "gate", "bias", "shift", "scale", "weight", "norm_bias")
            inputs = [given.get(name) for name in names]
            rest = 1e-6, norm_of(form), None, 0
            yield op.forward_op, with_gradients(*inputs, *rest)
            yield op.forward_op.jvp, (*inputs, *rest, *inputs)
            if form == "token_scale":  # has every sum
                x, branch, gate, bias, _, *others = inputs
                yield op.backward_op, (x, x, x, branch, gate, bias, *others, *rest)


@pytest.mark.parametrize("form", FORMS)
def test_packed_segments(form):
    """Lengths 0 and 1 among others; each segment as if it were alone."""
    kinds, words = named(form)
    lengths = torch.tensor([3, 0, 1, 6, 0], device=DEVICE)
    cu = torch.tensor([0, 3, 3, 4, 10, 10], dtype=torch.int32, device=DEVICE)
    sizes = {ROW: (5, 72), ALL: (1, 72), TOKEN: (10, 72), CHANNELS: (72,)}
    kinds = dict(kinds)
    inputs = [noise(*sizes[k], seed=i, device=DEVICE) for i, k in enumerate(kinds.values())]

    def packed(*inputs):
        given = dict(zip(kinds, inputs, strict=True))
        return fused(**given, **words, segments=Segments(cu, max_length=8))

    def apart(*inputs):
        given = dict(zip(kinds, inputs, strict=True))
        rows = [name for name, kind in kinds.items() if kind == ROW]
        given |= {name: given[name].repeat_interleave(lengths, dim=0) for name in rows}
        return eager(**given, **words)

    assert_parity(packed, apart, inputs)


SHAPES = [(8,), (1, 8), (3, 8), (3, 1, 8), (1, 1, 8), (1, 4, 8), (3, 4, 8)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_conditioning_of_every_shape(shape):
    """Gradients come back in it, and tangents go in."""
    x, branch = (noise(3, 4, 8, seed=i, device=DEVICE) for i in (0, 1))
    cond = [noise(*shape, seed=2 + i, device=DEVICE) for i in range(3)]
    row = (noise(*shape, seed=5, device=DEVICE),) if 4 not in shape else ()

    def ours(x, branch, gate, shift, scale, bias=None):
        return gated_residual_ada_layer_norm(x, branch, gate, shift, scale, branch_bias=bias)

    def twin(x, branch, *cond):
        gate, shift, scale, *bias = (c if c.ndim != 2 else c[:, None] for c in cond)
        return eager(x, branch, gate, shift, scale, *bias)

    assert_parity(ours, twin, [x, branch, *cond, *row])
    result = run(ours, [x, branch, *cond, *row], None, not EMULATED)
    assert [g.shape[1:] for g in result["gradients"][2:]] == [c.shape for c in [*cond, *row]]


@pytest.mark.parametrize("sizes", ["{C}", "{B} 1 {C}", "1 {N} {C}"])
def test_conditioning_of_every_shape_compiles_once(sizes):
    calls = []
    for B, N in ((2, 5), (3, 7), (4, 6)):
        shape = map(int, sizes.format(B=B, N=N, C=8).split())
        calls.append((noise(B, N, 8, device=DEVICE), noise(*shape, seed=1, device=DEVICE)))
    assert_compiles_once(lambda x, cond: ada_layer_norm(x, cond, cond), calls)


def test_packed_conditioning_of_every_shape():
    """(T, C) of as many tokens as samples is a row a sample; (1, T, C) never is."""
    cu = torch.tensor([0, 2, 2, 3], dtype=torch.int32, device=DEVICE)
    segments, sample = Segments(cu, 2), torch.tensor([0, 0, 2], device=DEVICE)
    x, cond = noise(3, 8, device=DEVICE), noise(3, 8, seed=1, device=DEVICE)

    def ours(cond):
        return ada_layer_norm(x, cond, cond, segments=segments)

    with use_backend(BACKEND):
        of_sample = eager(x, shift=cond[sample], scale=cond[sample])
        torch.testing.assert_close(ours(cond), of_sample)
        torch.testing.assert_close(ours(cond[:, None]), of_sample)
        torch.testing.assert_close(ours(cond[None]), eager(x, shift=cond, scale=cond))
        torch.testing.assert_close(ours(cond[0]), eager(x, shift=cond[0], scale=cond[0]))
        leaf = cond[None].clone().requires_grad_()
        ours(leaf).sum().backward()
        assert leaf.grad.shape == leaf.shape
        with pytest.raises(ValueError, match=r"shift must be \(3, 8\) or \(1, 8\), or \(3, 8\)"):
            ours(cond[:2])


def test_rows_that_all_samples_share_by_token():
    """Views of one row, and of one (1, N, C), are read where they lie."""
    x, shift = noise(3, 4, 8, device=DEVICE), noise(1, 4, 8, seed=1, device=DEVICE)
    with use_backend(BACKEND):
        expected = ada_layer_norm(x, shift.repeat(3, 1, 1), shift.repeat(3, 1, 1))
        assert torch.equal(ada_layer_norm(x, shift, shift.expand(3, 4, 8)), expected)


def test_a_gradient_of_one_output_alone():
    """Of x' nothing reaches the norm; of y all does."""
    for form in MOST:
        ours, _, inputs = problem(form, C=8)
        kinds, _ = named(form)
        with use_backend(BACKEND):
            for output in (0, 1):
                leaves = [x.clone().requires_grad_() for x in inputs]
                ours(*leaves)[output].square().sum().backward()
                for name, leaf in zip(kinds, leaves, strict=True):
                    is_of_norm = name in ("shift", "scale", "weight", "bias")
                    has_gradient = leaf.grad is not None and bool(leaf.grad.any())
                    assert has_gradient == (output == 1 or not is_of_norm), (form, name)


def test_mean_far_from_zero():
    given = dict(zip(FORMS["affine"], problem("affine", C=1152).inputs, strict=True))
    x, *rest = given.values()
    rows = dict(weight=rest[2], bias=rest[3])
    assert_parity(
        lambda x: ada_layer_norm(x, *rest[:2], **rows),
        lambda x: eager(x, shift=rest[0][:, None], scale=rest[1][:, None], **rows),
        [x + 1e4],
    )


def change(**given):
    x = noise(2, 5, 96)
    arguments = dict(branch=x, gate=x[:, 0], shift=x[:, 0], scale=x[:, 0]) | given
    return gated_residual_ada_layer_norm(x, **arguments)


@pytest.mark.parametrize(
    "given, message",
    [
        (
            dict(shift=torch.zeros(2, 4, 96)),
            r"shift must be \(2, 96\) or \(1, 96\), or \(2, 5, 96\) of each token; got \(2, 4",
        ),
        (dict(scale=torch.zeros(3, 1, 96)), r"scale must be .* got \(3, 1, 96\)"),
        (dict(gate=torch.zeros(1, 4, 96)), r"gate must be .* got \(1, 4, 96\)"),
        (dict(gate=torch.zeros(5, 96)), r"gate must be .* got \(5, 96\)"),
        (dict(branch_bias=torch.zeros(2, 5, 96)), r"branch_bias must be .* got \(2, 5, 96\)"),
        (dict(weight=torch.zeros(95)), r"weight must be \(96,\), got \(95,\)"),
        (dict(bias=torch.zeros(1, 96)), r"bias must be \(96,\), got \(1, 96\)"),
        (dict(weight=torch.zeros(96).long()), "weight must be floating-point"),
        (dict(norm="batch"), "norm must be one of layer, rms; got 'batch'"),
    ],
)
def test_refusals(given, message):
    with pytest.raises(ValueError, match=message):
        change(**given)


def test_auto_takes_csrc_where_it_is_fast():
    """There it has kernels with 16-byte accesses; else Triton's are faster."""
    x, row = torch.empty(2, 5, 1152), torch.empty(2, 1152)
    rest = 1e-6, "layer", None, 0
    assert cuda.is_fast(x, x, row, None, row, row, None, None, *rest)
    assert cuda.is_fast(x, None, None, None, row, row, None, None, *rest)
    assert cuda.is_fast(None, x, x, x, row, None, row, None, None, *rest)
    assert cuda.is_fast(x, x, row, None, None, None, None, None, 0.0, None, None, 0)
    assert not cuda.is_fast(x, x, row, None, x, row, None, None, *rest)
    assert not cuda.is_fast(None, x, x, x, x, None, row, None, None, *rest)
    assert not cuda.is_fast(x, None, None, None, row, row, row[0], None, *rest)
    assert not cuda.is_fast(x, None, None, None, None, None, None, None, *rest)
    assert not cuda.is_fast(x, None, None, None, row, row, None, None, 1e-6, "rms", None, 0)
    narrow = x[..., :64], None, None, None, row[:, :64], row[:, :64], None, None
    assert not cuda.is_fast(*narrow, *rest)


def test_tokens_in_two_dtypes_are_triton_s():
    """What csrc/ would first have to convert in a pass of its own."""
    x, row = torch.empty(2, 5, 64, dtype=torch.bfloat16), torch.empty(2, 64)
    args = x, None, None, None, row, x, None, None, 1e-6, "layer", None, 0
    assert cuda.forward(*args) is None
    assert (
        cuda.backward(None, x, x, None, None, None, x, row[0], None, 1e-6, "layer", None, 0) is None
    )
