"""The inputs of all tests: shapes, dtypes, masks, offsets and similarities.

Features are made in float64 from a seed and then rounded to the dtype under test. So the oracle and
the code under test get exactly the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels import reference

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
FORMS = ("covariance", "gram")

# The relative error of a gradient. In half precision, rounding the gradient alone costs 1.7e-3
# (bfloat16) or 2e-4 (float16). In float64, Newton-Schulz stops at 8e-12.
GRADIENT_TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.bfloat16: 4e-3,
    torch.float16: 4e-3,
}
# Absolute up to 1 and relative beyond, because some distances are large, as are offsets of 30.
VALUE_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 1e-5,
    torch.float16: 1e-5,
}


@dataclass(frozen=True)
class Case:
    """Features of some shape; the teacher is a noisy linear image of the student."""

    name: str
    rows: int
    student_width: int
    teacher_width: int
    batch: tuple[int, ...] = ()
    offset: float = 0.0
    masked: bool = False
    strided: bool = False

    def features(self, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor | None]:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        x = normal(*self.batch, self.rows, self.student_width)
        mix = normal(self.student_width, self.teacher_width) / self.student_width**0.5
        y = x @ mix + 0.7 * normal(*self.batch, self.rows, self.teacher_width)
        x, y = (x + self.offset).to(dtype), (y + self.offset).to(dtype)
        mask = None
        if self.masked:
            mask = torch.rand(*self.batch, self.rows, generator=generator) < 0.7
            mask[..., :4] = True
        if self.strided:
            x, y = _interleave(x), _interleave(y)
        return x, y, mask


def _interleave(x: Tensor) -> Tensor:
    """The same numbers, neither contiguous nor aligned."""
    padded = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), float("nan"), dtype=x.dtype)
    view = padded[..., 1::2]
    view.copy_(x)
    return view


def overlapping(kind: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """Features whose elements share memory: rows 8 or 1 elements apart, or one column expanded."""
    generator = torch.Generator().manual_seed(0)
    if kind == "expanded":
        return torch.randn(rows, 1, generator=generator).to(dtype).expand(rows, width)
    step = {"windows": 8, "close windows": 1}[kind]
    memory = torch.randn(step * (rows - 1) + width, generator=generator).to(dtype)
    return memory.as_strided((rows, width), (step, 1))


OVERLAPS = ("windows", "close windows", "expanded")

CASES = (
    Case("tall", 70, 12, 12),
    Case("wide", 9, 40, 40),
    Case("square", 33, 33, 33),
    Case("blocks", 450, 210, 210),
    Case("odd", 37, 7, 7),
    Case("fewest rows", 4, 5, 5),
    Case("one feature", 20, 1, 1),
    Case("widths differ", 50, 13, 24),
    Case("widths differ, few rows", 12, 31, 17),
    Case("batch", 21, 10, 10, batch=(3,)),
    Case("two batch axes", 9, 16, 16, batch=(2, 3)),
    Case("offset", 64, 16, 16, offset=30.0),
    Case("masked", 60, 11, 11, masked=True),
    Case("masked batch", 30, 24, 24, batch=(2,), masked=True),
    Case("masked, offset", 40, 30, 30, offset=10.0, masked=True),
    Case("strided", 26, 18, 18, strided=True),
)


@dataclass(frozen=True)
class Measure:
    """A public function with settings, and its oracle."""

    name: str
    function: Callable[..., Tensor]
    oracle: Callable[..., Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    method: str | None = None
    min_rows: int = 2
    equal_widths: bool = False

    def __call__(self, x: Any, y: Any, **options: Any) -> Tensor:
        method = {} if self.method is None else {"method": self.method}
        return self.function(x, y, **self.settings, **method, **options)

    def reference(self, x: Any, y: Any, **options: Any) -> Tensor:
        return self.oracle(x, y, **self.settings, **options)

    def takes(self, case: Case) -> bool:
        widths_fit = case.student_width == case.teacher_width or not self.equal_widths
        return widths_fit and case.rows >= self.min_rows


def _measure(name: str, function: str, **options: Any) -> Measure:
    return Measure(name, getattr(rk, function), getattr(reference, function), **options)


CKA = _measure("cka", "linear_cka", min_rows=4)
CKA_BIASED = _measure("cka biased", "linear_cka", settings={"debiased": False})
PROCRUSTES = _measure("procrustes", "procrustes_similarity")
PROCRUSTES_SVD = _measure("procrustes svd", "procrustes_similarity", method="svd")
COVARIANCE = _measure("covariance", "covariance_distance", equal_widths=True)
CORAL = _measure(
    "coral",
    "covariance_distance",
    settings={"scale": "coral", "mean_weight": 0.3},
    equal_widths=True,
)
COVARIANCE_PLAIN = _measure(
    "covariance unscaled", "covariance_distance", settings={"scale": "none"}, equal_widths=True
)
BURES = _measure("bures", "bures_distance", equal_widths=True)
BURES_ROOT = _measure(
    "bures root",
    "bures_distance",
    settings={"squared": False, "mean_weight": 0.5},
    equal_widths=True,
)
BURES_EIGH = _measure("bures eigh", "bures_distance", method="eigh", equal_widths=True)

MEASURES = (
    CKA,
    CKA_BIASED,
    PROCRUSTES,
    PROCRUSTES_SVD,
    COVARIANCE,
    CORAL,
    COVARIANCE_PLAIN,
    BURES,
    BURES_ROOT,
    BURES_EIGH,
)


def pair(
    rows: int = 12,
    width: int = 5,
    dtype: torch.dtype = torch.float32,
    batch: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """A student and a teacher that both require gradients."""
    x, y, _ = Case("", rows, width, width, batch=batch).features(dtype)
    return x.requires_grad_(), y.requires_grad_()


def by_name(measures: Sequence[Measure]) -> pytest.MarkDecorator:
    """Parametrise a test over measures."""
    return pytest.mark.parametrize("measure", measures, ids=lambda m: m.name)


EMPTY_BATCHES = ((0,), (0, 3), (2, 0))
_batches = pytest.mark.parametrize("batch", EMPTY_BATCHES, ids=str)
_masked = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


def every_empty_batch(test: Callable[..., None]) -> Callable[..., None]:
    """Parametrise a test over empty batches, with and without a mask."""
    return _batches(_masked(test))


def assert_empty(
    measure: Measure,
    batch: tuple[int, ...],
    masked: bool,
    dtype: torch.dtype,
    device: torch.device | None = None,
) -> None:
    """Values and gradients of an empty batch are empty, whichever side requires a gradient."""
    mask = torch.ones(*batch, 9, dtype=torch.bool, device=device) if masked else None
    for sides in ((True, False), (False, True), (True, True), (False, False)):
        x, y = (
            torch.zeros(*batch, 9, 6, dtype=dtype, device=device, requires_grad=wanted)
            for wanted in sides
        )
        values = measure(x, y, mask=mask)
        assert values.shape == batch
        if any(sides):
            values.sum().backward()
        for features, wanted in zip((x, y), sides, strict=True):
            assert (features.grad is None) != wanted
            assert not wanted or (features.grad.shape, features.grad.dtype) == (x.shape, dtype)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; the absolute error where that is 0."""
    expected = expected.double().cpu()
    difference = (actual.double().cpu() - expected).norm()
    return float(difference / expected.norm() if expected.norm() > 0 else difference)


