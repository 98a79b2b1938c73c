"""The processes that share a batch, and what they do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Union

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

WORLD = "world"
Group = Union["ProcessGroup", str, None]


class Ranks:
    """The processes of a group. Where one process has all rows, there is None instead."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)

    @contextmanager
    def _explained(self, action: str) -> Iterator[None]:
        """Explain the error that torch raises if a rank is missing."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"rank {self.rank} of {self.size} could not {action}: another rank has ended, or "
                "has not made this call within the group's timeout. All ranks of the group must "
                "make a call with group=, including those without rows"
            ) from error

    def exchange(self, tensor: Tensor) -> Tensor:
        """The tensors of all ranks, which have one shape: (size, ...)."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._explained("exchange tensors"):
            dist.all_gather(tensors, tensor, group=self.group)
        return torch.stack(tensors)

    def total(self, *tensors: Tensor | None) -> Callable[[], tuple[Any, ...]]:
        """Begin to sum over ranks, in one message per dtype; the result waits for the sums."""
        present = [t for t in tensors if t is not None]
        flat = {
            dtype: torch.cat([t.reshape(-1) for t in present if t.dtype == dtype])
            for dtype in dict.fromkeys(t.dtype for t in present)
        }
        with self._explained("sum moments"):
            pending = [
                dist.all_reduce(sums, group=self.group, async_op=True) for sums in flat.values()
            ]

        def wait() -> tuple[Any, ...]:
            with self._explained("sum moments"):
                for work in pending:
                    work.wait()
            offsets = dict.fromkeys(flat, 0)
            sums: list[Tensor | None] = []
            for tensor in tensors:
                if tensor is None:
                    sums.append(None)
                    continue
                start = offsets[tensor.dtype]
                offsets[tensor.dtype] += tensor.numel()
                part = flat[tensor.dtype][start : start + tensor.numel()]
                sums.append(part.view(tensor.shape))
            return tuple(sums)

        return wait

    def blocks(
        self, xx: Tensor | None, xy: Tensor | None, yy: Tensor | None
    ) -> Callable[[], tuple[Any, ...]]:
        """:meth:`total` of second moments; one matrix carries half of each symmetric block."""
        if xx is None or yy is None or not _foldable(xx, yy):
            return self.total(xx, xy, yy)
        diagonal = yy.diagonal(dim1=-2, dim2=-1)
        pending = self.total(torch.triu(xx) + torch.tril(yy, -1), diagonal, xy)

        def wait() -> tuple[Any, ...]:
            folded, diagonal, xy = pending()
            upper, lower = torch.triu(folded), torch.tril(folded, -1)
            xx = upper + torch.triu(folded, 1).mT
            return xx, xy, lower + lower.mT + torch.diag_embed(diagonal)

        return wait


def _foldable(xx: Tensor, yy: Tensor) -> bool:
    """Whether both are matrices, or batches of matrices, of one size."""
    return xx.dim() > 1 and xx.shape == yy.shape


def resolve(group: Group) -> Ranks | None:
    """The ranks of ``group``; None if no other process shares the batch."""
    if group is None:
        return None
    if isinstance(group, str):
        if group != WORLD:
            raise ValueError(f"group must be None, 'world' or a ProcessGroup; got {group!r}")
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    if not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise TypeError(
            "group must be None, 'world' or a torch.distributed.ProcessGroup that includes this "
            f"process; got {type(group).__name__}"
        )
    ranks = Ranks(group)
    return ranks if ranks.size > 1 else None
