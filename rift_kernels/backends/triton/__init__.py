"""Triton kernels for NVIDIA GPUs from sm_80 on, and for AMD's, where they compile but never ran.

Fused measures go from features to values and back, for up to 24 layers in one launch of a kernel:

    cka_fwd, cka_bwd                                covariance_form.py, gram_form.py
    covariance_fwd, covariance_bwd                  covariance_form.py

All other measures are made of primitives, as in ``backends/eager.py``:

    moments                                         blocks.py; float64: products.py
    product, product_transposed, product_symmetric  products.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import blocks, covariance_form, gram_form, interpreter, products
from .layers import MAX_LAYERS, Layers, pack, unified

if interpreter.is_active():
    interpreter.repair()


class _Group(NamedTuple):
    """The layers that share launches, because they are of one form."""

    indices: Sequence[int]  # among the layers of the call
    gram: bool
    layers: Layers


def _groups(
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    masks: Sequence[Tensor],
    gram: Sequence[bool],
) -> list[_Group]:
    """Groups with room for the same number of layers, so that they share compiled kernels."""
    if len(gram) <= MAX_LAYERS and (all(gram) or not any(gram)):
        return [_Group(range(len(gram)), gram[0], pack(students, teachers, masks))]
    launches = -(-len(gram) // MAX_LAYERS)
    room = -(-len(gram) // launches)
    groups = []
    for form in (False, True):
        members = [i for i, is_gram in enumerate(gram) if is_gram == form]
        for first in range(0, len(members), room):
            indices = members[first : first + room]
            x, y, valid = (_select(side, indices) for side in (students, teachers, masks))
            groups.append(_Group(indices, form, pack(x, y, valid, room)))
    packed = unified([group.layers for group in groups])
    return [group._replace(layers=layers) for group, layers in zip(groups, packed, strict=True)]


def _select(tensors: Sequence[Tensor], indices: Sequence[int]) -> list[Tensor]:
    """The tensors of these layers; a single mask serves all layers."""
    return [tensors[i] for i in indices] if len(tensors) > 1 else list(tensors)


def _in_order(groups: Sequence[_Group], values: Sequence[Tensor]) -> Tensor:
    """The groups' values, in the order of the call's layers."""
    if len(groups) == 1:
        return values[0]
    ordered = [values[0]] * sum(len(group.indices) for group in groups)
    for group, group_values in zip(groups, values, strict=True):
        for i, value in zip(group.indices, group_values.unbind(), strict=True):
            ordered[i] = value
    return torch.stack(ordered)


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
    """Values, and what :func:`cka_bwd` needs besides the features."""
    values, saved = [], []
    with torch.cuda.device_of(students[0]):
        groups = _groups(students, teachers, masks, gram)
        for group in groups:
            settings = (group.layers, debiased, distance)
            if group.gram:
                forward = gram_form.cka_fwd(*settings, student_grad or teacher_grad)
            else:
                forward = covariance_form.cka_fwd(
                    *settings, student_grad, teacher_grad, precision != "medium"
                )
            values.append(forward[0])
            saved += forward[1]
    return _in_order(groups, values), saved


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
    """Values, and what :func:`covariance_bwd` needs besides features; all in covariance form."""
    values, saved = [], []
    with torch.cuda.device_of(students[0]):
        groups = _groups(students, teachers, masks, gram)
        for group in groups:
            value, tensors = covariance_form.covariance_fwd(
                group.layers, scale, mean_weight, student_grad, teacher_grad
            )
            values.append(value)
            saved += tensors
    return _in_order(groups, values), saved


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
    """The wanted gradients of CKA, students first; a side that none of them needs may be empty."""
    features = (students, teachers, saved, masks, gram)
    return _backward(covariance_form.cka_bwd, grad_values, *features, wanted, dtypes)


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
    """As :func:`cka_bwd`, of the covariance distance."""
    features = (students, teachers, saved, masks, gram)
    return _backward(covariance_form.covariance_bwd, grad_values, *features, wanted, dtypes)


def _backward(
    in_covariance_form: Callable[..., tuple[Tensor, ...]],
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    wanted: tuple[bool, bool],
    dtypes: tuple[torch.dtype, torch.dtype],
) -> list[Tensor]:
    """The wanted gradients, group after group; every measure in Gram form is CKA."""
    count = len(gram)
    students, teachers = students or teachers, teachers or students
    grads: list[Tensor] = [grad_values] * (2 * count)
    incoming = grad_values.contiguous()
    first = 0
    with torch.cuda.device_of(grad_values):
        groups = _groups(students, teachers, masks, gram)
        for group in groups:
            backward = gram_form.cka_bwd if group.gram else in_covariance_form
            length = gram_form.SAVED if group.gram else covariance_form.SAVED
            group_saved, first = saved[first : first + length], first + length
            group_incoming = incoming
            if len(groups) > 1:
                group_incoming = torch.stack([incoming[i] for i in group.indices])
            for side, tensors in enumerate((students, teachers)):
                if wanted[side]:
                    side_grads = backward(
                        group.layers, group_incoming, group_saved, side, dtypes[side]
                    )
                    if tensors[0].dim() > 3:  # a batch with more axes than the kernels' one
                        side_grads = (side_grads[0].view(tensors[0].shape),)
                    for i, grad in zip(group.indices, side_grads, strict=True):
                        grads[side * count + i] = grad
    return (grads[:count] if wanted[0] else []) + (grads[count:] if wanted[1] else [])


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


def product_symmetric(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` where that is known to be symmetric."""
    return products.product(a, b, symmetric=True)
