"""Polar factors and optimal-transport maps, by matrix products alone or by exact factorisation.

Everything here runs in float64: the matrices are small beside the features, and the gradients that
use them are differences of near-equal terms.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

# x -> a x + b x^3 + c x^5, applied to the singular values, one step after another. Each step is the
# minimax approximation of 1 on the interval that the previous step leaves, as constructed by Amsel
# et al. ("The Polar Express", 2025). While that interval begins near 0, the step is taken at
# x / 1.01, so that rounding cannot push a value out. The composition is 1 +- 3e-12 on
# [1.4e-8, 1] ...
POLAR_STEPS = (
    (8.430001641116219, -24.538215610980146, 17.85658121065871),
    (4.21500009576927, -3.0672765655713934, 0.5580181490157177),
    (4.214996784647683, -3.0672743802388998, 0.5580179212257459),
    (4.214982828337792, -3.067265169101808, 0.558016961095201),
    (4.214924003743099, -3.067226344891715, 0.5580129142228003),
    (4.214676080521806, -3.067062714003846, 0.5579958580531962),
    (4.2136314836704996, -3.0663732440893647, 0.5579239911814617),
    (4.209235599330123, -3.063471287397628, 0.5576215140550829),
    (4.190832170225531, -3.05131301319703, 0.5563543772491656),
    (4.11542955358439, -3.001340045860062, 0.5511487721102696),
    (3.8322615881727287, -2.811217060313529, 0.5313886809514625),
    (3.054893207710098, -2.2629438860336766, 0.47505519611371466),
    (2.127756620713766, -1.508131192585516, 0.40112969296112466),
    (1.8800624807876143, -1.2564453859618612, 0.3763864519568857),
    (1.8750007690251558, -1.2500015160192837, 0.3750007469941105),
)
# ... and 1 +- 8e-12 on [1e-6, 1] for roots of eigenvalues; below that, rounding dominates.
TRANSPORT_STEPS = (
    (8.429958930684629, -24.53805022316512, 17.8564522111289),
    (4.214927770625356, -3.067228037906838, 0.5580128644966584),
    (4.214691955561186, -3.067069848982002, 0.5579956483968701),
    (4.213698354830939, -3.066403298808073, 0.5579231064042506),
    (4.209516714098485, -3.063597627279826, 0.5576177656657578),
    (4.192003910217567, -3.051839534578548, 0.5563382434740814),
    (4.120143117535621, -3.003456571573111, 0.5510751311356854),
    (3.848683150206445, -2.818566340631538, 0.5309978018615462),
    (3.088830937367813, -2.277805479880878, 0.4728498544775217),
    (2.143495304300384, -1.512119946460401, 0.3949663724784364),
    (1.879022696456693, -1.253278074910175, 0.3742739900775917),
    (1.874995844749517, -1.249991641315447, 0.3749957965661476),
)


def _frobenius_norm(matrix: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(matrix, keepdim=True)


def _divide(matrix: Tensor, divisor: Tensor) -> Tensor:
    """matrix / divisor, and 0 where the divisor is 0; NaN stays NaN."""
    return (matrix / divisor).masked_fill_(divisor == 0, 0.0)


def polar(matrix: Tensor, primitives: ModuleType) -> tuple[Tensor, Tensor]:
    """The polar factor ``U V^T`` of ``matrix = U S V^T``, and the nuclear norm ``sum(S)``.

    Newton-Schulz: odd quintic steps, three products each. Singular values under 1.4e-8 of the
    Frobenius norm count in part, zeros not at all. So the factor stays bounded and finite where the
    derivative of an SVD does not.

    Args:
        matrix: (..., M, N), float64.
        primitives: a module with the products, such as ``backends.eager``.

    Returns:
        The factor (..., M, N) and the nuclear norm (...).
    """
    is_wide = matrix.shape[-2] < matrix.shape[-1]
    x = matrix.mT if is_wide else matrix
    x = _divide(x, _frobenius_norm(x))
    for a, b, c in POLAR_STEPS:
        gram = primitives.product_symmetric(x.mT, x)
        x = a * x + primitives.product(x, b * gram + c * primitives.product_symmetric(gram, gram))
    factor = x.mT if is_wide else x
    return factor, (factor * matrix).sum((-2, -1))


def polar_svd(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """:func:`polar` by singular value decomposition: exact but slow, for checking."""
    matrix, poison = _finite(matrix)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    is_nonzero = s > _rounding(s, matrix)
    return (u * is_nonzero.unsqueeze(-2)) @ vh + poison, s.sum(-1) + poison[..., 0, 0]


def transport(a: Tensor, b: Tensor, primitives: ModuleType) -> tuple[Tensor, Tensor, Tensor]:
    """The optimal-transport maps between N(0, a) and N(0, b), and the fidelity of a and b.

    ``forth = a^-1/2 (a^1/2 b a^1/2)^1/2 a^-1/2`` solves ``forth a forth = b``; ``back`` is its
    inverse; the fidelity is ``tr((a^1/2 b a^1/2)^1/2) = <a, forth>``.

    Coupled Newton-Schulz on the pair (b, a): polynomials like those of :func:`polar` act on the
    eigenvalues of ``a b``. The two iterates converge to ``forth`` and ``back`` without a matrix
    inverse or square root. Roots of these eigenvalues under 1e-6 of the norms count in part.

    Args:
        a, b: (..., N, N), symmetric positive semidefinite, float64.
        primitives: a module with the products, such as ``backends.eager``.

    Returns:
        forth (..., N, N), back (..., N, N), fidelity (...).
    """
    norm_a, norm_b = _frobenius_norm(a), _frobenius_norm(b)
    y, z = _divide(b, norm_b), _divide(a, norm_a)
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    for c1, c3, c5 in TRANSPORT_STEPS:
        product = primitives.product(z, y)
        step = c1 * eye + c3 * product + c5 * primitives.product(product, product)
        # Symmetric, because the step is a polynomial in z y.
        y, z = primitives.product_symmetric(y, step), primitives.product_symmetric(step, z)
    # Symmetric in exact arithmetic, and made so here because the gradient relies on it.
    forth = _divide(0.5 * (y + y.mT) * norm_b.sqrt(), norm_a.sqrt())
    back = _divide(0.5 * (z + z.mT) * norm_a.sqrt(), norm_b.sqrt())
    return forth, back, (forth * a).sum((-2, -1))


def transport_eigh(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`transport` by eigendecomposition: exact but slow, for checking."""
    (a, poison_a), (b, poison_b) = _finite(a), _finite(b)
    poison = poison_a + poison_b
    root_a, root_b = _square_root(a), _square_root(b)
    # b (a b)^-1/2 with a^1/2 b^1/2 = U S V^T; the pseudo-inverse where a b is singular.
    u, s, vh = torch.linalg.svd(root_a @ root_b)
    inverse = (1 / s).masked_fill_(s <= _rounding(s, a), 0.0).unsqueeze(-2)
    right, left = root_b @ vh.mT, root_a @ u
    forth, back = (right * inverse) @ right.mT, (left * inverse) @ left.mT
    return forth + poison, back + poison, s.sum(-1) + poison[..., 0, 0]


def eigenvalues(a: Tensor) -> Tensor:
    """Eigenvalues (..., N), ascending, of symmetric (..., N, N); NaN for a matrix with NaN or Inf.

    Differentiable even where eigenvalues repeat: the gradients need only eigenvectors.
    """
    a, poison = _finite(a)
    return torch.linalg.eigvalsh(a) + poison[..., 0]


def _square_root(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    root = values.masked_fill(values <= _rounding(values, a), 0.0).sqrt()
    return (vectors * root.unsqueeze(-2)) @ vectors.mT


def _rounding(spectrum: Tensor, matrix: Tensor) -> Tensor:
    """The size below which entries of this spectrum count as 0."""
    largest = spectrum.abs().amax(-1, keepdim=True)
    return largest * torch.finfo(spectrum.dtype).eps * max(matrix.shape[-2:])


def _finite(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """0 in place of matrices with NaN or Inf, at which LAPACK raises, and a term that adds NaN."""
    finite = torch.isfinite(matrix).all(-1, keepdim=True).all(-2, keepdim=True)
    return torch.where(finite, matrix, 0.0), torch.where(finite, 0.0, float("nan"))
