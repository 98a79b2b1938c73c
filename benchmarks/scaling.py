"""``python -m benchmarks.scaling``: how time grows with rows, with the width and with layers.

A benchmark, as benchmarks/run.py makes it, of linear CKA whose workloads lie on three curves: along
each, one of the three sizes grows. Of the providers it has naive eager and hand-derived code,
torch.compile where the profile compiles, and rift_kernels. Exits with 1 if rift_kernels failed or
was wrong, or nothing was measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from . import command, files, run, tables
from .providers import HAND_DERIVED, NAIVE, OURS, providers
from .schema import SCALING
from .workloads import BFLOAT16, COMPILED, Profile, Workload

# Where all providers have something to compute.
_CKA = partial(Workload, "cka_biased")


@dataclass(frozen=True)
class Curves:
    """Workloads along which one size grows, by its name."""

    along: dict[str, tuple[Workload, ...]]

    @property
    def workloads(self) -> tuple[Workload, ...]:
        """Each once, whatever the number of curves that it lies on."""
        return tuple(dict.fromkeys(w for curve in self.along.values() for w in curve))


CPU = Curves(
    {
        "rows": tuple(_CKA(rows, 512) for rows in (32, 64, 128, 256, 512, 1024, 2048, 4096)),
        "width": tuple(_CKA(64, width) for width in (64, 128, 256, 512, 1024, 2048, 4096)),
        "layers": tuple(_CKA(64, 512, layers=layers) for layers in (1, 2, 4, 8, 16)),
    }
)
GPU = Curves(
    {
        "rows": tuple(_CKA(rows, 1024, BFLOAT16) for rows in (64, 256, 1024, 4096, 16384, 65536)),
        "width": tuple(_CKA(4096, width, BFLOAT16) for width in (256, 512, 1024, 2048, 4096)),
        "layers": tuple(_CKA(64, 1024, BFLOAT16, layers) for layers in (1, 4, 12, 24)),
    }
)
SMOKE = Curves(
    {
        "rows": (_CKA(8, 8), _CKA(16, 8)),
        "width": (_CKA(8, 8), _CKA(8, 16)),
        "layers": (_CKA(8, 8), _CKA(8, 8, layers=2)),
    }
)
PROFILES = {
    # torch.compile takes seconds for every shape: on a CPU, more than there are.
    "cpu": (CPU, Profile(CPU.workloads, budget=32, probe=1024, max_rounds=40, compiled=())),
    "gpu": (GPU, Profile(GPU.workloads, budget=40, probe=8192, compiled=(COMPILED,))),
    "smoke": (SMOKE, Profile(SMOKE.workloads, budget=20, probe=64, max_rounds=5, compiled=())),
}


def measured(name: str, device: torch.device) -> files.Result:
    """A profile's result."""
    curves, profile = PROFILES[name]
    candidates = [p for p in providers(device, profile.compiled) if _is_shown(p.name)]
    result = run.run(name, profile, device, candidates, profile.budget)
    places = {workload: i for i, workload in enumerate(profile.workloads)}
    result["curves"] = [
        {"along": along, "workloads": [places[workload] for workload in curve]}
        for along, curve in curves.along.items()
    ]
    return {**result, "schema": SCALING}


def _is_shown(name: str) -> bool:
    return name in (NAIVE, HAND_DERIVED, COMPILED) or name.startswith(OURS)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = command.parser("scaling", __doc__, PROFILES)
    name, device, out = command.settle(parser, parser.parse_args(arguments))
    result = measured(name, device)
    path = files.write(result, out)
    print(f"\n{tables.summary(result)}\n\nwrote {path}")
    failed = run.failures(result)
    for failure in failed:
        print(f"FAILED {failure}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