def value_and_gradients(
    function: Callable[..., Tensor], x: Tensor, y: Tensor, scale: float = 1.0, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The values and both gradients, for a random incoming gradient times ``scale``."""
    # Not cloned, which would make strided features contiguous.
    x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
    values = function(x, y, **options)
    generator = torch.Generator().manual_seed(1)
    incoming = scale * (torch.rand(values.shape, generator=generator).double() + 0.5)
    values.backward(incoming.to(values.dtype).to(values.device))
    assert x.grad is not None
    assert y.grad is not None
    return values.detach(), x.grad, y.grad


def assert_same_under_autocast(
    function: Callable[..., Tensor], x: Tensor, y: Tensor, device: torch.device
) -> None:
    """Values and gradients are bitwise the same under autocast."""
    expected = value_and_gradients(function, x, y)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        actual = value_and_gradients(function, x, y)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def rotation(width: int, seed: int = 0) -> Tensor:
    """A random orthogonal matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]


@cache
def near_pair(
    rows: int, width: int, distance: float, rotated: bool, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """A student whose debiased CKA with its teacher is about ``1 - distance``; float64.

    The spectrum decays as in trained features. ``rotated``: the student is also rotated.
    """
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -0.5
    y = torch.randn(rows, width, generator=generator, dtype=torch.float64) * spectrum
    y = y @ rotation(width, seed + 1)
    noise = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    noise = noise @ (torch.diag(spectrum) @ rotation(width, seed + 2))
    low, high = 0.0, 3.0
    for _ in range(25):
        middle = (low + high) / 2
        similarity = rk.linear_cka(y + middle * noise, y)
        low, high = (middle, high) if 1 - float(similarity) < distance else (low, middle)
    x = y + low * noise
    return (x @ rotation(width, seed + 3) if rotated else x), y
