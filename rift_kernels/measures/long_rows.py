"""The longest rows of a batch: found, and kept out of the mean and of the sums over rows.

A language model's first token is a thousand times as long as all others. Debiasing removes what a
row gives with itself, ``||x_i||^4``, which is then nearly all of ``||A||^2``: a difference in which
nothing of the rest is left. So the longest rows stay out of the second moments, and what they give
with other rows is added by itself (:mod:`.hsic`). Nor do they move the mean: the unbiased HSIC does
not depend on the centre, which is the mean of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .centering import Alone, mean_over_ranks, row_energy, subtract

MOST = 8  # and at most half of all rows, or the others' mean would lie far from most of them


class LongRows(NamedTuple):
    """``k`` slots for the long rows of the whole batch, and which of them are rows of this process.

    A side is one of student and teacher.
    """

    sides: list[Tensor]  # (..., k, D), float64, about the mean of the others; 0 in an empty slot
    candidates: Tensor  # (..., c): the longest rows of this process
    # (..., c, k), float64: 1 where a candidate is in a slot; None where each is in its own.
    place: Tensor | None
    energy: Tensor  # (..., sides), float64: of all rows about the mean of all

    def put_(self, rows: Tensor, values: Tensor | None = None) -> Tensor:
        """Values (..., k, W) in place of the long ones among (..., N, W); without values, 0."""
        return _put_(rows, self.candidates, self.place, values)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    return rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, rows.shape[-1]))


def _put_(
    rows: Tensor, index: Tensor, place: Tensor | None, values: Tensor | None = None
) -> Tensor:
    where = index.unsqueeze(-1).expand(*index.shape, rows.shape[-1])
    if place is None and values is None:
        return rows.scatter_(-2, where, 0.0)
    if place is None or values is None:
        new = torch.zeros_like(where, dtype=rows.dtype) if values is None else values
    else:
        new = place @ values
    if place is not None:
        new = torch.where(place.sum(-1, keepdim=True) > 0, new, rows.gather(-2, where))
    return rows.scatter_(-2, where, new.to(rows.dtype))


def _longest(energies: Tensor, energy: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Shares of all energy, of whichever side a row has more of, and whose they are: (..., c)."""
    share = (energies / energy.unsqueeze(-1)).amax(-2)
    if mask is not None:
        # Below those that have none, too.
        share = share.masked_fill(~mask, -1.0)
    largest = share.topk(min(MOST, share.shape[-1]), dim=-1)
    return largest.values, largest.indices


def _filled(count: Tensor, slots: int) -> Tensor:
    """Which slots hold a row, (..., slots)."""
    return torch.arange(slots, device=count.device) < (count / 2).floor().unsqueeze(-1)


def center(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype, ranks: Any = Alone
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """Sides about the mean of the rows that are not long, those means, count, and the long rows.

    Masked rows and long ones are exact zeros. The rows may be spread over ranks.
    """
    if ranks is Alone:
        return _center(sides, mask, dtype)
    return _center_over_ranks(sides, mask, dtype, ranks)


def _center(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """Without ranks. A mean is subtracted twice, for the reason that ``centering.center`` has."""
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

    # In float64, of which enough is left without a row that is longer by far.
    sums = [side.sum(-2, keepdim=True, dtype=torch.float64) for side in sides]
    per_row = count[..., None, None].reciprocal()
    centered = [without(*side) for side in zip(sides, (per_row * s for s in sums), strict=True)]
    energies = torch.stack([row_energy(side) for side in centered], -2)
    energy = energies.sum(-1)
    _, index = _longest(energies, energy, mask)
    place = None
    others: Tensor | int = shape[-1] - MOST
    # Of enough rows that are all valid, all slots are filled.
    if mask is not None or shape[-1] < 2 * MOST:
        place = torch.diag_embed(_filled(count, index.shape[-1]).double())
        others = (count - place.sum((-2, -1))).clamp_(min=1)[..., None, None]
    long, middles = [], []
    for side, total, own in zip(sides, sums, centered, strict=True):
        rows = _gather(side, index).double()
        if place is not None:
            rows = place @ rows
        middle = ((total - rows.sum(-2, keepdim=True)) / others).to(dtype)
        _put_(without(side, middle, own), index, place)
        rest = (own.sum(-2, keepdim=True) / others).to(dtype)
        _put_(without(own, rest, own), index, place)
        moved = (middle + rest.double()).expand_as(rows)
        long.append(rows - (moved if place is None else place @ moved))
        middles.append((middle + rest).squeeze(-2))
    return centered, middles, count, LongRows(long, index, place, energy)


def _center_over_ranks(
    sides: list[Tensor], mask: Tensor | None, dtype: torch.dtype, ranks: Any
) -> tuple[list[Tensor], list[Tensor], Tensor, LongRows]:
    """With rows spread over ranks; this rank may have none."""
    sides = [side.to(dtype) for side in sides]
    means, count, _ = mean_over_ranks(sides, mask, ranks.total)
    centered = [subtract(side, mean, mask) for side, mean in zip(sides, means, strict=True)]
    energies = torch.stack([row_energy(side) for side in centered], -2)
    (energy,) = ranks.total(energies.sum(-1))()
    share, index = _longest(energies, energy, mask)
    place = _places(share, count, ranks)
    if mask is not None:
        sides = [side.masked_fill(~mask.unsqueeze(-1), 0.0) for side in sides]
    rows = [place.mT @ _gather(side, index).double() for side in sides]
    short = torch.ones_like(energies[..., 0, :], dtype=torch.bool) if mask is None else mask.clone()
    short.scatter_(-1, index, short.gather(-1, index) & (place.sum(-1) == 0))
    means, _, rows = mean_over_ranks(sides, short, ranks.total, *rows)
    centered = [subtract(side, mean, short) for side, mean in zip(sides, means, strict=True)]
    filled = _filled(count, MOST).unsqueeze(-1)
    long = [
        (of_side - mean.unsqueeze(-2)).masked_fill(~filled, 0.0)
        for of_side, mean in zip(rows, means, strict=True)
    ]
    means = [mean.to(dtype) for mean in means]
    return centered, means, count, LongRows(long, index, place, energy)


def _places(share: Tensor, count: Tensor, ranks: Any) -> Tensor:
    """Which candidates of this rank are among the longest of all ranks, and in which slot."""
    own = share.shape[-1]
    # A rank with few rows sends as much as all others.
    padded = torch.nn.functional.pad(share, (0, MOST - own), value=-2.0)
    everybody = ranks.exchange(padded.contiguous()).movedim(0, -2).flatten(-2)
    winners = everybody.sort(dim=-1, descending=True, stable=True).indices[..., :MOST]
    candidates = ranks.rank * MOST + torch.arange(own, device=share.device)
    taken = (winners.unsqueeze(-2) == candidates.unsqueeze(-1)) & _filled(count, MOST).unsqueeze(-2)
    return taken.double()
