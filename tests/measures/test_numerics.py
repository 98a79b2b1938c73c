"""Numerical pitfalls: offsets, scales, gradients near similarity 1, no variance, NaN, masks."""

import math

import pytest
import torch

import rift_kernels as rk
from rift_kernels import reference
from rift_kernels.dispatch import checks
from rift_kernels.measures import cka, coefficients, row_means
from rift_kernels.measures.centering import CenteredFeatures
from tests.support import cases

INVARIANT = [cases.CKA, cases.CKA_BIASED, cases.PROCRUSTES, cases.PROCRUSTES_SVD]
SHIFT_INVARIANT = [*INVARIANT, cases.COVARIANCE, cases.BURES, cases.BURES_EIGH]
DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
DISTANCE_IDS = [f"{d:.0e}" for d in DISTANCES]


def pair(rows: int = 200, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    x, y, _ = cases.Case("", rows, width, width).features(torch.float64)
    return x, y


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize(
    ("dtype", "shift", "tolerance"),
    [(torch.float64, 1000.0, 1e-6), (torch.float32, 30.0, 1e-5)],
    ids=["float64", "float32"],
)
@cases.by_name(SHIFT_INVARIANT)
def test_shift_changes_nothing(measure, dtype, shift, tolerance, form, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(device) for t in pair())
    expected = measure(x, y)
    shifted = measure((x + shift).to(dtype), (y - shift).to(dtype))
    scale = max(1.0, float(expected))
    assert float(shifted) == pytest.approx(float(expected), abs=tolerance * scale)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("factor", [1e-17, 1e-6, 1e-4, 1e4, 1e6, 1e17])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@cases.by_name(INVARIANT)
def test_scale_changes_nothing(measure, dtype, factor, form, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(device, dtype) for t in pair())
    expected, grad_x, _ = cases.value_and_gradients(measure, x, y)
    scaled, grad_scaled, _ = cases.value_and_gradients(measure, x * factor, y / factor)
    assert float(scaled) == pytest.approx(float(expected), rel=1e-6)
    assert cases.relative_error(grad_scaled * factor, grad_x) < 1e-4


@pytest.mark.parametrize("factor", [1e-6, 1e6])
def test_relative_covariance_distance_is_free_of_a_common_scale(factor, device) -> None:
    x, y = (t.to(device, torch.float32) for t in pair())
    expected = rk.covariance_distance(x, y)
    scaled = rk.covariance_distance(x * factor, y * factor)
    assert float(scaled) == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("rotated", [False, True], ids=["near", "rotated"])
@pytest.mark.parametrize("distance", DISTANCES, ids=DISTANCE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, *cases.HALF], ids=str)
@cases.by_name([cases.CKA, cases.CKA_BIASED])
def test_gradient_near_one(measure, dtype, distance, rotated, form, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(dtype) for t in cases.near_pair(512, 64, distance, rotated))
    # The initial scale of torch.amp.GradScaler.
    scale = 2.0**16 if dtype == torch.float16 else 1.0
    expected = cases.value_and_gradients(measure.reference, x.double(), y.double(), scale=scale)
    actual = cases.value_and_gradients(measure, x.to(device), y.to(device), scale=scale)
    assert float(1 - actual[0]) == pytest.approx(float(1 - expected[0]), abs=2e-6)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= 4e-3


@pytest.mark.eager_only
@pytest.mark.parametrize("rotated", [False, True], ids=["near", "rotated"])
@pytest.mark.parametrize("distance", DISTANCES, ids=DISTANCE_IDS)
@cases.by_name([cases.PROCRUSTES, cases.BURES, cases.COVARIANCE])
def test_other_gradients_near_the_teacher(measure, distance, rotated, device) -> None:
    x, y = (t.bfloat16() for t in cases.near_pair(512, 64, distance, rotated))
    expected = cases.value_and_gradients(measure.reference, x.double(), y.double())
    actual = cases.value_and_gradients(measure, x.to(device), y.to(device))
    assert cases.relative_error(actual[1], expected[1]) <= 4e-3
    assert cases.relative_error(actual[2], expected[2]) <= 4e-3


