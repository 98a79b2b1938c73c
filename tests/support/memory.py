"""What a call leaves in memory when its results are gone: nothing.

A tensor that some cache keeps belongs to the stream, or to the pool of the CUDA graph, that it was
made in, and whoever finds it there later belongs to another.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from torch import Tensor


def _tensors() -> dict[int, Tensor]:
    gc.collect()
    # By type: isinstance would import what lies behind the lazy proxies of other packages.
    return {id(found): found for found in gc.get_objects() if type(found) is Tensor}


def _is_namespace(value: object) -> bool:
    """A module's own names, which hold everything that it has imported."""
    return isinstance(value, dict) and "__builtins__" in value


def _holds_tensors(value: object) -> bool:
    """Whether a collection, or the cache of a function, has tensors in it, at any depth."""
    seen, left = set(), [value]
    while left:
        found = left.pop()
        if isinstance(found, Tensor):
            return True
        is_cache = isinstance(found, dict | list | tuple | set) or hasattr(found, "cache_info")
        if is_cache and id(found) not in seen and not _is_namespace(found):
            seen.add(id(found))
            left += gc.get_referents(found)
    return False


def assert_none_outlives(call: Callable[[], Tensor]) -> None:
    """Neither the first call of something nor its backward leaves a tensor behind."""
    before = _tensors()
    values = call()
    values.sum().backward()
    del values
    left = [tuple(t.shape) for name, t in _tensors().items() if name not in before]
    assert not left, f"tensors of these shapes are left: {left}"
    # Nor has an earlier call of the same process.
    modules = [m for name, m in sys.modules.items() if name.startswith("rift_kernels.backends")]
    kept = [
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("__") and _holds_tensors(value)
    ]
    assert not kept, f"these hold tensors: {kept}"
