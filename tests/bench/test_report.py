"""What the README says about speed is what committed files say, and never more."""

import copy

import pytest

from benchmarks.gate import parts, summary
from benchmarks.record.rows import FUSED, Network, Op, load
from benchmarks.report import markdown, proof
from benchmarks.report.markdown import README, into, section

GPU = "NVIDIA H100 80GB HBM3"


def op_row(contender: str, ms: float, op: str = "swiglu") -> dict:
    return dict(
        kind="op", op=op, direction="forward", shape="c2i-xl, batch 64", contender=contender, ms=ms,
        gb_per_s=1000 / ms, tflop_per_s=0.0, share_of_limit=0.3 / ms, error_vs_eager=0.9,
    )  # fmt: skip


def result(part: str, rows: list, **changes) -> dict:
    machine = dict(gpu=GPU, driver="580", torch="2.11", triton="3.6", cuda="13.0")
    stages = [dict(name=f"tests, {b}", outcome="passed", tests={"passed": 9}) for b in FUSED]
    return dict(
        part=part, rows=rows, machine=machine, sources="s", commit="c" * 40, stages=stages,
        failures=[], limits=dict(copy_gb_per_s=3000.0, gemm_tflop_per_s=790.0),
        file=f"2026-11-23-h100-{part}.json", started="2026-11-23T00:00:00+00:00",
    ) | changes  # fmt: skip


MODEL = dict(
    kind="model", model="c2i-xl", batch=64, task="forward", peak_gib=3.25, joules_per_image=0.5,
    samples_per_s=64.0, error_vs_eager=0.9, share_of_limit=0.5,
)  # fmt: skip
OPS = result("ops", [op_row("eager", 3.0), op_row("torch.compile", 1.5), op_row("triton", 0.4)])
MODELS = result(
    "model",
    [MODEL | dict(contender="eager", ms=9.0), MODEL | dict(contender="accelerate, cuda", ms=3.0)],
)
TESTS = result("tests", [])
FAILURE = dict(stage="tests, triton", why="…", what="tests/kernels/test_swiglu.py::test_parity")


def test_the_readme_is_what_the_report_makes():
    text = README.read_text()
    assert into(text, section(load())) == text


def test_without_a_gpu_s_result_no_speed_is_stated():
    assert markdown.NOTHING in section([])
    assert "×" not in section([]) and "GB/s" not in section([])


def test_speeds_with_their_proof():
    text = section([OPS, MODELS, TESTS])
    assert markdown.NOTHING not in text and f"### {GPU}" in text
    assert "| swiglu | forward | c2i-xl, batch 64 | triton | 400.0 | 2,500 | 75 % |" in text
    assert "7.50 × | 3.75 × |" in text
    assert (
        "| c2i-xl | forward | accelerate, cuda | 64 | 3.00 | 64.0 | 50 % | 3.2 | 0.50 | 3.00 × |"
        in text
    )
    assert "copy 3,000 GB/s" in text and "cccccccccccc" in text


@pytest.mark.parametrize(
    "proof",
    [
        [],
        [TESTS | dict(sources="other")],
        [TESTS | dict(machine=TESTS["machine"] | dict(gpu="another"))],
        [TESTS | dict(stages=[dict(name="tests, triton", outcome="left out")])],
    ],
)
def test_no_speed_without_tests_of_the_same_sources_on_that_gpu(proof):
    text = section([OPS, MODELS, *proof])
    assert "not told" in text and "7.50" not in text and "3.00 ×" not in text


def test_no_speed_beside_a_failing_test():
    rows = [*OPS["rows"], op_row("eager", 1.0, "ada_layer_norm"),
            op_row("triton", 0.25, "ada_layer_norm")]  # fmt: skip
    text = section([OPS | dict(rows=rows), MODELS, TESTS | dict(failures=[FAILURE])])
    assert "| ada_layer_norm |" in text and "| swiglu |" not in text
    assert "3.00 ×" not in text and "Tests failed there, 1" in text