@pytest.mark.parametrize("column", [1, 100])
@pytest.mark.parametrize(
    ("rows", "width", "row", "form"),
    [
        (128, 300, 300, "gram"),
        (128, 300, 3000, "gram"),
        (256, 48, 300, "gram"),
        (256, 48, 100, "covariance"),
        (256, 48, 1000, "covariance"),
        (256, 48, 3000, "covariance"),
    ],
)
def test_massive_activation(
    rows, width, row, column, form, force_form, device, has_kernels
) -> None:
    """One row, or one row and one feature, is far larger than the rest, as in language models.

    Debiasing removes that row's part, which is nearly all of ``||A||^2``.
    """
    force_form(form)
    x, y = (t.clone() for t in cases.near_pair(rows, width, 1e-2, rotated=False))
    for side in (x, y):
        side[0] *= row
        side[:, 5] *= column
    x, y = x.float(), y.float()
    expected = cases.value_and_gradients(cases.CKA.reference, x.double(), y.double())
    actual = cases.value_and_gradients(cases.CKA, x.to(device), y.to(device))
    # Kernels keep 16 bits of a float32.
    tolerance = 1e-5 if has_kernels else 2e-6
    assert float(actual[0]) == pytest.approx(float(expected[0]), abs=tolerance)
    # The Gram form subtracts the mean of all rows, which is far from most of them.
    exact = 1e-3 if form == "gram" else 1e-4
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= (4e-3 if has_kernels else exact)


LONG_ROWS = {"one": 1, "eight": 8, "modest": 8, "alike": 8, "twelve": 12}
GRADIENT = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("related", ["near", "rotated", "independent"])
@pytest.mark.parametrize("column", [1, 100])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
@pytest.mark.parametrize("which", LONG_ROWS)
def test_long_rows(which, dtype, column, related, force_form, device, has_kernels) -> None:
    """One long row, as many as are kept apart, in one direction or several, and more than that.

    Rows of modest length test terms that rounding would hide beside longer rows.
    """
    force_form("covariance")
    x, y = (t.clone() for t in cases.near_pair(96, 24, 1e-2, related == "rotated"))
    if related == "independent":
        y = y[torch.randperm(96, generator=torch.Generator().manual_seed(0))]
    for side in (x, y):
        long = side[5 : 5 + LONG_ROWS[which]]
        if which == "alike":
            long.copy_(long[0] + 0.1 * long)
        long *= 10 if which == "modest" else 3000
        side[:, 5] *= column
        side += 3
    x, y = x.to(dtype), y.to(dtype)
    expected = cases.value_and_gradients(cases.CKA.reference, x.double(), y.double())
    actual = cases.value_and_gradients(cases.CKA, x.to(device), y.to(device))
    tolerance = 1e-5 if has_kernels else 2e-6
    tolerance = 1e-11 if dtype == torch.float64 else tolerance
    assert float(actual[0]) == pytest.approx(float(expected[0]), abs=tolerance)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= GRADIENT[dtype]


