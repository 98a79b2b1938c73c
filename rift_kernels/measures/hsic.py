"""The unbiased HSIC from second moments and a few long rows, and the coefficients of its gradient.

A side is the student or the teacher. S are its long rows and R all others; ``p_i`` are the rows of
a side P, minus the mean of R. For a pair of sides, ``K = P P^T`` and ``L = Q Q^T``, and ``k_i``,
``l_i`` are their row sums without the diagonal (Song et al. 2012)::

    H = t1 + t2 t2' / ((n-1)(n-2)) - 2 t3 / (n-2)                [the caller divides by n (n-3)]
    t1 = sum_{i != j} K_ij L_ij = ||P_R^T Q_R||^2 - sum_R K_ii L_ii
                                + 2 sum_{R, S} K_is L_is + sum_{s != s'} K_ss' L_ss'
    t2 = sum_i k_i,   t2' = sum_i l_i,   t3 = sum_i k_i l_i

No sum contains a long row's product with itself: only ``||P_R^T Q_R||^2`` has such products, and it
excludes S. The gradient is the U-centered L, without its diagonal, times the rows of P; with
``a_i = l_i / (n-2)`` and ``b = t2' / ((n-1)(n-2))``::

    1/2 dH/dp_i = M q_i + [i in R] (2 a_i - b - ||q_i||^2) p_i - sum_R a_j p_j
                + sum_{s in S, s != i} (L_is - a_i - a_s + b) p_s,      M = P_R^T Q_R

This is a product with a D x D matrix, a weight per row, and a product of rank k + 2: the columns
``L_is``, ``a_i`` and 1 times the rows ``p_s``, ``-sum_S p_s`` and
``-sum_R a_j p_j - sum_S (a_s - b) p_s``.

Everything is in units of the sides' energies, so that only the second moments can overflow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .long_rows import LongRows
from .row_means import row_energy
from .sums_over_ranks import sum_over_ranks


class RowProducts(NamedTuple):
    """Inner products of rows of each side, stacked: float64, in units of the side's energy."""

    energies: Tensor  # (..., sides, N): of R with themselves, 0 in S
    short_long: Tensor  # (..., sides, N, k): of R with S
    long_long: Tensor  # (..., sides, k, k): of S with S, 0 on the diagonal
    short_sums: Tensor  # (..., sides, N): of R, each with all other rows
    long_sums: Tensor  # (..., sides, k): of S, each with all other rows


def row_products(sides: list[Tensor], long: LongRows, inverse: Tensor) -> RowProducts:
    """The products of sides minus the mean of R; ``inverse`` (..., sides) is one over energies."""
    energies = torch.stack([row_energy(side) for side in sides], -2) * inverse.unsqueeze(-1)
    scaled = [
        rows * factor[..., None, None]
        for rows, factor in zip(long.sides, inverse.unbind(-1), strict=True)
    ]
    short_long = torch.stack(
        [side @ rows.to(side.dtype).mT for side, rows in zip(sides, scaled, strict=True)], -3
    ).double()
    long_long = torch.stack(
        [rows @ other.mT for rows, other in zip(long.sides, scaled, strict=True)], -3
    )
    long_long.diagonal(dim1=-2, dim2=-1).zero_()
    return RowProducts(
        energies, short_long, long_long, short_long.sum(-1) - energies, long_long.sum(-1)
    )


def estimate(
    products: RowProducts, squares: Tensor, count: Tensor, ranks: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """H of all pairs of sides, the size of the terms that sum to it, and t2.

    Args:
        squares: ``||P_R^T Q_R||^2`` of all pairs of sides, in their units, (..., sides, sides).
        count: n, (...).
        ranks: sum over R.

    Returns:
        H (..., sides, sides); the size (..., sides) for each side with itself; t2 (..., sides).
    """
    short_long, long_long = products.short_long.flatten(-2), products.long_long.flatten(-2)
    total, diagonal, cross, mixed = sum_over_ranks(
        ranks,
        products.short_sums.sum(-1),
        products.energies @ products.energies.mT,
        short_long @ short_long.mT,
        products.short_sums @ products.short_sums.mT,
    )()
    total = total + products.long_sums.sum(-1)
    mixed = mixed + products.long_sums @ products.long_sums.mT
    size = squares + 2 * cross + long_long @ long_long.mT
    n = count[..., None, None]
    outer = total.unsqueeze(-1) * total.unsqueeze(-2)
    h = size - diagonal + outer / ((n - 1) * (n - 2)) - 2 * mixed / (n - 2)
    return h, size.diagonal(dim1=-2, dim2=-1), total


class Slope(NamedTuple):
    """The terms of a side's gradient apart from D x D products; None if it needs none."""

    weight: Tensor | None  # (..., N), multiplies the row itself
    left: Tensor | None  # (..., N, k + 2)
    right: Tensor | None  # (..., k + 2, D)


NO_SLOPE = Slope(None, None, None)


def slope(
    products: RowProducts,
    total: Tensor,
    count: Tensor,
    factors: Tensor,
    index: int,
    side: Tensor,
    long: LongRows,
    root: Tensor,
    ranks: Any,
) -> Slope:
    """The gradient of ``1/2 sum_Q factors_Q H(P, Q)`` with respect to P, side ``index``.

    Args:
        products, total: of all sides Q.
        factors: (..., sides), in units of energies.
        side: P, 0 in long rows.
        root: (..., sides), the root of one over the energies: one for the left factor and one for
            the right, so that neither leaves float32.
    """
    long_side, root = long.sides[index], root[..., index]
    n = count.unsqueeze(-1)
    mix = (factors * root.unsqueeze(-1)).unsqueeze(-2)
    average = (mix @ products.short_sums).squeeze(-2) / (n - 2)
    long_average = (mix @ products.long_sums).squeeze(-2) / (n - 2)
    offset = (mix @ total.unsqueeze(-1)).squeeze(-1) / ((n - 1) * (n - 2))
    weight = 2 * average - offset - (mix @ products.energies).squeeze(-2)
    short_long = (mix @ products.short_long.flatten(-2)).view(
        *average.shape, products.short_long.shape[-1]
    )
    ones = torch.ones_like(average)
    table = torch.cat([short_long, torch.stack([average, ones, weight], -1)], -1)
    # A long row has no product with itself, and no weight.
    long_long = (mix @ products.long_long.flatten(-2)).view(
        *long_average.shape, products.long_long.shape[-1]
    )
    long_long.diagonal(dim1=-2, dim2=-1).copy_(2 * long_average - offset)
    columns = torch.stack([long_average, torch.ones_like(long_average)], -1)
    long.put_(table, torch.nn.functional.pad(torch.cat([long_long, columns], -1), (0, 1)))
    (weighted,) = sum_over_ranks(ranks, _weighted_sum(average.to(side.dtype), side))()
    constant = weighted + _weighted_sum(long_average - offset, long_side)
    right = torch.cat([long_side, -torch.stack([long_side.sum(-2), constant], -2)], -2)
    return Slope(
        (table[..., -1] * root.unsqueeze(-1)).to(side.dtype, copy=True),
        table[..., :-1].to(side.dtype, copy=True),
        (right * root[..., None, None]).to(side.dtype),
    )


def _weighted_sum(weight: Tensor, rows: Tensor) -> Tensor:
    return (weight.unsqueeze(-2) @ rows).squeeze(-2)
