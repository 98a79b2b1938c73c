"""What each kernel in a compiled ``rift_kernels._C`` takes: registers, stack and instructions.

python -m tests.support.cuda_resources    writes benchmarks/results/cuda-resources.json
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
# A kernel for other architectures is empty: it takes at most this many registers.
EMPTY_REGISTERS = 8
# Instructions that are counted in machine code.
INSTRUCTIONS = {
    "products": r"\sHMMA\.",  # of a warp, on tensor cores
    "warpgroup": r"\sHGMMA\.",  # products of a warpgroup
    "waits": r"\sWARPGROUP\.DEPBAR",  # for products of a warpgroup
    "multicast": r"\sUTMALDG\.\S*MULTICAST",  # copies by the copy engine to a whole cluster
    "bulk": r"\sUTMALDG\.",  # copies by the copy engine to one block
    "copies": r"\sLDGSTS\.",  # asynchronous copies by threads
    "vector_stores": r"\sSTG\.E\.128",  # of 16 bytes by each thread
    "local": r"\s(?:LDL|STL)\b",  # accesses to local memory
    "clusters": r"\sUCGABAR_",  # barriers of a cluster
    "fences": r"\sMEMBAR\.",  # that wait for earlier accesses to memory
}
# Fences between the first and the last product of a warpgroup.
FENCES_AMONG_PRODUCTS = "fences_among_products"
# By architecture and kernel.
Resources = dict[str, dict[str, dict[str, Any]]]


def cuobjdump() -> Path | None:
    """CUDA's, or the one that comes with triton."""
    path = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if path is not None or triton is None:
        return None if path is None else Path(path)
    tool = Path(str(triton.origin)).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return tool if tool.exists() else None


def release(nvcc: str = "nvcc") -> str:
    """The release of a compiler, such as 13.0."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release (\d+\.\d+)", text)[1]


def kernel_resources(extension: Path) -> Resources:
    """The resources of every kernel that is not empty, for each architecture."""
    resources: Resources = {}
    by_mangled_name: dict[tuple[str, str], dict[str, Any]] = {}
    arch, usage = "", r"^arch = (\w+)|Function (\S+):\n\s*REG:(\d+) STACK:(\d+)"
    for next_arch, name, registers, stack in re.findall(
        usage, _cuobjdump("-res-usage", extension), re.M
    ):
        arch = next_arch or arch
        if name and int(registers) > EMPTY_REGISTERS:
            needs = {"registers": int(registers), "stack": int(stack)}
            needs |= dict.fromkeys((*INSTRUCTIONS, FENCES_AMONG_PRODUCTS), 0)
            by_mangled_name[arch, name] = needs
            resources.setdefault(arch, {})[_demangled(name)] = needs
    counted = "|".join(f"(?P<{name}>{pattern})" for name, pattern in INSTRUCTIONS.items())
    needs, fences_before = {}, 0
    for match in re.finditer(
        rf"^arch = (\w+)|Function : (\S+)|{counted}", _cuobjdump("-sass", extension), re.M
    ):
        if match[1]:
            arch = match[1]
        elif match[2]:
            needs = by_mangled_name.get((arch, match[2]), dict.fromkeys(INSTRUCTIONS, 0))
        else:
            needs[str(match.lastgroup)] += 1
            if match.lastgroup == "warpgroup":
                fences_before = needs["fences"] if needs["warpgroup"] == 1 else fences_before
                needs[FENCES_AMONG_PRODUCTS] = needs["fences"] - fences_before
    return {arch: dict(sorted(kernels.items())) for arch, kernels in resources.items()}


def _cuobjdump(option: str, extension: Path) -> str:
    command = [str(cuobjdump()), option, str(extension)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@cache
def _demangled(symbol: str) -> str:
    """The name of a kernel, such as ``cka_small<Bf16, Bf16, 64, true>``."""
    command = ["c++filt", symbol]
    name = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return (
        re.search(r"rift::(\w+(?:<.*>)?)\(", name)[1].replace("_kernel", "").replace("rift::", "")
    )


def as_json(extension: Path, nvcc: str = "nvcc") -> str:
    """The resources as JSON, with a line for each kernel."""
    sections = [f' "nvcc": "{release(nvcc)}"']
    for arch, kernels in kernel_resources(extension).items():
        lines = ",\n".join(f'  "{name}": {json.dumps(needs)}' for name, needs in kernels.items())
        sections.append(f' "{arch}": {{\n{lines}\n }}')
    return "{\n" + ",\n".join(sections) + "\n}\n"


def main() -> None:
    (extension,) = (Path(__file__).parents[2] / "rift_kernels").glob("_C*.so")
    RESULT.write_text(as_json(extension), encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
