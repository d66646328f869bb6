"""The ops that emit FP8 with a scale a row."""

import pytest
import torch
from parity import BACKEND, DEVICE, DTYPES, as_tuple, assert_as_accurate, noise

import tim_kernels as ops
from tim_kernels.ada_layer_norm import fp8 as ada_layer_norm
from tim_kernels.dispatch.backend import use_backend
from tim_kernels.fp8 import LARGEST, SMALLEST
from tim_kernels.fp8 import quantise_rows as definition
from tim_kernels.quantise_rows import fp8 as rows_op
from tim_kernels.quantise_rows.fp8 import quantise_rows
from tim_kernels.swiglu import fp8 as swiglu

C = 96
SEGMENTS = ops.Segments.from_lengths([3, 0, 4], DEVICE)


def ada(shape=(2, 7, C), dtype=torch.float32, **options):
    width = shape[-1]
    rows = [noise(shape[0], width, seed=i, device=DEVICE) for i in (1, 2)]
    return ops.ada_layer_norm_fp8, (noise(*shape, dtype=dtype, device=DEVICE), *rows), options


def gated(shape=(2, 7, C), dtype=torch.float32, **options):
    x, branch = (noise(*shape, seed=i, dtype=dtype, device=DEVICE) for i in (0, 1))
    rows = [noise(shape[0], shape[-1], seed=i, dtype=dtype, device=DEVICE) for i in (2, 3, 4)]
    return ops.gated_residual_ada_layer_norm_fp8, (x, branch, *rows), options


def of_token(dtype=torch.float32):
    x, branch, gate, shift, scale = (noise(2, 7, C, seed=i, device=DEVICE) for i in range(5))
    affine = dict(weight=noise(C, seed=6, device=DEVICE), bias=noise(C, seed=7, device=DEVICE))
    args = (x.to(dtype), branch.to(dtype), gate, shift, scale)
    return ops.gated_residual_ada_layer_norm_fp8, args, affine


def packed(dtype=torch.float32):
    x, branch = (noise(7, C, seed=i, dtype=dtype, device=DEVICE) for i in (0, 1))
    rows = [noise(3, C, seed=i, device=DEVICE) for i in (2, 3, 4)]
    return ops.gated_residual_ada_layer_norm_fp8, (x, branch, *rows), dict(segments=SEGMENTS)


def two(shape=(2, 7, C), dtype=torch.float32):
    args = tuple(2 * noise(*shape, seed=i, dtype=dtype, device=DEVICE) for i in (0, 1))
    return ops.swiglu_fp8, args, {}


def whole(shape=(2, 7, C), dtype=torch.float32):
    return ops.swiglu_fp8, (2 * noise(*shape[:-1], 2 * shape[-1], dtype=dtype, device=DEVICE),), {}


def rows(shape=(2, 7, C), dtype=torch.float32):
    return quantise_rows, (noise(*shape, dtype=dtype, device=DEVICE),), {}


SIZED = dict(ada=ada, gated=gated, two=two, whole=whole, rows=rows)
FORMS = dict(of_token=of_token, packed=packed, **SIZED)


def on(backend, function, args, options):
    with use_backend(backend):
        return as_tuple(function(*args, **options))


def product(outputs):
    """What the values and scales, the last two outputs, stand for."""
    return outputs[-2].double() * outputs[-1].double()


