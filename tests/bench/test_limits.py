"""What limits a kernel by its machine code, and the table beside its aims."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import limits as report
from benchmarks.report.limits import GOALS, Goal, Line, lines
from benchmarks.static import extension
from benchmarks.static.blocks import launched
from benchmarks.static.cubin import Compiled, Resources
from benchmarks.static.launches import record_cuda, record_launches
from benchmarks.static.sass import executed
from benchmarks.tune import attention
from benchmarks.tune.estimate import CHIPS, LATENCY, Reading, limits, reading, together

ROOT = Path(__file__).parents[2]
H100 = CHIPS[90]
WORDS = {2: ".U16", 4: "", 8: ".64", 16: ".128"}


def sass(*lines: str) -> str:
    """Instructions and labels, as nvdisasm prints them."""
    places = (f"        /*{16 * i:04x}*/                   " for i in range(len(lines)))
    pairs = zip(places, lines, strict=True)
    return "\n".join(each if each.endswith(":") else f"{at}{each} ;" for at, each in pairs)


COUNTED = sass(
    "S2R R0, SR_TID.X",
    "LDG.E.128 R4, desc[UR4][R2.64]",
    "LDG.E.64 R8, desc[UR4][R2.64]",
    "LDG.E.U16 R10, desc[UR4][R2.64]",
    "LDS.128 R12, [R0]",
    "SHFL.BFLY PT, R16, R12, 0x8, 0x1f",
    "FFMA R4, R4, R5, R8",
    "@P0 FMUL R4, R4, R10",
    "IADD3 R0, R0, 0x1, RZ",
    "LOP3.LUT R0, R0, 0x1, RZ, 0xc0, !PT",
    "MUFU.RSQ R4, R4",
    "F2F.BF16.F32 R4, R4",
    "DFMA R4, R4, R4, R4",
    "STG.E.U8 desc[UR4][R2.64], R4",
    "STG.E desc[UR4][R2.64], R4",
    "EXIT",
)


def test_counted_by_hand():
    run = executed(COUNTED, trips=1)
    assert run.instructions == 16 and run.rounds == 1  # of three loads, all under way
    assert (run.wide, run.narrow) == (1, 4)
    assert (run.loaded, run.stored) == (16 + 8 + 2, 1 + 4)
    assert run.lsu == (4 + 2 + 1) + (4 + 1) + (1 + 1)  # 128 bytes or 32 lanes a clock
    assert (run.fma, run.alu, run.mufu, run.double) == (2, 2, 2, 1)


WAYS = sass(
    "@P0 BRA `(.L_1)",
    "FADD R0, R0, R0",  # one of two ways
    "BRA `(.L_2)",
    ".L_1:",
    "MUFU.EX2 R0, R0",  # the other, longer
    "MUFU.EX2 R0, R0",
    "MUFU.EX2 R0, R0",
    ".L_2:",
    "FADD R0, R0, R0",
    ".L_3:",
    "IADD3 R0, R0, 0x1, RZ",
    ".L_4:",
    "MUFU.RSQ R1, R1",
    "@P1 BRA `(.L_4)",
    "@P2 BRA `(.L_3)",
    "EXIT",
)


def test_of_two_ways_the_longer_and_loops_within_loops():
    run = executed(WAYS, trips=10, others=3)
    assert run.instructions == 1 + 3 + 1 + 10 * (1 + 3 * 2 + 1) + 1
    assert (run.mufu, run.fma, run.alu) == (3 + 10 * 3, 1, 10)
    with pytest.raises(ValueError, match="loops within loops"):
        executed(WAYS, trips=10)


def test_nothing_runs_after_an_exit():
    run = executed(sass("@P0 BRA `(.L_1)", "EXIT", ".L_1:", "MUFU.EX2 R0, R0", "EXIT"), trips=1)
    assert (run.instructions, run.mufu) == (3, 1)


def test_a_loop_that_leaves_by_an_exit():
    loop = ".L_1:", "FADD R0, R0, R0", "@P0 EXIT", "BRA `(.L_1)"
    run = executed(sass("S2R R0, SR_TID.X", *loop, "MUFU.EX2 R0, R0"), trips=5)
    assert (run.instructions, run.fma, run.mufu) == (1 + 5 * 3, 5, 0)


COPY = "LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R4.64]", "LDGDEPBAR"


@pytest.mark.parametrize("groups, waits", [(0, 8), (1, 4), (3, 2)])
def test_copies_ahead_share_a_wait(groups, waits):
    loop = (".L_1:", f"DEPBAR.LE SB0, {groups:#x}", *COPY, "@P0 BRA `(.L_1)")
    run = executed(sass(*COPY, *loop, "EXIT"), trips=8)
    assert (run.waits, run.rounds, run.copied) == (waits, 0, 8 * 16) and run.loaded == 9 * 16


def test_copies_that_are_waited_for_at_once_are_loads():
    run = executed(sass(".L_1:", *COPY, "DEPBAR.LE SB0, 0x0", "@P0 BRA `(.L_1)", "EXIT"), trips=8)
    assert (run.rounds, run.waits, run.copied, run.loaded) == (8, 0, 0, 8 * 16)


TILES = sass(
    ".L_1:",  # over tiles
    ".L_2:",  # angles
    "DFMA R4, R4, R4, R4",
    "@P0 BRA `(.L_2)",
    ".L_3:",  # tokens
    "DEPBAR.LE SB0, 0x0",
    "@P1 BRA `(.L_4)",
    COPY[0],
    "BRA `(.L_5)",
    ".L_4:",  # a slow way, longer
    "IADD3 R0, R0, 0x1, RZ",
    "IADD3 R0, R0, 0x1, RZ",
    "IADD3 R0, R0, 0x1, RZ",
    ".L_6:",
    COPY[0],
    "@P2 BRA `(.L_6)",
    ".L_5:",
    "FADD R0, R0, R0",
    "@P3 BRA `(.L_3)",
    "@P4 BRA `(.L_1)",
    "EXIT",
)


def test_tokens_and_angles_of_tiles():
    """Whole accesses are on the way of a launch, the loop of single ones is not."""
    run = executed(TILES, trips=2, others=0, within=(4, 5))
    assert (run.double, run.fma, run.waits) == (2 * 5, 2 * 4, 2 * 4)
    assert run.copied == 2 * 4 * 16 and run.instructions == 2 * (5 * 2 + 4 * 6 + 1) + 1


def kernel(
    size: int, registers: int = 32, moved: int = 2**28, work: int = 0, is_ahead: bool = True
) -> Reading:
    """A copy with accesses of some bytes a lane, its loads all under way at once or in turn."""
    count = 32 // size
    loads = [f"LDG.E{WORDS[size]} R{8 + 4 * i}, desc[UR4][R2.64]" for i in range(count)]
    stores = [f"STG.E{WORDS[size]} desc[UR4][R4.64], R{8 + 4 * i}" for i in range(count)]
    moves = [*loads, *stores]
    if not is_ahead:
        moves = [each for pair in zip(loads, stores, strict=True) for each in pair]
    code = sass(*["MUFU.EX2 R0, R0"] * work, *moves, "EXIT")
    resources = Resources(registers, 0, 0, 0, 0, 0, 0, 0)
    programs = moved // (32 * 4 * 64)  # warps of 32 lanes that read and write 32 bytes each
    return reading(moved, programs, 4, resources, executed(code, 1), 90)


def estimated(found: Reading) -> float:
    return together(limits(found, H100))


def test_narrow_accesses_are_estimated_slower():
    for is_ahead in (True, False):
        found = [kernel(size, is_ahead=is_ahead) for size in (16, 8, 4, 2)]
        seconds = [estimated(each) for each in found]
        assert seconds == sorted(set(seconds))
        assert [each.width for each in found] == [16, 8, 4, 2]
        assert found[-1].rounds == (1 if is_ahead else 16)
    assert seconds[-1] > 2 * seconds[0]  # and too few bytes in flight
    assert limits(kernel(2), H100).lsu == pytest.approx(2 * limits(kernel(4), H100).lsu)
    assert limits(kernel(4), H100).lsu == pytest.approx(limits(kernel(16), H100).lsu)
    assert kernel(2).bytes == kernel(16).bytes


def test_fewer_resident_programs_are_estimated_slower():
    found = [kernel(16, registers) for registers in (32, 64, 128, 255)]
    assert [each.resident for each in found] == [16, 8, 4, 2]
    seconds = [estimated(each) for each in found]
    assert seconds == sorted(set(seconds)) and seconds[-1] > 1.2 * seconds[0]
    for each in found:  # Little's law: half of what is touched is read, and waited for
        assert each.in_flight == each.resident * 4 * 32 * 32
        waits = each.bytes / 2 / H100.multiprocessors / each.in_flight
        latency = limits(each, H100).latency
        assert waits * LATENCY < latency < 1.1 * waits * LATENCY


def test_units_by_hand():
    programs = kernel(16).programs
    clocks = programs * 4 / H100.multiprocessors / H100.clock  # one for each warp
    of = limits(kernel(16, work=200), H100)
    assert of.mufu == pytest.approx(200 * 2 * clocks)  # 16 lanes a clock
    assert Line(GOALS[0], 90, kernel(16, work=200)).limit == "mufu"
    of = limits(kernel(16)._replace(fma=8, alu=4, double=2), H100)
    assert of.fma == pytest.approx(2 * clocks) and of.alu == pytest.approx(2 * clocks)
    assert of.double == pytest.approx(clocks)
    of = limits(kernel(16)._replace(fma=8, double=2), CHIPS[80])
    assert of.fma / of.double == pytest.approx(2) and of.fma / of.issue == pytest.approx(16 / 5)


def test_what_programs_read_again_comes_from_a_cache():
    once, again = kernel(16), kernel(16)._replace(bytes=2**27)
    assert (once.first, again.first) == (1, 0.5)
    assert limits(again, H100).latency < limits(once, H100).latency


def test_copies_ahead_pass_while_a_program_works():
    """They are of each byte once, so loads beside them are of what is in a cache."""
    ahead = kernel(16)._replace(loaded=48, copied=32, waits=8, rounds=0)
    assert ahead.first == 0 and ahead.in_flight == ahead.resident * 4 * 32 * 32 / 8
    of, working = (limits(ahead._replace(instructions=n), H100) for n in (0, 10**5))
    turns = ahead.programs / H100.multiprocessors / ahead.resident
    assert of.latency == pytest.approx(turns * 8 * LATENCY)
    assert working.latency == pytest.approx(turns * 2 * 10**5 / H100.clock)
    cached = limits(ahead._replace(instructions=0, rounds=1), H100).latency
    assert of.latency < cached < 1.01 * of.latency


def test_an_estimate_is_a_share_of_copy():
    found = kernel(16)
    slowdown = estimated(found) / limits(found, H100).memory
    line = Line(GOALS[0], 90, found)
    assert line.estimate == pytest.approx(100 / slowdown) and line.parts["memory"] == 1


def test_attention_waits_for_its_products():
    """Two programs hide each other's waits, one does not."""
    goal = next(goal for goal in GOALS if goal.call == "attention")
    alone = attention.Reading(products=1000.0, issue=900.0, latency=2000.0)
    hidden = Line(goal, 90, alone._replace(latency=1000.0)).estimate
    assert Line(goal, 90, alone).estimate < 0.8 * hidden
    most = 12 * 72 * 4096 / 1000 * H100.multiprocessors * H100.clock / 1e12
    assert hidden < most


