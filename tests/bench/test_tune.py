"""The table of configurations, how it is looked up, and how its entries are chosen."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cases import fp8
from benchmarks.cases.calls import calls
from benchmarks.cases.shapes import Shape
from benchmarks.clock.timing import Timing
from benchmarks.static.cubin import ARCHITECTURES, Resources
from benchmarks.static.launches import record_launches, through_launchers
from benchmarks.static.resources import refusal
from benchmarks.static.sass import executed, of_a_trip
from benchmarks.tune import attention, tuner
from benchmarks.tune.attention import Tile
from benchmarks.tune.estimate import CHIPS, LATENCY, Reading, limits, slowdown
from benchmarks.tune.tuner import Candidate, choose, fastest
from tim_kernels import use_backend
from tim_kernels.launch import tuning

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def of_elements() -> list[str]:
    """The kernels of the table but attention's."""
    return [kernel for kernel in tuner.kernels() if kernel not in attention.HEAD_DIMS]


def asked(monkeypatch) -> set[str]:
    """The kernels whose configuration the launchers of all calls ask for."""
    names, section = set(), tuning.section
    monkeypatch.setattr(
        tuning, "section", lambda kernel, arch: names.add(kernel) or section(kernel, arch)
    )
    shape = Shape(2, (2, 2), (4, 32, 32), 144)
    every = *calls(**shape._asdict()), *fp8.calls(shape, torch.bfloat16, "meta")
    for call in every:
        for direction in call.directions:
            with use_backend("triton"), record_launches(), through_launchers():
                call.run(direction)
    return names


def test_every_kernel_has_an_entry_for_every_architecture(monkeypatch):
    names = asked(monkeypatch)
    assert names <= tuning.TABLE["default"].keys()
    assert {name for name in names if not name.startswith("attention")} == set(of_elements())
    for arch in ARCHITECTURES:
        for name in attention.HEAD_DIMS:
            assert attention.configured(name, arch) in attention.CANDIDATES
        assert (arch < fp8.OLDEST) == (not {*fp8.KERNELS} & {*tuning.TABLE[f"sm_{arch}"]})
        for name in of_elements():
            if arch < fp8.OLDEST and name in fp8.KERNELS:
                continue
            entry = tuning.TABLE[f"sm_{arch}"][name]
            assert Candidate(entry["elements"], entry["num_warps"]) in {
                *tuner.candidates(name),
                tuner.usual(name),
            }
            assert entry["source"].startswith(("timed on ", "compiled with ")), name


def results(call) -> list[torch.Tensor]:
    """Outputs, gradients and tangents, in float64."""
    leaves = [tensor.detach().requires_grad_() for tensor in call.tensors]
    outputs = call.function(*leaves, *call.constants)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    gradients = torch.autograd.grad(outputs, leaves, [o.detach().cos() for o in outputs])
    directions = tuple(tensor.sin() for tensor in call.tensors)
    _, tangents = torch.func.jvp(
        lambda *x: call.function(*x, *call.constants), call.tensors, directions
    )
    tangents = [tangents] if isinstance(tangents, torch.Tensor) else list(tangents)
    return [x.detach().double() for x in (*outputs, *gradients, *tangents)]


def configuration(op: str, arch: int | None) -> tuple:
    """Of all kernels of an op."""
    own = [kernel for kernel in of_elements() if kernel.partition(".")[0] == op]
    with tuning.as_architecture(arch):
        return tuple(tuning.tuned(kernel, CPU) for kernel in own)


def test_configurations_change_no_answer():
    """Each once, where architectures have the same."""
    shape = dict(width=144, head_dim=72, batch=2, grid=(2, 5), latent=(4, 5, 5))
    for call in calls(dtype=torch.float32, device=DEVICE, **shape):
        different = {configuration(call.op, arch): arch for arch in (*ARCHITECTURES, None)}
        if len(different) == 1:
            continue
        with use_backend("triton"):
            expected = results(call)
            for arch in set(different.values()) - {None}:
                with tuning.as_architecture(arch):
                    ours = results(call)
                for a, b in zip(ours, expected, strict=True):
                    assert (a - b).norm() <= 1e-5 * b.norm(), (call.name, arch)


