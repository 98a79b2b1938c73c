"""``python -m tests.gpu.exercise``: every Triton and CUDA kernel once on small features.

``make gpu-check`` runs it with ``--few`` under compute-sanitizer. By hand, it is a first check of a
new GPU. Values and gradients are compared with the eager backend's in float64.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import product
from unittest import mock

import torch
from torch import Tensor

from rift_kernels.backends import cuda
from rift_kernels.dispatch import availability
from tests.support import cases

TOLERANCE = 1e-2
# On a Hopper GPU, the kernels for any GPU can compute many rows, too.
GENERAL = "cuda without Hopper's own kernels"
MEASURES = (cases.CKA, cases.CKA_BIASED, cases.COVARIANCE, cases.PROCRUSTES, cases.BURES)
# Small and general Gram form, covariance form with pointers and with descriptors.
SHAPES = ((32, 72), (160, 136), (300, 64), (1100, 72))
FEW_SHAPES = ((32, 72), (160, 136), (1100, 72))
FEW_MEASURES = (cases.CKA, cases.COVARIANCE)


def value_and_gradient(
    measure: cases.Measure, x: Tensor, y: Tensor, mask: Tensor | None, backend: str
) -> Tensor:
    """Both in one vector, the gradient of length 1."""
    x = x.detach().requires_grad_()
    value = measure(x, y, mask=mask, backend=backend)
    grad = torch.autograd.grad(value, x)[0].double().flatten()
    return torch.cat([value.detach().double().reshape(1), grad / grad.norm()])


def compare(device: torch.device, few: bool = False) -> int:
    """How many comparisons fail; ``few`` takes one kernel of each kind, for a slow tool."""
    failures = 0
    # On a CPU, precompile launches Triton's kernels; nvcc compiles the CUDA kernels without it.
    reason = availability.reason_against("cuda") if device.type == "cuda" else "no GPU"
    if reason is not None:
        print(f"without the CUDA kernels: {reason}")
    shapes, measures = (FEW_SHAPES, FEW_MEASURES) if few else (SHAPES, MEASURES)
    dtypes = (torch.bfloat16,) if few else (torch.bfloat16, torch.float32)
    masks = (False,) if few else (False, True)
    for (rows, width), dtype, masked, measure in product(shapes, dtypes, masks, measures):
        x, y, mask = cases.Case("", rows, width, width, masked=masked).features(dtype)
        x, y, mask = x.to(device), y.to(device), mask.to(device) if masked else None
        expected = value_and_gradient(measure, x.double(), y.double(), mask, "eager")
        many_rows = rows > 2 * width and dtype == torch.bfloat16 and not masked
        backends = ["triton"]
        if reason is None and measure.name.startswith("cka") and (rows <= 128 or many_rows):
            backends += ["cuda", GENERAL] if many_rows else ["cuda"]
        for backend in backends:
            without_hopper = mock.patch.object(cuda, "_is_hopper", return_value=False)
            with without_hopper if backend == GENERAL else nullcontext():
                actual = value_and_gradient(measure, x, y, mask, backend.split()[0])
            error = float((actual - expected).norm())
            if not error <= TOLERANCE:
                failures += 1
                case = f"{measure.name}, {rows} x {width} {dtype}{', masked' if masked else ''}"
                print(f"{backend}: {case}: off by {error:.1e}", flush=True)
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
