"""F.scaled_dot_product_attention, and what calls it, inside `forward_mode`: PyTorch's composite
implementation, which has a forward derivative, in float64 is the truth."""

import contextlib
import copy
import threading
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from parity import BACKEND, DERIVATIVE, DEVICE, FORWARD, assert_as_accurate, noise
from torch import nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn

from benchmarks.static.launches import record_launches
from tim_kernels import forward_mode
from tim_kernels.attention import op
from tim_kernels.dispatch.backend import use_backend

B, H, N, M, D = 2, 4, 9, 13, 8
KEYS = torch.arange(M, device=DEVICE) < torch.tensor([[4], [M]], device=DEVICE)  # (B, M)
SOME = noise(N, M, seed=9, device=DEVICE) > 0
BIAS = noise(B, H, N, M, seed=9, device=DEVICE)
LOW = torch.bfloat16
BOTH = ["reference", BACKEND]


def shapes(*lead, heads=H, k_heads=H, N=N, M=M, D=D, v_head_dim=D):
    return (*lead, heads, N, D), (*lead, k_heads, M, D), (*lead, k_heads, M, v_head_dim)


# What our kernel makes, and what the composite does.
KERNEL = {
    "4-D": (shapes(B), {}),
    "3-D": (((B, N, D), (B, M, D), (B, M, D)), {}),
    "5-D": (shapes(3, B), {}),
    "scale": (shapes(B), dict(scale=0.7)),
    "causal": (shapes(B), dict(is_causal=True)),
    "causal, more queries": (shapes(B, N=M, M=N), dict(is_causal=True)),
    "grouped": (shapes(B, k_heads=2), dict(enable_gqa=True)),
    "grouped, 3-D": (shapes(k_heads=2), dict(enable_gqa=True)),
    "keys": (shapes(B), dict(attn_mask=KEYS[:, None, None])),
    "keys of all": (shapes(B), dict(attn_mask=KEYS[0])),
    "keys, 5-D": (shapes(3, B), dict(attn_mask=KEYS[:, None, None])),
    "keys, 3-D": (((B, N, D), (B, M, D), (B, M, D)), dict(attn_mask=KEYS[:, None])),
    "no key": (shapes(B), dict(attn_mask=KEYS[:, None, None] & False)),
    "keys, grouped": (shapes(B, k_heads=2),
                      dict(attn_mask=KEYS[:, None, None], enable_gqa=True)),
}  # fmt: skip
COMPOSITE = {
    "2-D": (((N, D), (M, D), (M, D)), {}),
    "any mask": (shapes(B), dict(attn_mask=SOME)),
    "bias": (shapes(B), dict(attn_mask=BIAS)),
    "bias of keys": (shapes(B), dict(attn_mask=torch.where(KEYS, 0, -1e4)[:, None, None])),
    "mask of heads": (shapes(B), dict(attn_mask=noise(H, 1, M, seed=9, device=DEVICE) > 0)),
    "mask, 3-D": (((B, N, D), (B, M, D), (B, M, D)), dict(attn_mask=SOME)),
    "negative scale": (shapes(B), dict(scale=-0.7)),
    "no scale": (shapes(B), dict(scale=0.0)),
    "wide values": (shapes(B, v_head_dim=16), {}),
    "head_dim 12": (shapes(B, D=12, v_head_dim=12), {}),
    "one head for all": (shapes(B, k_heads=1), {}),
    "one sample for all": (((B, H, N, D), (1, H, M, D), (1, H, M, D)), {}),
    "grouped values": (((B, H, N, D), (B, 2, M, D), (B, 1, M, D)), dict(enable_gqa=True)),
}


def given(sizes, dtype=torch.float32):
    primals, tangents = (
        tuple(noise(*s, seed=seed + i, dtype=dtype, device=DEVICE) for i, s in enumerate(sizes))
        for seed in (0, 10)
    )
    return primals, tangents


def in_float64(function, primals, tangents):
    double = [tuple(x.double() for x in each) for each in (primals, tangents)]
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(function, *double)


def check(function, primals, tangents, calls: int, oracle=None):
    """Hold the output and its tangent inside `forward_mode` to float64, and count our kernel's
    calls."""
    truth = in_float64(oracle or function, primals, tangents)
    with sdpa_kernel(SDPBackend.MATH):
        plain = torch.func.jvp(function, primals, tangents)
    with patch.object(op, "jvp_op", wraps=op.jvp_op) as kernel, forward_mode():
        ours = torch.func.jvp(function, primals, tangents)
    assert kernel.call_count == calls
    for kind, factor, *each in zip(
        ("output", "tangent"), (FORWARD, DERIVATIVE), ours, plain, truth, strict=True
    ):
        assert each[0].dtype == each[1].dtype
        assert_as_accurate(*each, factor, kind)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", KERNEL | COMPOSITE)
