"""``rift_kernels._C`` for a CPU: csrc's own bindings and kernels, compiled by g++.

``tests/support/emulator`` takes the place of CUDA's runtime and of the GPU.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

import rift_kernels as rk
from tests.support import cases

TESTS = Path(__file__).parents[1]
# Major compute capability and bytes of shared memory of a block, by where blocks exchange data:
# GPUs before sm_90 have no clusters.
GPUS = {"clusters": ("9", str(227 * 1024)), "global memory": ("8", str(163 * 1024))}
SOURCES = (
    TESTS.parent / "csrc" / "bindings.cpp",
    TESTS / "support" / "emulator" / "launchers.cpp",
    TESTS / "support" / "emulator" / "runtime.cpp",
)


def build(folder: Path) -> ModuleType:
    """The extension, compiled into ``folder`` and imported."""
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11")
    target = folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    command = [
        *("g++", "-std=c++17", "-O2", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
        *("-fPIC", "-shared", "-fvisibility=hidden"),
        *("-DRIFT_EMULATOR", "-DRIFT_ARCHS=emulated_architectures()"),
        # A fortified longjmp rejects jumps from one fiber's stack to another's.
        "-U_FORTIFY_SOURCE",
        # The emulator's headers of the runtime and the driver replace CUDA's.
        *("-I", str(TESTS / "support" / "emulator"), "-I", str(TESTS.parent / "csrc")),
        *("-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")),
        *(*map(str, SOURCES), "-o", str(target)),
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    specification = importlib.util.spec_from_file_location("_C", target)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def assert_matches_oracle(
    measure, x, y, mask=None, *, dtype: torch.dtype | None = None, scale: float = 1.0
) -> None:
    """Values and gradients are the oracle's, as closely as the dtype allows."""
    exact = (x.double(), y.double())
    expected = cases.value_and_gradients(measure.reference, *exact, mask=mask, scale=scale)
    actual = cases.value_and_gradients(measure, x, y, mask=mask, scale=scale)
    assert actual[0].dtype == torch.float32
    assert actual[0].shape == expected[0].shape
    tolerance = cases.VALUE_TOLERANCE[dtype or x.dtype]
    assert float((actual[0] - expected[0]).abs().max()) <= tolerance
    for grad, expected_grad, features in zip(actual[1:], expected[1:], (x, y), strict=True):
        assert grad.dtype == features.dtype
        assert grad.shape == features.shape
        if float(expected_grad.norm()) * float(features.double().norm()) < 1e-9:
            # The gradient is 0, up to rounding.
            assert float(grad.double().norm() * features.double().norm()) < 1e-4
        else:
            tolerance = cases.GRADIENT_TOLERANCE[features.dtype]
            assert cases.relative_error(grad, expected_grad) <= tolerance
        if mask is not None:
            assert not grad[~mask].any()


def assert_only_required_gradients(
    x: torch.Tensor, y: torch.Tensor, required: tuple[bool, bool], **settings: bool
) -> None:
    """The value and each required gradient have the bits of a call that requires both."""
    both = cases.value_and_gradients(rk.linear_cka, x, y, **settings)
    x.requires_grad_(required[0])
    y.requires_grad_(required[1])
    value = rk.linear_cka(x, y, **settings)
    assert torch.equal(value.detach(), both[0])
    if any(required):
        incoming = torch.rand((), generator=torch.Generator().manual_seed(1)).double() + 0.5
        value.backward(incoming.float())
    for features, is_required, grad in zip((x, y), required, both[1:], strict=True):
        assert torch.equal(features.grad, grad) if is_required else features.grad is None
