"""One batch over the ranks of a process group: its exact value on each, and its exact gradient.

Every rank holds some rows of the batch, perhaps none. A call with ``group=`` computes what one
process with all rows would, in the way that moves fewer bytes:

- *gather*: every rank receives all rows and computes everything (small batches);
- *moments*: rows stay where they are, and the ranks sum their second moments (large batches).

Every rank has the same value, so the backward sends nothing. A rank's gradient is that of its own
rows times the number of ranks: DDP and FSDP divide by that number when they average the parameters'
gradients, which gives the gradient of the whole batch.
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
from .checks import Layers
from .ranks import Group, Ranks, resolve

_ALIGNMENT = 16
_MESSAGE_BYTES = 512  # how much of a rank's error the others receive
_DTYPE_CODES = {torch.float64: 8, torch.float32: 4, torch.bfloat16: 3, torch.float16: 2}
# What all ranks must have in common, in the order of `_fingerprints`.
_COMMON = (
    "the number of layers",
    "the student dtype",
    "the teacher dtype",
    "the number of masks",
    "the sides that need gradients",
    "shapes (apart from the number of rows)",
    "the settings",
)


def share(
    group: Group,
    check: Callable[[], Layers],
    min_rows: int,
    settings: tuple[Any, ...],
) -> tuple[Layers, Ranks | None]:
    """The layers that this rank computes with, and the ranks that sum their moments.

    Args:
        group: the processes that share the batch, or None.
        check: returns the checked layers of this process.
        min_rows: the least number of rows of the whole batch.
        settings: must be the same on all ranks.

    Returns:
        All rows and None, without a group or if features were gathered; else this rank's rows and
        the ranks of the group.

    Raises:
        TypeError, ValueError: from ``check``, on the rank with wrong input.
        RuntimeError: on all other ranks then, so that none waits; or because a rank is missing.
    """
    ranks = resolve(group)
    if ranks is None:
        layers = check()
        checks.enough_rows(layers, min_rows)
        return layers, None
    return _share(ranks, check, min_rows, settings)


@_disable_dynamo  # torch.compiler.disable would import the compiler at once
def _share(
    ranks: Ranks,
    check: Callable[[], Layers],
    min_rows: int,
    settings: tuple[Any, ...],
) -> tuple[Layers, Ranks | None]:
    layers, rows = _agree(ranks, check, settings)
    fewest = min(map(sum, zip(*rows, strict=True)))
    if fewest < min_rows:
        raise ValueError(
            f"student and teacher must have at least {min_rows} rows for this measure on all ranks "
            f"together; got {fewest}"
        )
    if bytes_gathered(layers, rows) > bytes_summed(layers, ranks.size):
        return layers, ranks
    layers = gather(ranks, layers, rows)
    checks.enough_rows(layers, min_rows)
    return layers, None


def _agree(
    ranks: Ranks, check: Callable[[], Layers], settings: tuple[Any, ...]
) -> tuple[Layers, list[list[int]]]:
    """The layers of this rank, and the rows of each rank in each; or an error on every rank."""
    error: Exception | None = None
    layers: Layers | None = None
    header = [0] * (2 + len(_COMMON))
    try:
        layers = check()
        header = [1, layers.students[0].shape[-2], *_fingerprints(layers, settings)]
    except (TypeError, ValueError) as refusal:
        error = refusal
    device = _message_device(ranks, layers)
    headers = ranks.exchange(torch.tensor(header, dtype=torch.int64, device=device)).tolist()
    failed = [rank for rank, (is_right, *_) in enumerate(headers) if not is_right]
    if failed:
        _raise_everywhere(ranks, error, failed[0], device)
    assert layers is not None
    for i, name in enumerate(_COMMON):
        values = [header[2 + i] for header in headers]
        if len(set(values)) > 1:
            other = next(rank for rank, value in enumerate(values) if value != values[0])
            raise ValueError(
                f"all ranks of a group must agree on {name}; ranks 0 and {other} do not, and this "
                f"is rank {ranks.rank}"
            )
    if len(layers.students) == 1:
        return layers, [[header[1]] for header in headers]
    rows = torch.tensor([x.shape[-2] for x in layers.students], dtype=torch.int64, device=device)
    return layers, ranks.exchange(rows).tolist()


def _message_device(ranks: Ranks, layers: Layers | None) -> torch.device:
    """The device of small messages: the CPU if the group can use it, so that no GPU waits."""
    if "cpu" in str(dist.get_backend_config(ranks.group)):
        return torch.device("cpu")
    if layers is not None:
        return layers.students[0].device
    return torch.device(torch.accelerator.current_accelerator() or "cpu")


def _fingerprints(layers: Layers, settings: tuple[Any, ...]) -> list[int]:
    """A number for each item of ``_COMMON``."""
    shapes = [(*x.shape[:-2], x.shape[-1], y.shape[-1]) for x, y in layers.pairs]
    sides = (layers.students, layers.teachers)
    return [
        len(layers.students),
        *(_DTYPE_CODES[dtype] for dtype in layers.dtypes),
        len(layers.masks),
        sum((1 + i) * any(x.requires_grad for x in side) for i, side in enumerate(sides))
        * torch.is_grad_enabled(),
        zlib.crc32(repr(shapes).encode()),
        zlib.crc32(repr(settings).encode()),
    ]


def _raise_everywhere(
    ranks: Ranks, error: Exception | None, failed: int, device: torch.device
) -> None:
    """Raise the error itself where it happened, and its message on all other ranks."""
    message = torch.zeros(_MESSAGE_BYTES, dtype=torch.uint8)
    text = str(error or "").encode()[:_MESSAGE_BYTES]
    message[: len(text)] = torch.tensor(list(text), dtype=torch.uint8)
    messages = ranks.exchange(message.to(device))
    if error is not None:
        raise error
    reason = bytes(messages[failed].tolist()).rstrip(b"\0").decode(errors="ignore")
    raise RuntimeError(f"rank {failed} of the group was given wrong input: {reason}")


def bytes_gathered(layers: Layers, rows: Sequence[Sequence[int]]) -> int:
    """Bytes that a rank receives if all features and masks are gathered; ``rows`` of each rank."""
    tensors = _tensors(layers)
    return (len(rows) - 1) * max(sum(_sizes(tensors, rank_rows)) for rank_rows in rows)


def bytes_summed(layers: Layers, size: int) -> int:
    """Bytes that each of ``size`` ranks receives while a ring sums A, C and B."""
    itemsize = 8 if torch.float64 in layers.dtypes else 4
    total = 0
    for x, y in layers.pairs:
        batch, d1, d2 = x.shape[:-2].numel(), x.shape[-1], y.shape[-1]
        symmetric = d1 * d1 + d1 if d1 == d2 else d1 * d1 + d2 * d2
        total += batch * (symmetric + d1 * d2) * itemsize
    return 2 * (size - 1) * total // size


def _tensors(layers: Layers) -> list[tuple[int, Tensor]]:
    """All features and masks with rows as their first axis, each with the index of its layer."""
    sides = (layers.students, layers.teachers)
    features = [(i, x.movedim(-2, 0)) for side in sides for i, x in enumerate(side)]
    return features + [(i, mask.movedim(-1, 0)) for i, mask in enumerate(layers.masks)]


def _sizes(tensors: list[tuple[int, Tensor]], rows: Sequence[int]) -> list[int]:
    """Bytes of each tensor in a rank's message, rounded up to an alignment for any dtype."""
    sizes = [rows[i] * t.shape[1:].numel() * t.element_size() for i, t in tensors]
    return [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]