@pytest.mark.parametrize("outcome", ["left out", "timed out", "running"])
def test_no_speed_of_a_backend_whose_tests_did_not_end(outcome):
    """The other one's are told."""
    rows = [*OPS["rows"], op_row("cuda", 0.3)]
    stages = [TESTS["stages"][0], TESTS["stages"][1] | dict(outcome=outcome)]
    text = section([OPS | dict(rows=rows), MODELS, TESTS | dict(stages=stages)])
    assert "| triton |" in text and "| cuda |" not in text and "accelerate, cuda" not in text
    assert "What cuda reached is not shown, since the tests of cuda did not run" in text


@pytest.mark.parametrize(
    "finding",
    [
        dict(returncode=99, why="RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)"),
        dict(
            returncode=1, why="CUDA error: unspecified launch failure\n=== ERROR SUMMARY: 3 errors"
        ),
        dict(returncode=99, why="exit 99"),
    ],
)
def test_no_speed_where_the_sanitizer_did_not_pass(finding):
    """A program whose kernel memcheck stopped ends with an exit status of its own."""
    failed = dict(name="racecheck, short list", outcome="failed") | finding
    stages = [*TESTS["stages"], failed]
    results = [OPS, MODELS, TESTS | dict(stages=stages)]
    text = section(results)
    assert "compute-sanitizer did not pass: racecheck" in text and "7.50" not in text
    assert "7.50" not in section([*results, TESTS])  # a later run that found nothing hides nothing


def test_a_sanitizer_that_does_not_work_there_has_found_nothing():
    """Nor is a planted error a finding, however the tool words it."""
    refused = dict(name="memcheck, short list", outcome="failed", returncode=1, why="not supported")
    planted = dict(
        name="memcheck, planted error", outcome="failed", returncode=99, why="other words"
    )
    stages = [*TESTS["stages"], refused, planted]
    assert "7.50 ×" in section([OPS, MODELS, TESTS | dict(stages=stages)])


def test_the_sanitizer_s_stages_are_those_of_the_gate():
    assert {stage.name for stage in parts.sanitizer(False)} >= set(proof.SANITIZERS)


def test_a_failure_of_cuda_s_tests_hides_cuda_alone():
    rows = [*OPS["rows"], op_row("cuda", 0.3)]
    models = [*MODELS["rows"], MODEL | dict(contender="accelerate, triton", ms=2.0)]
    failed = TESTS | dict(failures=[FAILURE | dict(stage="tests, cuda")])
    text = section([OPS | dict(rows=rows), MODELS | dict(rows=models), failed])
    assert "| triton |" in text and "| cuda |" not in text
    assert "accelerate, triton" in text and "accelerate, cuda" not in text


def test_tests_that_were_cut_off_later_take_no_proof_away():
    cut = TESTS | dict(stages=[TESTS["stages"][0] | dict(outcome="timed out")], failures=[FAILURE])
    assert "7.50 ×" in section([OPS, TESTS, cut])


def test_a_failing_test_of_every_op_counts_for_the_one_it_names():
    rows = [*OPS["rows"], op_row("eager", 1.0, "ada_layer_norm"),
            op_row("triton", 0.25, "ada_layer_norm")]  # fmt: skip
    replay = dict(stage="tests, triton", why="…", what="test_graphs.py::test_replay[tokens-swiglu]")
    stage = dict(stage="tests, triton", why="exit 1", what="tests, triton")
    text = section([OPS | dict(rows=rows), TESTS | dict(failures=[replay, stage])])
    assert "| ada_layer_norm |" in text and "| swiglu |" not in text
    assert "Tests failed there, 1" in text


