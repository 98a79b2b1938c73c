"""One batch over the ranks of a process group: its exact value on each, and its exact gradient.

Every rank holds some rows of the batch, maybe none. A call with ``group=`` computes what one
process with all rows would, in the way that moves fewer bytes:

- *gather*: every rank gets all rows, and computes all of it (small batches);
- *moments*: rows stay where they are, and the ranks sum their second moments (large ones).

Every rank has the same value, so nothing is sent in the backward. A rank's gradient is that of its
own rows times the number of ranks: DDP and FSDP divide by it when they average the parameters'
gradients, and what comes out is the gradient of the whole batch.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from . import checks
from .ranks import Group, Ranks, resolve

_ALIGNMENT = 16
_MESSAGE = 512  # bytes of a rank's error that the others are told
_DTYPES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 3, torch.float16: 2}
_SHARED = (
    "number of layers",
    "student dtype",
    "teacher dtype",
    "masks",
    "gradients wanted",
    "shapes",
    "settings",
)


def share(
    group: Group,
    check: Callable[[], checks.Layers],
    min_rows: int,
    settings: tuple[Any, ...],
) -> tuple[checks.Layers, Ranks | None]:
    """The layers that this rank computes with, and with whom it sums moments.

    Args:
        group: None, or who shares the batch.
        check: the caller's own check of what it was given.
        min_rows: of the whole batch, for the measure.
        settings: what all ranks have to ask alike.

    Returns:
        Without a group, or where features were gathered: all rows and None. Else this rank's rows
        and its ranks.

    Raises:
        TypeError, ValueError: of ``check`` on the rank it is about.
        RuntimeError: on all other ranks then, so that none waits; or a rank is missing.
    """
    ranks = resolve(group)
    if ranks is None:
        given = check()
        checks.enough_rows(given, min_rows)
        return given, None
    return _share(ranks, check, min_rows, settings)


@_disable_dynamo  # as torch.compiler.disable, which imports the compiler at once
def _share(
    ranks: Ranks,
    check: Callable[[], checks.Layers],
    min_rows: int,
    settings: tuple[Any, ...],
) -> tuple[checks.Layers, Ranks | None]:
    given, rows = _agree(ranks, check, settings)
    fewest = min(sum(rank) for rank in zip(*[r[: len(given.students)] for r in rows], strict=True))
    if fewest < min_rows:
        raise ValueError(
            f"student and teacher must have at least {min_rows} rows for this measure on all ranks "
            f"together; got {fewest}"
        )
    if bytes_gathered(given, rows) > bytes_summed(given, ranks.size):
        return given, ranks
    given = gather(ranks, given, rows)
    checks.enough_rows(given, min_rows)
    return given, None


def _agree(
    ranks: Ranks, check: Callable[[], checks.Layers], settings: tuple[Any, ...]
) -> tuple[checks.Layers, list[list[int]]]:
    """What this rank was given, and everybody's rows of each layer, or an error on every rank."""
    error: Exception | None = None
    given: checks.Layers | None = None
    header = [0] * (2 + len(_SHARED))
    try:
        given = check()
        header = [1, given.students[0].shape[-2], *_fingerprints(given, settings)]
    except (TypeError, ValueError) as wrong:
        error = wrong
    device = _device(ranks, given)
    headers = ranks.exchange(torch.tensor(header, dtype=torch.int64, device=device)).tolist()
    failed = [rank for rank, (fine, *_) in enumerate(headers) if not fine]
    if failed:
        _refuse(ranks, error, failed[0], device)
    assert given is not None
    for i, what in enumerate(_SHARED):
        values = [line[2 + i] for line in headers]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"all ranks of a group must agree in {what} (of shapes, all but the number of "
                f"rows); ranks 0 and {other} do not, and this is rank {ranks.rank}"
            )
    if len(given.students) == 1:
        return given, [[line[1]] for line in headers]
    own = torch.tensor([x.shape[-2] for x in given.students], dtype=torch.int64, device=device)
    return given, ranks.exchange(own).tolist()


def _device(ranks: Ranks, given: checks.Layers | None) -> torch.device:
    """Where small messages are read: on the CPU where the group can, which makes no GPU wait."""
    if "cpu" in str(dist.get_backend_config(ranks.group)):
        return torch.device("cpu")
    if given is not None:
        return given.students[0].device
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def _fingerprints(given: checks.Layers, settings: tuple[Any, ...]) -> list[int]:
    """A number each for what ``_SHARED`` names."""
    shapes = [(*x.shape[:-2], x.shape[-1], y.shape[-1]) for x, y in given.pairs]
    return [
        len(given.students),
        *(_DTYPES[dtype] for dtype in given.dtypes),
        len(given.masks),
        sum((1 + i) * any(x.requires_grad for x in side) for i, side in enumerate(given[:2]))
        * torch.is_grad_enabled(),
        zlib.crc32(repr(shapes).encode()),
        zlib.crc32(repr(settings).encode()),
    ]


