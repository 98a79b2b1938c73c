"""CUDA C++ kernels from ``csrc/``: linear CKA.

Of few rows (Gram form), value and gradients in one launch for all layers; no features are kept:

    cka_fwd      cka_small: values, and gradients of a loss whose own gradient is 1
    cka_bwd      scale: those, times the incoming gradient

Of many bfloat16 rows (covariance form), one layer after another, on Hopper its own kernels:

    cka_fwd      statistics, longest and rows (debiased), moments_sm80 or _sm90, cka_large_head
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

# csrc/cka_small/layout.h has the same, and the plan that `fits` foresees.
MAX_ROWS = 128
MAX_LAYERS = 24
_LARGEST_CLUSTER = 8
_LARGEST_GROUP = 16
_TILE = 16
# Arrival counters of one call, as csrc/cka_small/layout.h counts them.
_COUNTERS = 5 * 256
# Bytes that a block may have, by compute capability.
_SHARED = {
    **dict.fromkeys(((8, 0), (8, 7)), 163 * 1024),
    **dict.fromkeys(((9, 0), (10, 0), (10, 3)), 227 * 1024),
}
_LEAST_SHARED = 99 * 1024
# Of csrc/cka_large/rows.cuh: bytes of the sums of a block's warps, and columns in a strip.
_ROW_SUMS, _STRIP = 768, 256
_TYPES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def extension() -> ModuleType:
    """``rift_kernels._C``, imported when it is first needed."""
    return importlib.import_module("rift_kernels._C")


@torch.compiler.assume_constant_result
def compiled_for(capability: tuple[int, int], hopper: bool = False) -> bool:
    """Whether the extension has code for a GPU, machine code or PTX; ``hopper``: of its own."""
    names = extension().architectures.split(";")
    number = 10 * capability[0] + capability[1]
    if hopper:
        return number == 90 and "90a" in names
    # PTX of the last one runs on all later ones.
    if number >= int(names[-1].rstrip("af")):
        return True
    for name in names:
        plain = int(name.rstrip("af"))
        if number == plain or (name.isdigit() and number // 10 == plain // 10 and number > plain):
            return True
    return False


def fits(device: torch.device, rows: int, width: int) -> bool:
    """Whether the shared memory of a group of blocks holds a layer; pure Python, for torch.compile
    traces it."""
    capability = torch.cuda.get_device_capability(device)
    blocks = _LARGEST_CLUSTER
    if capability < (9, 0):
        # They run at once, one on a processor, of which a part of a GPU (MIG) has few.
        blocks = _LARGEST_GROUP
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        while blocks > processors:
            blocks //= 2
    return shared_bytes(rows, width, blocks) <= _SHARED.get(capability, _LEAST_SHARED)


def most_columns(device: torch.device) -> int:
    """Of a layer of many rows: the means of both sides lie in a block's shared memory, as
    csrc/cka_large/rows.cuh has it."""
    limit = _SHARED.get(torch.cuda.get_device_capability(device), _LEAST_SHARED)
    return (limit - _ROW_SUMS) // 8 // _STRIP * _STRIP


def shared_bytes(rows: int, width: int, blocks: int) -> int:
    """What each of some blocks needs for a layer."""
    padded = 16 if rows <= 16 else 32 if rows <= 32 else 64 if rows <= 64 else 128
    share = -(-width // (blocks * _TILE)) * _TILE
    tiles = padded // _TILE
    tiles = tiles * (tiles + 1) // 2
    planes = 4 * 2 * padded * (share + 8)
    grams = 2 * 4 * tiles * _TILE * (_TILE + 1) + 2 * 4 * tiles * _TILE * _TILE // blocks
    return planes + grams + 16 + 192 + 2 * 4 * padded + padded


def _device(tensor: Tensor) -> int:
    """Whose memory it is; -1: the host's, on which emulators run."""
    return tensor.get_device()


