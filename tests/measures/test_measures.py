"""Every measure compared with the float64 oracle: value and gradients, forms, dtypes, shapes."""

import pytest
import torch

from tests.support import cases

PAIRS = [
    pytest.param(measure, case, id=f"{measure.name}-{case.name}")
    for measure in cases.MEASURES
    for case in cases.CASES
    if measure.takes(case)
]


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize(("measure", "case"), PAIRS)
def test_value_and_gradients(measure, case, form, dtype, force_form, device, has_kernels) -> None:
    force_form(form)
    x, y, mask = case.features(dtype)
    # As with a gradient scaler: float16 cannot hold small gradients.
    scaler = 256.0 if dtype == torch.float16 else 1.0
    exact = (x.double(), y.double())
    expected = cases.value_and_gradients(measure.reference, *exact, mask=mask, scale=scaler)
    if device.type != "cpu":
        x, y, mask = (t if t is None else t.to(device) for t in (x, y, mask))
    actual = cases.value_and_gradients(measure, x, y, mask=mask, scale=scaler)
    assert actual[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    scale = max(1.0, float(expected[0].abs().max()))
    tolerance = cases.VALUE_TOLERANCE[dtype] * scale
    if has_kernels and form == "covariance" and case.rows < case.student_width:
        # Kernels keep 16 bits of a float32, and use this form for so few rows only if forced to.
        tolerance *= 2
    assert float((actual[0].cpu() - expected[0]).abs().max()) <= tolerance
    for got, wanted, features in zip(actual[1:], expected[1:], (x, y), strict=True):
        assert got.dtype == features.dtype
        assert got.shape == features.shape
        # A gradient of 0 (with one feature, CKA is 1) has no relative error.
        if float(wanted.norm()) * float(features.double().norm()) < 1e-9 * scale:
            assert float(got.double().norm() * features.double().norm()) < 1e-4 * scale
        else:
            assert cases.relative_error(got, wanted) <= cases.GRADIENT_TOLERANCE[dtype]
        if mask is not None:
            assert not got[~mask].any()


@pytest.mark.parametrize("rows", [12, 40], ids=str)
@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name([cases.CKA, cases.CKA_BIASED, cases.PROCRUSTES])
def test_distance_is_one_minus_similarity(measure, form, rows, force_form, device) -> None:
    """It is rounded only once, unlike ``1 - float32``, which is a multiple of 2^-24."""
    force_form(form)
    x, y = (t.to(device, torch.bfloat16) for t in cases.near_pair(rows, 16, 1e-3, rotated=False))
    similarity, *gradients = cases.value_and_gradients(measure, x, y)
    distance, *opposite = cases.value_and_gradients(measure, x, y, distance=True)
    assert abs(float(distance) - (1 - float(similarity))) <= 2**-24
    steps = float(distance) * 2**24
    assert steps != round(steps)
    for got, wanted in zip(opposite, gradients, strict=True):
        assert torch.equal(got, -wanted)
