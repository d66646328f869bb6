import subprocess
import sys
import threading

import pytest
import torch

import tim_kernels
from tim_kernels.dispatch import backend
from tim_kernels.launch import tuning


def rows(device="cpu"):
    return torch.randn(2, 3, 8, device=device), *torch.randn(2, 2, 8, device=device)


def test_choice_nests_and_ends():
    assert backend.requested() == "auto"
    with tim_kernels.use_backend("triton"):
        assert backend.requested() == "triton"
        with tim_kernels.use_backend("reference"):
            assert backend.requested() == "reference"
        assert backend.requested() == "triton"
    assert backend.requested() == "auto"


@pytest.mark.parametrize("width, chosen", [(1152, "cuda"), (768, "cuda"), (1024, "triton")])
def test_auto_takes_triton_where_csrc_has_only_a_slow_kernel(monkeypatch, width, chosen):
    monkeypatch.setattr(backend, "_first", lambda *_: "cuda")
    monkeypatch.setattr(backend, "obstacle", lambda *_: None)
    tokens = torch.empty(2, 3, width, device="meta")
    norm, swiglu = backend.OPS["ada_layer_norm"], backend.OPS["swiglu"]
    row = tokens[:, 0]
    args = tokens, None, None, None, row, row, None, None, 1e-6, "layer", None, 0
    assert backend.fused(norm, args, "cuda") == chosen
    assert backend.fused(swiglu, (tokens, tokens), "cuda") == "cuda"
    with tim_kernels.use_backend("cuda"):
        assert backend.fused(norm, args, "cuda") == "cuda"


def test_use_backend_is_the_thread_s_own():
    seen = []
    with tim_kernels.use_backend("triton"):
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


def test_set_backend_is_the_process_s():
    seen = []
    tim_kernels.set_backend("reference")
    try:
        thread = threading.Thread(target=lambda: seen.append(backend.requested()))
        thread.start()
        thread.join()
    finally:
        tim_kernels.set_backend("auto")
    assert seen == ["reference"]


def test_auto_on_a_cpu_is_the_reference():
    assert backend.choose("ada_layer_norm", "cpu") == "reference"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="auto, reference, triton, cuda; got 'tritton'"):
        tim_kernels.set_backend("tritton")
    with pytest.raises(ValueError, match="tritton"), tim_kernels.use_backend("tritton"):
        pass


def test_the_impossible_is_refused_with_its_reason():
    with (
        tim_kernels.use_backend("cuda"),
        pytest.raises(tim_kernels.BackendUnavailable, match="cannot run ada_layer_norm: it "),
    ):
        tim_kernels.ada_layer_norm(*rows())


def test_what_no_backend_computes_asks_none():
    """Attention without tangents is PyTorch's, and float64 the reference's, whatever was chosen."""
    x, *row = rows()
    q = torch.randn(2, 3, 1, 8)
    with tim_kernels.use_backend("cuda"):
        assert tim_kernels.attention(q, q, q).shape == q.shape
        norm = tim_kernels.ada_layer_norm(x.double(), *(r.double() for r in row))
    assert norm.dtype == torch.float64


def run_python(code: str, **environment) -> str:
    """Run code in a fresh process: the environment is read at import."""
    import os

    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET",)} | environment
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can run Triton")
def test_triton_without_gpu_and_interpreter_is_refused():
    code = (
        "import torch, tim_kernels\n"
        "x = torch.randn(2, 3, 8)\n"
        "tim_kernels.ada_layer_norm(x, x[:, 0], x[:, 0])"
    )
    output = run_python(code, TIM_KERNELS_BACKEND="triton")
    assert "BackendUnavailable" in output and "TRITON_INTERPRET=1" in output
    assert "must be one of" in run_python("import tim_kernels", TIM_KERNELS_BACKEND="fast")


def test_meta_tensors_take_the_chosen_operators_anywhere():
    code = (
        "import torch, tim_kernels\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "class Names(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, f, types, args=(), kwargs=None):\n"
        "        print(f); return f(*args, **(kwargs or {}))\n"
        "x = torch.empty(2, 3, 8, device='meta')\n"
        "with tim_kernels.use_backend('triton'), Names():\n"
        "    print(tim_kernels.ada_layer_norm(x, x[:, 0], x[:, 0]).shape)\n"
    )
    output = run_python(code)
    assert "tim_kernels.ada_layer_norm.default" in output and "torch.Size([2, 3, 8])" in output


def test_explain_names_every_op(capsys):
    text = tim_kernels.explain()
    assert capsys.readouterr().out.strip() == text
    for op in backend.OPS:
        assert op in text


def test_explain_says_that_products_wait_for_each_other():
    def said() -> str:
        with tim_kernels.use_backend("triton"):
            lines = tim_kernels.explain().splitlines()
        return next(line for line in lines if "its tangent" in line)

    for architecture, is_slow in ((90, False), (100, True), (103, True), (120, False)):
        with tuning.as_architecture(architecture):
            assert ("a tenth of this GPU's peak" in said()) == is_slow
