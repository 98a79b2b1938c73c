"""A GPU refuses a launch: `auto` takes another backend, an explicit choice raises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import rift_kernels as rk
from rift_kernels.backends import eager
from rift_kernels.dispatch import availability, operators, plan
from rift_kernels.trust import decisions, refused_launches
from tests.support import cases

REFUSED = RuntimeError("Triton Error [CUDA]: too many resources requested for launch")
WARNS = pytest.warns(
    UserWarning, match="does without the kernels .* because a launch failed: Runtime"
)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Eager's functions as a backend called triton, whose launches a test can make fail."""

    def cka_fwd(*call):
        *arguments, debiased, distance = call
        backend.launches += 1
        values, _ = operators.cka_fwd(*arguments, "eager", False, debiased, distance)
        return values, []

    backend = SimpleNamespace(**vars(eager), launches=0, cka_fwd=cka_fwd, cka_bwd=refuse)
    find = operators._module
    monkeypatch.setattr(operators, "_module", lambda n: backend if n == "triton" else find(n))
    monkeypatch.setattr(plan, "_has_kernels", lambda _: True)
    monkeypatch.setattr(
        availability, "reason_against", lambda name, *_: "not here" if name == "cuda" else None
    )
    return backend


def refuse(*_: object) -> None:
    raise REFUSED


def both(function, backend: str) -> tuple[torch.Tensor, ...]:
    """The value and the gradients of both sides."""
    x, y = cases.pair(rows=30)
    return cases.value_and_gradients(function, x, y, backend=backend)


def assert_as_eager(function, expected=None) -> None:
    for got, wanted in zip(
        both(function, "auto"), expected or both(function, "eager"), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_refused_forward(kernels) -> None:
    attempts = []

    def fail(*_: object) -> None:
        attempts.append(1)
        refuse()

    kernels.cka_fwd = fail
    with WARNS:
        assert_as_eager(rk.linear_cka)
    # Remembered, and warned of once.
    assert_as_eager(rk.linear_cka)
    assert len(attempts) == 1


def test_a_refused_unfused_forward(kernels) -> None:
    kernels.moments = refuse
    for function in (rk.procrustes_similarity, rk.bures_distance):
        decisions.forget()
        with WARNS:
            assert_as_eager(function)
    decisions.forget()
    x, y = cases.pair()
    with WARNS:
        value = rk.cross_covariance(x, y)
    torch.testing.assert_close(value, rk.cross_covariance(x, y, backend="eager"))


@pytest.mark.parametrize("source", ["argument", "environment"])
def test_an_explicit_choice_raises(source, kernels, monkeypatch) -> None:
    kernels.cka_fwd = refuse
    if source == "environment":
        monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "triton")
    with pytest.raises(RuntimeError, match="too many resources") as raised:
        both(rk.linear_cka, "triton" if source == "argument" else "auto")
    assert "RIFT_KERNELS_BACKEND=eager" in "".join(raised.value.__notes__)


def test_other_errors_are_raised(kernels) -> None:
    def crash(*_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    kernels.cka_fwd = crash
    with pytest.raises(RuntimeError, match="illegal memory access"):
        both(rk.linear_cka, "auto")


def test_a_refused_backward_with_both_sides_kept(kernels, force_form) -> None:
    """CKA in covariance form keeps both sides, so eager can compute it again."""
    force_form("covariance")
    expected = both(rk.linear_cka, "eager")
    with WARNS:
        assert_as_eager(rk.linear_cka, expected)
    assert kernels.launches == 1
    assert_as_eager(rk.linear_cka, expected)
    assert kernels.launches == 1


def test_a_refused_backward_with_one_side_kept(kernels, force_form) -> None:
    """The Gram form keeps only the sides that get a gradient; the error gives advice."""
    force_form("gram")
    x, y = cases.pair(rows=30)
    value = rk.linear_cka(x, y.detach())
    with WARNS, pytest.raises(RuntimeError, match="too many resources") as raised:
        value.backward()
    assert "backend='eager'" in "".join(raised.value.__notes__)
    # The next step does not use the kernels.
    rk.linear_cka(x, y.detach()).backward()
    assert kernels.launches == 1
    expected = both(rk.linear_cka, "eager")
    assert_as_eager(rk.linear_cka, expected)


@pytest.mark.parametrize(
    "function", [rk.procrustes_similarity, lambda *a, **k: rk.cross_covariance(*a, **k).sum()]
)
def test_a_refused_unfused_backward(function, kernels, force_form) -> None:
    """Any backend can continue from what the forward saved."""
    force_form("covariance")
    expected = both(function, "eager")
    kernels.product_transposed = refuse
    with WARNS:
        assert_as_eager(function, expected)
    assert_as_eager(function, expected)


def test_errors_by_name() -> None:
    """Triton's errors, which cannot be imported without triton."""
    errors = pytest.importorskip("triton.runtime.errors", reason="needs triton")
    assert refused_launches.is_refusal(errors.OutOfResources(300000, 232448, "shared memory"))
    assert not refused_launches.is_refusal(ValueError("too many resources requested for launch"))
    assert not refused_launches.is_refusal(torch.OutOfMemoryError("CUDA out of memory"))
    text = "cka_large_forward: cudaErrorNoKernelImageForDevice: no kernel image is available"
    assert refused_launches.is_refusal(RuntimeError(text))
