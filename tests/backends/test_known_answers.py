"""The stored answers: they follow the definitions, and right code passes with them."""

from __future__ import annotations

import json

import pytest
import torch

from rift_kernels.commands import trial
from rift_kernels.trust import known_answers
from rift_kernels.trust.known_answers import ALL, CASES, DTYPES, Case
from rift_kernels.trust.verdicts import Kernels
from tests.support import known_answers as script

CPU = torch.device("cpu")


def numbers(answer: dict) -> torch.Tensor:
    flat = torch.tensor(answer["values"], dtype=torch.float64)
    parts = [torch.tensor(g, dtype=torch.float64).flatten() for g in answer["gradients"]]
    return torch.cat([flat, *parts])


@pytest.mark.parametrize("case", CASES, ids=known_answers.key)
def test_the_file_is_what_the_script_writes(case: Case) -> None:
    """Up to float64 rounding, which differs between processors."""
    stored, written = (
        numbers(a) for a in (known_answers.answers()[known_answers.key(case)], script.answer(case))
    )
    assert float((stored - written).norm()) <= 1e-9 * float(written.norm())


def test_the_file_has_these_cases_and_no_others() -> None:
    stored = json.loads(known_answers.ANSWERS.read_text())
    assert list(stored) == [known_answers.key(case) for case in CASES]


@pytest.mark.parametrize("case", CASES, ids=known_answers.key)
def test_every_dtype_holds_the_features(case: Case) -> None:
    features = known_answers.features(case)
    for side in (*features.students, *features.teachers):
        for dtype in DTYPES.values():
            torch.testing.assert_close(
                side.to(dtype).double(), side, rtol=0, atol=0, equal_nan=True
            )
    # In any order, float32 holds the sums of their products: whole numbers.
    sides = [s.nan_to_num() * 8 for s in (*features.students, *features.teachers)]
    largest = max(float((s.mT.abs() @ s.abs()).max()) for s in sides)
    largest = max(largest, max(float((s.abs() @ s.abs().mT).max()) for s in sides))
    assert largest < 2**24


@pytest.mark.parametrize("case", CASES, ids=known_answers.key)
@pytest.mark.parametrize("dtype", DTYPES)
def test_right_code_passes(dtype: str, case: Case) -> None:
    """The eager backend passes with a tenth of the tolerances."""
    outcome = trial.attempt(Kernels("eager", case.family, dtype), case, CPU)
    assert outcome.good, outcome
    assert outcome.value_error <= trial.VALUE_TOLERANCE / 10
    assert outcome.gradient_error <= trial.GRADIENT_TOLERANCE[dtype]


def test_all_families_have_cases_of_every_kind() -> None:
    """The self-test covers masks, several layers or a batch, and every dtype."""
    for kernels in ALL:
        first = known_answers.cases_of(kernels, thorough=False)
        every = known_answers.cases_of(kernels, thorough=True)
        assert first
        assert len(every) > len(first)
        if kernels[:2] != ("cuda", "covariance_cka"):  # these take no mask
            assert any(case.masked for case in first)
        if kernels.family != "products":
            assert any(case.batch or len(case.layers) > 1 for case in first)
            assert any(case.sides == (True, True) for case in first)
