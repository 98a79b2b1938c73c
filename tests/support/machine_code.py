"""Loops of machine code (SASS), and how many loads each has under way when it waits for one."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"\bR(\d+)(\.64)?")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str

    @property
    def registers(self) -> set[int]:
        """All that it reads or writes."""
        found = set()
        for number, pair in REGISTER.findall(self.operands):
            found |= {int(number), int(number) + bool(pair)}
        return found

    @property
    def loaded(self) -> tuple[int, int] | None:
        """The first register and the bytes of a load from global memory."""
        if not re.match(r"LDG?\.E\b|LDG\b", self.name):
            return None
        parts = self.name.split(".")
        target = REGISTER.search(self.operands)
        return (
            (int(target[1]), next((WIDTHS[p] for p in parts if p in WIDTHS), 4)) if target else None
        )


class Loop(NamedTuple):
    """An innermost loop that loads from global memory."""

    begin: int
    end: int
    instructions: int
    loads: int
    # Of a warp: the most loads and bytes under way when an instruction waits for one of them.
    loads_ahead: int
    bytes_ahead: int


def functions(path: Path, cuobjdump: Path) -> Iterator[tuple[str, list[Instruction]]]:
    """The mangled names and instructions of all functions in a file."""
    text = subprocess.run(
        [str(cuobjdump), "-sass", str(path)], capture_output=True, text=True, check=True
    ).stdout
    for name, body in re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function :|\Z)", text, re.DOTALL):
        yield name, [Instruction(int(a, 16), n, o) for a, n, o in INSTRUCTION.findall(body)]


def loops(code: list[Instruction]) -> Iterator[Loop]:
    """Innermost loops with loads; a loop is what a branch backwards repeats."""
    spans = []
    for instruction in code:
        target = re.search(r"(?:0x|`\(\.L_x_\d+\)|)([0-9a-f]+)$", instruction.operands.strip())
        if instruction.name.split(".")[0] == "BRA" and target:
            begin = int(target[1], 16)
            if begin < instruction.address:
                spans.append((begin, instruction.address))
    for begin, end in spans:
        if any((b, e) != (begin, end) and begin <= b and e <= end for b, e in spans):
            continue
        body = [i for i in code if begin <= i.address <= end]
        loads = sum(i.loaded is not None for i in body)
        if loads:
            yield Loop(begin, end, len(body), loads, *_ahead(body))


def _ahead(body: list[Instruction]) -> tuple[int, int]:
    """Follow the loop round twice. A wait for a load is one for all loads before it, too."""
    under_way: list[tuple[set[int], int]] = []
    most, most_bytes = 0, 0
    for instruction in body * 2:
        touched = instruction.registers
        load = instruction.loaded
        waited = [k for k, (registers, _) in enumerate(under_way) if registers & touched]
        if waited:
            most = max(most, len(under_way))
            most_bytes = max(most_bytes, 32 * sum(size for _, size in under_way))
            del under_way[: waited[-1] + 1]
        if load:
            first, size = load
            under_way.append((set(range(first, first + -(-size // 4))), size))
    return most, most_bytes


if __name__ == "__main__":
    import sys

    for name, code in functions(Path(sys.argv[1]), Path(sys.argv[2])):
        for loop in loops(code):
            print(name[:60], loop)
