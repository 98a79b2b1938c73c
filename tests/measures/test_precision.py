"""Dtypes, autocast and the settings for matrix products."""

from contextlib import ExitStack
from functools import partial

import pytest
import torch

import rift_kernels as rk
from rift_kernels import losses, reference
from rift_kernels.dispatch import operators, plan, precision
from tests.support import cases


@pytest.mark.parametrize("library", ["cuda", "mkldnn"])
def test_full_precision_leaves_the_settings_as_they_were(library) -> None:
    """An inherited setting stays inherited, also with two threads inside at once."""
    device = torch.device("cuda" if library == "cuda" else "cpu")
    reduced = "tf32" if library == "cuda" else "bf16"
    backend = getattr(torch.backends, library)
    parent = torch.backends if library == "cuda" else backend

    def inside() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(precision.full_precision(device, "highest"))
        assert backend.matmul.fp32_precision == "ieee"
        return stack

    before = parent.fp32_precision
    try:
        parent.fp32_precision = reduced
        assert backend.matmul.fp32_precision == reduced
        first, second = inside(), inside()
        first.close()
        assert backend.matmul.fp32_precision == "ieee"
        second.close()
        assert backend.matmul.fp32_precision == reduced
        parent.fp32_precision = "ieee"
        assert backend.matmul.fp32_precision == "ieee"
        backend.matmul.fp32_precision = reduced
        inside().close()
        assert backend.matmul.fp32_precision == reduced
    finally:
        backend.matmul.fp32_precision = "none"
        parent.fp32_precision = before


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_matmul_precision_settings(setting, device) -> None:
    """Training scripts that allow TF32 or bf16 products do not affect "highest"."""
    x, y = (t.detach().to(device) for t in cases.pair(300, 64))
    expected = cases.value_and_gradients(cases.CKA, x, y)
    try:
        torch.set_float32_matmul_precision(setting)
        actual = cases.value_and_gradients(cases.CKA, x, y)
        allowed, medium = (rk.linear_cka(x, y, precision=name) for name in ("high", "medium"))
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision("highest")
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)
    # These two differ only in the kernels' coefficients.
    assert torch.equal(allowed, medium)
    assert float(allowed) == pytest.approx(float(expected[0]), abs=1e-2)


@cases.by_name(cases.MEASURES)
def test_autocast_changes_nothing(measure, device) -> None:
    x, y = (t.detach().to(device) for t in cases.pair(64, 24))
    cases.assert_same_under_autocast(measure, x, y, device)


def test_autocast_does_not_reach_the_rotation(device) -> None:
    x, y = (t.detach().to(device) for t in cases.pair(64, 24))
    q = cases.rotation(24).float().to(device)
    distance = partial(rk.covariance_distance, rotation=q)
    cases.assert_same_under_autocast(distance, x, y, device)


def test_mixed_dtypes(device) -> None:
    x, y = (t.detach().to(device) for t in cases.pair(40, 16, torch.float64))
    for dtype_x, dtype_y in ((torch.bfloat16, torch.float32), (torch.float16, torch.float64)):
        a, b = x.to(dtype_x).requires_grad_(), y.to(dtype_y).requires_grad_()
        value = rk.linear_cka(a, b)
        value.backward()
        assert value.dtype == (torch.float64 if dtype_y == torch.float64 else torch.float32)
        assert a.grad.dtype == dtype_x
        assert b.grad.dtype == dtype_y
        expected = reference.linear_cka(a.detach().double(), b.detach().double())
        assert float(value.detach()) == pytest.approx(float(expected), abs=2e-6)


def test_float64_student_with_a_float32_teacher_and_rotation() -> None:
    x, y, _ = cases.Case("", 40, 12, 12).features(torch.float64)
    y, q = y.float(), cases.rotation(12).float()
    value = rk.covariance_distance(x, y, rotation=q)
    expected = reference.covariance_distance(x, y.double(), rotation=q.double())
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


def test_the_plan_is_for_the_rotated_teacher(monkeypatch) -> None:
    """A rotated teacher is float32 or float64, so the backward keeps both sides."""
    make, plans = plan.make, []

    def recorded(*arguments):
        plans.append(arguments)
        return make(*arguments)

    monkeypatch.setattr(plan, "make", recorded)
    x, y = (t.detach().bfloat16() for t in cases.pair())
    for dtype in (torch.float32, torch.float64):
        rk.covariance_distance(x, y, rotation=torch.eye(5, dtype=dtype))
        *_, dtypes, problem = plans.pop()
        assert dtypes == (torch.bfloat16, dtype)
        assert plan.with_backend("triton", dtypes, problem).keeps == "both"


def test_precision_reaches_every_operator(monkeypatch) -> None:
    used, full_precision = [], operators.full_precision

    def recorded(device, precision):
        used.append(precision)
        return full_precision(device, precision)

    monkeypatch.setattr(operators, "full_precision", recorded)
    x, y = cases.pair()
    q = torch.eye(5, requires_grad=True)
    for wanted in ("highest", "high", "medium"):
        used.clear()
        rk.covariance_distance(x, y, rotation=q, precision=wanted).backward()
        rk.cross_covariance(x, y, precision=wanted).sum().backward()
        rk.second_moments(x, y, precision=wanted).cross.sum().backward()
        for measure in losses.MEASURES:
            rk.RIFTLoss(measure, precision=wanted)(x, y).backward()
        assert set(used) == {wanted}
