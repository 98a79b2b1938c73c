"""The registered operators, the only boundary that torch.compile sees, and what they compute.

Per measure one forward operator ``<measure>_fwd`` (features -> values, and what the backward
needs); one backward operator ``features_bwd`` for all of them. Each takes lists, one entry a layer,
so that a backend may serve all layers in one launch. ``moments_fwd`` and ``matmul`` serve single
features. Autograd stays outside, in :mod:`.autograd`: a registered formula costs more per call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rift_kernels.backends import eager
from rift_kernels.measures import centering, heads, hsic, long_rows
from rift_kernels.trust import refusals

from .precision import full_precision
from .ranks import Ranks

NAMESPACE = "rift_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")
_LAYERS = "Tensor[] students, Tensor[] teachers, Tensor[] masks, bool[] gram"
_HOW = "bool student_grad, bool teacher_grad, str precision, str backend"
_HOW_MANY = 8  # arguments, of both together
_SETTINGS = {
    "cka": {"debiased": "bool", "distance": "bool"},
    "procrustes": {"method": "str", "distance": "bool"},
    "covariance": {"scale": "str", "mean_weight": "float"},
    "bures": {"squared": "bool", "mean_weight": "float", "method": "str"},
}
_TENSORS_A_LAYER = 2 + len(heads.Coefficients._fields)


def _backend(name: str) -> ModuleType:
    """The module that implements the primitives; dispatch has already refused what cannot run."""
    if name == "triton":
        # Not before it is asked for: triton is optional, and slow to import.
        from rift_kernels.backends import triton

        return triton
    if name == "cuda":
        from rift_kernels.backends import cuda

        return cuda
    return eager


def _primitives(backend: str, rows: Tensor) -> ModuleType:
    """The backend's for a layer; of a rank without a row, torch's, which know how to do nothing."""
    return _backend(backend) if rows.shape[-2] else eager


def is_fused(measure: str, backend: str, gram: Sequence[bool]) -> bool:
    """Whether the backend goes from features to values by itself, without a head in heads.py."""
    return backend != "eager" and (measure == "cka" or (measure == "covariance" and not any(gram)))


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where an input is float64, else float32."""
    return torch.float64 if torch.float64 in {t.dtype for t in tensors} else torch.float32