@pytest.fixture
def made_up(monkeypatch):
    """A kernel with an entry for sm_80 and one for sm_100."""
    sections = {"default": 1, "sm_80": 2, "sm_90": None, "sm_100": 3}
    table = {
        name: {"made.up": dict(elements=n, num_warps=n, source=f"guess {n}")} if n else {}
        for name, n in sections.items()
    }
    monkeypatch.setattr(tuning, "TABLE", table)
    tuning.section.cache_clear()
    yield "made.up"
    tuning.section.cache_clear()


@pytest.mark.parametrize(
    "arch, expected",
    [(None, 1), (75, 1), (80, 2), (86, 2), (89, 2), (90, 2), (100, 3), (103, 3), (120, 3)],
)
def test_an_unknown_architecture_takes_the_nearest_lower_one(made_up, arch, expected):
    with tuning.as_architecture(arch):
        assert tuning.tuned(made_up, CPU) == (expected, expected)


def test_source_says_whose_entry_it_is(made_up):
    assert tuning.source(made_up, CPU) == "guess 1"
    with tuning.as_architecture(80):
        assert tuning.source(made_up, CPU) == "guess 2"
    with tuning.as_architecture(89):
        assert tuning.source(made_up, CPU) == "guess 2 (sm_80 for sm_89)"


def test_tools_leave_nothing_behind(made_up):
    with (
        pytest.raises(KeyError),
        tuning.as_architecture(100),
        tuning.trying(made_up, elements=64, num_warps=8),
    ):
        assert tuning.tuned(made_up, CPU) == (64, 8)
        raise KeyError
    assert tuning.tuned(made_up, CPU) == (1, 1)


H100 = CHIPS[90]
# A hundred programs a multiprocessor, of which it holds ten; memory, issue and latency alike
READING = Reading(
    bytes=5 * 10**7, programs=13200, warps=4, resident=10, registers=64, spills=0,
    instructions=400, barriers=0, rounds=2, wide=4,
)  # fmt: skip


def test_limits_by_hand():
    memory, issue, latency, *units = limits(READING, H100)
    assert memory == pytest.approx(5e7 / 3.35e12)
    assert issue == pytest.approx(100 * 4 * 400 / 4 / 1.7e9)
    assert latency == pytest.approx(10 * (2 * LATENCY + 800 / 1.7e9))
    assert (
        max(memory, issue, latency) < slowdown([READING], H100) * memory < memory + issue + latency
    )


USUAL, OTHER = Candidate(1024, 4), Candidate(2048, 4)


@pytest.mark.parametrize(
    "other, is_chosen",
    [
        (dict(), False),  # as fast: what is there stays
        (dict(instructions=399), False),  # less than the model can tell
        (dict(resident=40, instructions=200), True),
        (dict(resident=40, instructions=200, spills=8), False),
        (dict(resident=40, instructions=200, wide=0), False),
        (dict(resident=40, instructions=200, refusal="a trap"), False),
        (dict(resident=5), False),  # too few bytes in flight
        (dict(rounds=1, barriers=2), True),  # as many in fewer rounds
    ],
)
def test_choice_by_the_model(other, is_chosen):
    readings = {USUAL: [READING, READING], OTHER: [READING, READING._replace(**other)]}
    assert choose(readings, USUAL, H100) == (OTHER if is_chosen else USUAL)


def test_of_equals_the_one_with_fewest_registers():
    slow = READING._replace(rounds=20)
    third = Candidate(512, 2)
    readings = {USUAL: [slow], OTHER: [READING], third: [READING._replace(registers=32)]}
    assert choose(readings, USUAL, H100) == third


def test_nothing_is_chosen_if_everything_spills():
    assert choose({USUAL: [READING._replace(spills=8)]}, USUAL, H100) is None


