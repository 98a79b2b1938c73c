"""The longest rows of a batch, which are kept out of the mean and of sums over rows.

A language model's first token can be a thousand times longer than all others. Debiasing subtracts
each row's product with itself, ``||x_i||^4``. For such a row that is nearly all of ``||A||^2``, and
the difference loses everything else. So the longest rows stay out of the second moments, and
:mod:`.hsic` adds their products with other rows separately. They stay out of the mean as well: the
unbiased HSIC does not depend on the centre, so it can be the mean of the other rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .row_means import means_over_ranks, row_energy, subtract_mean
from .sums_over_ranks import sum_over_ranks

# At most half of all rows, or the mean of the others would be far from most rows.
MAX_LONG_ROWS = 8


class LongRows(NamedTuple):
    """``k`` slots for the long rows of the whole batch, and which of them this process has.

    A side is the student or the teacher.
    """

    sides: list[Tensor]  # (..., k, D), float64, minus the mean of the others; 0 in an empty slot
    candidates: Tensor  # (..., c): the longest rows of this process
    # (..., c, k), float64: 1 where a candidate is in a slot; None if candidate i is in slot i.
    place: Tensor | None
    energy: Tensor  # (..., sides), float64: of all rows minus the mean of all

    def put_(self, rows: Tensor, values: Tensor | None = None) -> Tensor:
        """Replace the long rows of (..., N, W) in place by values (..., k, W), by default 0."""
        return _put_(rows, self.candidates, self.place, values)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def _put_(
    rows: Tensor, index: Tensor, place: Tensor | None, values: Tensor | None = None
) -> Tensor:
    positions = index.unsqueeze(-1).expand(*index.shape, rows.shape[-1])
    if place is None and values is None:
        return rows.scatter_(-2, positions, 0.0)
    if place is None or values is None:
        new = torch.zeros_like(positions, dtype=rows.dtype) if values is None else values
    else:
        new = place @ values
    if place is not None:
        new = torch.where(place.sum(-1, keepdim=True) > 0, new, rows.gather(-2, positions))
    return rows.scatter_(-2, positions, new.to(rows.dtype))


def _longest(energies: Tensor, energy: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest shares of energy, on whichever side is larger, and their rows: (..., c)."""
    share = (energies / energy.unsqueeze(-1)).amax(-2)
    if mask is not None:
        # Below valid rows without energy.
        share = share.masked_fill(~mask, -1.0)
    largest = share.topk(min(MAX_LONG_ROWS, share.shape[-1]), dim=-1)
    return largest.values, largest.indices


def _filled(count: Tensor, slots: int) -> Tensor:
    """Whether each slot holds a row, (..., slots)."""
    return torch.arange(slots, device=count.device) < (count / 2).floor().unsqueeze(-1)


