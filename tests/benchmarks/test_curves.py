"""The frontier of errors, and curves of time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from benchmarks import frontier
from benchmarks.command import Job
from benchmarks.providers import NAIVE, Provider, providers
from benchmarks.schema import Errors, Spread
from benchmarks.workloads import Inputs, Workload, features

CPU = torch.device("cpu")
OURS = "rift_kernels eager"


def test_frontier_is_complete(smoke) -> None:
    result = smoke("frontier")
    assert {(c.measure, c.dtype, c.rotated) for c in result.curves} == set(
        itertools.product(("cka_biased", "cka_debiased"), ("bfloat16", "float32"), (False, True))
    )
    for curve in result.curves:
        medians = [d.median for d in curve.distances]
        assert medians == sorted(medians, reverse=True)
        # Rounding features to bfloat16 moves them by about this.
        assert 0.03 < medians[0] < 0.3
        assert 1e-7 < medians[-1] < 3e-5
        for error, least in zip(curve.results[OURS].errors, curve.rounding, strict=True):
            assert least.median * 0.99 <= error.median <= 1e-2
            assert error.min <= error.median <= error.max


def test_frontier_sees_naive_code_fail(smoke) -> None:
    """And only in half precision, and only near the teacher."""
    for curve in smoke("frontier").curves:
        first, *_, last = (e.median for e in curve.results[NAIVE].errors)
        assert last > 1 > first if curve.dtype == "bfloat16" else last < 0.1


def test_frontier_measures_the_error_it_is_given() -> None:
    """Gradients that are a tenth too long, NaN, or none at all."""

    def scaled(factor: float, inputs: Inputs) -> Tensor:
        student = inputs.students[0].double()
        student = student.detach() + factor * (student - student.detach())
        return providers(CPU, ())[1].measures["cka_biased"](Inputs([student], inputs.teachers))

    def broken(_: Inputs) -> Tensor:
        raise NotImplementedError("one\ntwo")

    functions = {
        "long": lambda inputs: scaled(1.1, inputs).to(torch.float64),
        "nan": lambda inputs: scaled(math.nan, inputs),
        "broken": broken,
    }
    candidates = [Provider(name, {"cka_biased": f}) for name, f in functions.items()]
    profile = frontier.Profile(((16, 8),), (0.3, 0.1), pairs=3)
    curves = frontier.run(Job("smoke", profile, CPU), candidates).curves
    curve = next(curve for curve in curves if curve.dtype == "float32")
    for error in curve.results["long"].errors:
        assert error.median == pytest.approx(0.1, rel=1e-3)
    assert curve.results["nan"].errors == [Spread(None, None, None)] * 2
    assert curve.results["broken"] == Errors("NotImplementedError: one")


@pytest.mark.parametrize("numbers", [*itertools.permutations([1.0, math.nan, 3.0])])
def test_one_gradient_of_nan_is_the_worst(numbers) -> None:
    assert frontier._spread(numbers) == Spread(1.0, 3.0, None)


def test_frontier_fails_where_ours_does(smoke) -> None:
    result = smoke("frontier")
    assert [*frontier.failures(result)] == []
    result.curves[0].results[OURS].errors[1].max = 0.2
    result.curves[1].results[OURS].errors[0].max = None
    assert [*frontier.failures(result)] == [
        f"{OURS}: biased, bfloat16, 16 x 8: off by 2e-01",
        f"{OURS}: biased, bfloat16, 16 x 8, rotated: off by inf",
    ]


def test_a_rotated_student_is_as_similar() -> None:
    plain, rotated = (
        features(Workload("cka_biased", 16, 8), CPU, rotated=rotated) for rotated in (False, True)
    )
    student, turned = plain.students[0], rotated.students[0]
    assert torch.equal(plain.teachers[0], rotated.teachers[0])
    assert not torch.allclose(student, turned, atol=0.1)
    torch.testing.assert_close(student @ student.T, turned @ turned.T)


def test_scaling_is_a_benchmark_on_curves(smoke) -> None:
    result = smoke("scaling")
    assert [curve.along for curve in result.curves] == ["rows", "width", "layers"]
    for curve in result.curves:
        workloads = [result.workloads[i] for i in curve.workloads]
        for size in ("rows", "width", "layers"):
            sizes = [getattr(w, size) for w in workloads]
            assert (sizes == sorted(set(sizes))) == (size == curve.along)
    # The smallest lies on all three, and is measured once.
    assert len(result.workloads) == 4