SASS = """
.text._forward_kernel:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/              @!P0 LDG.E.128 R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   FADD R12, R5, R9 ;
.L_x_0:
        /*0030*/                   LDG.E.U16 R16, desc[UR4][R2.64] ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   FADD R12, R12, R16 ;
        /*0060*/              @P0 BRA `(.L_x_0) ;
        /*0070*/                   BRA `(.L_x_1) ;
.L_x_1:
        /*0080*/                   STG.E.64 desc[UR4][R2.64], R12 ;
        /*0090*/                   EXIT ;
$slowpath:
        /*00a0*/                   FADD R1, R1, R1 ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""


def test_executed_instructions():
    run = executed(SASS, trips=10)
    assert run.instructions == 3 + 10 * 4 + 3
    assert (run.barriers, run.rounds) == (10, 1 + 10)
    assert (run.wide, run.narrow) == (2, 10 + 1)


def test_loops_within_loops_are_refused():
    inner = SASS.replace("BRA `(.L_x_1) ;", "@P1 BRA `(.L_x_0) ;")
    with pytest.raises(ValueError, match="loops within loops"):
        executed(inner, trips=10)


MEAN = """
.L_x_0:
        /*0000*/                   FADD R12, R12, R16 ;
        /*0010*/               @P4 BRA `(.L_x_1) ;
        /*0020*/                   MUFU.RCP R5, R5 ;
        /*0030*/                   FMUL R5, R5, R6 ;
.L_x_1:
        /*0040*/               @P3 BRA `(.L_x_2) ;
        /*0050*/                   MUFU.EX2 R7, R7 ;
