"""Covariance distances to statistics and at the best rotation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels import reference
from tests.support import cases

SHAPES = [(40, 6), (12, 30)]  # more rows than columns, and fewer


def pair(rows: int, width: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y, _ = cases.Case("", rows, width, width, offset=2.0).features(dtype)
    return x.requires_grad_(), y.requires_grad_()


def statistics_of(rows: Tensor) -> rk.TeacherStatistics:
    statistics = rk.TeacherStatistics(rows.shape[-1]).to(rows.device)
    statistics.update(rows.detach())
    return statistics


def covariance(rows: Tensor) -> Tensor:
    return torch.cov(rows.detach().double().T)


def gradient(value: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(value, x)[0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scale", ["relative", "coral", "none"])
def test_optimal_is_the_distance_at_the_best_rotation(shape, scale, device) -> None:
    """It is attained between the eigenvectors, and random rotations nearby are worse."""
    x, y = (t.detach().to(device).requires_grad_() for t in pair(*shape))
    value = rk.covariance_distance(x, y, rotation="optimal", scale=scale)
    spectra_x, spectra_y = (torch.linalg.eigh(covariance(t)) for t in (x, y))
    best = spectra_y.eigenvectors @ spectra_x.eigenvectors.T
    expected = reference.covariance_distance(x, y, rotation=best, scale=scale)
    torch.testing.assert_close(value, expected)
    assert cases.relative_error(gradient(value, x), gradient(expected, x)) < 1e-6
    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        skew = 0.1 * torch.randn(shape[1], shape[1], generator=generator).double().to(device)
        other_rotation = best @ torch.linalg.matrix_exp(skew - skew.T)
        assert reference.covariance_distance(x, y, rotation=other_rotation, scale=scale) > value


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_optimal_depends_on_spectra_alone(shape) -> None:
    """A rotation or another order of rows changes nothing; another variance does."""
    x, _ = pair(*shape)
    turned = (x @ cases.rotation(shape[1])).detach().flip(0) + 5
    assert float(rk.covariance_distance(turned, x.detach(), rotation="optimal")) < 1e-12
    stretched = x.detach().clone()
    stretched[:, 0] *= 2
    assert float(rk.covariance_distance(stretched, x.detach(), rotation="optimal")) > 1e-3


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_optimal_in_every_dtype(dtype, device) -> None:
    x, y = (t.detach().to(device, dtype).requires_grad_() for t in pair(40, 6))
    value = rk.covariance_distance(x, y, rotation="optimal")
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = rk.covariance_distance(*exact, rotation="optimal")
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected, atol=1e-6, rtol=1e-6)
    grad = gradient(value, x)
    assert grad.dtype == dtype
    error = cases.relative_error(grad, gradient(expected, exact[0]))
    assert error < cases.GRADIENT_TOLERANCE[dtype]


def test_optimal_in_batches_lists_and_under_masks() -> None:
    x, y, _ = cases.Case("", 20, 6, 6, batch=(3,)).features(torch.float64)
    together = rk.covariance_distance(x, y, rotation="optimal")
    one_by_one = [
        rk.covariance_distance(a, b, rotation="optimal") for a, b in zip(x, y, strict=True)
    ]
    torch.testing.assert_close(together, torch.stack(one_by_one))
    listed = rk.covariance_distance(list(x), list(y), rotation="optimal")
    torch.testing.assert_close(listed, together)
    mask = torch.arange(20) < 13
    poisoned = x[0].masked_fill(~mask[:, None], float("nan")).requires_grad_()
    value = rk.covariance_distance(poisoned, y[0], mask=mask, rotation="optimal")
    expected = rk.covariance_distance(x[0][:13], y[0][:13], rotation="optimal")
    torch.testing.assert_close(value, expected)
    grad = gradient(value, poisoned)
    assert grad.isfinite().all()
    assert not grad[13:].any()


def test_optimal_is_nan_for_a_nan_in_a_valid_row() -> None:
    x, y = (t.detach() for t in pair(20, 6))
    x[3, 2] = float("nan")
    x.requires_grad_()
    assert rk.covariance_distance(x, y, rotation="optimal").isnan()
    listed = rk.covariance_distance([x, y], [y, y], rotation="optimal")
    assert listed[0].isnan()
    assert float(listed[1].detach()) == 0


def test_a_spectrum_with_equal_eigenvalues_has_a_gradient() -> None:
    """The derivative of an eigenvector would be infinite."""
    x = torch.linalg.qr(torch.randn(12, 4, dtype=torch.float64, generator=seeded()))[0]
    x = torch.cat([x, -x]).requires_grad_()
    y = pair(24, 4)[1]
    grad = gradient(rk.covariance_distance(x, y, rotation="optimal"), x)
    assert grad.isfinite().all()


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


STATISTICS = {
    "relative": {},
    "coral with means": {"scale": "coral", "mean_weight": 0.3},
    "unscaled": {"scale": "none"},
    "rotation": {"rotation": "given"},
    "rotation and means": {"rotation": "given", "mean_weight": 0.3},
    "optimal": {"rotation": "optimal"},
}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_give_the_results_of_features(shape, dtype, name, device) -> None:
    """Value and gradients, also of the rotation, are those with the teacher's features."""
    settings = dict(STATISTICS[name])
    x, y = (t.detach().to(device, dtype).requires_grad_() for t in pair(*shape))
    q = None
    if settings.get("rotation") == "given":
        q = cases.rotation(shape[1]).to(device).requires_grad_()
        settings["rotation"] = q
    value = rk.covariance_distance(x, statistics_of(y), debiased=False, **settings)
    exact = [t.detach().double().requires_grad_() for t in (x, y)]
    expected = rk.covariance_distance(*exact, **settings)
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), expected, atol=1e-5, rtol=1e-5)
    tolerance = cases.GRADIENT_TOLERANCE[dtype]
    sides = [(x, exact[0])] + ([] if q is None else [(q, q)])
    for tensor, exact_tensor in sides:
        grad = torch.autograd.grad(value, tensor, retain_graph=True)[0]
        wanted = torch.autograd.grad(expected, exact_tensor, retain_graph=True)[0]
        assert cases.relative_error(grad, wanted) < tolerance


