"""The extension's kernels, run on the CPU a thread block at a time, pass their ops' tests; and
mistakes that a GPU may forgive are caught."""

import re
import shutil
from pathlib import Path

import pytest
from emulated import ROOT, compile_op, run_tests

OPS = sorted(path.stem for path in (ROOT / "csrc").glob("*.cu"))
TESTS = Path("tests/kernels")
# Not of the extension: the reference's derivatives, a CPU's form, what torch.compile sees, Triton's
# tangents alone.
ELSEWHERE = (
    "gradcheck", "auto_on_a_cpu", "compiles_once", "opcheck", "a_tangent_of_one", "any_shape",
)  # fmt: skip
ON_DEVICE = " and ".join(f"not {name}" for name in ELSEWHERE)


@pytest.mark.parametrize("op", OPS)
def test_the_op_passes_its_tests(op, tmp_path):
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob(f"test_{op}*.py"))
    run = run_tests(compile_op(op, tmp_path), *files, "-k", ON_DEVICE)
    passed = re.search(r"(\d+) passed", run.stdout)
    assert run.returncode == 0 and int(passed[1]) >= 30, run.stdout[-3000:] + run.stderr[-3000:]


MISTAKES = {  # the file, what stands there, what is put in its place, what the run then says
    "a barrier is missing": (
        "ada_layer_norm_backward.cuh",
        "= one;\n  __syncthreads();",
        "= one;",
        "test_parity",
    ),
    "a copy of adaLN's is not waited for": (
        "ada_layer_norm_backward.cuh",
        "__pipeline_wait_prior(0);",
        "__pipeline_wait_prior(1);",
        "AddressSanitizer",  # it comes when the block's memory is gone
    ),
    "a token too many": (
        "common.cuh",
        "at.begin + tokens_per_block < tokens ? at.begin + tokens_per_block : tokens;",
        "at.begin + tokens_per_block <= tokens ? at.begin + tokens_per_block : tokens + 1;",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a barrier that some threads never reach": (
        "common.cuh",
        "  __syncthreads();  // the last call's readers are done",
        "  if (threadIdx.x < 32) __syncthreads();",
        "emulation: a barrier is not reached by all threads",
    ),
    "a copy is not waited for": (
        "qk_norm_rope_staged.cuh",
        "__pipeline_wait_prior(STAGES - 1);",
        "__pipeline_wait_prior(STAGES);",
        "AddressSanitizer",  # likewise
    ),
}


@pytest.mark.parametrize(
    "mistake",
    [
        "a token too many",
        pytest.param("a barrier is missing", marks=pytest.mark.nightly),
        pytest.param("a copy of adaLN's is not waited for", marks=pytest.mark.nightly),
        pytest.param("a barrier that some threads never reach", marks=pytest.mark.nightly),
        pytest.param("a copy is not waited for", marks=pytest.mark.nightly),
    ],
)
def test_a_mistake_is_caught(mistake, tmp_path):
    name, right, wrong, symptom = MISTAKES[mistake]
    source = shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    text = (source / name).read_text()
    assert text.count(right) == 1, f"{name} has changed: adapt the mistake"
    (source / name).write_text(text.replace(right, wrong))
    op = "qk_norm_rope" if name.startswith("qk_norm_rope") else "ada_layer_norm"
    cases = dict(qk_norm_rope="test_heads and 72", ada_layer_norm="test_parity and both_bias")[op]
    files = sorted(str(path.relative_to(ROOT)) for path in (ROOT / TESTS).glob(f"test_{op}*.py"))
    run = run_tests(compile_op(op, tmp_path, source), *files, "-k", cases)
    assert run.returncode != 0 and symptom in run.stdout + run.stderr
