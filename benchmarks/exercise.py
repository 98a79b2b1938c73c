"""``python -m benchmarks.exercise``: every Triton and CUDA kernel once on small features.

What compute-sanitizer watches, and what a first look at a new GPU runs: values and gradients are
compared with the eager backend's in float64.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from unittest import mock

import torch
from torch import Tensor

import rift_kernels as rk
from rift_kernels import dispatch
from rift_kernels.backends import cuda

TOLERANCE = 1e-2
# Many rows by the kernels for any GPU, on a Hopper GPU as well.
GENERAL = "cuda without Hopper's own kernels"

MEASURES = {
    "linear_cka": {},
    "linear_cka biased": {"debiased": False},
    "covariance_distance": {},
    "procrustes_similarity": {},
    "bures_distance": {},
}


def _without_hopper() -> AbstractContextManager[object]:
    return mock.patch.object(cuda, "_is_hopper", return_value=False)


def _value_and_gradient(
    name: str, x: Tensor, y: Tensor, mask: Tensor | None, backend: str
) -> Tensor:
    """Both in one vector."""
    x = x.detach().requires_grad_()
    function = getattr(rk, name.split()[0])
    value = function(x, y, mask=mask, backend=backend, **MEASURES[name])
    (grad,) = torch.autograd.grad(value, x)
    scale = grad.double().norm()
    return torch.cat([value.detach().double().reshape(1), (grad.double() / scale).flatten()])


def main() -> int:
    if not torch.cuda.is_available():
        print("exercise needs a GPU that torch can use, and this machine has none.")
        return 2
    failures = 0
    # Small and general Gram form, covariance form with pointers and with descriptors.
    has_cuda = dispatch.reason_against("cuda") is None
    if not has_cuda:
        print(f"without the CUDA kernels: {dispatch.reason_against('cuda')}")
    for rows, width in ((32, 72), (160, 136), (300, 64), (1100, 72)):
        for dtype in (torch.bfloat16, torch.float32):
            generator = torch.Generator("cuda").manual_seed(0)
            y = torch.randn(rows, width, device="cuda", generator=generator).to(dtype)
            noise = torch.randn(rows, width, device="cuda", generator=generator)
            x = (y.float() + 0.3 * noise).to(dtype)
            for mask in (None, torch.rand(rows, device="cuda", generator=generator) < 0.8):
                for name in MEASURES:
                    wide = (x.double(), y.double(), mask)
                    expected = _value_and_gradient(name, *wide, "eager")
                    backends = ["triton"]
                    many_rows = rows > 2 * width and dtype == torch.bfloat16 and mask is None
                    if has_cuda and name.startswith("linear_cka") and (rows <= 128 or many_rows):
                        backends += ["cuda", GENERAL] if many_rows else ["cuda"]
                    for backend in backends:
                        with _without_hopper() if backend == GENERAL else nullcontext():
                            actual = _value_and_gradient(name, x, y, mask, backend.split()[0])
                        error = float((actual - expected).norm())
                        if not error <= TOLERANCE:
                            failures += 1
                            masked = "" if mask is None else ", masked"
                            what = f"{backend}: {name}, {rows} x {width} {dtype}{masked}"
                            print(f"{what}: off by {error:.1e}")
    print(f"exercise: {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
