"""What is measured: the shapes of each profile, and the features."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CKA_MEASURES = ("cka_biased", "cka_debiased")
MEASURES = (*CKA_MEASURES, "procrustes", "covariance", "bures")


@dataclass(frozen=True)
class Workload:
    """A measure on features of one shape; student and teacher are equally wide."""

    measure: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    layers: int = 1

    @property
    def shape(self) -> str:
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        return f"{layers}{self.rows} x {self.width} {str(self.dtype).removeprefix('torch.')}"

    def __str__(self) -> str:
        return f"{self.measure} {self.shape}"


@dataclass(frozen=True)
class Profile:
    """A set of workloads, and how much effort goes into them.

    ``probe`` is the width of the product that finds the matmul peak, and the size in MiB of the
    copy that finds the bandwidth. ``budget`` is in seconds.
    """

    workloads: tuple[Workload, ...]
    budget: float
    probe: int
    max_rounds: int = 100
    compiled: bool = True


BFLOAT16 = torch.bfloat16

_CPU = (
    Workload("cka_biased", 64, 768),
    Workload("cka_biased", 256, 768),
    Workload("cka_biased", 64, 4096),
    Workload("cka_biased", 1024, 1024),
    Workload("cka_biased", 4096, 768),
    Workload("cka_biased", 4096, 768, BFLOAT16),
    Workload("cka_biased", 64, 768, layers=12),
    Workload("cka_debiased", 64, 768),
    Workload("cka_debiased", 1024, 1024),
    Workload("cka_debiased", 2048, 768),
    *(
        Workload(measure, rows, width)
        for measure in ("procrustes", "covariance", "bures")
        for rows, width in ((64, 768), (1024, 256))
    ),
)

_GPU = (
    *_CPU,
    Workload("cka_biased", 12608, 768, BFLOAT16),
    Workload("cka_biased", 50432, 1024, BFLOAT16),
    Workload("cka_biased", 65536, 4096, BFLOAT16),
    Workload("cka_biased", 256, 768, layers=12),
    Workload("cka_debiased", 12608, 768, BFLOAT16),
)

PROFILES = {
    "cpu": Profile(_CPU, budget=190, probe=2048, max_rounds=40),
    "gpu": Profile(_GPU, budget=140, probe=8192),
    "smoke": Profile(
        tuple(Workload(measure, 16, 8) for measure in MEASURES),
        budget=5,
        probe=64,
        max_rounds=5,
        compiled=False,
    ),
}


def features(
    workload: Workload, device: torch.device, seed: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Students, which require gradients, and frozen teachers; one tensor (N, D) a layer.

    Columns differ in scale and have means that are not zero, as those of a pretrained model do. The
    student is the teacher plus noise: a finetuned model.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = torch.arange(1, workload.width + 1, device=device) ** -0.5
    students, teachers = [], []
    for _ in range(workload.layers):
        rows = workload.rows, workload.width
        teacher = (normal(*rows) + normal(workload.width)) * scale
        student = teacher + 0.3 * normal(*rows) * scale
        teachers.append(teacher.to(workload.dtype))
        students.append(student.to(workload.dtype).requires_grad_())
    return students, teachers
