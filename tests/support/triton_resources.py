"""What resources a compiled kernel needs, from the text that triton keeps of it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton

MATRIX = {
    "wgmma": "wgmma.mma_async",
    "tcgen05": "tcgen05.mma",
    "mma.sync": "mma.sync",
    "mfma": "v_mfma",
}


class Resources(NamedTuple):
    kernel: str
    registers: int
    spilled: int  # bytes per thread; on AMD, vector registers
    shared: int  # bytes
    tensor: int  # columns of tensor memory
    matrix: str  # the kind of its matrix instructions
    copies: int  # asynchronous copies of 16 bytes each
    bulk: int  # copies by the copy engine
    loads: int  # other loads of tiles, in loops around products


def resources(kernel: Any) -> Resources:
    """The resources of a kernel that triton has compiled."""
    asm = kernel.asm
    text = asm["ptx"] if "ptx" in asm else asm["amdgcn"]
    registers, spilled = _usage(asm["cubin"]) if "ptx" in asm else _amd_usage(text)
    return Resources(
        kernel.src.fn.__name__,
        registers,
        spilled,
        kernel.metadata.shared,
        getattr(kernel.metadata, "tmem_size", None) or 0,
        ", ".join(kind for kind, instruction in MATRIX.items() if instruction in text),
        text.count("cp.async.cg.shared.global"),
        text.count("cp.async.bulk.tensor"),
        _loads(asm["ttgir"]),
    )


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack, which hold spilled registers and nothing else."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


def _amd_usage(text: str) -> tuple[int, int]:
    # Scalar registers spill into vector registers, which costs next to nothing.
    names = ("vgpr_count", "vgpr_spill_count")
    registers, spilled = (int(re.search(rf"\.{name}: +(\d+)", text)[1]) for name in names)
    return registers, spilled


def _loads(ttgir: str) -> int:
    """Loads of tiles that are not asynchronous, in the innermost loops around products."""
    lines, count = ttgir.splitlines(), 0
    for at, line in enumerate(lines):
        if " scf.for " in line:
            end = " " * (len(line) - len(line.lstrip())) + "}"
            body = []
            for inner in lines[at + 1 :]:
                if inner.startswith(end):
                    break
                body.append(inner)
            text = "\n".join(body)
            if re.search(r"tt\.dot |warp_group_dot |tc_gen5_mma ", text) and "scf.for" not in text:
                count += len(re.findall(r"tt\.load .*tensor<\d+x\d+x!tt\.ptr", text))
    return count
