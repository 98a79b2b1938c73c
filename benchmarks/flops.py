"""The model that predicts before anything is measured: floating point operations of the products.

Forward and student gradient of a layer, N rows, both widths D. A product (m, k) @ (k, n) is 2 m k
n; half of that where the result is symmetric and the implementation knows it. Element-wise work,
launches, and the decompositions behind Procrustes and Bures are not modelled.
"""

from __future__ import annotations

from rift_kernels.dispatch import plan

from .workloads import CKA_MEASURES, Workload


def naive(w: Workload) -> float | None:
    """Products in full; the backward of ``x^T x`` costs two."""
    factors = {"cka_biased": 12 * w.width, "cka_debiased": 8 * w.rows, "covariance": 8 * w.width}
    return factors[w.measure] * w.rows * w.width * w.layers if w.measure in factors else None


def hand_derived(w: Workload) -> float:
    return 10 * w.rows * w.width**2 * w.layers


def ckatorch(w: Workload) -> float:
    """Two Gram matrices, then fifteen products of N x N matrices."""
    return (8 * w.rows**2 * w.width + 30 * w.rows**3) * w.layers


def pytorch_cka(w: Workload) -> float:
    return 8 * w.rows**2 * w.width * w.layers


def rift_kernels(w: Workload) -> float | None:
    """Symmetric products at half, in the form that the package chooses."""
    if w.measure not in (*CKA_MEASURES, "covariance"):
        return None
    measure, gram, covariance = ("cka", 4, 8) if w.measure in CKA_MEASURES else (w.measure, 8, 4)
    use_gram = plan.use_gram(measure, w.rows, w.width, w.width)
    per_pair = gram * w.rows if use_gram else covariance * w.width
    return per_pair * w.rows * w.width * w.layers


def optimal(w: Workload) -> float | None:
    """The fewest known for CKA: N (D1+D2) (3 D1+D2) over columns, N^2 (3 D1+D2) over rows."""
    if w.measure not in CKA_MEASURES:
        return None
    return min(8 * w.width, 4 * w.rows) * w.rows * w.width * w.layers
