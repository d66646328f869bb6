"""What a warp executes, counted in the machine code: loops by their trips, of ways past each other
the longest, so that slow paths count as if taken.

The code that Triton makes is a straight line with forward branches and simple loops, nvcc's has
loops within loops as well. What stands behind the last EXIT, the slow paths of square roots, is
never reached by ordinary numbers; a loop that leaves by an EXIT goes on to its branch.
"""

import math
import re
from typing import NamedTuple

LABEL = re.compile(r"^(\.\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);")
TARGET = re.compile(r"`\((\.\w+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
BYTES = {"128": 16, "256": 32, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # 4 without one
LANE = 4  # bytes a clock: 32 load and store units, H100 white paper; 128 bytes of L1 a clock
GLOBAL = {"LDG", "STG", "LDGSTS", "RED", "ATOMG"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "SHFL"}
FMA = {"FFMA", "FADD", "FMUL", "FFMA2", "FADD2", "FMUL2"}  # the last three are two a lane
ALU = {
    "IADD", "IADD3", "VIADD", "LOP3", "SHF", "LEA", "SEL", "FSEL", "ISETP", "FSETP", "FMNMX",
    "FMNMX3", "IMNMX", "VIMNMX", "PRMT", "F2FP", "IABS", "MOV",
}  # fmt: skip
SPECIAL = {"MUFU", "F2F", "F2I", "I2F", "FRND"}  # the XU pipeline of Nsight Compute's guide
DOUBLE = {"DFMA", "DADD", "DMUL", "DSETP"}
# How a way counts, beside its instructions: one with whole accesses is rather taken than one with a
# loop that single ones would need, one with a loop that is not entered is avoided.
ACCESS, AVOIDED = 100, -(10**6)


class Executed(NamedTuple):
    """By each warp of a program."""

    instructions: int = 0
    barriers: int = 0
    rounds: int = 0  # how often it waits for loads from global memory that are then all under way
    wide: int = 0  # accesses to global memory of at least 16 bytes a thread
    narrow: int = 0
    loaded: int = 0  # bytes a lane from global memory, and to it
    stored: int = 0
    lsu: float = 0  # clocks of the load and store units, which move 128 bytes or 32 lanes each
    mufu: int = 0  # instructions of the special function units, conversions too, and so on
    fma: int = 0
    alu: int = 0
    double: int = 0
    copied: int = 0  # of the bytes loaded, by copies ahead into shared memory that are waited for
    waits: float = 0  # for these
    answers: int = 0  # how often it waits for tcgen05 products that are then all under way

    def plus(self, other: "Executed", times: int) -> "Executed":
        return Executed(*(a + times * b for a, b in zip(self, other, strict=True)))


def executed(
    sass: str, trips: int, others: int | None = None, within: tuple[int, int] | None = None
) -> Executed:
    """Of a kernel whose loops, one after the other, each make `trips` trips; or the longest of them
    does, and all the others, within loops too, make `others`: 0 are not entered where there is a
    way past them. Of the loops within the longest, the longest may make trips `within` it of its
    own, and the longest with float64 arithmetic."""
    code = _parse(sass)
    outer = [loop for loop in code.loops if not any(_is_in(loop, each) for each in code.loops)]
    if others is None and len(outer) < len(code.loops):
        raise ValueError("loops within loops are not counted")
    of_loop = dict.fromkeys(code.loops, trips if others is None else others)
    if longest := max(outer, key=_length, default=None):
        of_loop[longest] = trips
    if within:
        inner = [loop for loop in code.loops if _is_in(loop, longest)]
        double = [loop for loop in inner if any(_is_double(each) for each in code.of(loop))]
        of_loop |= {max(inner, key=_length): within[0], max(double, key=_length): within[1]}
    return _longest_way(code, (0, len(code.code)), of_loop)


def of_a_trip(sass: str) -> Executed:
    """A trip through the longest loop, past the first: without its branches that hold a division,
    as attention has for the mean over its first tile."""
    code, loops, jumps = _parse(sass)
    start, stop = max(loops, key=_length, default=(0, 0))
    inner = [(at + 1, jump.to) for at, jump in jumps.items() if start <= at < jump.to <= stop]
    divides = ("MUFU.RCP" in {operation for operation, _ in code[at:to]} for at, to in inner)
    once = {i for (at, to), skip in zip(inner, divides, strict=True) if skip for i in range(at, to)}
    return _straight([code[i] for i in range(start, stop) if i not in once])


Span = tuple[int, int]


class Jump(NamedTuple):
    to: int
    is_certain: bool


class Code(NamedTuple):
    """The instructions up to the last EXIT, an operation with its modifiers and its operands each;
    where loops begin and end; jumps forward, by the place of the branch."""

    code: list[tuple[str, str]]
    loops: list[Span]
    jumps: dict[int, Jump]

    def of(self, span: Span) -> list[tuple[str, str]]:
        return self.code[slice(*span)]


def _is_wide(operation: str, _operands: str) -> bool:
    name, *modifiers = operation.split(".")
    return name in GLOBAL and _size(name, modifiers) >= 16


def _length(span: Span) -> int:
    return span[1] - span[0]


def _is_double(instruction: tuple[str, str]) -> bool:
    return instruction[0].partition(".")[0] in DOUBLE


def _is_in(loop: Span, other: Span) -> bool:
    return loop != other and other[0] <= loop[0] and loop[1] <= other[1]


def _parse(sass: str) -> Code:
    code, labels, loops, forward, exits, last, goes_on = [], {}, [], {}, [], 0, False
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            predicate, operation, operands = instruction.groups()
            target = TARGET.search(operands)
            if operation.startswith("BRA") and target:
                if target[1] in labels:
                    loops.append((labels[target[1]], len(code) + 1))
                else:
                    is_certain = not predicate and operands.startswith("`")
                    forward[len(code)] = target[1], is_certain
            code.append((operation, operands))
            if operation == "EXIT":
                last, goes_on = len(code), bool(predicate)
                exits += [] if predicate else [last - 1]
            elif goes_on and operation.startswith("BRA") and not predicate:
                last, goes_on = len(code), False
    jumps = {at: Jump(labels[to], sure) for at, (to, sure) in forward.items() if to in labels}
    jumps |= {at: Jump(last, True) for at in exits}
    return Code(code[:last], sorted(loop for loop in loops if loop[1] <= last), jumps)


def _longest_way(code: Code, span: Span, trips: dict[Span, int]) -> Executed:
    """From the start of a span to its end, by instructions."""
    start, stop = span
    within = [loop for loop in code.loops if _is_in(loop, span) and trips[loop]]
    ends = {at: to for at, to in within if not any(_is_in((at, to), each) for each in within)}
    backs = {to - 1 for at, to in code.loops if not trips[at, to]}
    before, length, inner = {start: None}, {start: 0}, {}
    for i in range(start, stop):
        if i not in length:  # nothing leads here
            continue
        steps, cost = [i + 1], length[i] + 1 + ACCESS * _is_wide(*code.code[i])
        cost += AVOIDED * (i in backs)
        if i in ends:
            inner[i] = _longest_way(code, (i, ends[i]), trips)
            steps, cost = [ends[i]], length[i] + inner[i].instructions * trips[i, ends[i]]
        elif i in code.jumps:
            to, is_certain = code.jumps[i]
            to = next((at for at, end in ends.items() if at < to < end), min(to, stop))
            steps = [to] if is_certain else [i + 1, to]
        for step in steps:
            if cost > length.get(step, -math.inf):
                before[step], length[step] = i, cost
    way, at = [], before.get(stop)
    while at is not None:
        way.append(at)
        at = before[at]
    total, run = Executed(), []
    for i in reversed(way):
        if i in ends:
            total = total.plus(_straight(run), 1).plus(inner[i], trips[i, ends[i]])
            run = []
        else:
            run.append(code.code[i])
    return total.plus(_straight(run), 1)


def _straight(code: list[tuple[str, str]]) -> Executed:
    barriers = rounds = wide = narrow = loaded = stored = lsu = mufu = fma = alu = double = 0
    copied = waits = begun = 0  # bytes: `begun` here
    answers, is_multiplying = 0, False
    coming: set[int] = set()  # registers that a load under way will write
    is_copying = any(operation.startswith("LDGSTS") for operation, _ in code)  # by cp.async
    groups = max(1, sum(operation == "LDGDEPBAR" for operation, _ in code))  # of copies, a trip
    for operation, operands in code:
        name, *modifiers = operation.split(".")
        registers = [int(number) for number in REGISTER.findall(operands)]
        if coming.intersection(registers):
            coming, rounds = set(), rounds + 1
        if name == "DEPBAR" and is_copying:  # for all copies but the last so many groups
            left = int(re.search(r", 0x(\w+)|$", operands)[1] or "0", 16)
            if begun and not left:  # nothing ahead: as loads
                copied, begun, rounds = copied - begun, 0, rounds + 1
            else:
                waits += 1 / (1 + left / groups)
        if name in GLOBAL | SHARED:
            size = _size(name, modifiers)
            lsu += max(1, size / LANE)
        if name in GLOBAL:
            wide, narrow = wide + (size >= 16), narrow + (size < 16)
            is_load = name in ("LDG", "LDGSTS")
            loaded, stored = loaded + size * is_load, stored + size * (not is_load)
            begun += size * (name == "LDGSTS")
            copied += size * (name == "LDGSTS")
            if name == "LDG":
                coming.update(range(registers[0], registers[0] + -(-size // 4)))
        if name == "UTCBAR":  # a commit
            is_multiplying = True
        if is_multiplying and name == "SYNCS" and "PHASECHK" in modifiers:
            answers, is_multiplying = answers + 1, False
        barriers += name == "BAR"
        mufu += name in SPECIAL
        fma += (name in FMA) * (2 if name.endswith("2") else 1)
        alu += name in ALU
        double += name in DOUBLE
    return Executed(
        len(code), barriers, rounds, wide, narrow, loaded, stored, lsu, mufu, fma, alu, double,
        copied if waits else 0, waits, answers + is_multiplying,
    )  # fmt: skip


def _size(name: str, modifiers: list[str]) -> int:
    """Bytes a lane."""
    if name in ("LDSM", "STSM"):  # matrices of 8 × 8, four bytes a lane each
        return 4 * int(modifiers[-1]) if modifiers[-1] in ("2", "4") else 4
    return next((BYTES[m] for m in modifiers if m in BYTES), 4)
