"""Sums over the processes that share a batch; ``ranks`` is None where one process has all rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def sum_over_ranks(ranks: Any, *sums: Tensor | None) -> Callable[[], tuple[Any, ...]]:
    """Begin to sum over ``ranks``, a ``dispatch.ranks.Ranks``; the result waits for the sums."""
    return (lambda: sums) if ranks is None else ranks.total(*sums)


def sum_blocks_over_ranks(
    ranks: Any, xx: Tensor | None, xy: Tensor | None, yy: Tensor | None
) -> Callable[[], tuple[Any, ...]]:
    """:func:`sum_over_ranks` of second moments, in a smaller message."""
    return (lambda: (xx, xy, yy)) if ranks is None else ranks.blocks(xx, xy, yy)