@cache
def _plan(device: int, rows: int, width: int) -> Any:
    return extension().cka_small_plan(device, rows, width)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _flat(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """(N, D), or with one axis for the batch; of one dtype."""
    wide = [t.to(dtype) for t in tensors]
    return [t.flatten(0, -3) if t.dim() > 3 else t for t in wide]


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
    """Values, and what the backward needs beside the features, if it needs them at all."""
    sides = (student_grad, teacher_grad)
    if all(gram):
        return _small_fwd(students, teachers, masks, sides, debiased, distance)
    return _covariance_fwd(students, teachers, (*sides, debiased, distance, precision != "medium"))


def _small_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    sides: tuple[bool, bool],
    debiased: bool,
    distance: bool,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and the gradients of a loss whose own is 1, all students first."""
    first = students[0]
    dtype = first.dtype if first.dtype == teachers[0].dtype else torch.float32
    grad_dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
    count = len(students)
    shape = first.shape[:-2] if count == 1 else (count,)
    values = torch.empty(shape, dtype=torch.float32, device=first.device)
    grads: list[list[Tensor]] = [
        [torch.empty(t.shape, dtype=grad_dtype, device=t.device) for t in side] if wanted else []
        for side, wanted in zip((students, teachers), sides, strict=True)
    ]
    if not isinstance(first, FakeTensor) and first.numel():
        with torch.cuda.device_of(first):
            x, y = _flat(students, dtype), _flat(teachers, dtype)
            valid = [m.reshape(-1, m.shape[-1]).contiguous() for m in masks]
            _launch(x, y, valid, grads, values, debiased, distance)
    return values, grads[0] + grads[1]


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
        # Kept until the launch is made; on one stream nobody else gets it before that has run.
        floats = min(plan.entries, entries) * plan.workspace
        memory = torch.empty(floats, dtype=torch.float32, device=device)
        # Fresh ones, too: kept between calls, they would have to be one set a stream, and memory
        # that a CUDA graph does not know of.
        arrivals = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
        workspace, counters = memory.data_ptr(), arrivals.data_ptr()
    extension().cka_small(
        plan, layers, batch, _TYPES[x[0].dtype], rows, entries, debiased, distance,
        values.data_ptr(), workspace, counters, _stream(device),
    )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _is_hopper(device: torch.device) -> bool:
    return compiled_for(torch.cuda.get_device_capability(device), hopper=True)


def _aligned(features: Tensor) -> Tensor:
    """Rows contiguous, at multiples of 16 bytes, and one behind the other, as they are fetched."""
    rows, width = features.shape
    stride_n, stride_d = features.stride()
    apart = stride_n >= width and stride_n % 8 == 0
    if apart and stride_d == 1 and features.data_ptr() % 16 == 0:
        return features
    room = features.new_empty(rows, -(-width // 8) * 8)
    room[:, :width] = features
    return room[:, :width]


def _entries(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(N, D) each, of a list or of a batch."""
    first = tensors[0]
    return list(tensors if first.dim() == 2 else first.reshape(-1, *first.shape[-2:]).unbind())


def _call(x: Tensor, y: Tensor, settings: tuple[bool, ...]) -> Any:
    """``settings``: student_grad, teacher_grad, debiased, distance, high."""
    sides = [(t.data_ptr(), t.stride(0), t.shape[1]) for t in (x, y)]
    device = x.device
    machine = _processors(device), _is_hopper(device)
    return extension().CkaLargeCall(*sides, x.shape[0], *settings, *machine)


def _sizes(x: Tensor, y: Tensor, settings: tuple[bool, ...]) -> tuple[int, int]:
    """Bytes of scratch memory, and of what is saved: known from shapes alone."""
    sides = [(16, -(-int(t.shape[1]) // 8) * 8, int(t.shape[1])) for t in (x, y)]
    machine = _processors(x.device), _is_hopper(x.device)
    call = extension().CkaLargeCall(*sides, int(x.shape[0]), *settings, *machine)
    scratch, saved = extension().cka_large_memory(call)
    return scratch, saved


def _covariance_fwd(
    students: list[Tensor], teachers: list[Tensor], settings: tuple[bool, ...]
) -> tuple[Tensor, list[Tensor]]:
    """Values, and one piece of memory an entry."""
    first = students[0]
    shape = first.shape[:-2] if len(students) == 1 else (len(students),)
    values = torch.empty(shape, dtype=torch.float32, device=first.device)
    memory: list[Tensor] = []
    if not first.numel():
        return values, memory
    with torch.cuda.device_of(first):
        pairs = zip(_entries(students), _entries(teachers), strict=True)
        for i, (x, y) in enumerate(pairs):
            scratch_bytes, saved_bytes = _sizes(x, y, settings)
            saved = torch.empty(saved_bytes, dtype=torch.uint8, device=x.device)
            memory.append(saved)
            if isinstance(first, FakeTensor):
                continue
            scratch = torch.empty(scratch_bytes, dtype=torch.uint8, device=x.device)
            x, y = _aligned(x), _aligned(y)
            address = values.data_ptr() + 4 * i
            extension().cka_large_forward(
                _call(x, y, settings), scratch.data_ptr(), saved.data_ptr(), address,
                _device(x), _stream(x.device),
            )  # fmt: skip
    return values, memory


def _covariance_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    wanted: tuple[bool, bool],
) -> list[Tensor]:
    grads = [
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for side, want in zip((students, teachers), wanted, strict=True)
        for t in (side if want else [])
    ]
    if isinstance(grad_values, FakeTensor) or not saved:
        return grads
    incoming = grad_values.contiguous()
    count = len(students)
    # Debiased, the forward has left more.
    first = _entries(students)[0], _entries(teachers)[0]
    debiased = saved[0].numel() == _sizes(*first, (*wanted, True, False, True))[1]
    settings = (*wanted, debiased, False, True)
    with torch.cuda.device_of(incoming):
        outs = [_entries(grads[at : at + count]) for at in range(0, len(grads), count)]
        pairs = zip(_entries(students), _entries(teachers), strict=True)
        for i, (x, y) in enumerate(pairs):
            x, y = _aligned(x), _aligned(y)
            call = _call(x, y, settings)
            for out, side in zip(outs, [i for i in (0, 1) if wanted[i]], strict=True):
                extension().cka_large_backward(
                    call, side, saved[i].data_ptr(), incoming.data_ptr() + 4 * i,
                    out[i].data_ptr(), _device(x), _stream(x.device),
                )  # fmt: skip
    return grads


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
    if not all(gram):
        return _covariance_bwd(grad_values, students, teachers, saved, wanted)
    count = len(gram)
    sides = [dtype for dtype, want in zip(dtypes, wanted, strict=True) if want]
    grads = [
        torch.empty(unit.shape, dtype=sides[i // count], device=unit.device)
        for i, unit in enumerate(saved)
    ]
    if isinstance(grad_values, FakeTensor) or not grad_values.numel():
        return grads
    incoming = grad_values.contiguous()
    entries = incoming.numel() // count
    with torch.cuda.device_of(incoming):
        stream = _stream(incoming.device)
        for side, dtype in enumerate(sides):
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
