"""`to_fp8`: which layers of a network are in 8 bits, how near the result is, what is refused."""

import copy
import pickle

import pytest
import torch
from golden_files import relative_error
from parity import BACKEND, DEVICE, noise
from published import problem
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion

from tim_kernels import accelerate, explain, fp8, restore, to_fp8, use_backend
from tim_kernels.fp8 import has_scaled_mm, quantise_rows
from tim_kernels.network import fp8_linear
from tim_kernels.network.fp8_linear import Fp8Linear, Fp8Tokens

pytest.importorskip("diffusers", reason="tim needs diffusers")
from tim.models import TiMTransformer2DModel  # noqa: E402

ERROR = 0.05  # relative, of one product and of shallow networks; E4M3 rounds to 1/16 at worst


def linear(K=64, N=48, dtype=torch.bfloat16) -> nn.Linear:
    layer = nn.Linear(K, N)
    layer.weight.data = noise(N, K, seed=3)
    layer.bias.data = noise(N, seed=4)
    return layer.to(DEVICE, dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_layer_is_the_product_of_what_was_rounded(dtype):
    """Also where a GPU multiplies: rounding the output to bfloat16 is all that may differ."""
    plain = linear(dtype=dtype)
    x = noise(2, 5, 64, dtype=dtype, device=DEVICE)
    layer = Fp8Linear(plain)
    with torch.no_grad():
        out, tokens = layer(x), Fp8Tokens(*quantise_rows(x), dtype)
        assert torch.equal(layer(tokens), out)
    assert out.dtype == dtype and out.shape == (2, 5, 48)
    of = [values.double() * scales for values, scales in (tokens[:2], (layer.values, layer.scales))]
    exact = nn.functional.linear(*of, layer.bias.double())
    torch.testing.assert_close(out.double(), exact, rtol=2**-8, atol=1e-4)
    assert relative_error(out, plain(x)) < ERROR
    again = layer.without_bias(x).float() + layer.bias
    torch.testing.assert_close(again, out.float(), rtol=2**-7, atol=2**-6)


def test_a_gpu_multiplies_where_it_can(monkeypatch):
    """The call of torch._scaled_mm, which a CPU has too: rows by columns."""
    layer, x = Fp8Linear(linear()), noise(5, 64, dtype=torch.bfloat16, device=DEVICE)
    expected, calls = layer(x), []

    def scaled_mm(a, b, scale_a, scale_b, bias, out_dtype, use_fast_accum):
        calls.append((a.dtype, b.dtype, scale_a.shape, scale_b.shape, b.stride(0), use_fast_accum))
        assert a.is_contiguous() and scale_a.is_contiguous() and scale_b.is_contiguous()
        out = (a.float() * scale_a) @ (b.float() * scale_b) + bias.float()
        return out.to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(fp8_linear, "_has_scaled_mm", lambda weight: True)
    torch.testing.assert_close(layer(x), expected, rtol=2**-7, atol=0)
    e4m3 = torch.float8_e4m3fn
    assert calls == [(e4m3, e4m3, (5, 1), (1, 48), 1, False)]


def test_only_whole_16s_go_to_the_gpu_s_product():
    fits = [fp8_linear._has_scaled_mm(Fp8Linear(linear(K, 48)).values) for K in (64, 72)]
    assert fits == [has_scaled_mm(torch.device(DEVICE)), False]


@pytest.mark.parametrize(
    "capability, version, expected",
    [((8, 0), "2.13.0", False), ((8, 9), "2.11.0", False), ((8, 9), "2.12.0", True),
     ((9, 0), "2.11.0", True), ((12, 0), "2.11.0", True)],
)  # fmt: skip
def test_which_gpus_multiply(monkeypatch, capability, version, expected):
    """On sm_89 only where torch's kernel keeps to its stream."""
    monkeypatch.setattr(fp8, "_capability", lambda device: capability)
    monkeypatch.setattr(torch, "__version__", TorchVersion(version))
    assert has_scaled_mm(torch.device("cuda")) == expected
    assert not has_scaled_mm(torch.device("cpu"))


@pytest.mark.parametrize("tokens", [0, 1, 77])
def test_torch_takes_the_gpu_s_call(tokens):
    """Fake tensors of a GPU meet the checks of shapes, strides and dtypes that real ones do."""
    with FakeTensorMode(), torch.device("cuda"):
        values, weight = (torch.empty(n, 64, dtype=torch.float8_e4m3fn) for n in (tokens, 48))
        scales, weight_scales = torch.empty(tokens, 1), torch.empty(48, 1)
        for bias in (None, torch.empty(48, dtype=torch.bfloat16)):
            out = fp8_linear._scaled_mm(values, scales, weight, weight_scales, bias)
            assert out.shape == (tokens, 48) and out.dtype == torch.bfloat16
        with pytest.raises(RuntimeError, match="scaling"):
            fp8_linear._scaled_mm(values, scales.half(), weight, weight_scales, None)


def test_casts_leave_what_is_quantised():
    layer = Fp8Linear(linear())
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.half().double().to(torch.float32)
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == before[name].dtype
        assert torch.equal(tensor.float(), before[name].float())
    assert layer.to("meta").values.device.type == "meta"


@pytest.fixture
def network(golden_model):
    model = TiMTransformer2DModel(**golden_model.meta["params"]).to(DEVICE)
    model.load_state_dict(golden_model.group("state"))
    given = golden_model.group("input")
    return model.eval(), [given[name].to(DEVICE) for name in ("x", "t", "r", "y")]


@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_the_golden_networks(network, backend):
    model, args = network
    left_alone = copy.deepcopy(model)
    report = to_fp8(model)
    per_block = 7 if hasattr(model.blocks[0], "cross_attn") else 5
    assert len(report.fused) == per_block * len(model.blocks) and not report.left
    with torch.no_grad(), use_backend(backend):
        expected = left_alone(*args)
        error = relative_error(model(*args), expected)
        x, t, r, y = args
        y = y.bfloat16() if y.is_floating_point() else y
        plain = relative_error(left_alone.bfloat16()(x.bfloat16(), t, r, y), expected)
    assert plain < error < 2**4 * plain  # of four bits fewer, in some of the roundings
    text = explain(model)
    assert "blocks.0     fused, FP8" in text and "shifted" not in text


def test_norm_and_swiglu_make_the_fp8(network):
    """No layer but the attention's projection is given tokens that it has to quantise."""
    model, args = network
    to_fp8(model)
    given, forward = [], Fp8Linear.forward

    def watched(layer, x):
        name = next(name for name, each in model.named_modules() if each is layer)
        given.append((name.partition(".")[2].partition(".")[2], type(x) is Fp8Tokens))
        return forward(layer, x)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(Fp8Linear, "forward", watched)
        model(*args)
    assert {name for name, is_fp8 in given if not is_fp8} <= {"attn.proj", "cross_attn.proj"}
    assert {name for name, is_fp8 in given if is_fp8} >= {"attn.qkv", "mlp.fc1_g", "mlp.fc2"}


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_an_accelerated_model(text):
    model, args = problem(text)
    model.eval()
    with torch.no_grad():
        expected = model(*args)
        accelerate(model)
        assert to_fp8(model).fused
        fp8 = model(*args)
        assert relative_error(fp8, expected) < ERROR
        model.blocks[0].attn.register_forward_hook(lambda *_: None)  # a hook sees tensors
        model.blocks[0].mlp.register_forward_pre_hook(lambda _, args: args[0] + 0)
        assert relative_error(model(*args), fp8) < ERROR
        restore(model)
        assert relative_error(model(*args), expected) < ERROR


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_an_accelerated_model(monkeypatch, copied):
    """And what could save it is refused, also once it is restored."""
    model, args = problem(False)
    accelerate(model.eval())
    kind = type(model).own
    monkeypatch.setattr(kind, "save_pretrained", lambda model, folder: None, raising=False)
    to_fp8(model)
    other = copied(model)
    with torch.no_grad():
        assert torch.equal(other(*args), model(*args))
    assert other.blocks[0].attn.qkv.values.dtype == torch.float8_e4m3fn
    restore(other)
    with pytest.raises(ValueError, match="save it before to_fp8"):
        other.save_pretrained("nowhere")


def test_layers_that_are_not_plain_stay():
    model, _ = problem(False)
    accelerate(model.eval())
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: None)
    report = to_fp8(model)
    assert report.left == {"blocks.0.attn.qkv": "it has hooks"}
    assert type(model.blocks[0].attn.qkv) is nn.Linear
    assert set(to_fp8(model).left.values()) == {"it has hooks", "it is a Fp8Linear"}


def test_refusals():
    model, args = problem(False)
    with pytest.raises(ValueError, match="accelerate\\(model\\) first"):
        to_fp8(model.eval())
    accelerate(model)
    with pytest.raises(ValueError, match="model.eval"):
        to_fp8(model.train())
    to_fp8(model.eval())
    with pytest.raises(NotImplementedError, match="an FP8 layer has no derivative"):
        model(*args)
    with pytest.raises(NotImplementedError, match="has no derivative"), torch.no_grad():
        torch.func.jvp(lambda x: model(x, *args[1:]), args[:1], args[:1])
    with pytest.raises(NotImplementedError, match="not for training"), torch.no_grad():
        model.train()(*args)
    x = noise(2, 64, device=DEVICE).requires_grad_()
    with pytest.raises(NotImplementedError, match="an FP8 layer has no derivative"):
        Fp8Linear(linear(dtype=torch.float32))(x)


@pytest.mark.parametrize("text", [False, True], ids=["class", "text"])
def test_compiles_whole(text):
    model, args = problem(text)
    accelerate(model.eval())
    to_fp8(model)
    with torch.no_grad(), use_backend(BACKEND):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert relative_error(compiled(*args), model(*args)) < 1e-2