def separate(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype, ranks: Any = None
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """Sides minus the mean of the rows that are not long, those means, count, and the long rows.

    Masked rows and long rows become exact zeros. The rows may be spread over ranks.
    """
    if ranks is None:
        return _separate(sides, mask, dtype)
    return _separate_over_ranks(sides, mask, dtype, ranks)


def _separate(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """All rows on this process. :func:`.row_means.subtract_own_mean` explains the second pass."""
    sides = [side.to(dtype) for side in sides]
    shape, device = sides[0].shape[:-1], sides[0].device
    if mask is None:
        count = torch.full(shape[:-1], shape[-1], dtype=torch.float64, device=device)
    else:
        count = mask.sum(-1, dtype=torch.float64)
        sides = [side.masked_fill(~mask.unsqueeze(-1), 0.0) for side in sides]

    def without(side: Tensor, mean: Tensor, out: Tensor | None = None) -> Tensor:
        centered = torch.sub(side, mean.to(dtype), out=out)
        return centered if mask is None else centered.masked_fill_(~mask.unsqueeze(-1), 0.0)

    # In float64, so that enough digits are left after a far longer row is subtracted.
    sums = [side.sum(-2, keepdim=True, dtype=torch.float64) for side in sides]
    per_row = count[..., None, None].reciprocal()
    centered = [without(*side) for side in zip(sides, (per_row * s for s in sums), strict=True)]
    energies = torch.stack([row_energy(side) for side in centered], -2)
    energy = energies.sum(-1)
    _, index = _longest(energies, energy, mask)
    place = None
    other_count: Tensor | int = shape[-1] - MAX_LONG_ROWS
    # Without a mask, enough rows fill all slots.
    if mask is not None or shape[-1] < 2 * MAX_LONG_ROWS:
        place = torch.diag_embed(_filled(count, index.shape[-1]).double())
        other_count = (count - place.sum((-2, -1))).clamp_(min=1)[..., None, None]
    long, middles = [], []
    for side, total, out in zip(sides, sums, centered, strict=True):
        rows = _gather(side, index).double()
        if place is not None:
            rows = place @ rows
        middle = ((total - rows.sum(-2, keepdim=True)) / other_count).to(dtype)
        _put_(without(side, middle, out), index, place)
        residual = (out.sum(-2, keepdim=True) / other_count).to(dtype)
        _put_(without(out, residual, out), index, place)
        shift = (middle + residual.double()).expand_as(rows)
        long.append(rows - (shift if place is None else place @ shift))
        middles.append((middle + residual).squeeze(-2))
    return centered, middles, count, LongRows(long, index, place, energy)


def _separate_over_ranks(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype, ranks: Any
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """Rows spread over ranks; this rank may have none."""
    sides = [side.to(dtype) for side in sides]
    means, count, _ = means_over_ranks(sides, mask, ranks)
    centered = [subtract_mean(side, mean, mask) for side, mean in zip(sides, means, strict=True)]
    energies = torch.stack([row_energy(side) for side in centered], -2)
    (energy,) = sum_over_ranks(ranks, energies.sum(-1))()
    share, index = _longest(energies, energy, mask)
    place = _places(share, count, ranks)
    if mask is not None:
        sides = [side.masked_fill(~mask.unsqueeze(-1), 0.0) for side in sides]
    rows = [place.mT @ _gather(side, index).double() for side in sides]
    short = torch.ones_like(energies[..., 0, :], dtype=torch.bool) if mask is None else mask.clone()
    short.scatter_(-1, index, short.gather(-1, index) & (place.sum(-1) == 0))
    means, _, rows = means_over_ranks(sides, short, ranks, *rows)
    centered = [subtract_mean(side, mean, short) for side, mean in zip(sides, means, strict=True)]
    filled = _filled(count, MAX_LONG_ROWS).unsqueeze(-1)
    long = [
        (side_rows - mean.unsqueeze(-2)).masked_fill(~filled, 0.0)
        for side_rows, mean in zip(rows, means, strict=True)
    ]
    means = [mean.to(dtype) for mean in means]
    return centered, means, count, LongRows(long, index, place, energy)


def _places(share: Tensor, count: Tensor, ranks: Any) -> Tensor:
    """The slots of those candidates of this rank that are among the longest of all ranks."""
    count_here = share.shape[-1]
    # A rank with few rows sends as much as all others.
    padded = torch.nn.functional.pad(share, (0, MAX_LONG_ROWS - count_here), value=-2.0)
    shares = ranks.exchange(padded.contiguous()).movedim(0, -2).flatten(-2)
    longest = shares.sort(dim=-1, descending=True, stable=True).indices[..., :MAX_LONG_ROWS]
    candidates = ranks.rank * MAX_LONG_ROWS + torch.arange(count_here, device=share.device)
    filled = _filled(count, MAX_LONG_ROWS).unsqueeze(-2)
    in_slot = (longest.unsqueeze(-2) == candidates.unsqueeze(-1)) & filled
    return in_slot.double()
