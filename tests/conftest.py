"""Fixtures: where tests run, which form they take, and no uninitialised memory that looks fine."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch

from rift_kernels import dispatch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that the numerical tests run on: RIFT_TEST_DEVICE, default the CPU."""
    return torch.device(os.environ.get("RIFT_TEST_DEVICE", "cpu"))


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
    if os.environ.get("TRITON_INTERPRET") == "1":
        monkeypatch.setattr(dispatch, "_has_kernels", lambda _: True)
        monkeypatch.setattr(dispatch, "_warned", True)


@pytest.fixture
def force_form(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make every call take the "gram" or the "covariance" form, whatever costs less."""

    def force(form: str) -> None:
        monkeypatch.setattr(dispatch, "use_gram", lambda *_: form == "gram")

    return force
