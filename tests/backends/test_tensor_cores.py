"""Long sums on tensor cores, which truncate where a float32 sum would be rounded to nearest.

Runs on a GPU, or in Triton's interpreter, whose products add up as on tensor cores.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from rift_kernels.dispatch import plan
from tests.support import cases

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    pytest.skip(
        "needs a GPU, or TRITON_INTERPRET=1 for Triton's interpreter", allow_module_level=True
    )

from rift_kernels.backends.triton import config  # noqa: E402

MEASURES = [cases.CKA, cases.CKA_BIASED, cases.COVARIANCE, cases.CORAL]


@pytest.fixture(autouse=True)
def _triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = tuple(kind for kind in plan.PREFERRED if kind[0] == "triton")
    monkeypatch.setattr(plan, "PREFERRED", kinds)


@pytest.fixture(autouse=True)
def _many_rows_at_a_time() -> Iterator[None]:
    """Many rows at a time for narrow features, because the interpreter's time goes by steps."""
    if INTERPRETED:
        for kind in config.FEATURES:
            name = f"covariance small {kind}"
            entry = config.lookup("cpu", name)._replace(
                block=16, block_k=64, block_r=1024, sub=16, backward=(1024, 16, 16)
            )
            config.use("cpu", name, entry)
    yield
    config.forget()


def features(rows: int, offset: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    x, y, _ = cases.Case("", rows, 8, 8, offset=offset).features(dtype)
    return x, y


def errors(measure, x, y, device, **more) -> tuple[float, float]:
    """The value's error, and the larger one of both gradients."""
    # The oracle would make matrices of all rows by all rows.
    wide = (x.double(), y.double())
    expected = cases.value_and_gradients(measure, *wide, backend="eager", **more)
    more = {name: tensor.to(device) for name, tensor in more.items()}
    actual = cases.value_and_gradients(measure, x.to(device), y.to(device), **more)
    scale = max(1.0, float(expected[0]))
    pairs = zip(actual[1:], expected[1:], strict=True)
    return (
        abs(float(actual[0]) - float(expected[0])) / scale,
        max(cases.relative_error(got, wanted) for got, wanted in pairs),
    )


@pytest.mark.parametrize("offset", [30.0, 3.0])
@cases.by_name(MEASURES)
def test_many_rows_far_from_zero(measure, offset, device) -> None:
    """The value may miss a float32's last digit of the mean's share, as if rounded to nearest.

    A sum that is truncated all the way misses a hundred times as much.
    """
    x, y = features(6000, offset, torch.bfloat16)
    value, gradient = errors(measure, x, y, device)
    assert value <= max(2e-6, 2**-24 * offset**2)
    assert gradient <= 4e-3


@cases.by_name([cases.CKA])
def test_many_rows_some_of_them_masked(measure, device) -> None:
    """The number of valid rows in a run tells what it adds: first none, then few, then all."""
    x, y = features(6000, 30.0, torch.bfloat16)
    row = torch.arange(6000)
    mask = (row >= 100) & ((row % 5 == 0) | (row > 3000))
    value, gradient = errors(measure, x, y, device, mask=mask)
    assert value <= 2**-24 * 30**2
    assert gradient <= 4e-3


@cases.by_name([cases.CKA])
def test_many_rows_in_order(measure, device) -> None:
    """Means drift by as much as features vary."""
    x, y = features(6000, 0.0, torch.float32)
    drift = 30 + torch.linspace(-1, 1, 6000)[:, None]
    value, gradient = errors(measure, (x + drift).bfloat16(), (y - drift).bfloat16(), device)
    assert value <= 2**-24 * 30**2
    assert gradient <= 4e-3


@pytest.mark.parametrize("width", [8, 7])
@cases.by_name([cases.CKA])
def test_many_rows_of_float32(measure, width, device) -> None:
    """Sums of squares do not cancel, and lose most. Rows of 7 are not aligned."""
    x, y = (t[:, :width] for t in features(6000, 30.0, torch.float32))
    value, gradient = errors(measure, x, y, device)
    assert value <= 1e-5
    assert gradient <= 1e-4


@cases.by_name([cases.CKA, cases.CKA_BIASED])
def test_wide_rows_in_gram_form(measure, device) -> None:
    x, y, _ = cases.Case("", 160, 1500, 1500, offset=3.0).features(torch.bfloat16)
    value, gradient = errors(measure, x, y, device)
    assert value <= 2e-6
    assert gradient <= 4e-3


@cases.by_name([cases.CKA, cases.CKA_BIASED])
def test_rows_far_from_zero_in_gram_form(measure, device) -> None:
    """Rows of a centered K sum to 0 except for rounding, which the mean multiplies."""
    x, y, _ = cases.Case("", 140, 200, 200, offset=30.0).features(torch.bfloat16)
    value, gradient = errors(measure, x, y, device)
    assert value <= 2**-24 * 30**2
    assert gradient <= 4e-3