.L_x_2:
        /*0060*/               @P0 BRA `(.L_x_0) ;
        /*0070*/                   EXIT ;
"""


def test_a_trip_has_no_mean_of_the_first_tile():
    assert (
        of_a_trip(MEAN).instructions == 5
    )  # the branch that divides is skipped, the other as if taken
    assert of_a_trip(MEAN.replace("MUFU.RCP", "MUFU.LG2")).instructions == 7


def test_refusals():
    fits = Resources(64, 0, 99 * 1024, 500, 4, 0, 4, 0)
    assert all(refusal(fits, arch, 4) is None for arch in (80, 86, 90, 120))
    assert "trap" in refusal(Resources(4, 0, 0, 16, 0, 0, 0, 0, is_trap=True), 90, 4)
    larger = Resources(64, 0, 100 * 1024, 500, 4, 0, 4, 0)
    assert refusal(larger, 80, 4) is None and "a program has 101376" in refusal(larger, 86, 4)
    most = Resources(128, 0, 0, 500, 4, 0, 4, 0)
    assert refusal(most, 90, 16) is None
    assert "69632 registers" in refusal(Resources(129, 0, 0, 500, 4, 0, 4, 0), 90, 16)


FAST = attention.Reading(registers=200, products=1000.0, issue=900.0, loads=700.0)
PRESENT, FASTER = Tile(128, 32, 8, 2), Tile(128, 64, 8, 2)


@pytest.mark.parametrize(
    "other, is_chosen",
    [
        (dict(), False),  # as fast: what is there stays
        (dict(products=800.0), True),
        (dict(products=800.0, loads=2000.0), False),
        (dict(products=800.0, latency=2000.0), False),
        (dict(products=800.0, spills=8), False),
        (dict(products=800.0, refusal="a trap"), False),
    ],
)
def test_choice_of_a_tile(other, is_chosen):
    readings = {PRESENT: FAST, FASTER: FAST._replace(**other)}
    assert attention.choose(readings, PRESENT, 0.02) == (FASTER if is_chosen else PRESENT)
    assert attention.choose({PRESENT: FAST._replace(refusal="a trap")}, PRESENT, 0.02) is None


def test_a_kernel_that_became_a_trap_is_refused():
    """sm_100's 512 columns of tensor memory do not hold a tile of 128 × 128. ptxas says nothing and
    makes a trap of it: few registers and no spills, the best of all if one looks no closer."""
    text = outside_the_interpreter("""
from benchmarks.tune import attention, tuner
attention.CANDIDATES[:] = [attention.Tile(128, 128, 8, 2)]
readings = tuner._read_tiles("attention.jvp.80", [100], 1)[100]
trap = readings[attention.CANDIDATES[0]]
assert trap.registers < 16 and not trap.spills, trap
print(trap.refusal)
present = attention.configured("attention.jvp.80", 100)
assert attention.choose(readings, present, 0.02) == present
assert readings[present].refusal is None and readings[present].registers > 100
print(attention.table("attention.jvp.80", 100, readings, present))
""")
    assert text.count("left a trap of it: it asks for more than there is") == 2


def outside_the_interpreter(code: str, *options: str) -> str:
    """What Python says to it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.nightly
def test_static_choice_goes_into_the_table(tmp_path):
    table = tmp_path / "tuning.json"
    timed = {"elements": 7, "num_warps": 7, "source": "timed on something"}
    mine = {"rows": 1}
    table.write_text(json.dumps({"default": {}, "sm_80": {"swiglu": timed, "attention": mine}}))
    code = (
        "from benchmarks.tune import tuner; tuner.WARPS = 4,; tuner.TILE = 512, 1024; "
        "tuner.HEAD_DIMS = {768: 64}; tuner.main()"
    )
    options = ["--arch", "80", "90", "--op", "swiglu", "--write", "--table", str(table)]
    text = outside_the_interpreter(code, *options, "--processes", "1")
    assert "sm_80 keeps what was timed: swiglu" in text
    written = json.loads(table.read_text())
    assert written["sm_80"] == {"swiglu": timed, "attention": mine}
    entry = written["sm_90"]["swiglu"]
    assert entry["elements"] in (512, 1024) and "not timed" in entry["source"]


def test_what_is_timed_replaces_what_was(tmp_path):
    table = tmp_path / "tuning.json"
    before = {"default": {}, "sm_90": {"a": {"source": "timed on A"}, "b": {}}}
    table.write_text(json.dumps(before))
    assert tuner.write(table, 90, {"a": {"elements": 1}, "b": {"elements": 2}}, "timed on B") == []
    assert {entry["source"] for entry in json.loads(table.read_text())["sm_90"].values()} == {
        "timed on B"
    }


def ms(*times: float) -> dict[str, Timing]:
    return {str(i): Timing(t, t, t, 7, 2, "events") for i, t in enumerate(times)}


def test_fastest():
    assert fastest({USUAL: ms(1.0, 2.0), OTHER: ms(0.9, 2.0)}) == OTHER
    assert fastest({USUAL: ms(1.0, 2.0), OTHER: ms(0.995, 2.0)}) == USUAL  # noise
    assert fastest({USUAL: ms(1.0, 0.1), OTHER: ms(0.9, 0.2)}) == USUAL


def test_what_cannot_run_is_not_timed(monkeypatch):
    """A trap would end the process; a GPU without FP8 is not asked for it."""
    reasons = iter([*[None] * 6, "a trap"])  # of six launches of the present one, and others
    monkeypatch.setattr(tuner, "why_not", lambda *_: next(reasons, None))
    monkeypatch.setattr(tuner, "candidates", lambda kernel: [Candidate(512, 4), Candidate(512, 2)])
    shape = dict(width=144, batch=2, grid=(2, 3), latent=(4, 4, 4))
    monkeypatch.setattr(fp8, "why_not", lambda device: "it is old")
    result = tuner.measure(DEVICE, 60.0, ("swiglu",), **shape)
    (refused,) = result["refused"]
    assert refused == {"kernel": "swiglu", "why": "a trap", "elements": 512, "num_warps": 4}
    timed = {(row["elements"], row["num_warps"]) for row in result["timings"]}
    assert timed == {tuner.usual("swiglu"), (512, 2)}


def test_measure(monkeypatch):
    """In the interpreter here; with CUDA graphs and events on a GPU. There is no time but for the
    present configuration, which alone is no choice."""
    shape = dict(width=144, batch=2, grid=(2, 3), latent=(4, 4, 4))
    result = tuner.measure(DEVICE, 0.0, ("swiglu", "transition_step"), **shape)
    assert json.loads(json.dumps(result)) == result
    assert result["source"].startswith("timed on ") and not result["chosen"]
    launches = {(row["kernel"], row["launch"]) for row in result["timings"]}
    ops, ways = ("swiglu", "transition_step"), ("forward", "backward", "jvp")
    summed = {("swiglu", "swiglu.summed_backward")}  # has the tile of the others
    own = {("swiglu.fp8", "swiglu.fp8")}
    assert launches == {(op, f"{op}.{way}") for op in ops for way in ways} | summed | own
    monkeypatch.setattr(tuner, "LEAST_TRIED", 1)
    chosen = tuner.measure(DEVICE, 0.0, ("transition_step",), **shape)["chosen"]
    assert chosen == {"transition_step": tuner.usual("transition_step")._asdict()}
    for row in result["timings"]:
        assert row["ms"] > 0 and Candidate(row["elements"], row["num_warps"]) is not None
