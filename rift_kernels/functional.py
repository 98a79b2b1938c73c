"""The public functions. Each docstring is the specification; each body validates and dispatches.

Symbols throughout the package: N rows (samples or tokens), D1 student width, D2 teacher width, L
layers. ``Xc`` and ``Yc`` are the student's and the teacher's valid rows minus their mean, ``n`` of
them. ``||.||`` is the Frobenius norm, ``||.||_*`` the nuclear norm.

Common to all functions
    Features are ``(..., N, D)``, where the leading axes are a batch with one value each. They may
    also be lists of L tensors ``(N, D_l)`` of any widths, which give a vector of L values. Dtypes
    are float64, float32, bfloat16 and float16; student and teacher may differ.

    ``mask`` is boolean ``(..., N)``, True = valid; for a list, one mask for all or a list of masks.
    Masked rows are left out by selection, not by multiplication: their contents, NaN included, have
    no effect, and their gradient is 0.

    The value is float32, or float64 where an input is float64. Accumulation is in that dtype; sums
    of squares are in float64. The GPU kernels multiply each float32 or float16 feature as two
    bfloat16 numbers, which keeps 16 bits: values are then accurate to 1e-5. Autocast has no effect.

    Gradients flow to every input that requires them, in its own dtype. Double backward, forward
    mode and torch.func are not supported: all three raise.

    Shifting or scaling features by a constant does not change the value, where the measure itself
    has this invariance. For float32 it holds between sizes of 1e-17 and 1e17. Squares of larger
    features overflow to NaN or Inf; smaller ones lose digits until they count as no variance.

    Results are deterministic: on a CPU for a given number of threads, in the kernels for a given
    GPU. NaN or Inf in a valid row makes that layer's value NaN.

    ``precision`` has the values of ``torch.set_float32_matmul_precision``. ``"highest"`` keeps
    products at the full precision of their operands. ``"high"`` lets products of the eager backend
    follow torch's TF32/bf16 settings. ``"medium"`` does so as well, and rounds the gradient's
    coefficients to bfloat16 in the GPU kernels.

    ``backend`` is ``"auto"``, ``"eager"``, ``"triton"`` or ``"cuda"``. An explicit choice that
    cannot run raises ``RuntimeError``. On a GPU, features must not be modified in place between a
    call and its backward, because the kernels keep no copy: autograd raises then.

    ``group`` is for a batch whose rows are spread over processes: a
    ``torch.distributed.ProcessGroup``, or ``"world"`` for all processes. Where torch.distributed is
    not initialised, ``"world"`` is this process alone. All ranks of the group must make the call,
    each with any number of rows, including none. All get the value of the whole batch, identical to
    the last bit. Gradients are scaled so that averaging by DDP or FSDP gives the parameters the
    gradients of one process with the whole batch.

    Wrong input on one rank, or a rank that has ended, makes all ranks raise. If a rank never makes
    the call, the others raise after the group's timeout. Where ranks sum moments and a mask selects
    rows, the number of valid rows is not checked: with too few, the value is NaN. torch.compile
    breaks its graph at such a call. See :mod:`rift_kernels.dispatch.shared_batch`.

    Wrong input raises ``TypeError`` or ``ValueError`` that names the argument before anything runs.
    Too few valid rows raise ``ValueError``. Where counting them means reading a mask on a GPU or
    under torch.compile, which would stall, the value is NaN instead.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import overload

from torch import Tensor

from .dispatch import call, checks, covariance_matching
from .dispatch.checks import Features, Mask
from .dispatch.covariance_matching import Teacher
from .dispatch.ranks import Group
from .dispatch.second_moments import SecondMoments


def linear_cka(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    debiased: bool = True,
    distance: bool = False,
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    """Linear centered kernel alignment: 1 for features equal up to rotation, shift and scale.

    ``||Xc^T Yc||^2 / (||Xc^T Xc|| ||Yc^T Yc||)``; debiased, ``H(X, Y) / sqrt(H(X, X) H(Y, Y))``
    with the unbiased estimator of HSIC ::

        H(X, Y) = [||Xc^T Yc||^2 - n/(n-2) sum_i r_i q_i + (sum r)(sum q)/((n-1)(n-2))] / (n(n-3))

    and row energies ``r_i = ||xc_i||^2``, ``q_i = ||yc_i||^2``. For *independent* features the
    biased value is near 1 when N is small compared with D. The debiased one is near 0, may be
    negative and is never clamped.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid.
        debiased: correct the bias of small batches; needs n >= 4, else n >= 2.
        distance: return 1 - CKA, rounded once. Small distances keep their digits: a float32 has
            steps of 6e-8 near 1, far finer ones near 0.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,); CKA is in [-1, 1], biased in [0, 1]. It is 0 with gradient 0 where student or
        teacher has no variance. Debiased, it is also 0 where the variance is no more than rounding,
        as when at most one row differs from the others.

    Accuracy in float32: 2e-6, even where up to eight rows are thousands of times longer than all
    others, as in language models; 1e-5 in the kernels. A value indistinguishable from rounding
    error is 0.

    Sources: Kornblith et al. 2019 (CKA), Song et al. 2012 (HSIC_1), Nguyen et al. 2021 (debiased).
    """
    checks.flag("debiased", debiased)
    checks.flag("distance", distance)
    return call.measure(
        "cka",
        (debiased, distance),
        student,
        teacher,
        mask,
        precision,
        backend,
        group,
        min_rows=4 if debiased else 2,
    )


def procrustes_similarity(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    method: str = "newton_schulz",
    distance: bool = False,
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    """How well the best orthogonal map aligns the features: 0 to 1, where 1 is a rotation.

    ``max_Q <Xc Q, Yc> / (||Xc|| ||Yc||) = ||Xc^T Yc||_* / (||Xc|| ||Yc||)``. The gradient of the
    nuclear norm is the polar factor, which stays finite where the gradient of an SVD does not.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l); D1 and D2 may differ.
        mask: boolean (..., N), True = valid; n >= 2.
        method: ``"newton_schulz"``, matrix products only, or ``"svd"``, exact. Newton-Schulz counts
            singular values of ``Xc^T Yc`` below 1.4e-8 of its norm (1e-6 in Gram form) only in
            part. This does not affect the value. Where standard deviations fall as steeply as
            ``k^-2``, it changes the gradient by 5e-4 (3e-3 in Gram form). The change grows as the
            value approaches 1.
        distance: return 1 - similarity, rounded once.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,), the similarity; 0 with gradient 0 where student or teacher has no variance.

    Source: Williams et al. 2021 (shape metrics).
    """
    checks.option("method", method, ("newton_schulz", "svd"))
    checks.flag("distance", distance)
    settings = (method, distance)
    return call.measure("procrustes", settings, student, teacher, mask, precision, backend, group)


def covariance_distance(
    student: Features,
    teacher: Teacher,
    *,
    mask: Mask = None,
    scale: str = "relative",
    mean_weight: float = 0.0,
    debiased: bool = True,
    rotation: Features | str | None = None,
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    """Squared distance between the covariances, the teacher's rotated by Q.

    ``||S_s - Q^T S_t Q||^2 * s + mean_weight * ||mu_s - mu_t Q||^2`` with ``S = Xc^T Xc / (n-1)``
    and ``s`` = 1 (``"none"``), ``1 / (4 D1^2)`` (``"coral"``) or ``1 / ||Q^T S_t Q||^2``
    (``"relative"``).

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l); D2 = D1 without a rotation. Instead of
            features, :class:`~rift_kernels.TeacherStatistics` or a list of those.
        mask: boolean (..., N), True = valid; n >= 2.
        scale: see above. ``"relative"`` is invariant to scaling both sets of features by one
            factor.
        mean_weight: weight of the squared distance between the means; not scaled by ``s``.
        debiased: with statistics as teacher, correct the bias of small batches. The covariance of n
            rows scatters around that of the data. Uncorrected, a student that *is* its teacher has
            a relative distance of about ``(1 + r) / (n - 1)`` for normal features, not 0. Here
            ``r = tr(S_t)^2 / ||S_t||^2``, at most D. The minimum then lies at features that are too
            small. The correction replaces ``||S_s||^2`` by the unbiased HSIC_1 of
            :func:`linear_cka`, and ``||mu_s||^2`` by its unbiased estimate. The value may be
            negative; needs n >= 4. Ignored with features as teacher, whose rows scatter as the
            student's do, and with ``rotation="optimal"``.
        rotation: Q, (D2, D1) with orthonormal columns (rows if D2 < D1), or None for the identity;
            a list for lists. Orthogonality is not checked. Q gets a gradient if it requires one.
            ``"optimal"`` is the orthogonal Q with the least distance, for D1 = D2 and
            ``mean_weight=0``. The value is then the distance between the spectra in closed form,
            ``sum_k (lambda_k(S_s) - lambda_k(S_t))^2 * s``. It retains how the variance is
            distributed over directions, but neither the directions nor where each sample lies. It
            costs one eigendecomposition of min(N, D) rows for each side, in float64.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,). With ``"relative"``, the first term and its gradient are 0 where the teacher
        has no variance.

    Sources: RIFT, arXiv 2503.07399 (the rotated covariance match); Sun & Saenko 2016 (CORAL).
    """
    checks.flag("debiased", debiased)
    checks.option("scale", scale, checks.SCALES)
    mean_weight = checks.number("mean_weight", mean_weight)
    if isinstance(rotation, str) or not checks.is_features(teacher):
        return covariance_matching.covariance_distance(
            student,
            teacher,
            mask,
            scale,
            mean_weight,
            rotation,
            debiased,
            precision,
            backend,
            group,
        )
    return call.measure(
        "covariance",
        (scale, mean_weight),
        student,
        teacher,
        mask,
        precision,
        backend,
        group,
        equal_widths=rotation is None,
        rotation=rotation,
    )


def bures_distance(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    squared: bool = True,
    mean_weight: float = 0.0,
    method: str = "newton_schulz",
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> Tensor:
    """2-Wasserstein distance between the Gaussians that have the features' covariances.

    ``tr(S_s) + tr(S_t) - 2 tr((S_s^1/2 S_t S_s^1/2)^1/2) + mean_weight * ||mu_s - mu_t||^2`` with
    ``S = Xc^T Xc / (n-1)``. With ``squared=False``, the square root of this, whose gradient at
    distance 0 is 0. ``mean_weight=1`` gives the usual Wasserstein distance.

    Args:
        student, teacher: (..., N, D), or lists of (N, D_l), of equal widths.
        mask: boolean (..., N), True = valid; n >= 2.
        squared: return the square of the distance.
        mean_weight: weight of the squared distance between the means.
        method: ``"newton_schulz"``, matrix products only, or ``"eigh"``, exact. Newton-Schulz
            counts singular values of ``Xc Yc^T`` below 1e-6 of its norm (1.4e-8 in Gram form) only
            in part. Where standard deviations fall as steeply as ``k^-2`` and n >= D, this adds
            5e-6 to a distance between features of size 1. Close to the teacher that is too much;
            use ``"eigh"`` there.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,), >= 0.

    Sources: Dowson & Landau 1982; Bhatia, Jain & Lim 2019.
    """
    checks.flag("squared", squared)
    mean_weight = checks.number("mean_weight", mean_weight)
    checks.option("method", method, ("newton_schulz", "eigh"))
    return call.measure(
        "bures",
        (squared, mean_weight, method),
        student,
        teacher,
        mask,
        precision,
        backend,
        group,
        equal_widths=True,
    )


@overload
def cross_covariance(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Mask = ...,
    correction: int = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> Tensor: ...


@overload
def cross_covariance(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Mask = ...,
    correction: int = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> list[Tensor]: ...


def cross_covariance(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    correction: int = 1,
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> Tensor | list[Tensor]:
    """Centered cross-covariance ``Xc^T Yc / (n - correction)``.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid; n >= 2 and n > ``correction``.
        correction: 1 for the unbiased estimate, 0 to divide by n.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (..., D1, D2), or a list of (D1_l, D2_l). Differentiable in both inputs.
    """
    if isinstance(correction, bool) or not isinstance(correction, numbers.Integral):
        raise TypeError(f"correction must be an integer; got {correction!r}")
    if correction < 0:
        raise ValueError(f"correction must not be negative; got {correction}")
    min_rows = max(2, correction + 1)
    settings = (f"cross_covariance, {correction}", precision)
    layers = call.moments(
        student, teacher, mask, min_rows, group, settings, "xy", precision, backend
    )
    results = []
    for layer in layers:
        divisor = (layer.count - correction).to(layer.cross.dtype)[..., None, None]
        divisor = divisor.masked_fill(divisor <= 0, float("nan"))
        results.append(layer.cross / divisor)
    return results[0] if isinstance(student, Tensor) else results


@overload
def second_moments(
    student: Tensor,
    teacher: Tensor,
    *,
    mask: Mask = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> SecondMoments: ...


@overload
def second_moments(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    *,
    mask: Mask = ...,
    precision: str = ...,
    backend: str = ...,
    group: Group = ...,
) -> list[SecondMoments]: ...


def second_moments(
    student: Features,
    teacher: Features,
    *,
    mask: Mask = None,
    precision: str = "highest",
    backend: str = "auto",
    group: Group = None,
) -> SecondMoments | list[SecondMoments]:
    """Count, means and centered second moments: the quantities that define every measure here.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid; n >= 2.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        :class:`SecondMoments`, or a list of them. All fields except the count are differentiable.
    """
    settings = ("second_moments", precision)
    layers = call.moments(
        student, teacher, mask, 2, group, settings, "xx xy yy", precision, backend
    )
    return layers[0] if isinstance(student, Tensor) else layers