def check(function, args, options):
    """As accurate as the definition against float64, and the same FP8 number or the next."""
    expected = on("reference", function, args, options)
    ours = on(BACKEND, function, args, options)
    exact = on("reference", function, [x.double() for x in args], options)
    for a, b in zip(ours, expected, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
    if len(ours) == 3:
        assert_as_accurate(ours[0], expected[0], exact[0], 1.25, "x'")
    torch.testing.assert_close(ours[-1], expected[-1], rtol=1e-5, atol=0)
    whole = unrounded(function, args, options)
    assert_as_accurate(product(ours), product(expected), whole, 1.01, "values·scales")
    steps = ours[-2].view(torch.uint8).int() - expected[-2].view(torch.uint8).int()
    assert steps.abs().max() <= 1 and steps.count_nonzero() <= 0.01 * steps.numel()


def unrounded(function, args, options):
    if function is quantise_rows:
        return args[0].double()
    plain = getattr(ops, function.__name__.removesuffix("_fp8"))
    return on("reference", plain, [x.double() for x in args], options)[-1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_parity(form, dtype):
    check(*FORMS[form](dtype=dtype))


@pytest.mark.parametrize("width", [1, 33, 100, 1152, 3072, 5000])
@pytest.mark.parametrize("form", SIZED)
def test_any_width(form, width):
    check(*SIZED[form]((1, 3, width)))


@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_norms_and_a_row_for_all(norm):
    x, (row,) = noise(2, 5, C, device=DEVICE), noise(1, C, device=DEVICE)
    check(ops.ada_layer_norm_fp8, (x, row, row), dict(norm=norm, weight=row))


@pytest.mark.parametrize("form", SIZED)
def test_the_error_is_that_of_one_rounding(form):
    """Half a unit in the last of three bits, and below 2⁻⁶ of the scale half the smallest step."""
    function, args, options = SIZED[form]()
    ours, whole = on(BACKEND, function, args, options), unrounded(function, args, options)
    bound = torch.maximum(whole.abs() * 2**-4, ours[-1].double() * 2**-10)
    assert bool(((product(ours) - whole).abs() <= 1.001 * bound).all())
    assert bool((ours[-2].float().abs().amax(-1) == LARGEST).all())


@pytest.mark.parametrize("form", SIZED)
def test_rows_of_zeros_give_zeros(form):
    function, args, options = SIZED[form]()
    zeros = [torch.zeros_like(x) for x in args]
    for outputs in (on(BACKEND, function, zeros, options), on("reference", function, zeros, {})):
        assert not product(outputs).any()
        assert bool((outputs[-1] == SMALLEST / LARGEST).all())


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("form", ["rms", "two", "whole", "rows"])
def test_nan_and_infinity_stay_in_their_rows(form, bad):
    if form == "rms":
        function, args, options = ops.ada_layer_norm_fp8, *ada()[1:]
        args, options = (args[0], args[1]), dict(norm="rms")
    else:
        function, args, options = FORMS[form]()
    args[0][1, 2, 5] = bad
    expected, ours = (on(name, function, args, options) for name in ("reference", BACKEND))
    assert torch.equal(ours[0].float().isnan(), expected[0].float().isnan())
    assert torch.equal(ours[1].isnan(), expected[1].isnan())
    assert torch.equal(ours[1].isinf(), expected[1].isinf())
    finite = product(ours).isfinite()
    assert not finite[1, 2].any()
    rest = torch.ones(2, 7, dtype=torch.bool)
    rest[1, 2] = False
    assert bool(finite[rest.to(DEVICE)].all())


def test_infinity_beside_numbers_leaves_no_number():
    values, scales = definition(torch.tensor([[1.0, torch.inf], [1.0, torch.nan], [1.0, 2.0]]))
    assert torch.equal((values.float() * scales).isnan().all(-1), torch.tensor([True, True, False]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_any_dtype_are_quantised_in_float32(dtype):
    x = noise(3, C, dtype=dtype)
    x[1] = 0
    for a, b in zip(definition(x), definition(x.float()), strict=True):
        assert torch.equal(a.float(), b.float())
    assert not product(definition(x))[1].any()


def test_rows_of_float32_are_torchao_s():
    """Bit for bit; it rounds the scales of bfloat16 rows to bfloat16."""
    torchao = pytest.importorskip("torchao.quantization")
    x = 3 * noise(5, C)
    theirs = torchao.Float8Tensor.from_hp(x, granularity=torchao.PerRow())
    values, scales = definition(x)
    assert torch.equal(theirs.qdata.float(), values.float()) and torch.equal(theirs.scale, scales)


@pytest.mark.parametrize("form", SIZED)
@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)])
def test_nothing_to_do(form, shape):
    function, args, options = SIZED[form](shape)
    ours, expected = (on(name, function, args, options) for name in (BACKEND, "reference"))
    assert [x.shape for x in ours] == [x.shape for x in expected]


@pytest.mark.parametrize("form", ["gated", "two", "rows"])
def test_layouts(form):
    function, args, options = SIZED[form]()
    strided = [torch.cat((x, x), dim=-1)[..., : x.shape[-1]] for x in args]
    dense, placed = (on(BACKEND, function, each, options) for each in (args, strided))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(dense, placed, strict=True))


