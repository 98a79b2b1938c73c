"""What is measured: the shapes of each profile, and the features."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Hidden states of a pretrained transformer after layers in its middle and at its end, student and
# teacher, bfloat16; a row is a token. data/make_antiberty.py made them.
REAL_FEATURES = Path(__file__).parent / "data" / "antiberty.safetensors"
REAL_ROWS, REAL_WIDTH, REAL_LAYERS = 480, 512, (4, 8)

CKA_MEASURES = ("cka_biased", "cka_debiased")
OTHER_MEASURES = ("procrustes", "covariance", "bures")
MEASURES = (*CKA_MEASURES, *OTHER_MEASURES)
COMPILED = "torch.compile"
AUTOTUNED = f"{COMPILED} max-autotune"
BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Workload:
    """A measure on features of one shape; student and teacher are equally wide.

    ``valid`` is the share of rows that a mask selects, and ``kind`` where features come from:
    "random" numbers, random numbers with "massive" activations, or a "real" transformer.
    """

    measure: str
    rows: int
    width: int
    dtype: torch.dtype = torch.float32
    layers: int = 1
    valid: float = 1.0
    kind: str = "random"

    @property
    def shape(self) -> str:
        layers = f"{self.layers} layers of " if self.layers > 1 else ""
        kind = f", {self.kind} features" if self.kind != "random" else ""
        valid = f", {self.valid:.0%} valid" if self.valid < 1 else ""
        return f"{layers}{self.rows} x {self.width} {dtype_name(self.dtype)}{kind}{valid}"

    def __str__(self) -> str:
        return f"{self.measure} {self.shape}"


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Inputs:
    """Students, which require gradients, and frozen teachers, (N, D) a layer; valid rows."""

    students: list[Tensor]
    teachers: list[Tensor]
    mask: Tensor | None = None


@dataclass(frozen=True)
class Profile:
    """Workloads, about how many seconds they may take, and which modes of torch.compile run.

    ``probe`` is the width of the product that finds the matmul peak, and the size in MiB of eight
    copies that find the bandwidth.
    """

    workloads: tuple[Workload, ...]
    budget: float
    probe: int
    max_rounds: int = 100
    compiled: tuple[str, ...] = (COMPILED,)


_CPU = (
    # Pooled features, a row an image or a text, and tokens.
    *(Workload("cka_biased", n, 768) for n in (64, 256, 4096)),
    Workload("cka_biased", 64, 4096),
    Workload("cka_biased", 1024, 1024),
    Workload("cka_biased", 64, 768, layers=12),
    Workload("cka_biased", 4096, 768, BFLOAT16),
    Workload("cka_biased", 2048, 768, BFLOAT16, kind="massive"),
    *(Workload("cka_debiased", n, d) for n, d in ((64, 768), (1024, 1024), (2048, 768))),
    Workload("cka_debiased", 2048, 768, valid=0.75),
    Workload("cka_debiased", REAL_ROWS, REAL_WIDTH, BFLOAT16, len(REAL_LAYERS), kind="real"),
    *(Workload(m, n, d) for m in OTHER_MEASURES for n, d in ((64, 768), (1024, 256))),
)
# GPUs are bought for these: tokens of a ViT-B and a ViT-L, and of a language model.
_TOKENS = tuple(
    Workload("cka_biased", n, d, BFLOAT16) for n, d in ((12608, 768), (50432, 1024), (65536, 4096))
)
_DEBIASED_TOKENS = Workload("cka_debiased", 12608, 768, BFLOAT16)
# A GPU is judged by these first: pooled features, class tokens of all layers, tokens.
_HEADLINE = (
    Workload("cka_debiased", 64, 768, BFLOAT16),
    Workload("cka_debiased", 256, 768, BFLOAT16, layers=12),
    _DEBIASED_TOKENS,
    *_TOKENS[:2],
    Workload("covariance", 12608, 768, BFLOAT16),
)
_GPU = (*_CPU, *_TOKENS, Workload("cka_biased", 256, 768, layers=12), _DEBIASED_TOKENS)
_FULL = (
    *(Workload("cka_debiased", n, d, BFLOAT16) for n in (64, 256, 1024) for d in (384, 768, 1024)),
    *(*_CPU, *_TOKENS, _DEBIASED_TOKENS),
    Workload("cka_debiased", 12608, 768, BFLOAT16, valid=0.75),
    Workload("cka_biased", 12608, 768),
    Workload("cka_biased", 12608, 768, BFLOAT16, kind="massive"),
    *(Workload("cka_biased", 256, 768, BFLOAT16, layers) for layers in (12, 24)),
    Workload("cka_debiased", 4096, 768, BFLOAT16, 12),
    *(Workload(m, 12608, 768, BFLOAT16) for m in OTHER_MEASURES),
    Workload("covariance", 65536, 1024, BFLOAT16),
)
_SMOKE = tuple(Workload(measure, 16, 8) for measure in MEASURES)

PROFILES = {
    "cpu": Profile(_CPU, budget=90, probe=2048, max_rounds=40),
    # gpu-check begins with this: no compiler beside ours, and no step takes a minute.
    "headline": Profile(_HEADLINE, budget=50, probe=8192, compiled=()),
    # gpu-check measures this where there is time.
    "gpu": Profile(_GPU, budget=140, probe=8192),
    "full": Profile(_FULL, budget=500, probe=8192, compiled=(COMPILED, AUTOTUNED)),
    # More time than it takes: on a busy machine, nothing is left out.
    "smoke": Profile(_SMOKE, budget=30, probe=64, max_rounds=5, compiled=()),
}


def features(
    workload: Workload,
    device: torch.device,
    seed: int = 0,
    noise: float = 0.3,
    rotated: bool = False,
) -> Inputs:
    """A workload's features.

    Random columns differ in scale and have means other than zero, like those of a pretrained model.
    The student is the teacher plus noise, like a finetuned model, or that sum rotated.
    """
    generator = torch.Generator(device).manual_seed(seed)
    rows, width = workload.rows, workload.width

    def real() -> list[tuple[Tensor, Tensor]]:
        from safetensors.torch import load_file

        tensors = load_file(REAL_FEATURES, device=str(device))
        return [(tensors[f"student.{n}"], tensors[f"teacher.{n}"]) for n in REAL_LAYERS]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def random() -> tuple[Tensor, Tensor]:
        scale = torch.arange(1, width + 1, device=device) ** -0.5
        teacher = (normal(rows, width) + normal(width)) * scale
        student = teacher + noise * normal(rows, width) * scale
        if workload.kind == "massive":
            student, teacher = massive(student, teacher, generator)
        if rotated:
            student = student @ torch.linalg.qr(normal(width, width))[0]
        return student, teacher

    pairs = real() if workload.kind == "real" else [random() for _ in range(workload.layers)]
    mask = None
    if workload.valid < 1:
        mask = torch.rand(rows, generator=generator, device=device) < workload.valid
    students = [x.to(workload.dtype).requires_grad_() for x, _ in pairs]
    return Inputs(students, [y.to(workload.dtype) for _, y in pairs], mask)


def massive(student: Tensor, teacher: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """1000 medians added to four columns of one row in a hundred, the same in both.

    Language models have them in few channels of few tokens, hardly dependent on the input, like a
    bias (Sun et al. 2024, "Massive Activations in Large Language Models").
    """
    columns, rows = (
        torch.randperm(size, generator=generator, device=teacher.device)
        for size in reversed(teacher.shape)
    )
    bias = torch.zeros_like(teacher)
    bias[rows[: -(-len(teacher) // 100), None], columns[:4]] = 1000 * teacher.abs().median()
    return student + bias, teacher + bias
