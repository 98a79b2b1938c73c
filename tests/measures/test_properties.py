"""Invariances for all features; hypothesis searches for counterexamples."""

import pytest
import torch

import rift_kernels as rk
from tests.support import cases

hypothesis = pytest.importorskip("hypothesis", reason="needs hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

shapes = st.tuples(st.integers(4, 40), st.integers(1, 24), st.integers(1, 24))
seeds = st.integers(0, 10_000)
thorough = settings(max_examples=40, deadline=None, derandomize=True)


def features(shape, seed):
    rows, student_width, teacher_width = shape
    return cases.Case("", rows, student_width, teacher_width).features(torch.float64, seed)[:2]


@given(shapes, seeds)
@thorough
def test_cka_is_symmetric_and_bounded(shape, seed) -> None:
    x, y = features(shape, seed)
    for debiased in (True, False):
        value = rk.linear_cka(x, y, debiased=debiased)
        torch.testing.assert_close(value, rk.linear_cka(y, x, debiased=debiased))
        # Cauchy-Schwarz.
        assert float(value.abs()) <= 1 + 1e-9
    assert float(value) >= 0


@given(shapes, seeds)
@thorough
def test_similarities_ignore_rotations(shape, seed) -> None:
    x, y = features(shape, seed)
    turned = x @ cases.rotation(x.shape[1], seed)
    for function in (rk.linear_cka, rk.procrustes_similarity):
        torch.testing.assert_close(function(turned, y), function(x, y), rtol=1e-7, atol=1e-7)


@given(shapes, seeds)
@thorough
def test_procrustes_is_at_least_any_alignment(shape, seed) -> None:
    """Its rotation is the best one, so no other is better."""
    x, y = features((shape[0], shape[1], shape[1]), seed)
    xc, yc = x - x.mean(0), y - y.mean(0)
    other = cases.rotation(x.shape[1], seed)
    alignment = (xc @ other * yc).sum() / (xc.norm() * yc.norm())
    similarity = rk.procrustes_similarity(x, y)
    assert float(alignment) - 1e-6 <= float(similarity) <= 1 + 1e-9


@given(shapes, seeds)
@thorough
def test_gradient_is_orthogonal_to_invariances(shape, seed) -> None:
    """It has no part along a shift (all measures) or along a rescaling (similarities)."""
    x, y = features((shape[0], shape[1], shape[1]), seed)
    for measure in (cases.CKA, cases.CKA_BIASED, cases.PROCRUSTES, cases.COVARIANCE, cases.BURES):
        _, grad_x, _ = cases.value_and_gradients(measure, x, y)
        size = 1 + float(grad_x.norm())
        assert float(grad_x.sum(0).norm()) < 1e-9 * size
        if measure in (cases.CKA, cases.CKA_BIASED, cases.PROCRUSTES):
            along_scale = (grad_x * (x - x.mean(0))).sum()
            assert float(along_scale.abs()) < 1e-8 * size * float(x.norm())


@given(shapes, seeds, st.randoms(use_true_random=False))
@thorough
def test_a_mask_selects_rows(shape, seed, random) -> None:
    x, y = features((shape[0] + 4, shape[1], shape[1]), seed)
    mask = torch.tensor([True] * 4 + [random.random() < 0.5 for _ in range(len(x) - 4)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    mask = mask[order]
    for measure in (cases.CKA, cases.CKA_BIASED, cases.PROCRUSTES, cases.COVARIANCE, cases.BURES):
        masked = cases.value_and_gradients(measure, x, y, mask=mask)
        selected = cases.value_and_gradients(measure, x[mask], y[mask])
        torch.testing.assert_close(masked[0], selected[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(masked[1][mask], selected[1], rtol=1e-5, atol=1e-7)


@given(shapes, seeds)
@thorough
def test_distances_are_distances(shape, seed) -> None:
    x, y = features((shape[0], shape[1], shape[1]), seed)
    for scale in ("none", "coral"):
        there = rk.covariance_distance(x, y, scale=scale)
        torch.testing.assert_close(there, rk.covariance_distance(y, x, scale=scale))
        assert float(there) >= 0
    there = rk.bures_distance(x, y, squared=False)
    torch.testing.assert_close(there, rk.bures_distance(y, x, squared=False), rtol=1e-5, atol=1e-5)
    z = features((shape[0], shape[1], shape[1]), seed + 1)[1]
    detour = rk.bures_distance(x, z, squared=False) + rk.bures_distance(z, y, squared=False)
    assert float(there) <= float(detour) + 1e-5