def outside_the_interpreter(code: str, *options: str) -> subprocess.CompletedProcess:
    """A process without the interpreter that the rest of the suite sets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_attention_s_tangent_reaches_its_aim():
    """And rounds p and w in pairs: one at a time takes the special functions, which are few."""
    done = outside_the_interpreter("""
from benchmarks.report.limits import GOALS, lines
(line,) = lines(90, [goal for goal in GOALS if goal.call == "attention"])
assert line.estimate >= line.goal.aim and not line.reading.spills, line
assert line.parts["mufu"] < 0.4, line
print("done")
""")
    assert done.stdout == "done\n", done.stderr


@pytest.mark.parametrize("goal", GOALS, ids=lambda goal: f"{goal.kernel} {goal.backend}")
def test_every_aim_has_a_launch(goal):
    """Blocks and trips have every token of the call."""
    if goal.backend == "triton":
        names = [launch.name for launch in report._recorded(goal, 90, record_launches)]
        assert goal.kernel in names
        return
    found = report._recorded(goal, 90, record_cuda)
    (args,) = [args for name, args in found if name == goal.kernel.replace(".", "_")]
    launch = launched(goal.kernel.replace(".", "_"), args)
    step = 1 if launch.within is None else 32
    assert launch.blocks is None or launch.blocks * launch.trips * step >= 256 * 256 / 8


def test_the_kernel_is_read_that_is_launched(monkeypatch):
    """The general one has the same op and direction."""
    resources = Resources(32, 0, 0, 0, 2, 0, 2, 0)
    names = ["<true, {}>", "<false, {}>"], ["<64, 2, {}>", "<72, 2, {}>", "<128, 4, {}>"]
    goals = [goal for goal in GOALS if (goal.backend, goal.call) == ("cuda", report.QK)]
    compiled = [
        (Compiled(backend="cuda", kernel=f"{goal.kernel}{suffix}", call=call.format(dtype), arch=90,
                  num_warps=8, resources=resources), "")
        for goal in goals for suffix, calls in zip(("", "_staged"), names, strict=True)
        for call in calls for dtype in ("bf16", "fp16", "fp32")
    ]  # fmt: skip
    seen = []
    monkeypatch.setattr(report, "reading", lambda *args: seen.append(args) or kernel(16))
    monkeypatch.setattr(report, "executed", lambda sass, *trips: trips)
    for goal in goals:
        args = dict(report._recorded(goal, 90, record_cuda))[goal.kernel.replace(".", "_")]
        launch = launched(goal.kernel.replace(".", "_"), args)
        (own,) = [each for each, _ in compiled if launch.is_of(each.kernel, each.call)]
        assert (own.kernel, own.call) == (f"{goal.kernel}_staged", "<72, 2, bf16>")
        assert report._read_cuda(goal, 90, compiled).reading
        general = [each for each in compiled if "staged" not in each[0].kernel]
        assert "_staged of 72" in report._read_cuda(goal, 90, general).refusal
    forward, backward = seen
    assert [each[4] for each in seen] == [(2, 0, (16, 7))] * 2  # tiles, tokens, angles
    assert [each[1:3] for each in seen] == [(1024, 4)] * 2
    assert (forward[3].shared, backward[3].shared) == (47_792, 75_440)  # 3 and 2 fit in 164 KB


def test_adaln_is_read_at_its_width():
    launch = launched("ada_layer_norm_backward", _adaln(1152))
    fits = "<1152, bf16, bf16>", "<768, bf16, bf16>", "<1152, bf16, fp32>", "<1152, fp16, fp16>"
    assert [launch.is_of("ada_layer_norm.backward", call) for call in fits] == [True, *[False] * 3]
    assert not launch.is_of("ada_layer_norm.backward_any", "<bf16, bf16>")
    assert (launch.blocks, launch.warps, launch.trips) == (1024, 9, 32)


def _adaln(width: int) -> tuple:
    goal = next(goal for goal in GOALS if (goal.backend, goal.direction) == ("cuda", "backward"))
    return dict(report._recorded(goal, 90, record_cuda))["ada_layer_norm_backward"]


def test_what_cannot_be_compiled_is_named(monkeypatch):
    goals = [goal for goal in GOALS if goal.backend == "cuda"]
    monkeypatch.setattr(extension, "why_not", lambda: "nvcc was not found")
    found = list(lines(90, goals))
    assert [line.goal for line in found] == goals
    assert {line.refusal for line in found} == {"not compiled: nvcc was not found"}
    text = report.text(found, report.COLUMNS)
    assert text.count("not compiled: nvcc was not found") == len(goals) == text.count("cuda ")
    missing = report._read_cuda(Goal("swiglu", "forward", "cuda", 92), 90, [])
    assert "csrc/ has no swiglu.forward" in missing.refusal


@pytest.fixture
def compiled(monkeypatch):
    """nvcc has made a copy of 16-byte accesses of swiglu.forward."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(extension, "why_not", lambda: None)
    resources = Resources(32, 0, 0, 0, 2, 0, 2, 0)
    made = Compiled(
        backend="cuda", kernel="swiglu.forward", call="<8, bf16>", arch=90, num_warps=4,
        resources=resources,
    )  # fmt: skip
    loads = [f"LDG.E.128 R{8 + 4 * i}, desc[UR4][R2.64]" for i in range(4)]
    stores = [f"STG.E.128 desc[UR4][R2.64], R{8 + 4 * i}" for i in range(2)]
    monkeypatch.setattr(extension, "read", lambda *_: [(made, sass(*loads, *stores, "EXIT"))])