def test_forms(name, backend):
    sizes, options = (KERNEL | COMPOSITE)[name]

    def attend(q, k, v):
        mask = options.get("attn_mask")
        if mask is not None and mask.is_floating_point():
            mask = mask.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, **options | dict(attn_mask=mask))

    with use_backend(backend):
        check(attend, *given(sizes), backend != "reference" and name in KERNEL)


@pytest.mark.parametrize("backend", BOTH)
def test_a_bias_with_a_tangent_of_its_own(backend):
    q, k, v = given(shapes(B))[0]

    def attend(bias):
        return F.scaled_dot_product_attention(*(x.to(bias.dtype) for x in (q, k, v)), bias)

    with use_backend(backend):
        check(attend, (BIAS,), (BIAS.cos(),), 0)


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("mask", [None, BIAS, KEYS[:, None, None]], ids=["", "bias", "keys"])
def test_autocast(mask, backend):
    """Inputs of two dtypes and a bias, all as PyTorch casts them."""
    (q, k, v), tangents = given(shapes(B))

    def attend(q, k, v):
        with torch.autocast(DEVICE, LOW, enabled=q.dtype != torch.float64):
            k = k.to(LOW) if q.dtype != torch.float64 else k
            bias = mask.to(q.dtype) if mask is BIAS else mask
            return F.scaled_dot_product_attention(q, k, v, bias)

    is_ours = backend != "reference" and mask is not BIAS
    with use_backend(backend):
        check(attend, (q, k, v), tangents, is_ours)


@pytest.mark.parametrize("backend", BOTH)
def test_dropout_is_of_value_and_tangent_alike(backend):
    """The composite's, with its random numbers."""

    def attend(q, k, v):
        torch.manual_seed(0)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)

    primals, tangents = given(shapes(B))
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jvp(attend, primals, tangents)
    with use_backend(backend), forward_mode():
        ours = torch.func.jvp(attend, primals, tangents)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_heads_are_read_in_place():
    packed, tangent = (noise(B, N, 3, H, D, seed=i, device=DEVICE) for i in range(2))

    def attend(packed):
        return F.scaled_dot_product_attention(*packed.permute(2, 0, 3, 1, 4))

    with use_backend("triton"), record_launches() as launches, forward_mode():
        torch.func.jvp(attend, (packed,), (tangent,))
    (launch,) = launches
    for prefix, whole in (("", packed), ("t", tangent)):
        for name, part in zip("qkv", whole.unbind(2), strict=True):
            assert launch.arguments[f"{prefix}{name}_ptr"].data_ptr() == part.data_ptr()


@pytest.mark.parametrize("backend", BOTH)
def test_the_output_has_its_gradient(backend):
    (q, k, v), tangents = given(shapes(B))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), leaves)
    with use_backend(backend), forward_mode():
        out, _ = torch.func.jvp(F.scaled_dot_product_attention, tuple(leaves), tangents)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), leaves), expected)


CAUSAL = nn.Transformer.generate_square_subsequent_mask(N, device=DEVICE)
LAYERS = {
    "MultiheadAttention": lambda m, x: m(x, x, x, need_weights=False)[0],
    "with weights": lambda m, x: m(x, x, x)[0],
    "causal": lambda m, x: m(
        x, x, x, need_weights=False, is_causal=True, attn_mask=CAUSAL.to(x.dtype)
    )[0],
    "TransformerEncoder": lambda m, x: m(x),
}


@pytest.mark.parametrize("backend", BOTH)
@pytest.mark.parametrize("name", LAYERS)
def test_layers_of_torch(name, backend):
    """Where fused paths of their own have no forward derivative."""
    torch.manual_seed(0)
    module, layers = nn.MultiheadAttention(32, 4, batch_first=True), 1
    if name == "TransformerEncoder":
        layer, layers = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2
        module = nn.TransformerEncoder(layer, layers)
    module = module.eval().requires_grad_(False).to(DEVICE)
    x, tangent = given([(B, N, 32)])
    run, double = LAYERS[name], copy.deepcopy(module).double()
    is_ours = backend != "reference" and name != "with weights"
    with torch.device(DEVICE):  # any mode turns the layers' fused paths off
        truth = in_float64(lambda x: run(double, x), x, tangent)
    with patch.object(op, "jvp_op", wraps=op.jvp_op) as kernel, use_backend(backend):
        for outer in (contextlib.nullcontext(), torch.device(DEVICE), forward_mode()):
            with outer, forward_mode():
                ours = torch.func.jvp(lambda x: run(module, x), x, tangent)
            for a, b in zip(ours, truth, strict=True):
                assert (a - b).norm() < 1e-6 * b.norm()
    assert kernel.call_count == 3 * layers * is_ours


