"""``python -m benchmarks.frontier``: how wrong gradients are as the student nears its teacher.

There the gradient of linear CKA is small and a difference of near-equal terms. Students are their
teachers plus less and less noise, as they are or rotated; every provider differentiates the same
features, already rounded to their dtype, and is compared with float64 of these, so that an error is
the provider's own. No time is measured. Exits with 1 if rift_kernels failed or was wrong.
"""

from __future__ import annotations

import itertools
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import command, environment, pictures, schema
from .command import Job
from .measure import Task
from .oracle import GRADIENT_TOLERANCE, Oracle
from .providers import OURS, Provider, providers
from .run import finite, sentence
from .schema import ErrorCurve, Errors, Spread
from .workloads import BFLOAT16, CKA_MEASURES, Inputs, Workload, dtype_name, features

# Half a decade of 1 - CKA a step, from about 1e-1 to 1e-6.
NOISES = tuple(0.35 * 10 ** (-step / 4) for step in range(11))


class Profile(NamedTuple):
    """Rows and widths, how near students come, and how many random pairs there are a point."""

    shapes: tuple[tuple[int, int], ...]
    noises: tuple[float, ...] = NOISES
    pairs: int = 5


# A batch is compared by its Gram matrices, and tokens by covariances. Some packages are too slow on
# 4096 rows without a GPU.
PROFILES = {
    "cpu": Profile(((64, 768), (512, 64))),
    "gpu": Profile(((64, 768), (4096, 768))),
    "smoke": Profile(((16, 8),), NOISES[::5], pairs=3),
}


def run(job: Job[Profile], candidates: Sequence[Provider]) -> schema.Frontier:
    dtypes = BFLOAT16, torch.float32
    workloads = [
        Workload(measure, *shape, dtype)
        for shape, dtype, measure in itertools.product(job.profile.shapes, dtypes, CKA_MEASURES)
    ]
    curves = [
        _curve(job, candidates, workload, rotated)
        for workload in command.progress(workloads)
        for rotated in (False, True)
    ]
    return schema.Frontier(
        profile=job.name,
        environment=environment.describe(job.device),
        providers=[schema.Provider(p.name, p.reason) for p in candidates],
        pairs=job.profile.pairs,
        curves=curves,
    )


def _curve(
    job: Job[Profile], candidates: Sequence[Provider], workload: Workload, rotated: bool
) -> ErrorCurve:
    """Every provider's errors, from the first noise to the last."""
    curve = ErrorCurve(
        measure=workload.measure,
        rows=workload.rows,
        width=workload.width,
        dtype=dtype_name(workload.dtype),
        rotated=rotated,
        distances=[],
        rounding=[],
        results={p.name: Errors() for p in candidates if p.can_do(workload)},
    )
    able = [p for p in candidates if p.name in curve.results]
    for noise in job.profile.noises:
        seeds = range(job.profile.pairs)
        inputs = [features(workload, job.device, seed, noise, rotated) for seed in seeds]
        pairs = [(pair, Oracle(workload, pair)) for pair in inputs]
        curve.distances.append(_spread([1 - oracle.values.item() for _, oracle in pairs]))
        # Nobody's error can be smaller than that of the right gradient in the features' dtype.
        rounded = [tuple(g.to(workload.dtype) for g in o.gradients) for _, o in pairs]
        errors = [o.errors(o.values, g)[1] for (_, o), g in zip(pairs, rounded, strict=True)]
        curve.rounding.append(_spread(errors))
        for provider in [p for p in able if not curve.results[p.name].reason]:
            try:
                errors = [_error(provider, workload, *pair) for pair in pairs]
                curve.results[provider.name].errors.append(_spread(errors))
            except Exception as error:
                # Other people's code may fail in any way.
                curve.results[provider.name] = Errors(sentence(error))
    return curve


def _error(provider: Provider, workload: Workload, inputs: Inputs, oracle: Oracle) -> float:
    task = Task(provider, workload.measure, inputs)
    values = task.forward()
    return oracle.errors(values, task.backward(values))[1]


def _spread(numbers: Sequence[float]) -> Spread:
    """NaN counts as infinite."""
    known = sorted(x if math.isfinite(x) else math.inf for x in numbers)
    return Spread(*map(finite, (known[0], statistics.median(known), known[-1])))


def failures(result: schema.Frontier) -> Iterator[str]:
    """The curves on which ours failed or was wrong."""
    for curve in result.curves:
        for name, outcome in curve.results.items():
            worst = max((math.inf if e.max is None else e.max for e in outcome.errors), default=0)
            if name.startswith(OURS) and (outcome.reason or worst > GRADIENT_TOLERANCE):
                label = pictures.label(curve) + ", rotated" * curve.rotated
                yield f"{name}: {label}: {outcome.reason or f'off by {worst:.0e}'}"


def main(arguments: Sequence[str] | None = None) -> int:
    job, out = command.options("frontier", __doc__, PROFILES, arguments)
    # Compiled or not, naive code has the same errors.
    result = run(job, providers(job.device, compiled=()))
    words = (picture.alt for picture in pictures.of(result))
    return command.finish(result, out, "\n\n".join(words), failures(result))


if __name__ == "__main__":
    sys.exit(main())