def debiased(x: Tensor, y: Tensor, mean_weight: float) -> Tensor:
    """The distance from its definition, with sums over pairs of different rows."""
    n = len(x)
    # HSIC_1 of Song et al. 2012, without the diagonal.
    k = (x @ x.T).masked_fill(torch.eye(n, dtype=torch.bool), 0.0)
    products = (k * k).sum()
    total, cross = k.sum(), (k.sum(0) * k.sum(1)).sum()
    hsic = products + total**2 / ((n - 1) * (n - 2)) - 2 * cross / (n - 2)
    hsic = hsic / (n * (n - 3))
    covariance_x, covariance_y = torch.cov(x.T), torch.cov(y.T)
    norm = covariance_y.square().sum()
    value = (hsic - 2 * (covariance_x * covariance_y).sum() + norm) / norm
    means = (x.mean(0) - y.mean(0)).square().sum() - covariance_x.trace() / n
    return value + mean_weight * means


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
def test_debiased_from_its_definition(shape, dtype, device) -> None:
    x, y = (t.detach().to(device, dtype).requires_grad_() for t in pair(*shape))
    value = rk.covariance_distance(x, statistics_of(y), mean_weight=0.3)
    exact = [t.detach().cpu().double().requires_grad_() for t in (x, y)]
    expected = debiased(*exact, 0.3)
    torch.testing.assert_close(value.cpu().double(), expected, atol=1e-4, rtol=1e-5)
    error = cases.relative_error(gradient(value, x), gradient(expected, exact[0]))
    assert error < cases.GRADIENT_TOLERANCE[dtype]


