"""Backends on CPU tensors as if these lay on a GPU, for callers that can execute the kernels.

The caller brings what executes them: an extension for the CPU, or a driver for Triton. This file
patches the functions in which the package queries a GPU: if one is renamed, it changes, and no
emulator does. ``tests/support/stand_in_gpu.py`` fakes torch.cuda instead, and runs no kernel.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch

from rift_kernels.backends import cuda as cuda_backend
from rift_kernels.dispatch import availability, plan


def patch_cuda(
    patch: pytest.MonkeyPatch,
    name: str,
    extension: ModuleType,
    processors: int,
    form: str | None = None,
) -> None:
    """What :func:`cuda` replaces, for a caller with a MonkeyPatch of its own."""
    patch.setattr(plan, "choose_backend", lambda *_: "cuda")
    if form is not None:
        patch.setattr(plan, "use_gram", lambda *_: form == "gram")
    patch.setattr(cuda_backend, "extension", lambda: extension)
    patch.setattr(cuda_backend, "_stream", lambda _: 0)
    patch.setattr(cuda_backend, "_processors", lambda _: processors)
    patch.setattr(cuda_backend, "_is_hopper", lambda _: name == "sm90")
    cuda_backend._plan.cache_clear()


@contextmanager
def cuda(
    name: str, extension: ModuleType, processors: int, form: str | None = None
) -> Iterator[None]:
    """Every call takes the CUDA kernels of ``extension``, as on a GPU "sm80" or "sm90".

    ``form``: "gram" or "covariance", None for the cheaper one.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch_cuda(patch, name, extension, processors, form)
        yield
    cuda_backend._plan.cache_clear()


@contextmanager
def triton(name: str, processors: int = 5, descriptor_rows: float | None = None) -> Iterator[None]:
    """Triton's launches take CPU tensors, with the configurations of a GPU "sm80" or "sm90".

    ``descriptor_rows``: the fewest rows for the copy engine, by default 256 on sm90.
    """
    from rift_kernels.backends import triton as kernels
    from rift_kernels.backends.triton import config, products

    if descriptor_rows is None:
        descriptor_rows = 256 if name == "sm90" else float("inf")
    blocks = products._blocks
    replaced = {
        "architecture": lambda _: name,
        "processors": lambda _: processors,
        "_descriptor_rows": lambda _: descriptor_rows,
        "_blocks": lambda dtype, _: blocks(dtype, "cuda"),
        "_multiplies_float64": lambda _: True,
        "energy_programs": lambda _, debiased: 32 if debiased else 0,
    }
    missing = set(replaced)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            availability,
            "_reason_against_triton",
            lambda _, dtypes: "float64" if torch.float64 in dtypes else None,
        )
        for info in pkgutil.iter_modules(kernels.__path__, kernels.__name__ + "."):
            module = importlib.import_module(info.name)
            for attribute in replaced.keys() & vars(module).keys():
                patch.setattr(module, attribute, replaced[attribute])
                missing.discard(attribute)
        assert not missing, f"no launch asks for {missing} any more"
        config.forget()
        yield
    config.forget()
