"""``python -m benchmarks.scaling``: how time grows with rows, with the width and with layers.

A benchmark, as benchmarks/run.py makes it, of linear CKA whose workloads lie on three curves: along
each, one of the three sizes grows. Exits with 1 if rift_kernels failed or was wrong, or nothing was
measured.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import command, run, schema, tables
from .providers import HAND_DERIVED, NAIVE, OURS, providers
from .workloads import BFLOAT16, COMPILED, Profile, Workload

_CKA = partial(Workload, "cka_biased")

# Profile -> the size that grows -> workloads.
CURVES = {
    "cpu": {
        "rows": [_CKA(rows, 512) for rows in (32, 64, 128, 256, 512, 1024, 2048, 4096)],
        "width": [_CKA(64, width) for width in (64, 128, 256, 512, 1024, 2048, 4096)],
        "layers": [_CKA(64, 512, layers=layers) for layers in (1, 2, 4, 8, 16)],
    },
    "gpu": {
        "rows": [_CKA(rows, 1024, BFLOAT16) for rows in (64, 256, 1024, 4096, 16384, 65536)],
        "width": [_CKA(4096, width, BFLOAT16) for width in (256, 512, 1024, 2048, 4096)],
        "layers": [_CKA(64, 1024, BFLOAT16, layers) for layers in (1, 4, 12, 24)],
    },
    "smoke": {
        "rows": [_CKA(8, 8), _CKA(16, 8)],
        "width": [_CKA(8, 8), _CKA(8, 16)],
        "layers": [_CKA(8, 8), _CKA(8, 8, layers=2)],
    },
}
EFFORTS: dict[str, dict[str, Any]] = {
    # torch.compile takes seconds for every shape, too many on a CPU.
    "cpu": {"budget": 32, "probe": 1024, "max_rounds": 40, "compiled": ()},
    "gpu": {"budget": 40, "probe": 8192},
    "smoke": {"budget": 20, "probe": 64, "max_rounds": 5, "compiled": ()},
}
# Each workload once, whatever the number of curves that it lies on.
PROFILES = {
    name: Profile(tuple(dict.fromkeys(w for c in curves.values() for w in c)), **EFFORTS[name])
    for name, curves in CURVES.items()
}


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("scaling", __doc__, PROFILES, arguments)
    names = (NAIVE, HAND_DERIVED, COMPILED)
    candidates = providers(job.device, job.profile.compiled)
    benchmark = run.run(job, [p for p in candidates if p.name in names or p.name.startswith(OURS)])
    curves = [
        schema.Curve(along, [job.profile.workloads.index(workload) for workload in curve])
        for along, curve in CURVES[job.name].items()
    ]
    fields = {**vars(benchmark), "schema": schema.Scaling.schema}
    result = schema.Scaling(**fields, curves=curves)
    return command.finish(result, out, tables.summary(result), run.failures(result))


if __name__ == "__main__":
    sys.exit(main())