@pytest.mark.parametrize("name", ["batch", "masked", "masked batch", "masked, offset"])
@pytest.mark.parametrize("dtype", GRADIENT, ids=str)
def test_long_rows_of_a_batch_and_under_a_mask(
    name, dtype, force_form, device, has_kernels
) -> None:
    """The long rows differ between entries, and a masked row is never one of them."""
    force_form("covariance")
    case = next(case for case in cases.CASES if case.name == name)
    x, y, mask = case.features(torch.float64)
    for side in (x, y):
        side[..., 1, :] *= 3000
        side[0, ..., 2] *= 1000
        if mask is not None:
            side[~mask] = 1e9
    x, y = x.to(device, dtype), y.to(device, dtype)
    masks = {} if mask is None else {"mask": mask.to(device)}
    masks_on_cpu = {} if mask is None else {"mask": mask}
    expected = cases.value_and_gradients(
        cases.CKA.reference, x.cpu().double(), y.cpu().double(), **masks_on_cpu
    )
    actual = cases.value_and_gradients(cases.CKA, x, y, **masks)
    tolerance = 1e-5 if has_kernels else 2e-6
    torch.testing.assert_close(actual[0].cpu().double(), expected[0], atol=tolerance, rtol=0)
    for got, wanted in zip(actual[1:], expected[1:], strict=True):
        assert cases.relative_error(got, wanted) <= GRADIENT[dtype]


@pytest.mark.eager_only
@pytest.mark.parametrize("rows", [4, 5, 6, 8, 9, 12, 17])
@pytest.mark.parametrize("width", [1, 2])
@pytest.mark.parametrize("row", [1, 3000])
def test_long_rows_among_few(row, width, rows, force_form, device) -> None:
    """At most half of the rows are kept apart, so the mean of the others is near most rows."""
    force_form("covariance")
    for seed in range(5):
        x, y, _ = cases.Case("", rows, width, width).features(torch.float32, seed)
        for side in (x, y):
            side[rows // 3] *= row
        expected = cases.value_and_gradients(cases.CKA.reference, x.double(), y.double())
        actual = cases.value_and_gradients(cases.CKA, x.to(device), y.to(device))
        assert float(actual[0]) == pytest.approx(float(expected[0]), abs=2e-6)
        for got, wanted in zip(actual[1:], expected[1:], strict=True):
            assert cases.relative_error(got, wanted) <= 1e-4


@pytest.mark.eager_only
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("row", [0, 30])
def test_nan_and_inf_in_long_rows_and_in_others(row, bad, force_form, device) -> None:
    force_form("covariance")
    x, y = (t.to(device, torch.float32) for t in pair())
    x[:4] *= 3000
    x[row, 3] = bad
    value, *_ = cases.value_and_gradients(cases.CKA, x, y)
    assert value.isnan()


@pytest.mark.parametrize("shape", [(4, 768), (6, 768), (8, 4096), (32, 8192)], ids=str)
def test_debiased_with_few_rows_of_wide_features(shape, device, has_kernels) -> None:
    """The bias is thousands of times larger than the debiased value."""
    # A single seed may hide the error, which depends on the order of a processor's sums.
    for seed in range(1 if has_kernels else 12):
        generator = torch.Generator().manual_seed(seed)
        x, noise = (torch.randn(shape, generator=generator) for _ in range(2))
        value = rk.linear_cka(x.to(device), noise.to(device))
        expected = float(reference.linear_cka(x.double(), noise.double()))
        assert float(value) == pytest.approx(expected, abs=2e-6)
    x, y = x.bfloat16(), (x + 5e-3 * noise).bfloat16()
    exact = cases.value_and_gradients(cases.CKA.reference, x.double(), y.double())
    actual = cases.value_and_gradients(cases.CKA, x.to(device), y.to(device))
    assert float(actual[0]) == pytest.approx(float(exact[0]), abs=2e-6)
    assert cases.relative_error(actual[1], exact[1]) <= 4e-3
    assert cases.relative_error(actual[2], exact[2]) <= 4e-3


@pytest.mark.parametrize(
    "shape", [(8, 5), (16, 64), (32, 768), (40, 5), (100, 3), (64, 16)], ids=str
)
@pytest.mark.parametrize(
    ("length", "offset"), [(1, 0), (1e5, 1000)], ids=["", "long rows in the other, offset"]
)
def test_one_distinct_row_is_no_similarity(shape, length, offset, device) -> None:
    """Debiased, nothing varies, and the remaining rounding must not become a divisor."""
    rows, width = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, width, generator=generator).repeat(rows, 1) + offset
    x[0] += length * torch.randn(width, generator=generator)
    y = torch.randn(rows, width, generator=generator)
    y[4:6] *= length
    for sides in ((x, y), (y, x)):
        value, *grads = cases.value_and_gradients(cases.CKA, *(t.to(device) for t in sides))
        assert float(value) == 0
        assert not any(grad.any() for grad in grads)