def test_no_channels_are_refused():
    with pytest.raises(ValueError, match="gate must have channels"):
        ops.swiglu_fp8(torch.ones(2, 0, device=DEVICE))
    for function in (ops.ada_layer_norm_fp8, quantise_rows):
        with pytest.raises(ValueError, match="x must have channels"):
            function(torch.ones(2, 3, 0, device=DEVICE))


def test_what_has_no_rows_is_refused():
    with pytest.raises(ValueError, match="got a scalar"):
        quantise_rows(torch.tensor(1.0, device=DEVICE))
    with pytest.raises(ValueError, match="x must be"):
        quantise_rows(torch.ones(2, 3, dtype=torch.int64, device=DEVICE))


@pytest.mark.parametrize("backend", ["reference", BACKEND])
@pytest.mark.parametrize("form", ["ada", "gated", "two", "rows"])
def test_derivatives_are_refused_by_name(form, backend):
    function, (x, *rest), options = FORMS[form]()
    names = {"two": "swiglu_fp8", "rows": "quantise_rows"}
    name = names.get(form, "ada_layer_norm_fp8")
    message = f"{name} has no derivative, and an argument needs one"
    with use_backend(backend):
        with pytest.raises(NotImplementedError, match=message):
            function(*(each.clone().requires_grad_() for each in (x, *rest)), **options)
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(lambda x: function(x, *rest, **options), (x,), (x,))
        with pytest.raises(NotImplementedError, match=message):
            torch.func.grad(lambda x: function(x, *rest, **options)[-1].sum())(x)
        with torch.no_grad():
            function(x.requires_grad_(), *rest, **options)


@pytest.mark.parametrize("form", ["ada", "gated", "whole", "rows"])
def test_compiles_whole_for_all_lengths(form):
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounter()
    function = FORMS[form]()[0]
    with use_backend(BACKEND):
        compiled = torch.compile(function, backend=frames, fullgraph=True, dynamic=True)
        for shape in [(2, 5, C), (3, 7, C), (4, 6, C)]:
            _, args, _ = FORMS[form](shape)
            for a, b in zip(compiled(*args), function(*args), strict=True):
                assert torch.equal(a.float(), b.float())
    assert frames.frame_count == 1


def test_opcheck():
    x, row = noise(2, 3, 8, device=DEVICE), noise(2, 8, seed=1, device=DEVICE)
    tail = None, None, 1e-6, "layer", None, 0
    with use_backend(BACKEND), torch.no_grad():
        for args in [(x, None, None, None, row, row, *tail), (x, x, row, row, None, None, *tail)]:
            torch.library.opcheck(ada_layer_norm.forward_op.torch_op, args)
        torch.library.opcheck(swiglu.forward_op.torch_op, (x, x))
        torch.library.opcheck(swiglu.forward_op.torch_op, (x, None))
        torch.library.opcheck(rows_op.forward_op.torch_op, (x,))


def test_vmap_takes_slices():
    gate = noise(3, 2, 8, device=DEVICE)
    values, scales = torch.func.vmap(lambda g: ops.swiglu_fp8(g))(gate)
    expected = ops.swiglu_fp8(gate)
    assert torch.equal(values.float(), expected[0].float()) and torch.equal(scales, expected[1])