def gather(ranks: Ranks, layers: Layers, rows: list[list[int]]) -> Layers:
    """All ranks' rows, in the order of the ranks, in one message; differentiable."""
    features = [*layers.students, *layers.teachers]
    count = len(layers.students)
    # Under autocast, torch.cat refuses the half precision that is not autocast's.
    with torch.autocast(features[0].device.type, enabled=False):
        gathered = _Gather.apply(ranks, rows, count, *features, *layers.masks)
    students, teachers, masks = _split(gathered, count)
    return layers._replace(students=students, teachers=teachers, masks=masks)


def _split(
    tensors: Sequence[Tensor], layers: int
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Students, teachers and masks."""
    return (
        list(tensors[:layers]),
        list(tensors[layers : 2 * layers]),
        list(tensors[2 * layers :]),
    )


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, ranks: Ranks, rows: list[list[int]], layers: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        parts = _tensors(Layers(*_split(tensors, layers)))
        sizes = [_sizes(parts, rank_rows) for rank_rows in rows]
        # Not empty: torch gives empty messages a layout that only their own dtype can read.
        longest = max(_ALIGNMENT, *map(sum, sizes))
        message = torch.zeros(longest, dtype=torch.uint8, device=tensors[0].device)
        start = 0
        for (_, part), size in zip(parts, sizes[ranks.rank], strict=True):
            if part.numel():
                raw = part.contiguous().view(-1).view(torch.uint8)
                message[start : start + len(raw)] = raw
            start += size
        messages = ranks.exchange(message)
        results = []
        offsets = [0] * ranks.size
        for number, (layer, part) in enumerate(parts):
            pieces = []
            for rank in range(ranks.size):
                shape = (rows[rank][layer], *part.shape[1:])
                length = torch.Size(shape).numel() * part.element_size()
                raw = messages[rank, offsets[rank] : offsets[rank] + length]
                pieces.append(raw.view(part.dtype).view(shape))
                offsets[rank] += sizes[rank][number]
            axis = -2 if number < 2 * layers else -1
            results.append(torch.cat(pieces).movedim(0, axis))
        ctx.size, ctx.layers = ranks.size, layers
        starts = [sum(rank_rows[i] for rank_rows in rows[: ranks.rank]) for i in range(layers)]
        # The first row and the number of rows of this rank, in each layer.
        ctx.ranges = list(zip(starts, rows[ranks.rank], strict=True))
        # Else a frozen teacher's gradient would be computed and thrown away.
        needs_grad = ctx.needs_input_grad[3:]
        constants = [t for t, needed in zip(results, needs_grad, strict=True) if not needed]
        ctx.mark_non_differentiable(*constants)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        features = 2 * ctx.layers
        grad_rows = [
            None if grad is None else ctx.size * grad.narrow(-2, *ctx.ranges[i % ctx.layers])
            for i, grad in enumerate(grads[:features])
        ]
        return (None, None, None, *grad_rows, *([None] * (len(grads) - features)))
