"""Which kernel attention without tangents takes, why, and how it is called; no GPU is here to run
them, so PyTorch's operators are called with shapes alone."""

import importlib.machinery
import os
import subprocess
import sys
import types
import warnings

import pytest
import torch
from torch.backends import cuda

import tim_kernels
from tim_kernels import BackendUnavailable, attention, set_attention
from tim_kernels.attention import choice, op, packed
from tim_kernels.linear import choice as linear


@pytest.fixture(autouse=True)
def automatic():
    """Before and after, whatever a test chose or changed."""
    choice._module.cache_clear()
    yield
    for each in (choice._module, packed.has_varlen, linear.obstacle):  # explain() asks them all
        each.cache_clear()
    set_attention("auto")


@pytest.fixture
def gpu(monkeypatch):
    """A Hopper with all of PyTorch's kernels, as far as anybody asks."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    monkeypatch.setattr(choice, "architecture", lambda device: 90)
    monkeypatch.setattr(choice.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(cuda, "is_flash_attention_available", lambda: True)
    choice.chosen.cache_clear()
    yield monkeypatch


def installed(monkeypatch, *names):
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.flash_attn_func = module.flash_attn_varlen_func = lambda q, k, v, **_: q
        monkeypatch.setitem(sys.modules, name, module)


def line() -> str:
    return next(s for s in tim_kernels.explain().splitlines() if "without tangents" in s)


@pytest.mark.parametrize(
    "order, first, why",
    [
        ({}, "flash_attn_interface", "the newest, as nobody has timed them"),
        ({90: ("flash_attn", "cudnn")}, "flash_attn", "as timed on sm_90"),
        ({90: ("cudnn", "flash_attn")}, "cudnn", "PyTorch's cuDNN attention for bfloat16"),
        ({90: ("flash",)}, "flash", "PyTorch's flash attention for bfloat16"),
        ({90: ("flash_attn.cute", "flash")}, "flash", "not flash_attn.cute: it is not installed"),
        ({80: ("flash_attn",)}, "flash_attn_interface", "nobody has timed them"),
    ],
)  # fmt: skip
def test_the_order(gpu, order, first, why):
    """As timed, or the newest flash-attn until somebody has timed them on such a GPU."""
    installed(gpu, "flash_attn_interface", "flash_attn")
    gpu.setattr(choice, "ORDER", order)
    assert choice.chosen() == first
    assert why in line() and (first in line() or "PyTorch's" in line())


def test_without_any(gpu):
    assert choice.chosen() == "native"
    assert "PyTorch   not flash_attn.cute: it is not installed; not flash_attn_inter" in line()


@pytest.mark.parametrize("name", ["cudnn", "flash", "native", "flash_attn"])
def test_what_is_asked_for_comes_first(gpu, name):
    installed(gpu, "flash_attn_interface", "flash_attn")
    set_attention(name)
    assert choice.chosen() == name and "as asked for" in line()
    set_attention("auto")
    assert choice.chosen() == "flash_attn_interface"


def test_a_refusal_says_why(gpu):
    def refused(name, why):
        with pytest.raises(BackendUnavailable, match=f"attention by '{name}' cannot run: .*{why}"):
            set_attention(name)

    refused("flash_attn", "it is not installed")
    with gpu.context() as patch:
        patch.setattr(choice.cudnn, "is_available", lambda: False)
        refused("cudnn", "was built without it")
        patch.setattr(cuda, "flash_sdp_enabled", lambda: False)
        refused("flash", "switched off in torch.backends.cuda")
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (7, 5))
        refused("flash", "compute capability 8.0")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        refused("cudnn", "needs a CUDA device")
    with pytest.raises(ValueError, match="the attention must be one of auto, native, .*'sage'"):
        set_attention("sage")
    assert choice.chosen() == "native"


@pytest.mark.parametrize(
    "name, error", [("cudnn", ""), ("best", "TIM_KERNELS_ATTENTION must be one of auto, native")]
)
def test_the_environment(name, error):
    """What cannot run is refused where it would: a CPU has no choice."""
    code = "import tim_kernels, torch; tim_kernels.attention(*torch.randn(3, 1, 4, 2, 8))\n"
    code += "from tim_kernels.attention import choice; choice.chosen()"
    environment = os.environ | dict(TIM_KERNELS_ATTENTION=name)
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    expected = error or "attention by 'cudnn' cannot run: it needs a CUDA device"
    assert done.returncode and expected in done.stderr.splitlines()[-1]


OPERATORS = {
    "cudnn": torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    "flash": torch.ops.aten._scaled_dot_product_flash_attention.default,
}


class Called(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.operators.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


def meta(*shape, heads=2):
    q = torch.empty(2, 9, 2, *shape, dtype=torch.bfloat16, device="meta", requires_grad=True)
    return q, q[:, :, :heads], q[:, :, :heads]


def as_chosen(monkeypatch, name, can=True):
    monkeypatch.setattr(choice, "chosen", lambda: name)
    monkeypatch.setattr(op, "_is_flash_ready", lambda *_: True)
    monkeypatch.setattr(choice, "CAN", dict.fromkeys(choice.CAN, lambda params: can))


@pytest.mark.parametrize("options", [{}, dict(scale=0.3, is_causal=True)], ids=["", "options"])
@pytest.mark.parametrize("name", OPERATORS)
def test_pytorch_s_kernels_are_called_by_themselves(monkeypatch, name, options):
    """With a gradient; no setting of all threads is touched."""
    as_chosen(monkeypatch, name)
    qkv = meta(72)
    with Called() as called:
        out = attention(*qkv, **options)
        (gradient,) = torch.autograd.grad(out.sum(), qkv[0])
    assert out.shape == gradient.shape == qkv[0].shape
    found = [(args, kwargs) for each, args, kwargs in called.operators if each is OPERATORS[name]]
    ((args, kwargs),) = found
    assert kwargs.get("scale") == options.get("scale")
    assert [tuple(x.shape) for x in args[:3]] == [(2, 2, 9, 72)] * 3
    at = dict(cudnn=6, flash=4)[name]
    assert (len(args) > at and args[at]) == options.get("is_causal", False)
    if name == "cudnn":
        assert args[4]  # the log-sum-exp, for the backward
        with Called() as called, torch.no_grad():
            attention(*qkv, **options)
        assert not next(a for f, a, _ in called.operators if f is OPERATORS[name])[4]


@pytest.mark.parametrize(
    "name, shape, heads, can, is_called",
    [("cudnn", 72, 2, False, False), ("cudnn", 136, 2, True, False), ("cudnn", 72, 1, True, False),
     ("flash", 136, 2, True, True), ("flash", 72, 1, True, True), ("native", 72, 2, True, False)],
)  # fmt: skip
def test_what_a_kernel_does_not_take_pytorch_chooses(
    monkeypatch, name, shape, heads, can, is_called
):
    as_chosen(monkeypatch, name, can)
    with Called() as called:
        out = attention(*meta(shape, heads=heads))
    assert out.shape[-1] == shape
    assert (OPERATORS.get(name) in [each for each, *_ in called.operators]) == is_called


@pytest.mark.parametrize("name", OPERATORS)
def test_one_graph(monkeypatch, name):
    as_chosen(monkeypatch, name)
    torch._dynamo.reset()
    graphs = []

    def backend(module, example):
        graphs.append([node.target for node in module.graph.nodes])
        return module.forward

    compiled = torch.compile(attention, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        assert compiled(*meta(72)).shape == (2, 9, 2, 72)
    (targets,) = graphs
    assert OPERATORS[name].overloadpacket in targets or OPERATORS[name] in targets


@pytest.mark.parametrize("names", [[], ["flash_attn"]], ids=["", "flash_attn"])
def test_one_graph_of_what_the_machine_has(monkeypatch, names):
    """What is asked of the machine cannot be traced, and is not."""
    installed(monkeypatch, *names)
    monkeypatch.setattr(op, "_is_flash_ready", lambda *_: True)
    monkeypatch.setattr(choice, "obstacle", lambda name: None if choice._module(name) else "none")
    choice.chosen.cache_clear()
    torch._dynamo.reset()
    compiled = torch.compile(attention, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache")  # a cache that is looked into
        q, k, v = torch.randn(3, 2, 9, 2, 8)
        assert torch.equal(compiled(q, k, v), attention(q, k, v))
    assert choice.chosen() == (names[0] if names else "native")