def test_the_table(compiled, capsys):
    report.main(["--op", "swiglu", "--processes", "1"])
    said = capsys.readouterr().out
    assert "Estimates from compiled code for sm_90" in said and "nothing was timed" in said
    (row,) = (line.split() for line in said.splitlines() if line.startswith("swiglu.forward"))
    assert row[1] == "cuda" and row[-7:] == [row[-7], "≥", "92", "%", "of", "copy", "memory"]
    (line,) = lines(90, [goal for goal in GOALS if goal.call == "swiglu"])
    assert line.reading.bytes == 256 * 256 * 3 * 3072 * 2 and line.reading.first == 1
    assert 92 < line.estimate < 100


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        report.main([])


@pytest.mark.nightly
@pytest.mark.parametrize("arch", ["80", "90", "100"])
def test_every_kernel_has_an_estimate(arch):
    """What a launch accesses is at least what it touches, else its shape was misread."""
    code = """
import sys
from benchmarks.report.limits import GOALS, lines
for line in lines(int(sys.argv[1])):
    assert line.reading, line
    if line.goal.call != "attention":
        found = line.reading
        moved = found.programs * found.warps * 32 * (found.loaded + found.stored)
        assert moved >= 0.99 * found.bytes and 20 < line.estimate < 100, line
print(len(GOALS))
"""
    done = outside_the_interpreter(code, arch)
    if reason := extension.why_not():
        assert f"not compiled: {reason}" in done.stderr
    else:
        assert done.stdout.split() == [f"{len(GOALS)}"], done.stderr