def test_the_short_part_is_its_own_proof_and_has_ops_and_models():
    short = result("short", [*OPS["rows"], *MODELS["rows"]])
    text = section([short])
    assert text.count("7.50 × | 3.75 × |") == 1 and text.count("| 3.00 × |") == 1
    assert "-short-against.png" in text and "-short-models.png" in text
    assert "not told" in section([short | dict(stages=[])])
    assert "Whole networks on a CPU" not in text
    without_ops = result("short", MODELS["rows"], file="2026-11-24-h100-short.json")
    assert "7.50 × | 3.75 × |" in section([OPS, TESTS, without_ops])


def test_fp8_s_products_and_errors():
    linear = "linear 1152 to 3456"
    rows = [*OPS["rows"], op_row("eager", 1.0, linear), op_row("FP8", 0.5, linear)]
    error = dict(network="model_c2i_wide", width=48, bfloat16=0.006, fp8=0.0178, apart=0.0177)
    rows.append(dict(kind="fp8") | error)
    text = section([OPS | dict(rows=rows), TESTS])
    assert f"| {linear} | forward | c2i-xl, batch 64 | FP8 | 500.0 | 2,000 | 60 % | 2.00 ×" in text
    assert "| model_c2i_wide | 48 | 0.60% | 1.78% | 1.77% |" in text
    shown = summary.of_result(OPS | dict(rows=rows, dry_run=False, left_out=[], stages=[]))
    assert linear in shown and "model_c2i_wide" in shown
    assert "model_c2i_wide" not in section([OPS | dict(rows=rows)])


def test_the_derivative_s_tables():
    cost = dict(kind="derivative", error=1.5e-3, ms=12.5, peak_bytes=3 * 2**20, contender="tim")
    network = dict(what="dF/dt", network="xl-256", depth=8, derivative="jvp", dtype="bfloat16")
    rows = [cost | network, cost | dict(what="attention", shape="XL, 256 tokens")]
    text = section([OPS | dict(rows=rows), TESTS])
    assert "| xl-256 | 8 | jvp | bfloat16 | tim | 1.5e-03 | 0.0 | 12.50 | 3 |" in text
    assert "| XL, 256 tokens | tim | 1.5e-03 | 0.0 | 12.50 | 3 |" in text


def test_the_latest_result_counts():
    newer = copy.deepcopy(OPS) | dict(started="2026-12-01", file="2026-12-01-h100-ops.json")
    newer["rows"][2]["ms"] = 0.3
    text = section([OPS, newer, TESTS])
    assert "10.00 ×" in text and "7.50 ×" not in text


def test_plots(tmp_path, monkeypatch):
    monkeypatch.setattr(markdown, "PLOTS", tmp_path)
    markdown.write_plots(OPS, [OPS, TESTS], Op)
    markdown.write_plots(MODELS, [MODELS, TESTS], Network)
    made = {path.name for path in tmp_path.iterdir()}
    assert made == {
        "2026-11-23-h100-ops-against.png",
        "2026-11-23-h100-ops-limit.png",
        "2026-11-23-h100-model-models.png",
    }


def test_networks_on_a_cpu():
    row = dict(
        kind="turns", subject="model", case="forward, TiM-B", dtype="float32", base="eager",
        contender="tim, auto", base_ms=3.0, ms=2.0, ratio=1.5, ratio_10=1.4, ratio_90=1.6, rounds=5,
    )  # fmt: skip
    machine = dict(cpu="A processor", threads=1)
    text = section([result("cpu", [row, row | dict(subject="op", case="an op")], machine=machine)])
    assert "| float32 | eager | 3.000 | 2.000 | 1.50 × | 1.40–1.60 |" in text
    assert "an op" not in text
    assert "A processor, threads: 1" in text and markdown.NOTHING in text


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="README.md needs the lines"):
        into("# A project", "text")
    assert into(f"a\n{markdown.BEGIN}\nold\n{markdown.END}\nb", "new") == (
        f"a\n{markdown.BEGIN}\nnew\n{markdown.END}\nb"
    )
