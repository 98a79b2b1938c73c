"""Values on which independent public implementations agree, computed in both forms."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import rift_kernels as rk
from tests.support import cases

GOLDEN = json.loads((Path(__file__).parent / "golden" / "similarity.json").read_text())["values"]


def data(dataset: str) -> tuple[Tensor, Tensor]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 48)) + 3
    y = rng.standard_normal((64, 32)) + 3
    if dataset == "correlated":
        w = rng.standard_normal((48, 32)) / np.sqrt(48)
        y = (x - 3) @ w + 0.5 * (y - 3) + 3
    return torch.from_numpy(x), torch.from_numpy(y)


def one_minus_procrustes(x: Tensor, y: Tensor, method: str) -> Tensor:
    return 1 - rk.procrustes_similarity(x, y, method=method)


def procrustes_distance_squared(x: Tensor, y: Tensor, method: str) -> Tensor:
    energies = [z.sub(z.mean(0)).square().sum() for z in (x, y)]
    similarity = rk.procrustes_similarity(x, y, method=method)
    return energies[0] + energies[1] - 2 * similarity * (energies[0] * energies[1]).sqrt()


def minibatch(x: Tensor, y: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Minibatch CKA: the ratio of HSIC_1 averaged over batches."""

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        from rift_kernels.reference import _hsic_unbiased

        return torch.stack(
            [
                _hsic_unbiased(p @ p.T, q @ q.T)
                for p, q in zip(a.split(sizes), b.split(sizes), strict=True)
            ]
        ).mean()

    return hsic(x, y) / (hsic(x, x) * hsic(y, y)).sqrt()


EXACT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear_cka": lambda x, y: rk.linear_cka(x, y, debiased=False),
    "linear_cka_debiased": lambda x, y: rk.linear_cka(x, y),
    "one_minus_procrustes_similarity": lambda x, y: one_minus_procrustes(x, y, "svd"),
    "procrustes_distance_squared": lambda x, y: procrustes_distance_squared(x, y, "svd"),
    "bures_distance_squared_X32_vs_Y_ddof1": lambda x, y: rk.bures_distance(
        x[:, :32], y, method="eigh"
    ),
    "coral_over_4d2_X32_vs_Y_ddof1": lambda x, y: rk.covariance_distance(
        x[:, :32], y, scale="coral"
    ),
}
ITERATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "one_minus_procrustes_similarity": lambda x, y: one_minus_procrustes(x, y, "newton_schulz"),
    "procrustes_distance_squared": lambda x, y: procrustes_distance_squared(x, y, "newton_schulz"),
    "bures_distance_squared_X32_vs_Y_ddof1": lambda x, y: rk.bures_distance(x[:, :32], y),
}


CALLS = [
    pytest.param(name, function, tolerance, id=f"{name}-{tolerance:.0e}")
    for functions, tolerance in ((EXACT, 1e-9), (ITERATED, 1e-6))
    for name, function in functions.items()
]


@pytest.mark.parametrize("dataset", ["as_asked", "correlated"])
@pytest.mark.parametrize("form", cases.FORMS)
@pytest.mark.parametrize(("name", "function", "tolerance"), CALLS)
def test_values(name, function, tolerance, form, dataset, force_form, device) -> None:
    force_form(form)
    x, y = (t.to(device) for t in data(dataset))
    expected = pytest.approx(GOLDEN[name][dataset], rel=tolerance, abs=tolerance)
    assert float(function(x, y)) == expected


@pytest.mark.parametrize("dataset", ["as_asked", "correlated"])
def test_reference_estimator_of_hsic(dataset: str) -> None:
    """The oracle's estimator, averaged over batches as in minibatch CKA."""
    x, y = data(dataset)
    even = float(minibatch(x, y, (16, 16, 16, 16)))
    ragged = float(minibatch(x, y, (24, 24, 16)))
    assert even == pytest.approx(GOLDEN["minibatch_cka_debiased_4x16"][dataset], rel=1e-9)
    expected = GOLDEN["minibatch_cka_debiased_24_24_16_mean_hsic1"][dataset]
    assert ragged == pytest.approx(expected, rel=1e-9)
