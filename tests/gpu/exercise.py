"""``python -m tests.gpu.exercise``: every Triton and CUDA kernel once on small features.

compute-sanitizer watches it, and a first look at a new GPU runs it. Values and gradients are
compared with the eager backend's in float64.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from unittest import mock

import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability

TOLERANCE = 1e-2
# The kernels for any GPU compute many rows, on a Hopper GPU as well.
GENERAL = "cuda without Hopper's own kernels"
MEASURES = (
    "linear_cka",
    "linear_cka biased",
    "covariance_distance",
    "procrustes_similarity",
    "bures_distance",
)
# Small and general Gram form, covariance form with pointers and with descriptors.
SHAPES = ((32, 72), (160, 136), (300, 64), (1100, 72))
FEW_SHAPES = ((32, 72), (160, 136), (1100, 72))
FEW_MEASURES = ("linear_cka", "covariance_distance")


def _value_and_gradient(
    name: str, x: Tensor, y: Tensor, mask: Tensor | None, backend: str
) -> Tensor:
    """Both in one vector, the gradient of unit length."""
    x = x.detach().requires_grad_()
    function, *biased = name.split()
    options = {"debiased": False} if biased else {}
    value = getattr(rk, function)(x, y, mask=mask, backend=backend, **options)
    (grad,) = torch.autograd.grad(value, x)
    grad = grad.double().flatten()
    return torch.cat([value.detach().double().reshape(1), grad / grad.norm()])


def compare(device: torch.device, few: bool = False) -> int:
    """The number of disagreements; ``few`` takes one of each kind, for a slow tool."""
    failures = 0
    # precompile launches Triton's kernels on a CPU; nvcc has compiled the CUDA kernels before.
    reason = availability.reason_against("cuda") if device.type == "cuda" else "no GPU"
    if reason is not None:
        print(f"without the CUDA kernels: {reason}")
    dtypes = (torch.bfloat16,) if few else (torch.bfloat16, torch.float32)
    for (rows, width), dtype in itertools.product(FEW_SHAPES if few else SHAPES, dtypes):
        generator = torch.Generator(device).manual_seed(0)
        y = torch.randn(rows, width, device=device, generator=generator).to(dtype)
        noise = torch.randn(rows, width, device=device, generator=generator)
        x = (y.float() + 0.3 * noise).to(dtype)
        mask = torch.rand(rows, device=device, generator=generator) < 0.8
        masks, names = ((None,), FEW_MEASURES) if few else ((None, mask), MEASURES)
        for valid, name in itertools.product(masks, names):
            expected = _value_and_gradient(name, x.double(), y.double(), valid, "eager")
            many_rows = rows > 2 * width and dtype == torch.bfloat16 and valid is None
            backends = ["triton"]
            if reason is None and name.startswith("linear_cka") and (rows <= 128 or many_rows):
                backends += ["cuda", GENERAL] if many_rows else ["cuda"]
            for backend in backends:
                without_hopper = mock.patch.object(cuda, "_is_hopper", return_value=False)
                with without_hopper if backend == GENERAL else nullcontext():
                    actual = _value_and_gradient(name, x, y, valid, backend.split()[0])
                error = float((actual - expected).norm())
                if not error <= TOLERANCE:
                    failures += 1
                    masked = "" if valid is None else ", masked"
                    what = f"{backend}: {name}, {rows} x {width} {dtype}{masked}"
                    print(f"{what}: off by {error:.1e}", flush=True)
    return failures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.exercise", description=__doc__)
    parser.add_argument("--few", action="store_true", help="a kernel of each kind")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("exercise needs a GPU that torch can use, and this machine has none.")
        return 2
    failures = compare(torch.device("cuda"), options.few)
    print(f"exercise: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