@pytest.mark.parametrize("row", [1, 3000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_debiased_beside_long_rows(dtype, row, device) -> None:
    """Their ``||x_i||^4`` would be nearly all of the sum."""
    x, y = (t.detach().clone() for t in pair(200, 24))
    x[3] *= row
    x[7] *= -row / 2
    x, y = (t.to(device, dtype) for t in (x, y))
    x.requires_grad_()
    value = rk.covariance_distance(x, statistics_of(y), mean_weight=0.3)
    exact = [t.detach().cpu().double().requires_grad_() for t in (x, y)]
    expected = debiased(*exact, 0.3)
    scale = max(1.0, float(expected.detach()))
    assert float(value.detach()) == pytest.approx(float(expected.detach()), abs=2e-6 * scale)
    error = cases.relative_error(gradient(value, x), gradient(expected, exact[0]))
    assert error < cases.GRADIENT_TOLERANCE[dtype]


def test_debiased_is_0_on_average_for_the_teacher_itself() -> None:
    """The biased distance is not: the covariance of few rows scatters."""
    data = torch.randn(100_000, 8, dtype=torch.float64, generator=seeded())
    data = data @ torch.randn(8, 8, dtype=torch.float64, generator=seeded(1)) + 1
    stored = statistics_of(data)
    batches = data[:40_000].view(-1, 10, 8)
    values = {
        flag: torch.stack(
            [rk.covariance_distance(x, stored, debiased=flag, mean_weight=0.1) for x in batches]
        )
        for flag in (True, False)
    }
    spread = values[True].std() / len(batches) ** 0.5
    assert abs(values[True].mean()) < 4 * spread
    assert values[False].mean() > 20 * spread


def test_debiased_under_a_mask_and_with_too_few_rows() -> None:
    x, y = pair(40, 6)
    stored = statistics_of(y)
    mask = torch.arange(40) < 25
    poisoned = x.detach().masked_fill(~mask[:, None], float("nan")).requires_grad_()
    value = rk.covariance_distance(poisoned, stored, mask=mask)
    expected = rk.covariance_distance(x[:25], stored)
    torch.testing.assert_close(value, expected)
    grad = gradient(value, poisoned)
    torch.testing.assert_close(grad[:25], gradient(expected, x)[:25])
    assert not grad[25:].any()
    with pytest.raises(ValueError, match="at least 4 rows"):
        rk.covariance_distance(x[:3], stored)
    assert rk.covariance_distance(x[:3], stored, debiased=False).isfinite()


def test_statistics_of_layers_and_under_a_mask() -> None:
    x, y = pair(40, 6)
    mask = torch.arange(40) < 25
    stored = [statistics_of(y), statistics_of(y[:, :4])]
    value = rk.covariance_distance([x, x[:, :4]], stored, mask=mask)
    expected = [
        rk.covariance_distance(x[:25], stored[0]),
        rk.covariance_distance(x[:25, :4], stored[1]),
    ]
    torch.testing.assert_close(value, torch.stack(expected))
    # Statistics of a wider teacher, rotated to the student's width.
    q = torch.eye(6, 4, dtype=torch.float64)
    narrow = rk.covariance_distance(x[:, :4], stored[0], rotation=q, debiased=False)
    torch.testing.assert_close(narrow, rk.covariance_distance(x[:, :4], y[:, :4]))


def test_statistics_without_variance() -> None:
    x, y = pair(40, 6)
    value = rk.covariance_distance(x, statistics_of(torch.ones_like(y)))
    assert float(value.detach()) == 0
    assert not gradient(value, x).any()


def test_statistics_compile() -> None:
    x, y = (t.detach().float().requires_grad_() for t in pair(40, 6))
    stored = statistics_of(y)
    compiled = torch.compile(
        lambda x: rk.covariance_distance(x, stored), fullgraph=True, backend="aot_eager"
    )
    value, expected = compiled(x), rk.covariance_distance(x, stored)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient(value, x), gradient(expected, x))


def test_autocast_changes_nothing(device) -> None:
    x, y = (t.detach().float().to(device).requires_grad_() for t in pair(40, 6))
    q = cases.rotation(6).float().to(device)
    for settings in ({"rotation": "optimal"}, {}, {"rotation": q}):
        teacher = y if settings.get("rotation") == "optimal" else statistics_of(y)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            value = rk.covariance_distance(x, teacher, **settings)
        assert torch.equal(value, rk.covariance_distance(x, teacher, **settings))


X = torch.randn(8, 3)
WRONG = [
    (ValueError, "rotation must be one of 'optimal'; got 'best'", X, {"rotation": "best"}),
    (ValueError, "must have the same width", torch.randn(8, 4), {"rotation": "optimal"}),
    (ValueError, "mean_weight must be 0", X, {"rotation": "optimal", "mean_weight": 1.0}),
    (RuntimeError, "'triton' cannot run", X, {"rotation": "optimal", "backend": "triton"}),
    (ValueError, "teacher must hold at least 2 rows; got 0", rk.TeacherStatistics(3), {}),
    (ValueError, "must have the student's width, 3", statistics_of(torch.randn(9, 4)), {}),
    (ValueError, "one per layer for a list; got a list of 1 for a tensor", [statistics_of(X)], {}),
    (
        ValueError,
        r"rotation must be .* = \(4, 3\)",
        statistics_of(torch.randn(9, 4)),
        {"rotation": X[:3]},
    ),
    (TypeError, "teacher must be TeacherStatistics; got Linear", torch.nn.Linear(3, 3), {}),
    (ValueError, "precision must be one of", statistics_of(X), {"precision": "low"}),
]


@pytest.mark.parametrize(("error", "message", "teacher", "settings"), WRONG)
def test_errors(error, message, teacher, settings) -> None:
    with pytest.raises(error, match=message):
        rk.covariance_distance(X, teacher, **settings)


def test_statistics_are_for_covariances() -> None:
    with pytest.raises(TypeError, match="teacher must be features for measure='cka'"):
        rk.RIFTLoss("cka")(X, statistics_of(X))
    assert float(rk.RIFTLoss("covariance", debiased=False)(X, statistics_of(X))) < 1e-10
    with pytest.raises(ValueError, match="rotation='optimal' needs measure='covariance'"):
        rk.RIFTLoss("cka", rotation="optimal")
    loss = rk.RIFTLoss("covariance", rotation="optimal")
    turned = X @ cases.rotation(3).float()
    assert float(loss(turned, X)) < 1e-6 < float(rk.RIFTLoss("covariance")(turned, X))