def _register(schema: str, implementation: Callable[..., Any]) -> None:
    def explained(*arguments: Any) -> Any:
        try:
            return implementation(*arguments)
        except Exception as error:
            refusals.explain(error)
            raise

    name = schema.split("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, explained, "CompositeExplicitAutograd")
    # The implementations are shape-agnostic PyTorch, so they are their own fakes.
    torch.library.register_fake(f"{NAMESPACE}::{name}", implementation, lib=_LIBRARY)


def center(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor | None,
    ranks: Ranks | None = None,
    without_long_rows: bool = False,
) -> heads.Centered:
    """Both sides about their means, of all ranks that share the rows."""
    dtype = compute_dtype(student, teacher)
    if without_long_rows:
        (x, y), (mean_x, mean_y), count, long = _center_without_long_rows(
            [student, teacher], mask, ranks
        )
        who = ranks or heads.Alone
        return heads.Centered(x, y, mean_x, mean_y, count, mask, who, long)
    if ranks is not None:
        sides = [student.to(dtype), teacher.to(dtype)]
        means, count, _ = centering.mean_over_ranks(sides, mask, ranks.total)
        x, y = (centering.subtract(*side, mask) for side in zip(sides, means, strict=True))
        mean_x, mean_y = (mean.to(dtype) for mean in means)
        return heads.Centered(x, y, mean_x, mean_y, count, mask, ranks)
    x, mean_x, count = centering.center(student, mask, dtype)
    y, mean_y, _ = centering.center(teacher, mask, dtype)
    return heads.Centered(x, y, mean_x, mean_y, count, mask)


def _center_without_long_rows(
    sides: list[Tensor], mask: Tensor | None, ranks: Ranks | None
) -> tuple[list[Tensor], list[Tensor], Tensor, long_rows.LongRows]:
    """Sides about the means of all rows but the longest, which are kept apart."""
    how = (sides, mask, compute_dtype(*sides))
    return long_rows.center(*how) if ranks is None else long_rows.center_over_ranks(*how, ranks)


def tensors_of(optional: Iterable[Tensor | None], like: Tensor) -> list[Tensor]:
    """An operator returns tensors only: None becomes an empty one, the rest contiguous."""
    return [like.new_empty(0) if t is None else t.contiguous() for t in optional]


def _mask_of_each(masks: Sequence[Tensor], layers: int) -> Sequence[Tensor | None]:
    """No mask, one mask for all layers, or one each."""
    if len(masks) == layers:
        return masks
    return [masks[0] if masks else None] * layers


def measure_fwd(
    head: partial[heads.Head],
    students: list[Tensor],
    teachers: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Values, and per layer the centered features and the coefficients (empty where absent)."""
    want = heads.Wanted(student_grad, teacher_grad)
    debiased = head.keywords.get("debiased", False)
    values, saved = [], []
    with full_precision(students[0].device, precision):
        for x, y, mask, use_gram in zip(
            students, teachers, _mask_of_each(masks, len(students)), gram, strict=True
        ):
            f = center(x, y, mask, ranks, debiased and not use_gram)
            value, coefficients = head(f, _primitives(backend, x), use_gram, want)
            values.append(value.to(f.x.dtype))
            if any(want):
                crossed = coefficients.xy is not None
                own_x = f.x if crossed or want.student else None
                own_y = f.y if crossed or want.teacher else None
                saved += tensors_of((own_x, own_y, *coefficients), f.x)
    return values[0] if len(values) == 1 else torch.stack(values), saved


def head(measure: str, settings: Sequence[Any]) -> partial[heads.Head]:
    """The measure of heads.py with its settings."""
    named = dict(zip(_SETTINGS[measure], settings, strict=True))
    return partial(getattr(heads, measure), **named)


def _fwd(measure: str, *call: Any) -> tuple[Tensor, list[Tensor]]:
    """Layers and how, then the measure's settings."""
    how, settings = call[:_HOW_MANY], call[_HOW_MANY:]
    if is_fused(measure, how[-1], how[3]):
        *layers, backend = how
        return getattr(_backend(backend), f"{measure}_fwd")(*layers, *settings)
    return measure_fwd(head(measure, settings), *how)


def _features_bwd(
    grad_values: Tensor,
    students: list[Tensor],
    teachers: list[Tensor],
    saved: list[Tensor],
    masks: list[Tensor],
    gram: list[bool],
    student_grad: bool,
    teacher_grad: bool,
    precision: str,
    backend: str,
    student_dtype: torch.dtype,
    teacher_dtype: torch.dtype,
    measure: str,
) -> list[Tensor]:
    """The wanted gradients, all students first.

    A fused ``measure`` takes the features themselves; of the others, which have no name here, what
    the forward saved is enough.
    """
    if measure and backend != "eager":
        features_ = (students, teachers, saved, masks, gram)
        sides = (student_grad, teacher_grad)
        dtypes = (student_dtype, teacher_dtype)
        return _backend(backend).fused_bwd(grad_values, *features_, sides, dtypes, measure == "cka")
    layers = len(gram)
    grad_students, grad_teachers = [], []
    with full_precision(grad_values.device, precision):
        for i, mask in enumerate(_mask_of_each(masks, layers)):
            scale = grad_values if layers == 1 else grad_values[i]
            x, y, *rest = saved[i * _TENSORS_A_LAYER : (i + 1) * _TENSORS_A_LAYER]
            c = heads.Coefficients(*(t if t.dim() > 1 or t.numel() else None for t in rest))
            cross = None if c.xy is None else c.xy.mT
            primitives = _primitives(backend, x if x.dim() > 1 else y)
            if student_grad:
                side = (scale, x, y, mask, c.xx, c.xy, c.wx, c.bx, c.left_x, c.right_x)
                grad_students.append(
                    centering.features_bwd(primitives, *side, gram[i], student_dtype)
                )
            if teacher_grad:
                side = (scale, y, x, mask, c.yy, cross, c.wy, c.by, c.left_y, c.right_y)
                grad_teachers.append(
                    centering.features_bwd(primitives, *side, gram[i], teacher_dtype)
                )
    return grad_students + grad_teachers


def moments_fwd(
    student: Tensor,
    teacher: Tensor,
    masks: list[Tensor],
    wanted: str,
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Centered features, count, means, and the wanted blocks (empty where not wanted)."""
    with full_precision(student.device, precision):
        f = center(student, teacher, masks[0] if masks else None, ranks)
        blocks = f.ranks.blocks(*_primitives(backend, student).moments(f.x, f.y, False, wanted))()
    return [f.x, f.y, f.mean_x, f.mean_y, f.count, *tensors_of(blocks, f.x)]


def own_moments_fwd(
    student: Tensor,
    masks: list[Tensor],
    precision: str,
    backend: str,
    ranks: Ranks | None = None,
) -> list[Tensor]:
    """Mean, count, second moments and HSIC_1 times ``n (n-3)`` of one side with itself.

    And what their gradients are made of: the rows about the mean of those that are not long, what
    is missing there to the mean of all, the second moments of those that are not long, one over the
    energy, and :class:`.hsic.Slope`.
    """
    mask = masks[0] if masks else None
    how = ([student], mask, compute_dtype(student))
    with full_precision(student.device, precision):
        found = (
            long_rows.center(*how) if ranks is None else long_rows.center_over_ranks(*how, ranks)
        )
        (x,), (mean,), count, long = found
        who = heads.Alone if ranks is None else ranks
        pending = who.total(_primitives(backend, student).moments(x, x, False, "xx")[0])
        inverse = heads.safe_inverse(long.energy)
        pairs = hsic.pairs([x], long, inverse)
        (xx,) = pending()
        square = (heads.norm(xx) * inverse[..., 0]).square()[..., None, None]
        h, _, total = hsic.estimate(pairs, square, count, who)
        one = torch.ones_like(inverse)
        slope = hsic.slope(pairs, total, count, one, 0, x, long, inverse.sqrt(), who)
        (rows,) = long.sides
        long.put_(x, rows)
        moved = rows.sum(-2) / count.unsqueeze(-1)
        outer = rows.mT @ rows - count[..., None, None] * moved.unsqueeze(-1) * moved.unsqueeze(-2)
        mean = (mean + moved).to(x.dtype)
        value = h[..., 0, 0] * long.energy[..., 0].square()
        rest = (moved.to(x.dtype), xx, inverse[..., 0].clone(), *slope)
        return [mean, count, xx + outer.to(x.dtype), value, x, *tensors_of(rest, x)]


def _matmul(a: Tensor, b: Tensor, precision: str) -> Tensor:
    with full_precision(a.device, precision):
        return a @ b


for _measure_name, _settings in _SETTINGS.items():
    _arguments = ", ".join(f"{kind} {name}" for name, kind in _settings.items())
    _register(
        f"{_measure_name}_fwd({_LAYERS}, {_HOW}, {_arguments}) -> (Tensor, Tensor[])",
        partial(_fwd, _measure_name),
    )
_register(
    "features_bwd(Tensor grad_values, Tensor[] students, Tensor[] teachers, Tensor[] saved,"
    f" Tensor[] masks, bool[] gram, {_HOW}, ScalarType student_dtype, ScalarType teacher_dtype,"
    " str measure) -> Tensor[]",
    _features_bwd,
)
_register(
    "moments_fwd(Tensor student, Tensor teacher, Tensor[] masks, str wanted, str precision,"
    " str backend) -> Tensor[]",
    moments_fwd,
)
_register(
    "own_moments_fwd(Tensor student, Tensor[] masks, str precision, str backend) -> Tensor[]",
    own_moments_fwd,
)
_register("matmul(Tensor a, Tensor b, str precision) -> Tensor", _matmul)