@pytest.mark.eager_only
@pytest.mark.parametrize("measure", [cases.BURES, cases.BURES_ROOT], ids=lambda m: m.name)
@pytest.mark.parametrize("form", cases.FORMS)
def test_bures_close_to_the_teacher(measure, form, force_form, device) -> None:
    """The distance is a millionth of its two terms."""
    force_form(form)
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(160, 32, generator=generator)
    x = y + 1e-3 * torch.randn(160, 32, generator=generator)
    expected = cases.value_and_gradients(measure.reference, x.double(), y.double())
    actual = cases.value_and_gradients(measure, x.to(device), y.to(device))
    assert float(actual[0]) == pytest.approx(float(expected[0]), rel=1e-3)
    assert cases.relative_error(actual[1], expected[1]) <= 1e-3
    assert cases.relative_error(actual[2], expected[2]) <= 1e-3


@pytest.mark.eager_only
def test_bures_of_a_steep_spectrum(device) -> None:
    """Close to the teacher, the error of Newton-Schulz exceeds the distance."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, 129, dtype=torch.float64) ** -2
    y = torch.randn(512, 128, generator=generator, dtype=torch.float64) * scale
    for noise in (0.3, 0.03):
        x = y + noise * torch.randn(512, 128, generator=generator, dtype=torch.float64) * scale
        expected = float(reference.bures_distance(x, y))
        x, z = x.to(device), y.to(device)
        assert float(rk.bures_distance(x, z)) == pytest.approx(expected, abs=1e-5)
        assert float(rk.bures_distance(x, z, method="eigh")) == pytest.approx(expected, rel=1e-6)


@pytest.mark.eager_only
def test_permuted_rows_have_distance_0(force_form, device) -> None:
    """In Gram form, rounding could make the sum negative."""
    force_form("gram")
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        y = torch.randn(12, 30, generator=generator)
        value = rk.covariance_distance(
            y[torch.randperm(12, generator=generator)].to(device), y.to(device)
        )
        assert 0 <= float(value) < 1e-5


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("valid", [0, 1])
@cases.by_name(cases.MEASURES)
def test_too_few_rows_in_an_unreadable_mask(
    measure, valid, form, force_form, monkeypatch, device
) -> None:
    """On a GPU the mask is not read before the call."""
    force_form(form)
    monkeypatch.setattr(checks, "enough_rows", lambda *_: None)
    x, y = (t[:8, :3].to(device, torch.float32) for t in pair())
    mask = (torch.arange(8) < valid).to(device)
    value, grad_x, _ = cases.value_and_gradients(measure, x, y, mask=mask)
    assert value.isnan()
    assert grad_x[mask].isnan().all()
    assert not grad_x[~mask].any()


@pytest.mark.parametrize("value", [0.1, 0.7, 1e5 / 3])
def test_subtract_own_mean(value, device) -> None:
    """A constant column becomes exactly 0, masked rows stay 0, and the mean is accurate."""
    mask = (torch.arange(60) % 3 != 0).to(device)
    constant = torch.full((60, 3), value, device=device)
    assert not row_means.subtract_own_mean(constant, mask, torch.float32)[0].any()
    generator = torch.Generator().manual_seed(1)
    x = (1e4 + torch.randn(9999, 16, generator=generator)).to(device)
    assert not row_means.subtract_own_mean(x[:60], mask, torch.float32)[0][~mask].any()
    _, mean, _ = row_means.subtract_own_mean(x, None, torch.float32)
    half_a_digit = 0.51 * 2**-10
    assert float((mean.double() - x.double().mean(0)).abs().max()) <= half_a_digit


@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name(cases.MEASURES)
def test_overflow_is_never_a_number_that_looks_right(measure, form, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(device, torch.float32) for t in pair(rows=20))
    x[3, 2] = 2e19
    expected = float(measure.reference(x.double(), y.double()))
    value = float(measure(x, y))
    assert not math.isfinite(value) or value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("value", [0.0, 0.1, 1e5])
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@cases.by_name(INVARIANT)
def test_no_variance_is_zero(measure, side, dtype, value, form, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(device, dtype) for t in pair(rows=33))
    constant = torch.full_like(x, value if dtype != torch.float16 else min(value, 6e4))
    if side in ("student", "both"):
        x = constant
    if side in ("teacher", "both"):
        y = constant
    values, grad_x, grad_y = cases.value_and_gradients(measure, x, y)
    assert float(values) == 0
    assert not grad_x.any()
    assert not grad_y.any()


@pytest.mark.parametrize("form", cases.FORMS)
def test_distances_without_variance(form, force_form, device) -> None:
    force_form(form)
    x, _ = (t.to(device, torch.float32) for t in pair(rows=33))
    constant = torch.full_like(x, 0.1)
    for measure in (cases.COVARIANCE, cases.BURES, cases.BURES_ROOT):
        values, grad_x, grad_y = cases.value_and_gradients(measure, constant, constant)
        assert float(values) == 0
        assert not grad_x.any()
        assert not grad_y.any()
    # There is nothing to be relative to.
    values, grad_x, _ = cases.value_and_gradients(cases.COVARIANCE, x, constant)
    assert float(values) == 0
    assert not grad_x.any()
    # The student lacks all of the teacher's covariance.
    values, grad_x, _ = cases.value_and_gradients(cases.COVARIANCE, constant, x)
    assert float(values) == pytest.approx(1)
    assert not grad_x.any()


@pytest.mark.parametrize("form", cases.FORMS)
@cases.by_name(cases.MEASURES)
def test_identical_features(measure, form, force_form, device) -> None:
    force_form(form)
    x = pair(rows=40)[0].to(device, torch.float32)
    values, grad_x, _ = cases.value_and_gradients(measure, x, x)
    is_similarity = measure in INVARIANT
    # The error of a square root at 0 is the root of the rounding.
    tolerance = 5e-3 if measure is cases.BURES_ROOT else 2e-6
    assert float(values) == pytest.approx(1.0 if is_similarity else 0.0, abs=tolerance)
    assert torch.isfinite(grad_x).all()


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["student", "teacher"])
@cases.by_name(cases.MEASURES)
def test_nan_and_inf_propagate(measure, side, bad, form, force_form, device) -> None:
    """They reach only the layer that holds them."""
    force_form(form)
    features = [t.clone().to(device) for t in cases.CASES[9].features(torch.float32)[:2]]
    features[side][1, 2, 3] = bad
    values = measure(*features)
    assert values.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), 1e30])
@cases.by_name(cases.MEASURES)
def test_masked_rows_are_harmless(measure, garbage, form, force_form, device) -> None:
    force_form(form)
    case = next(case for case in cases.CASES if case.name == "masked batch")
    x, y, mask = (t.to(device) for t in case.features(torch.float32))
    expected = cases.value_and_gradients(measure, x, y, mask=mask)
    x[~mask], y[~mask] = garbage, -garbage
    actual = cases.value_and_gradients(measure, x, y, mask=mask)
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


@cases.by_name(cases.MEASURES)
def test_gradient_of_masked_rows_is_zero_even_for_nan(measure, device) -> None:
    case = next(case for case in cases.CASES if case.name == "masked")
    x, y, mask = (t.to(device) for t in case.features(torch.float32))
    x.requires_grad_()
    (measure(x, y, mask=mask) * float("nan")).backward()
    assert not x.grad[~mask].any()
    assert x.grad[mask].isnan().all()


@cases.by_name(cases.MEASURES)
def test_all_true_mask_is_no_mask(measure, device) -> None:
    x, y = (t.to(device, torch.float32) for t in pair(rows=30))
    mask = torch.ones(30, dtype=torch.bool, device=device)
    with_mask = cases.value_and_gradients(measure, x, y, mask=mask)
    without = cases.value_and_gradients(measure, x, y)
    for got, wanted in zip(with_mask, without, strict=True):
        assert cases.relative_error(got, wanted) < 1e-5


@pytest.mark.parametrize("threads", [1, 2])
@cases.by_name(cases.MEASURES)
def test_repeats_are_bitwise_equal(measure, threads, device) -> None:
    x, y = (t.to(device, torch.bfloat16) for t in pair(rows=300, width=130))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        first = cases.value_and_gradients(measure, x, y)
        for _ in range(3):
            for got, wanted in zip(cases.value_and_gradients(measure, x, y), first, strict=True):
                assert torch.equal(got, wanted)
    finally:
        torch.set_num_threads(before)


@pytest.mark.eager_only
def test_biased_cka_of_noise_is_saturated_and_debiased_is_not(device) -> None:
    """The reason why debiased is the default."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(32, 768, generator=generator).to(device) for _ in range(2))
    assert float(rk.linear_cka(x, y, debiased=False)) > 0.9
    assert abs(float(rk.linear_cka(x, y))) < 0.1


