"""The public functions. Each docstring is the specification; each body checks, chooses and calls.

One alphabet of dimensions throughout the package: N rows (samples or tokens), D1 student width,
D2 teacher width, L layers. ``Xc`` and ``Yc`` are the student's and the teacher's valid rows minus
their mean, ``n`` of them; ``||.||`` is the Frobenius and ``||.||_*`` the nuclear norm.

What all functions share
    Features are ``(..., N, D)``, the leading axes being a batch, one value each; or lists of L
    tensors ``(N, D_l)`` of any widths, for a vector of L values. float64, float32, bfloat16 and
    float16, student and teacher not necessarily alike.

    ``mask`` is boolean ``(..., N)``, True = valid; for a list, one mask for all or a list of masks.
    Masked rows are selected away: whatever they hold, NaN included, has no effect, and their
    gradient is 0.

    The value is float32, or float64 where an input is float64; accumulation is in that dtype and
    sums of squares are in float64. The GPU kernels multiply float32 and float16 features as two
    bfloat16 each, to 16 bits: values are then right to 1e-5. Autocast changes nothing. Gradients
    flow to whichever input requires them, in its own dtype; they cannot be differentiated again,
    and neither forward mode nor torch.func is supported: both raise. The value does not change when
    features are shifted or scaled by a constant (where the measure itself is so invariant), for
    float32 as long as they are of a size between 1e-17 and 1e17: squares of larger ones overflow to
    NaN or Inf, smaller ones lose digits and in the end count as no variance. Results are
    deterministic: on a CPU for a given number of threads, in the kernels for a given GPU.
    NaN or Inf in a valid row makes that layer's value NaN.

    ``precision`` has the values of ``torch.set_float32_matmul_precision``. ``"highest"`` keeps
    products at the full precision of their operands. ``"high"`` lets products of the eager backend
    follow torch's TF32/bf16 settings. ``"medium"`` does so as well, and rounds the gradient's
    coefficients to bfloat16 in the GPU kernels. ``backend`` is ``"auto"``, ``"eager"``,
    ``"triton"`` or ``"cuda"``; an explicit choice that cannot run raises ``RuntimeError``. Features
    must not change in place between a call and its backward on a GPU, where the kernels keep no
    copy: autograd raises then.

    ``group`` is for a batch whose rows are spread over processes: a
    ``torch.distributed.ProcessGroup``, or ``"world"`` for all processes (this one alone where
    torch.distributed is not initialised). All ranks of the group make the call, with any number of
    rows each, none included; all get the value of the whole batch, to the same bit. Gradients are
    scaled so that after the averaging of DDP or FSDP the parameters' gradients are those of one
    process with the whole batch. A rank with wrong input makes all raise, and so does one that has
    ended; one that never calls does after the group's timeout. Which rows of a whole batch only a
    mask leaves is not checked where moments are summed: of too few, the value is NaN. torch.compile
    breaks its graph there. See :mod:`rift_kernels.dispatch.shared_batch`.

    Wrong input raises ``TypeError`` or ``ValueError`` that names the argument before anything runs.
    Too few valid rows raise ``ValueError``; where only the mask tells and reading it would stall
    (on a GPU, under torch.compile) the value is NaN instead.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import overload

from torch import Tensor

from .dispatch import call, checks, moment_matching
from .dispatch.checks import Features, Mask
from .dispatch.moment_matching import Teacher
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

    and row energies ``r_i = ||xc_i||^2``, ``q_i = ||yc_i||^2``. The biased value of *independent*
    features is near 1 when N is small beside D; the debiased one is near 0, may be negative and is
    never clamped.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid.
        debiased: correct the bias of small batches; needs n >= 4, else n >= 2.
        distance: return 1 - CKA, rounded once: a float32 near 1 has steps of 6e-8, one near 0 not.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,); CKA is in [-1, 1], [0, 1] biased. It is 0 with gradient 0 where student or
        teacher has no variance, or debiased none beyond rounding: when at most one row differs from
        the others.

    Accuracy, float32: 2e-6, also where up to eight rows are thousands of times longer than all
    others, as in language models; 1e-5 in the kernels. What cannot be told from rounding is 0.

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
    """How well the best orthogonal map takes one onto the other: 0 to 1, 1 for a rotation.

    ``max_Q <Xc Q, Yc> / (||Xc|| ||Yc||) = ||Xc^T Yc||_* / (||Xc|| ||Yc||)``. The gradient of the
    nuclear norm is the polar factor, which stays finite where that of an SVD does not.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l); D1 and D2 may differ.
        mask: boolean (..., N), True = valid; n >= 2.
        method: ``"newton_schulz"``, matrix products only, or ``"svd"``, exact. In the former,
            singular values of ``Xc^T Yc`` under 1.4e-8 of its norm (1e-6 in Gram form) count in
            part. That is nothing to the value, but where standard deviations fall as steeply as
            ``k^-2`` it is felt in the gradient (5e-4; 3e-3 in Gram form), the more the closer the
            value is to 1.
        distance: return 1 - similarity, rounded once.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        (...) or (L,), the similarity. 0 with gradient 0 where student or teacher has no variance.

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
    """Squared distance of the covariances, the teacher's rotated by Q.

    ``||S_s - Q^T S_t Q||^2 * s + mean_weight * ||mu_s - mu_t Q||^2`` with ``S = Xc^T Xc / (n-1)``
    and ``s`` = 1 (``"none"``), ``1 / (4 D1^2)`` (``"coral"``) or ``1 / ||Q^T S_t Q||^2``
    (``"relative"``).

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l); D2 = D1 without a rotation. Or, in place of
            features, their :class:`~rift_kernels.TeacherStatistics`, or a list of those.
        mask: boolean (..., N), True = valid; n >= 2.
        scale: see above. ``"relative"`` does not change when both features are scaled alike.
        mean_weight: weight of the squared distance of the means; it is not scaled by ``s``.
        debiased: of statistics, take off what few rows add: the covariance of n rows scatters about
            that of the data, so that the relative distance of a student that *is* its teacher would
            not be 0 but about ``(1 + r) / (n - 1)`` (normal features), with ``r = tr(S_t)^2 /
            ||S_t||^2``, at most D, and be least for features shrunk. ``||S_s||^2`` is replaced by
            the unbiased HSIC_1 of :func:`linear_cka`, and ``||mu_s||^2`` by its estimate; the value
            may be negative; needs n >= 4. No matter with features as teacher, whose rows scatter as
            the student's do, nor for ``rotation="optimal"``.
        rotation: Q, (D2, D1) with orthonormal columns (rows if D2 < D1), or None for the identity;
            a list for lists. Orthogonality is not checked. Q gets a gradient if it requires one.
            ``"optimal"``: of all orthogonal Q the one with the least distance, for D1 = D2 and
            ``mean_weight=0``. What is left then is the distance of the spectra,
            ``sum_k (lambda_k(S_s) - lambda_k(S_t))^2 * s``, in closed form: it keeps how much
            variance there is in how many directions and nothing of which directions, nor of which
            sample lies where. An eigendecomposition a side, of min(N, D) rows and in float64.
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
        return moment_matching.covariance_distance(
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
    """2-Wasserstein distance of the Gaussians with the features' covariances.

    ``tr(S_s) + tr(S_t) - 2 tr((S_s^1/2 S_t S_s^1/2)^1/2) + mean_weight * ||mu_s - mu_t||^2`` with
    ``S = Xc^T Xc / (n-1)``; its square root if not ``squared``, whose gradient at distance 0 is 0.
    The usual Wasserstein distance is ``mean_weight=1``.

    Args:
        student, teacher: (..., N, D), or lists of (N, D_l), of equal widths.
        mask: boolean (..., N), True = valid; n >= 2.
        squared: return the square of the distance.
        mean_weight: weight of the squared distance of the means.
        method: ``"newton_schulz"``, matrix products only, or ``"eigh"``, exact. In the former,
            singular values of ``Xc Yc^T`` under 1e-6 of its norm (1.4e-8 in Gram form) count in
            part. Where standard deviations fall as steeply as ``k^-2`` and n >= D, this adds 5e-6
            to a distance between features of size 1: too much close to the teacher, where
            ``"eigh"`` is right.
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
    """Count, means and the centered second moments that every measure here is made of.

    Args:
        student: (..., N, D1), or a list of (N, D1_l).
        teacher: (..., N, D2), or a list of (N, D2_l).
        mask: boolean (..., N), True = valid; n >= 2.
        precision, backend, group: see :mod:`rift_kernels.functional`.

    Returns:
        :class:`SecondMoments`, or a list of them. All but the count are differentiable.
    """
    settings = ("second_moments", precision)
    layers = call.moments(
        student, teacher, mask, 2, group, settings, "xx xy yy", precision, backend
    )
    return layers[0] if isinstance(student, Tensor) else layers
