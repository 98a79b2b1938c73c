"""CUDA C++ kernels from ``csrc/``: linear CKA.

Few rows (Gram form), all layers in one launch; no features are kept:

    cka_fwd      cka_small: values, and gradients for an incoming gradient of 1
    cka_bwd      scale: those gradients, times the incoming one

Many bfloat16 rows (covariance form), one layer after another, with separate kernels for Hopper:

    cka_fwd      statistics, means, longest and row_terms (debiased), moments_sm80 or _sm90,
                 cka_large_head
    cka_bwd      backward_sm80 or _sm90
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

# As in csrc/cka_small/layout.h.
MAX_ROWS = 128
MAX_LAYERS = 24
# As in csrc/bindings.cpp: the largest width of many rows.
MAX_COLUMNS = 1 << 15
_LARGEST_CLUSTER = 8
_LARGEST_GROUP = 16
_TILE_ROWS = 16
# Arrival counters: one for each entry, and for each number of blocks up to _LARGEST_GROUP.
_COUNTERS = 5 * 256
# Bytes of shared memory that a block may have, by compute capability.
_SHARED_BYTES = {
    **dict.fromkeys(((8, 0), (8, 7)), 163 * 1024),
    **dict.fromkeys(((9, 0), (10, 0), (10, 3)), 227 * 1024),
}
_LEAST_SHARED_BYTES = 99 * 1024
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def extension() -> ModuleType:
    """``rift_kernels._C``, imported on first use."""
    return importlib.import_module("rift_kernels._C")


@torch.compiler.assume_constant_result
def compiled_for(capability: tuple[int, int], hopper: bool = False) -> bool:
    """Whether the extension has machine code or PTX for a GPU; ``hopper``: Hopper's own kernels."""
    names = extension().architectures.split(";")
    number = 10 * capability[0] + capability[1]
    if hopper:
        return number == 90 and "90a" in names
    # The PTX of the last architecture runs on all later GPUs.
    if number >= int(names[-1].rstrip("af")):
        return True
    for name in names:
        plain = int(name.rstrip("af"))
        if number == plain or (name.isdigit() and number // 10 == plain // 10 and number > plain):
            return True
    return False


def fits(device: torch.device, rows: int, width: int) -> bool:
    """Whether the shared memory of a group of blocks holds a layer of few rows.

    Pure Python, because torch.compile traces it; csrc/cka_small/layout.h makes the real plan.
    """
    capability = torch.cuda.get_device_capability(device)
    blocks = _LARGEST_CLUSTER
    cluster = capability >= (9, 0)
    if not cluster:
        # The blocks run at once, one on each processor. A part of a GPU (MIG) has few of them.
        blocks = _LARGEST_GROUP
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        while blocks > processors:
            blocks //= 2
    limit = _SHARED_BYTES.get(capability, _LEAST_SHARED_BYTES)
    return shared_bytes(rows, width, blocks, cluster) <= limit


def shared_bytes(rows: int, width: int, blocks: int, cluster: bool) -> int:
    """Bytes of shared memory that each of ``blocks`` blocks needs for a layer of few rows."""
    padded = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    columns = -(-width // (blocks * _TILE_ROWS)) * _TILE_ROWS
    tiles = padded // _TILE_ROWS
    tiles = tiles * (tiles + 1)  # of both Gram matrices
    features = 2 * (columns // _TILE_ROWS) * (2 * padded * _TILE_ROWS * 2 + 16)
    tile_bytes = 4 * _TILE_ROWS * _TILE_ROWS
    exchanged = tiles * tile_bytes
    if cluster:
        owned = -(-tiles // blocks)
        exchanged = owned * (blocks + 1) * tile_bytes + 4 * 2 * padded * (padded // _TILE_ROWS + 1)
    return features + exchanged + 512


def _device(tensor: Tensor) -> int:
    """The index of a tensor's device; -1 for the CPU, on which emulators run."""
    return tensor.get_device()


@cache
def _plan(device: int, rows: int, width: int) -> Any:
    return extension().cka_small_plan(device, rows, width)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_hopper(device: torch.device) -> bool:
    return compiled_for(torch.cuda.get_device_capability(device), hopper=True)


def cka_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    debiased: bool,
    distance: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what the backward needs."""
    wanted = (student_grad, teacher_grad)
    if all(gram):
        return _small_fwd(students, teachers, masks, wanted, debiased, distance)
    may_use_low_halves = precision != "medium"
    return _large_fwd(students, teachers, (*wanted, debiased, distance, may_use_low_halves))


def cka_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    _masks: list[Tensor],
    gram: list[bool],
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor]:
    """The wanted gradients, all students first."""
    if all(gram):
        return _small_bwd(grad_values, saved, len(gram), wanted, dtypes)
    return _large_bwd(grad_values, students, teachers, saved, wanted)


def _small_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    wanted: tuple[bool, bool],
    debiased: bool,
    distance: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and the gradients for an incoming gradient of 1, all students first."""
    first = students[0]
    dtype = first.dtype if first.dtype == teachers[0].dtype else torch.float32
    grad_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    count = len(students)
    shape = first.shape[:-2] if count == 1 else (count,)
    values = torch.empty(shape, dtype=torch.float32, device=first.device)
    grads: list[list[Tensor]] = [
        [torch.empty(t.shape, dtype=grad_dtype, device=t.device) for t in side] if is_wanted else []
        for side, is_wanted in zip((students, teachers), wanted, strict=True)
    ]
    if not isinstance(first, FakeTensor) and first.numel():
        with torch.cuda.device_of(first):
            x, y = _flat(students, dtype), _flat(teachers, dtype)
            valid = [m.reshape(-1, m.shape[-1]).contiguous() for m in masks]
            _launch(x, y, valid, grads, values, debiased, distance)
    return values, grads[0] + grads[1]


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in one dtype, as (N, D) or with one batch axis."""
    converted = [t.to(dtype) for t in tensors]
    return [t.flatten(0, -3) if t.dim() > 3 else t for t in converted]


def _launch(
    x: list[Tensor], y: list[Tensor], masks: list[Tensor], grads: list[list[Tensor]],
    values: Tensor, debiased: bool, distance: bool,
) -> None:  # fmt: skip
    count = len(x)
    device = values.device
    rows = max(t.shape[-2] for t in x)
    width = max(t.shape[-1] for t in (*x, *y))
    plan = _plan(_device(values), rows, width)
    layers = [
        (
            a.data_ptr(), b.data_ptr(),
            masks[i if len(masks) > 1 else 0].data_ptr() if masks else 0,
            grads[0][i].data_ptr() if grads[0] else 0, grads[1][i].data_ptr() if grads[1] else 0,
            a.stride(-2), a.stride(-1), b.stride(-2), b.stride(-1),
            a.shape[-2], a.shape[-1], b.shape[-1],
        )
        for i, (a, b) in enumerate(zip(x, y, strict=True))
    ]  # fmt: skip
    batch = None
    entries = count
    if x[0].dim() == 3:
        entries, n, d1 = x[0].shape
        batch = (x[0].stride(0), y[0].stride(0), n, n * d1, n * y[0].shape[-1])
    workspace = counters = 0
    if not plan.cluster:
        # Kept until the launch; on one stream, memory is reused only after the kernel has run.
        floats = min(plan.entries, entries) * plan.workspace
        memory = torch.empty(floats, dtype=torch.float32, device=device)
        # New for each call: counters kept between calls would need one set per stream, in memory
        # that a CUDA graph does not know of.
        arrivals = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        workspace, counters = memory.data_ptr(), arrivals.data_ptr()
    extension().cka_small(
        plan, layers, batch, _TYPES[x[0].dtype], rows, entries, debiased, distance,
        values.data_ptr(), workspace, counters, _stream(device),
    )  # fmt: skip


def _small_bwd(
    grad_values: Tensor,
    saved: list[Tensor],
    count: int,
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor]:
    """The saved gradients of ``count`` layers, times the incoming gradient."""
    grad_dtypes = [dtype for dtype, is_wanted in zip(dtypes, wanted, strict=True) if is_wanted]
    grads = [
        torch.empty(unit.shape, dtype=grad_dtypes[i // count], device=unit.device)
        for i, unit in enumerate(saved)
    ]
    if isinstance(grad_values, FakeTensor) or not grad_values.numel():
        return grads
    incoming = grad_values.contiguous()
    entries = incoming.numel() // count
    with torch.cuda.device_of(incoming):
        stream = _stream(incoming.device)
        for side, dtype in enumerate(grad_dtypes):
            tensors = [
                (
                    saved[i].data_ptr(), grads[i].data_ptr(), saved[i].numel() // entries, entries,
                    incoming.data_ptr() + 4 * (i % count),
                )
                for i in range(side * count, (side + 1) * count)
            ]  # fmt: skip
            types = _TYPES[saved[0].dtype], _TYPES[dtype]
            extension().scale(tensors, *types, _device(incoming), stream)
    return grads


def _aligned(features: Tensor) -> Tensor:
    """Features as the kernels read them: contiguous rows at multiples of 16 bytes, none shared."""
    rows, width = features.shape
    stride_n, stride_d = features.stride()
    is_apart = stride_n >= width and stride_n % 8 == 0
    if is_apart and stride_d == 1 and features.data_ptr() % 16 == 0:
        return features
    padded = features.new_empty(rows, -(-width // 8) * 8)
    padded[:, :width] = features
    return padded[:, :width]


def _entries(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The (N, D) entries of a list of layers, or of one batch."""
    first = tensors[0]
    return list(tensors if first.dim() == 2 else first.reshape(-1, *first.shape[-2:]).unbind())


Side = tuple[int, int, int]  # address, elements from one row to the next, width


def _sides(x: Tensor, y: Tensor) -> list[Side]:
    """Both sides, aligned, as the kernels take them."""
    return [(t.data_ptr(), t.stride(0), t.shape[1]) for t in (x, y)]


def _large_call(sides: list[Side], x: Tensor, flags: tuple[bool, ...]) -> Any:
    """``flags``: student_grad, teacher_grad, debiased, distance, may_use_low_halves."""
    machine = _processors(x.device), _is_hopper(x.device)
    return extension().CkaLargeCall(*sides, int(x.shape[0]), *flags, *machine)


def _large_bytes(x: Tensor, y: Tensor, flags: tuple[bool, ...]) -> tuple[int, int]:
    """Bytes of scratch memory, and of what is saved; they depend on shapes alone."""
    # Any aligned address will do.
    sides = [(16, -(-int(t.shape[1]) // 8) * 8, int(t.shape[1])) for t in (x, y)]
    scratch, saved = extension().cka_large_memory(_large_call(sides, x, flags))
    return scratch, saved


def _large_fwd(
    students: list[Tensor], teachers: list[Tensor], flags: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Values, and the saved memory of each entry."""
    first = students[0]
    shape = first.shape[:-2] if len(students) == 1 else (len(students),)
    values = torch.empty(shape, dtype=torch.float32, device=first.device)
    memory: list[Tensor] = []
    if not first.numel():
        return values, memory
    with torch.cuda.device_of(first):
        pairs = zip(_entries(students), _entries(teachers), strict=True)
        for i, (x, y) in enumerate(pairs):
            scratch_bytes, saved_bytes = _large_bytes(x, y, flags)
            saved = torch.empty(saved_bytes, dtype=torch.uint8, device=x.device)
            memory.append(saved)
            if isinstance(first, FakeTensor):
                continue
            scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device)
            x, y = _aligned(x), _aligned(y)
            extension().cka_large_forward(
                _large_call(_sides(x, y), x, flags), scratch.data_ptr(), saved.data_ptr(),
                values.data_ptr() + 4 * i, _device(x), _stream(x.device),
            )  # fmt: skip
    return values, memory


def _large_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    wanted: tuple[bool, bool],
) -> list[Tensor]:
    """The wanted gradients, from the saved memory of each entry."""
    sides = [i for i in (0, 1) if wanted[i]]
    grads = [
        [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (students, teachers)[side]]
        for side in sides
    ]
    if not isinstance(grad_values, FakeTensor) and saved:
        incoming = grad_values.contiguous()
        outs = [_entries(side_grads) for side_grads in grads]
        entries = list(zip(_entries(students), _entries(teachers), strict=True))
        # A debiased forward saves more.
        debiased_bytes = _large_bytes(*entries[0], (*wanted, True, False, True))[1]
        flags = (*wanted, saved[0].numel() == debiased_bytes, False, True)
        with torch.cuda.device_of(incoming):
            for i, (x, y) in enumerate(entries):
                x, y = _aligned(x), _aligned(y)
                call = _large_call(_sides(x, y), x, flags)
                for side, out in zip(sides, outs, strict=True):
                    extension().cka_large_backward(
                        call, side, saved[i].data_ptr(), incoming.data_ptr() + 4 * i,
                        out[i].data_ptr(), _device(x), _stream(x.device),
                    )  # fmt: skip
    return [grad for side_grads in grads for grad in side_grads]
