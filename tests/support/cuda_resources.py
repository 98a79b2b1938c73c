"""What the kernels in a compiled ``rift_kernels._C`` need of a processor.

python -m tests.support.cuda_resources    benchmarks/results/cuda-resources.json anew
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "cuda-resources.json"
# A kernel for other architectures returns at once.
EMPTY_REGISTERS = 8
# In machine code: products of a warp and of a warpgroup on tensor cores, waits for the latter;
# copies by the copy engine into all of a cluster and into one block, and by threads; local memory;
# barriers of clusters.
INSTRUCTIONS = {
    "products": r"\sHMMA\.",
    "warpgroup": r"\sHGMMA\.",
    "waits": r"\sWARPGROUP\.DEPBAR",
    "multicast": r"\sUTMALDG\.\S*MULTICAST",
    "bulk": r"\sUTMALDG\.",
    "copies": r"\sLDGSTS\.",
    "local": r"\s(?:LDL|STL)\b",
    "clusters": r"\sUCGABAR_",
}
# Architecture -> kernel -> its needs
Resources = dict[str, dict[str, dict[str, Any]]]


def cuobjdump() -> Path | None:
    """CUDA's, or the one that triton carries."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is not None or triton is None:
        return None if found is None else Path(found)
    tool = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


def release(nvcc: str = "nvcc") -> str:
    """A compiler's, such as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def measured(extension: Path) -> Resources:
    """Of every kernel that is not empty there."""
    result: Resources = {}
    mangled: dict[tuple[str, str], dict[str, Any]] = {}
    arch, usage = "", r"^arch = (\w+)|Function (\S+):\n\s*REG:(\d+) STACK:(\d+)"
    for found, name, registers, stack in re.findall(usage, _run("-res-usage", extension), re.M):
        arch = found or arch
        if name and int(registers) > EMPTY_REGISTERS:
            needs = {"registers": int(registers), "stack": int(stack)}
            needs |= dict.fromkeys(INSTRUCTIONS, 0)
            mangled[arch, name] = result.setdefault(arch, {})[_readable(name)] = needs
    counted = "|".join(f"(?P<{name}>{text})" for name, text in INSTRUCTIONS.items())
    needs = {}
    for match in re.finditer(
        rf"^arch = (\w+)|Function : (\S+)|{counted}", _run("-sass", extension), re.M
    ):
        if match[1]:
            arch = match[1]
        elif match[2]:
            needs = mangled.get((arch, match[2]), dict.fromkeys(INSTRUCTIONS, 0))
        else:
            needs[str(match.lastgroup)] += 1
    return {arch: dict(sorted(kernels.items())) for arch, kernels in result.items()}


def _run(option: str, extension: Path) -> str:
    command = [str(cuobjdump()), option, str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _readable(mangled: str) -> str:
    """As ``cka_small<Bf16, Bf16, 64, true>``."""
    command = ["c++filt", mangled]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (
        re.search(r"rift::(\w+(?:<.*>)?)\(", name)[1].replace("_kernel", "").replace("rift::", "")
    )


def dumped(extension: Path, nvcc: str = "nvcc") -> str:
    """As JSON, a kernel a line."""
    lines = [f' "nvcc": "{release(nvcc)}"']
    for arch, kernels in measured(extension).items():
        rows = ",\n".join(f'  "{name}": {json.dumps(needs)}' for name, needs in kernels.items())
        lines.append(f' "{arch}": {{\n{rows}\n }}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main() -> None:
    (extension,) = (Path(__file__).parents[2] / "rift_kernels").glob("_C*.so")
    RESULT.write_text(dumped(extension), encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
