"""Triton kernels for NVIDIA GPUs from sm_80 on (and AMD's, compiled but never run).

Fused measures, from features to values and back, up to 24 layers in one launch a pass:

    cka_fwd, covariance_fwd, fused_bwd      covariance_form.py, gram_form.py

and the primitives that the others are made of, as in ``backends/eager.py``:

    moments                                 blocks.py; float64: products.py
    product, product_transposed, symmetric  products.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from . import blocks, covariance_form, gram_form, interpreter, products
from .layers import MAX_LAYERS, Layers, alike, pack

if interpreter.is_active():
    interpreter.mend()


def _slots(gram: Sequence[bool]) -> int:
    """Layers that a launch of this call has room for: the same of all, whatever their form is."""
    launches = -(-len(gram) // MAX_LAYERS)
    return -(-len(gram) // launches)


def _groups(gram: Sequence[bool]) -> list[list[int]]:
    """The layers of each launch, which are of one form."""
    slots, groups = _slots(gram), []
    for form in (False, True):
        indices = [i for i, g in enumerate(gram) if g == form]
        groups += [indices[at : at + slots] for at in range(0, len(indices), slots)]
    return groups


def _some(tensors: Sequence[Tensor], indices: list[int]) -> list[Tensor]:
    """The tensors of these layers; a mask may be one for all."""
    return [tensors[i] for i in indices] if len(tensors) > 1 else list(tensors)


def _launches(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    gram: Sequence[bool],
    groups: Sequence[list[int]],
) -> list[Layers]:
    slots, packed = _slots(gram), []
    for indices in groups:
        x, y, valid = (_some(side, indices) for side in (students, teachers, masks))
        packed.append(pack(x, y, valid, slots))
    return packed if len(packed) == 1 else alike(packed)


def _forward(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    measure: Callable[[Layers, bool], tuple[Tensor, list[Tensor]]],
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what the backward needs beside the features, group after group."""
    values: list[Tensor] = [students[0]] * len(gram)
    saved, groups = [], _groups(gram)
    with torch.cuda.device_of(students[0]):
        launches = _launches(students, teachers, masks, gram, groups)
        for indices, layers in zip(groups, launches, strict=True):
            value, kept = measure(layers, gram[indices[0]])
            if len(groups) == 1:
                return value, kept
            for i, one in zip(indices, value.unbind(), strict=True):
                values[i] = one
            saved += kept
    return torch.stack(values), saved


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
    """Values, and what the backward needs beside the features."""
    sides = (student_grad, teacher_grad)

    def measure(layers: Layers, form: bool) -> tuple[Tensor, list[Tensor]]:
        if form:
            return gram_form.cka_fwd(layers, debiased, distance, any(sides))
        return covariance_form.cka_fwd(layers, debiased, distance, *sides, precision != "medium")

    return _forward(students, teachers, masks, gram, measure)


def covariance_fwd(
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    _precision: str,
    scale: str,
    mean_weight: float,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and what the backward needs beside the features."""

    def measure(layers: Layers, _form: bool) -> tuple[Tensor, list[Tensor]]:
        sides = (student_grad, teacher_grad)
        return covariance_form.covariance_fwd(layers, scale, mean_weight, *sides)

    return _forward(students, teachers, masks, gram, measure)


def _bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
    is_cka: bool,
) -> list[Tensor]:
    """The wanted gradients, all students first; a side that none of them needs may be empty."""
    count = len(gram)
    students, teachers = students or teachers, teachers or students
    grads: list[Tensor] = [grad_values] * (2 * count)
    incoming = grad_values.reshape(-1).contiguous()
    groups = _groups(gram)
    at = 0
    with torch.cuda.device_of(grad_values):
        launches = _launches(students, teachers, masks, gram, groups)
        for indices, layers in zip(groups, launches, strict=True):
            form = gram[indices[0]]
            kept = saved[at : at + (gram_form.SAVED if form else covariance_form.SAVED)]
            at += len(kept)
            mine = incoming
            if len(groups) > 1:
                mine = torch.stack([incoming[i] for i in indices])
            for side, tensors in enumerate((students, teachers)):
                if wanted[side]:
                    how = (layers, mine, kept, side, dtypes[side])
                    if form:
                        some = gram_form.cka_bwd(*how)
                    elif is_cka:
                        some = covariance_form.cka_bwd(*how)
                    else:
                        some = covariance_form.covariance_bwd(*how)
                    for i, grad in zip(indices, some, strict=True):
                        grads[side * count + i] = grad.view(tensors[i].shape)
    return (grads[:count] if wanted[0] else []) + (grads[count:] if wanted[1] else [])


def cka_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor]:
    """The wanted gradients, all students first."""
    return _bwd(grad_values, students, teachers, saved, masks, gram, wanted, dtypes, True)


def covariance_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor]:
    """The wanted gradients, all students first."""
    return _bwd(grad_values, students, teachers, saved, masks, gram, wanted, dtypes, False)


def moments(x: Tensor, y: Tensor, gram: bool, wanted: str) -> tuple[Tensor | None, ...]:
    """The blocks named in ``wanted`` of second moments of centered features; see eager.py."""
    if x.dtype == torch.float64:
        if gram:
            x, y = x.mT, y.mT
        return (
            products.product(x.mT, x, symmetric=True) if "xx" in wanted else None,
            products.product(x.mT, y) if "xy" in wanted else None,
            products.product(y.mT, y, symmetric=True) if "yy" in wanted else None,
        )
    with torch.cuda.device_of(x):
        form = "gram" if gram else "covariance"
        matrices = blocks.second_moments(pack([x], [y], []), form, wanted)
    return tuple(b if b is None else b.reshape(*x.shape[:-2], *b.shape[-2:]) for b in matrices)


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b``."""
    return products.product(a, b)


def product_transposed(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b^T``."""
    return products.product(a, b.mT)


def symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where that is known to be symmetric."""
    return products.product(a, b, symmetric=True)