def _refuse(ranks: Ranks, error: Exception | None, failed: int, device: torch.device) -> None:
    """Raise on every rank: the error where it happened, its message elsewhere."""
    message = torch.zeros(_MESSAGE, dtype=torch.uint8)
    text = str(error or "").encode()[:_MESSAGE]
    message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    texts = ranks.exchange(message.to(device))
    if error is not None:
        raise error
    words = bytes(texts[failed].tolist()).rstrip(b"\0").decode(errors="ignore")
    raise RuntimeError(f"rank {failed} of the group was given wrong input: {words}")


def bytes_gathered(given: checks.Layers, rows: Sequence[Sequence[int]]) -> int:
    """Bytes that a rank receives where all features and masks are gathered."""
    tensors = _tensors(given)
    return (len(rows) - 1) * max(sum(_sizes(tensors, of_rank)) for of_rank in rows)


def bytes_summed(given: checks.Layers, size: int) -> int:
    """Bytes that a rank receives while A, C and B are summed by a ring."""
    width = 8 if torch.float64 in given.dtypes else 4
    total = 0
    for x, y in given.pairs:
        batch, d1, d2 = x.shape[:-2].numel(), x.shape[-1], y.shape[-1]
        own = d1 * d1 + d1 if d1 == d2 else d1 * d1 + d2 * d2
        total += batch * (own + d1 * d2) * width
    return 2 * (size - 1) * total // size


def _tensors(given: checks.Layers) -> list[tuple[int, Tensor]]:
    """Everything that has rows, rows first, with the layer whose rows they are."""
    sides = (given.students, given.teachers)
    features = [(i, x.movedim(-2, 0)) for side in sides for i, x in enumerate(side)]
    return features + [(i, mask.movedim(-1, 0)) for i, mask in enumerate(given.masks)]


def _sizes(tensors: list[tuple[int, Tensor]], rows: Sequence[int]) -> list[int]:
    """Bytes of each tensor in a rank's message, rounded up to what any dtype is aligned to."""
    sizes = [rows[i] * t.shape[1:].numel() * t.element_size() for i, t in tensors]
    return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]


def gather(ranks: Ranks, given: checks.Layers, rows: list[list[int]]) -> checks.Layers:
    """All ranks' rows, in the order of the ranks, in one message; differentiable."""
    features = [*given.students, *given.teachers]
    # Autocast's torch.cat refuses half precision other than its own.
    with torch.autocast(features[0].device.type, enabled=False):
        everything = _Gather.apply(ranks, rows, len(given.students), *features, *given.masks)
    layers = len(given.students)
    return given._replace(
        students=list(everything[:layers]),
        teachers=list(everything[layers : 2 * layers]),
        masks=list(everything[2 * layers :]),
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, rows: list[list[int]], layers: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        given = checks.Layers(
            list(tensors[:layers]), list(tensors[layers : 2 * layers]), list(tensors[2 * layers :])
        )
        parts = _tensors(given)
        sizes = [_sizes(parts, of_rank) for of_rank in rows]
        # Of nothing, torch would lay the messages out as no other dtype can read them.
        longest = max(_ALIGNMENT, *map(sum, sizes))
        own = torch.zeros(longest, dtype=torch.uint8, device=tensors[0].device)
        start = 0
        for (_, part), size in zip(parts, sizes[ranks.rank], strict=True):
            if part.numel():
                raw = part.contiguous().view(-1).view(torch.uint8)
                own[start : start + len(raw)] = raw
            start += size
        everybody = ranks.exchange(own)
        results = []
        offsets = [0] * ranks.size
        for number, (layer, part) in enumerate(parts):
            pieces = []
            for rank in range(ranks.size):
                shape = (rows[rank][layer], *part.shape[1:])
                length = torch.Size(shape).numel() * part.element_size()
                raw = everybody[rank, offsets[rank] : offsets[rank] + length]
                pieces.append(raw.view(part.dtype).view(shape))
                offsets[rank] += sizes[rank][number]
            axis = -2 if number < 2 * layers else -1
            results.append(torch.cat(pieces).movedim(0, axis))
        ctx.size, ctx.layers = ranks.size, layers
        before = [sum(of_rank[i] for of_rank in rows[: ranks.rank]) for i in range(layers)]
        ctx.own = [(before[i], rows[ranks.rank][i]) for i in range(layers)]
        # Or a frozen teacher's gradient would be computed, and thrown away.
        wanted = ctx.needs_input_grad[3:]
        constants = [t for t, needed in zip(results, wanted, strict=True) if not needed]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        own = [
            None if grad is None else ctx.size * grad.narrow(-2, *ctx.own[i % ctx.layers])
            for i, grad in enumerate(grads[: 2 * ctx.layers])
        ]
        return (None, None, None, *own, *([None] * (len(grads) - 2 * ctx.layers)))
