"""What a warp executes, counted in the machine code: loops by their trips, slow paths as if taken.

The code that Triton makes is a straight line with forward branches and simple loops. What stands
behind the last EXIT, the slow paths of square roots, is never reached by ordinary numbers.
"""

import re
from typing import NamedTuple

LABEL = re.compile(r"^(\.\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?);")
TARGET = re.compile(r"`\((\.\w+)\)")
REGISTER = re.compile(r"\bR(\d+)\b")
BYTES = {"128": 16, "256": 32, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # 4 without one


class Executed(NamedTuple):
    """By each warp of a program."""

    instructions: int
    barriers: int
    rounds: int  # how often it waits for loads from global memory that are then all under way
    wide: int  # accesses to global memory of at least 16 bytes a thread
    narrow: int

    def plus(self, other: "Executed", times: int) -> "Executed":
        return Executed(*(a + times * b for a, b in zip(self, other, strict=True)))


def executed(sass: str, trips: int) -> Executed:
    """Of a kernel whose loops, one after the other, each make `trips` trips."""
    code, loops, _ = _parse(sass)
    total, end = Executed(0, 0, 0, 0, 0), 0
    for start, stop in loops:
        if start < end:
            raise ValueError("loops within loops are not counted")
        total = total.plus(_straight(code[end:start]), 1).plus(_straight(code[start:stop]), trips)
        end = stop
    return total.plus(_straight(code[end:]), 1)


def of_a_trip(sass: str) -> int:
    """Instructions of a trip through the longest loop, past the first: without its branches that
    hold a division, as attention has for the mean over its first tile."""
    code, loops, branches = _parse(sass)
    start, stop = max(loops, key=lambda loop: loop[1] - loop[0], default=(0, 0))
    inner = [(at, to) for at, to in branches if start <= at < to <= stop]
    divides = ("MUFU.RCP" in {operation for operation, _ in code[at:to]} for at, to in inner)
    once = {i for (at, to), skip in zip(inner, divides, strict=True) if skip for i in range(at, to)}
    return stop - start - len(once)


Span = tuple[int, int]
Code = list[tuple[str, str]]  # an operation with its modifiers, and its operands


def _parse(sass: str) -> tuple[Code, list[Span], list[Span]]:
    """The instructions up to the last EXIT, where loops begin and end, and branches forward."""
    code, labels, loops, forward, last = [], {}, [], [], 0
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append((instruction[1], instruction[2]))
            target = TARGET.search(instruction[2])
            if instruction[1].startswith("BRA") and target:
                if target[1] in labels:
                    loops.append((labels[target[1]], len(code)))
                else:
                    forward.append((len(code), target[1]))
            elif instruction[1] == "EXIT":
                last = len(code)
    branches = [(at, labels[label]) for at, label in forward if label in labels]
    return code[:last], sorted(loop for loop in loops if loop[1] <= last), branches


def _straight(code: Code) -> Executed:
    barriers = rounds = wide = narrow = 0
    coming: set[int] = set()  # registers that a load under way will write
    for operation, operands in code:
        name, *modifiers = operation.split(".")
        registers = [int(number) for number in REGISTER.findall(operands)]
        if coming.intersection(registers):
            coming, rounds = set(), rounds + 1
        if name in ("LDG", "STG"):
            size = next((BYTES[m] for m in modifiers if m in BYTES), 4)
            wide, narrow = wide + (size >= 16), narrow + (size < 16)
            if name == "LDG":
                coming.update(range(registers[0], registers[0] + -(-size // 4)))
        barriers += name == "BAR"
    return Executed(len(code), barriers, rounds, wide, narrow)
