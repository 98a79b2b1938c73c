"""Known answers: small features, and the values and gradients that kernels must compute for them.

Features are whole numbers of at most 64, divided by 8. Every dtype holds them exactly, so one
answer serves all, and no order of summation changes their raw moments. Integer arithmetic makes
them, so they are the same in every version of torch. A gradient G is stored as ``L^T G R`` for
fixed columns of signs, which keeps the size of an error.
``python -m tests.support.known_answers`` writes known_answers.json from the definitions in float64.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .verdicts import Kernels

ANSWERS = Path(__file__).with_suffix(".json")
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float16": torch.float16}
SIGNS = 6
_PRIME = 2**31 - 1

# Products are of centered features, which are float32 for all these dtypes.
FAMILIES = {
    "triton": {
        **dict.fromkeys(
            ("gram_cka_small", "gram_cka", "covariance_cka", "covariance_distance"), tuple(DTYPES)
        ),
        "products": ("float32",),
    },
    "cuda": {"gram_cka_small": tuple(DTYPES), "covariance_cka": ("bfloat16",)},
}
ALL = [
    Kernels(backend, family, dtype)
    for backend, families in FAMILIES.items()
    for family, dtypes in families.items()
    for dtype in dtypes
]


class Case(NamedTuple):
    """One call: layers of (rows, student width, teacher width), or a batch of one such layer."""

    name: str
    family: str
    layers: tuple[tuple[int, int, int], ...]
    measure: str = "cka"
    settings: tuple[Any, ...] = (True, False)  # for CKA: debiased, distance
    batch: int = 0
    masked: bool = False
    strided: bool = False
    near: bool = False  # the student is close to its teacher
    massive: bool = False  # three rows are much longer than the others
    mixed: bool = False  # the teacher is float32
    sides: tuple[bool, bool] = (True, True)
    gram: bool = False
    thorough: bool = False  # only the `check` command tries it, not `auto`


BIASED = (False, True)
CASES = (
    Case("masked layers", "gram_cka_small", ((37, 40, 24), (61, 200, 136)), masked=True, gram=True),
    Case("batch", "gram_cka_small", ((128, 96, 96),), settings=BIASED, batch=2, sides=(True, False), gram=True),
    Case("fewest rows", "gram_cka_small", ((4, 5, 3),), gram=True, thorough=True),
    Case("16 rows", "gram_cka_small", ((16, 64, 64),), settings=BIASED, gram=True, thorough=True),
    Case("odd, masked batch", "gram_cka_small", ((31, 33, 47),), batch=3, masked=True, gram=True, thorough=True),
    Case("strided", "gram_cka_small", ((64, 72, 72),), strided=True, gram=True, thorough=True),
    Case("near", "gram_cka_small", ((64, 128, 128),), near=True, gram=True, thorough=True),
    Case("teacher alone", "gram_cka_small", ((100, 130, 70),), sides=(False, True), gram=True, thorough=True),
    Case("two dtypes", "gram_cka_small", ((48, 64, 80),), mixed=True, gram=True, thorough=True),
    Case("wide", "gram_cka_small", ((64, 768, 768),), gram=True, thorough=True),
    Case("masked layers", "gram_cka", ((150, 200, 136), (200, 72, 72)), masked=True, gram=True),
    Case("batch", "gram_cka", ((144, 160, 160),), settings=BIASED, batch=2, sides=(True, False), gram=True),
    Case("odd", "gram_cka", ((301, 257, 131),), gram=True, thorough=True),
    Case("strided", "gram_cka", ((200, 136, 136),), strided=True, gram=True, thorough=True),
    Case("near", "gram_cka", ((256, 320, 320),), near=True, gram=True, thorough=True),
    Case("teacher alone", "gram_cka", ((160, 96, 96),), sides=(False, True), gram=True, thorough=True),
    Case("two dtypes", "gram_cka", ((160, 96, 112),), mixed=True, gram=True, thorough=True),
    Case("masked layers", "covariance_cka", ((170, 136, 72), (300, 40, 24)), masked=True),
    Case("long", "covariance_cka", ((1040, 64, 64),), sides=(True, False)),
    Case("batch", "covariance_cka", ((330, 136, 72),), settings=BIASED, batch=2),
    Case("massive rows", "covariance_cka", ((210, 48, 40),), massive=True),
    Case("odd", "covariance_cka", ((777, 131, 67),), thorough=True),
    Case("wide", "covariance_cka", ((1100, 264, 264),), thorough=True),
    Case("strided", "covariance_cka", ((300, 72, 72),), strided=True, thorough=True),
    Case("near", "covariance_cka", ((600, 136, 136),), near=True, thorough=True),
    Case("teacher alone", "covariance_cka", ((1040, 64, 40),), sides=(False, True), thorough=True),
    Case("two dtypes", "covariance_cka", ((300, 64, 80),), mixed=True, thorough=True),
    Case("masked layers", "covariance_distance", ((170, 136, 136), (300, 40, 40)), "covariance", ("relative", 0.0), masked=True),
    Case("long", "covariance_distance", ((1040, 64, 64),), "covariance", ("coral", 0.25), sides=(True, False)),
    Case("odd batch", "covariance_distance", ((333, 67, 67),), "covariance", ("none", 0.0), batch=2, thorough=True),
    Case("strided", "covariance_distance", ((300, 72, 72),), "covariance", ("relative", 0.5), strided=True, thorough=True),
    Case("two dtypes", "covariance_distance", ((300, 64, 64),), "covariance", ("relative", 0.0), mixed=True, thorough=True),
    Case("masked Procrustes", "products", ((90, 40, 24),), "procrustes", ("newton_schulz", False), masked=True),
    Case("distance of few rows", "products", ((40, 136, 136),), "covariance", ("relative", 0.0), gram=True),
    Case("Procrustes of few rows", "products", ((30, 70, 136),), "procrustes", ("newton_schulz", True), batch=2, gram=True, thorough=True),
    Case("Bures", "products", ((200, 40, 40),), "bures", (True, 0.5, "newton_schulz"), thorough=True),
    Case("Bures of few rows", "products", ((33, 72, 72),), "bures", (False, 0.0, "newton_schulz"), gram=True, thorough=True),
)  # fmt: skip


class Features(NamedTuple):
    """The input of a case: one tensor per layer, and the incoming gradient of the values."""

    students: list[Tensor]
    teachers: list[Tensor]
    masks: list[Tensor]
    incoming: Tensor


def cases_of(kernels: Kernels, thorough: bool) -> list[Case]:
    """The cases that kernels are tested on; with ``thorough``, all that they can compute."""
    return [
        case
        for case in CASES
        if case.family == kernels.family
        and (thorough or not case.thorough)
        and not (case.mixed and kernels.dtype == "float32")
        and not (kernels == ("cuda", "covariance_cka", "bfloat16") and (case.masked or case.mixed))
    ]


def features(case: Case, device: torch.device | str = "cpu") -> Features:
    """The features of a case in float64; any dtype holds them exactly. Masked rows are NaN."""
    students, teachers, masks = [], [], []
    for layer, (rows, width, other) in enumerate(case.layers):
        lead = (case.batch,) if case.batch else ()
        x = _whole((*lead, rows, width), 24, 8 * layer + 1)
        columns = (5 * torch.arange(other) + 1) % width
        if case.near:
            columns = torch.arange(width)
        y = x[..., columns] + _whole((*lead, rows, other), 1 if case.near else 20, 8 * layer + 2)
        x, y = (x + 32) / 8, (y + 16) / 8
        if case.massive:
            for side in (x, y):
                side[..., [0, 70, 71], :] *= 16
        if case.masked:
            mask = _whole((*lead, rows), 50, 8 * layer + 3) < 20
            mask[..., :6] = True
            x, y = (side.masked_fill(~mask.unsqueeze(-1), float("nan")) for side in (x, y))
            masks.append(mask.to(device))
        students.append(x.to(device))
        teachers.append(y.to(device))
    count = case.batch or len(case.layers)
    # Large, as from a gradient scaler: small gradients are lost in float16.
    incoming = (256 + 64 * torch.arange(count, dtype=torch.float64)).to(device)
    return Features(students, teachers, masks, incoming if count > 1 or case.batch else incoming[0])


def sketch(gradient: Tensor) -> Tensor:
    """A gradient between columns of signs, (..., SIGNS, SIGNS), in float64 on the CPU."""
    gradient = gradient.detach().double().cpu()
    left, right = (_signs(size, seed) for seed, size in enumerate(gradient.shape[-2:]))
    return left.T @ gradient @ right


def key(case: Case) -> str:
    """The name of a case in the file of answers."""
    return f"{case.family}: {case.name}"


@cache
def answers() -> dict[str, Any]:
    """For each case, its values and the sketches of its wanted gradients, students first."""
    stored: dict[str, Any] = json.loads(ANSWERS.read_text(encoding="utf-8"))
    return stored


def _whole(shape: tuple[int, ...], bound: int, seed: int) -> Tensor:
    """Pseudorandom whole numbers from -bound to bound, as float64."""
    count = torch.Size(shape).numel()
    numbers = torch.arange(1, count + 1) * 48271 + seed * 7_919_993
    for factor in (16807, 69621):
        numbers = (numbers % _PRIME).square() % _PRIME
        numbers = (numbers * factor + seed) % _PRIME
    numbers = (numbers >> 8) % (2 * bound + 1) - bound
    return numbers.reshape(shape).double()


@cache
def _signs(size: int, seed: int) -> Tensor:
    return 2 * (_whole((size, SIGNS), 50, 100 + seed) < 0).double() - 1
