"""Newton-Schulz, compared with exact factorisations."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels.backends import eager
from rift_kernels.measures import matrix_functions
from tests.support import cases

POLAR = partial(matrix_functions.polar, primitives=eager)
TRANSPORT = partial(matrix_functions.transport, primitives=eager)


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def with_spectrum(spectrum: Tensor) -> Tensor:
    n = len(spectrum)
    return cases.rotation(n, 1) @ torch.diag(spectrum) @ cases.rotation(n, 2)


MATRICES = {
    "full rank": normal(256, 256),
    "rank deficient": normal(256, 64) @ normal(64, 256, seed=1),
    "rank one": normal(256, 1) @ normal(1, 256, seed=1),
    "tall": normal(200, 30),
    "wide": normal(30, 200),
    "decaying": with_spectrum(torch.logspace(0, -5, 128, dtype=torch.float64)),
    "repeated singular values": with_spectrum(torch.ones(64, dtype=torch.float64)),
    "one dominates": normal(128, 128) + 1e4 * normal(128, 1, seed=1) @ normal(1, 128, seed=2),
    "zero": torch.zeros(16, 16, dtype=torch.float64),
    "tiny": 1e-120 * normal(16, 16),
    "huge": 1e150 * normal(16, 16),
    "batch": normal(3, 20, 12),
}


@pytest.mark.parametrize(
    ("steps", "lowest"),
    [(matrix_functions.POLAR_STEPS, 1.4e-8), (matrix_functions.TRANSPORT_STEPS, 1e-6)],
    ids=["polar", "transport"],
)
def test_steps_map_the_interval_to_one(steps, lowest) -> None:
    x = torch.logspace(math.log10(lowest), 0, 100_001, dtype=torch.float64)
    for a, b, c in steps:
        x = x * (a + x**2 * (b + c * x**2))
    assert float((x - 1).abs().max()) < 1e-11


@pytest.mark.parametrize("name", MATRICES)
def test_polar(name) -> None:
    matrix = MATRICES[name]
    factor, nuclear = POLAR(matrix)
    exact_factor, exact_nuclear = matrix_functions.polar_svd(matrix)
    torch.testing.assert_close(nuclear, exact_nuclear, rtol=1e-6, atol=0)
    # Its norm never exceeds that of a rotation, whatever the rank.
    assert float(torch.linalg.matrix_norm(factor, 2).max()) < 1 + 1e-9
    # A gradient uses it on the range of the matrix.
    applied, expected = factor.mT @ matrix, exact_factor.mT @ matrix
    assert cases.relative_error(applied, expected) < 1e-5


def gram(*shape: int, seed: int) -> Tensor:
    features = normal(*shape, seed=seed)
    return features.mT @ features


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (gram(100, 24, seed=0), gram(90, 24, seed=1)),
        (gram(2, 100, 24, seed=0), gram(2, 90, 24, seed=1)),
        (gram(40, 24, seed=0), gram(40, 24, seed=0)),
        (1e-8 * gram(60, 24, seed=0), 1e8 * gram(60, 24, seed=1)),
    ],
    ids=["regular", "batch", "equal", "scales apart"],
)
def test_transport(a, b) -> None:
    forth, back, fidelity = TRANSPORT(a, b)
    exact_forth, exact_back, exact_fidelity = matrix_functions.transport_eigh(a, b)
    assert cases.relative_error(forth, exact_forth) < 1e-8
    assert cases.relative_error(back, exact_back) < 1e-8
    torch.testing.assert_close(fidelity, exact_fidelity, rtol=1e-9, atol=0)
    assert torch.equal(forth, forth.mT)
    assert torch.equal(back, back.mT)
    # The definition of a transport map.
    assert cases.relative_error(forth @ a @ forth, b) < 1e-8
    assert cases.relative_error(back @ b @ back, a) < 1e-8


def test_transport_of_singular_matrices() -> None:
    """With fewer rows than features, maps are used on their range only."""
    x, y = normal(10, 24), normal(10, 24, seed=1)
    forth, _, fidelity = TRANSPORT(x.mT @ x, y.mT @ y)
    expected = torch.linalg.svdvals(x @ y.mT).sum()
    torch.testing.assert_close(fidelity, expected, rtol=1e-8, atol=0)
    factor, _ = matrix_functions.polar_svd(x @ y.mT)
    assert cases.relative_error(x @ forth, factor @ y) < 1e-6


@pytest.mark.parametrize("solve", [POLAR, matrix_functions.polar_svd])
def test_polar_propagates_nan_per_matrix(solve) -> None:
    matrices = normal(3, 8, 8)
    matrices[1, 2, 3] = float("nan")
    factor, nuclear = solve(matrices)
    assert nuclear.isnan().tolist() == [False, True, False]
    assert torch.isfinite(factor[0]).all()


@pytest.mark.parametrize("solve", [TRANSPORT, matrix_functions.transport_eigh])
def test_transport_propagates_nan_per_matrix(solve) -> None:
    a, b = gram(3, 20, 8, seed=0), gram(3, 20, 8, seed=1)
    a[1, 2, 3] = float("inf")
    forth, back, fidelity = solve(a, b)
    assert fidelity.isnan().tolist() == [False, True, False]
    assert torch.isfinite(forth[2]).all()
    assert torch.isfinite(back[0]).all()


def rank_deficient(kind: str) -> tuple[Tensor, Tensor]:
    """Features whose 256 x 256 cross-covariance may lack full rank or have a steep spectrum."""
    rows = 100 if kind == "few rows" else 1024
    x = normal(rows, 256) / torch.arange(1, 257) ** (2 if kind == "steep" else 0.5)
    if kind == "bottleneck":
        x = normal(rows, 100) @ normal(100, 256, seed=3)
    y = x @ cases.rotation(256) + 0.03 * normal(rows, 256, seed=4)
    if kind == "steep":
        y = x + 0.5 * normal(rows, 256, seed=4) / torch.arange(1, 257) ** 2
    if kind == "massive activation":
        for features in (x, y):
            features[0] *= 300
            features[:, 5] *= 100
    if kind == "dead features":
        x[:, 100:], y[:, 80:] = 0, 0
    return x, y


@pytest.mark.parametrize(
    ("kind", "dtype", "form"),
    [
        # Rounded to float32, a bottleneck has full rank, and its gradient would be rounding.
        ("bottleneck", torch.float64, "covariance"),
        *(
            (kind, dtype, form)
            for kind, form in (
                ("full rank", "covariance"),
                ("dead features", "covariance"),
                ("steep", "covariance"),
                ("massive activation", "covariance"),
                ("few rows", "covariance"),
                ("few rows", "gram"),
            )
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
    ids=str,
)
def test_procrustes_newton_schulz_against_svd(kind, dtype, form, force_form, device) -> None:
    """At D = 256, Newton-Schulz is accurate enough to replace an SVD."""
    force_form(form)
    x, y = (t.to(device, dtype) for t in rank_deficient(kind))
    fast = cases.value_and_gradients(cases.PROCRUSTES, x, y)
    exact = cases.value_and_gradients(cases.PROCRUSTES_SVD, x, y)
    assert float(fast[0]) == pytest.approx(float(exact[0]), abs=1e-4)
    assert cases.relative_error(fast[1], exact[1]) < 1e-3
    assert cases.relative_error(fast[2], exact[2]) < 1e-3


def test_procrustes_of_a_steep_spectrum_in_gram_form(force_form, device) -> None:
    """The error is within what the docstring says, and larger than in covariance form."""
    force_form("gram")
    scale = torch.arange(1, 257) ** -2.0
    y = normal(64, 256) * scale
    x = y + 0.3 * normal(64, 256, seed=4) * scale
    x, y = x.to(device), y.to(device)
    fast = cases.value_and_gradients(cases.PROCRUSTES, x, y)
    exact = cases.value_and_gradients(cases.PROCRUSTES_SVD, x, y)
    assert float(fast[0]) == pytest.approx(float(exact[0]), abs=1e-5)
    assert cases.relative_error(fast[1], exact[1]) < 3e-3


def test_gradient_is_finite_where_that_of_an_svd_is_not() -> None:
    """With repeated singular values, the derivative of an SVD is NaN."""
    x = torch.cat([torch.eye(4), -torch.eye(4)]).double().requires_grad_()
    y = x.detach().clone()
    u, s, vh = torch.linalg.svd((x - x.mean(0)).T @ (y - y.mean(0)))
    through_svd = ((u @ vh) * torch.arange(16.0).reshape(4, 4)).sum() + s.sum()
    (grad_svd,) = torch.autograd.grad(through_svd, x)
    assert not torch.isfinite(grad_svd).all()
    (grad,) = torch.autograd.grad(rk.procrustes_similarity(x, y), x)
    assert torch.isfinite(grad).all()