def test_other_operators_must_not_lose_a_tangent():
    """They give zeros without an error, PyTorch's own attention of packed sequences among them."""

    @torch.library.custom_op("tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    @torch.library.custom_op("tests::write", mutates_args=("out",))
    def write(x: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(x)

    @torch.library.custom_op("tests::first", mutates_args=())
    def first(x: list[torch.Tensor]) -> torch.Tensor:
        return x[0].argmax()

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(x):
            return double(x)

        @staticmethod
        def setup_context(ctx, inputs, output):
            pass

        @staticmethod
        def jvp(ctx, tangent):
            return 2 * tangent

    cu = torch.tensor([0, 4, N], dtype=torch.int32, device="meta")

    def varlen(q):
        q = q.to("meta", torch.float16)
        return varlen_attn(q, q, q, cu, cu, 5, 5)

    (x,), (tangent,) = given([(N, H, D)])
    losing = [
        ("double", double),
        ("double", lambda x: double(x=first([x, x]) + x)),
        ("write", lambda x: write(x, torch.empty_like(x))),
        ("_varlen_attn", varlen),
    ]
    for name, function in losing:
        for run in (in_jvp, in_dual_level):
            with forward_mode(), pytest.raises(NotImplementedError, match=f"{name}.*would be lost"):
                run(function, x, tangent)
    for run in (in_jvp, in_dual_level):
        with forward_mode():
            assert torch.equal(run(Double.apply, x, tangent), 2 * tangent)
            assert torch.equal(run(lambda z: z + double(x), x, tangent), tangent)
            assert first([x]) >= 0 and double(x) is not None  # nothing to lose


def in_jvp(function, x, tangent):
    return torch.func.jvp(function, (x,), (tangent,))[1]


def in_dual_level(function, x, tangent):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


def attend(x):
    return F.scaled_dot_product_attention(x, x, x)


@pytest.mark.parametrize("backend", BOTH)
def test_dual_levels_and_jvp_agree_inside_and_outside(backend):
    (x,), (tangent,) = given([(B, H, N, D)])
    with use_backend(backend):
        with forward_mode():
            expected = in_jvp(attend, x, tangent)
            assert torch.equal(in_dual_level(attend, x, tangent), expected)
            assert torch.equal(attend(x), F.scaled_dot_product_attention(x, x, x))
        assert torch.equal(in_jvp(forward_mode()(attend), x, tangent), expected)  # a decorator
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, tangent)
            with forward_mode():
                inside = attend(dual)
            assert torch.equal(forward_ad.unpack_dual(inside).tangent, expected)
            with pytest.raises(NotImplementedError):
                attend(dual)


def test_it_ends_with_its_block_and_holds_for_its_thread():
    (x,), (tangent,) = given([(B, H, N, D)])
    depth = torch._C._len_torch_function_stack
    with contextlib.suppress(KeyError), forward_mode(), forward_mode():
        assert depth() == 2
        raise KeyError
    assert depth() == 0
    with forward_mode(), pytest.raises(RuntimeError, match=r"size|shape|match"):
        in_jvp(lambda x: F.scaled_dot_product_attention(x, x[..., 1:], x), x, tangent)
    assert depth() == 0
    errors = []

    def elsewhere():
        try:
            in_jvp(attend, x, tangent)
        except NotImplementedError as error:
            errors.append(error)

    with forward_mode():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        in_jvp(attend, x, tangent)
    assert len(errors) == 1


def test_settings_of_all_threads_stay_as_they_are():
    (x,), (tangent,) = given([(B, H, N, D)])

    def settings():
        return [
            getattr(torch.backends.cuda, f"{name}_sdp_enabled")()
            for name in ("flash", "mem_efficient", "math", "cudnn")
        ]

    seen, composite = [settings()], op.reference.composite

    def look(*args, **kwargs):
        seen.append(settings())
        return composite(*args, **kwargs)

    with patch.object(op.reference, "composite", look), forward_mode():
        in_jvp(attend, x, tangent)
    assert len(seen) == 2 and seen[0] == seen[1]


def test_under_torch_compile():
    """Right, or for our kernel a refusal."""
    (x,), (tangent,) = given([(B, H, N, D)])

    @forward_mode()
    def inside(x):
        return attend(x)

    def derivative(x):
        return in_jvp(attend, x, tangent)

    def compiled(function, **options):
        torch._dynamo.reset()
        return torch.compile(function, backend="aot_eager", **options)

    with forward_mode(), use_backend("reference"):
        expected = derivative(x)
        for function in (attend, inside):
            compiled_one = compiled(function)
            torch.testing.assert_close(compiled_one(x), attend(x))
            for run in (in_jvp, in_dual_level):
                torch.testing.assert_close(run(compiled_one, x, tangent), expected)
        torch.testing.assert_close(compiled(derivative, fullgraph=True)(x), expected)
    with forward_mode(), use_backend(BACKEND), pytest.raises(Exception, match="forward derivative"):
        compiled(derivative, fullgraph=True)(x)


@pytest.mark.parametrize("backend", BOTH)
def test_all_directions_at_once(backend):
    (x,), _ = given([(1, 1, 3, 8)])
    with sdpa_kernel(SDPBackend.MATH):
        expected = torch.func.jacfwd(attend)(x)
    with use_backend(backend), forward_mode():
        torch.testing.assert_close(torch.func.jacfwd(attend)(x), expected)
