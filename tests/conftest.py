"""Fixtures: where tests run, which form they take, and no uninitialised memory that looks fine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from rift_kernels import dispatch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# What concerns the kernels, and what of it the interpreter, thousands of times slower than a GPU,
# goes through: of measures that differ in settings alone, one; of float16, linear CKA.
KERNEL_TESTS = {"test_triton", "test_measures", "test_numerics", "test_autograd", "test_compile"}
INTERPRETED_MEASURES = {"cka", "cka biased", "covariance"}
INTERPRETED_EVERYWHERE = {*INTERPRETED_MEASURES, "coral", "procrustes", "bures"}


def _is_interpreted(item: pytest.Item) -> bool:
    module = item.module.__name__.split(".")[-1]
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    measure, dtype = parameters.get("measure"), parameters.get("dtype")
    everywhere = module == "test_measures"
    measures = INTERPRETED_EVERYWHERE if everywhere else INTERPRETED_MEASURES
    return (
        module in KERNEL_TESTS
        and item.get_closest_marker("eager_only") is None
        and (measure is None or measure.name in measures)
        and dtype is not torch.float64
        and (dtype is not torch.float16 or (everywhere and measure.name == "cka"))
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        config.hook.pytest_deselected(items=[item for item in items if not _is_interpreted(item)])
        items[:] = [item for item in items if _is_interpreted(item)]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the numerical tests run on: RIFT_TEST_DEVICE, default the CPU."""
    return torch.device(os.environ.get("RIFT_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session")
def has_kernels(device: torch.device) -> bool:
    """Whether ``backend="auto"`` takes the Triton kernels in these tests."""
    return INTERPRETED or (
        device.type == "cuda" and dispatch.reason_against("triton", device) is None
    )


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """So small products gain nothing from more, and lose much where another job runs."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that reading before writing shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _backend_from_the_call_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In Triton's interpreter, CPU tensors take the kernels as those on a GPU do."""
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    if INTERPRETED:
        monkeypatch.setattr(dispatch, "_has_kernels", lambda _: True)
        monkeypatch.setattr(dispatch, "_warned", True)


@pytest.fixture
def force_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every call take the "gram" or the "covariance" form, whatever costs less."""

    def force(form: str) -> None:
        monkeypatch.setattr(dispatch, "use_gram", lambda *_: form == "gram")

    return force