@pytest.mark.eager_only
def test_covariance_and_cka_measure_different_things(device) -> None:
    """A permutation of rows preserves the covariance and not CKA; a rotation does the opposite."""
    y = pair()[0].to(device)
    permuted = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0)).to(device)]
    rotated = y @ cases.rotation(y.shape[1]).to(device)
    assert float(rk.covariance_distance(permuted, y)) < 1e-12
    assert float(rk.linear_cka(permuted, y)) < 0.2
    assert float(rk.linear_cka(rotated, y)) == pytest.approx(1)
    spread = y * torch.arange(1, y.shape[1] + 1, device=device)
    turned = spread @ cases.rotation(y.shape[1]).to(device)
    assert float(rk.covariance_distance(turned, spread)) > 0.3


@pytest.mark.eager_only
def test_safe_inverse() -> None:
    got = coefficients.safe_inverse(torch.tensor([0.0, 2.0, math.inf, math.nan]))
    assert got[:2].tolist() == [0.0, 0.5]
    assert got[2:].isnan().all()


@pytest.mark.eager_only
def test_u_centering_an_overflow_is_nan() -> None:
    k = torch.rand(2, 6, 6)
    k[0, 0, 0] = math.inf
    count = torch.tensor(6.0, dtype=torch.float64)
    norm = cka._u_center_(k, CenteredFeatures(k, k, k, k, count, None))
    assert norm.isnan().tolist() == [True, False]


@pytest.mark.eager_only
def test_reference_agrees_with_the_definition_by_hand() -> None:
    """The oracle, on numbers small enough to check on paper."""
    x = torch.tensor([[0.0], [1.0], [2.0], [5.0]], dtype=torch.float64)
    y = torch.tensor([[1.0], [0.0], [2.0], [3.0]], dtype=torch.float64)
    correlation = torch.corrcoef(torch.cat([x, y], 1).T)[0, 1]
    biased = reference.linear_cka(x, y, debiased=False)
    assert float(biased) == pytest.approx(float(correlation**2))
    assert float(reference.procrustes_similarity(x, y)) == pytest.approx(float(correlation.abs()))
    # One dimension: Bures is the squared difference of the standard deviations.
    expected = (x.std() - y.std()).square()
    assert float(reference.bures_distance(x, y)) == pytest.approx(float(expected))
