"""A call leaves nothing in memory once its results are gone.

A cached tensor belongs to the stream, or to the CUDA graph's memory pool, in which it was made. A
later call that finds it in the cache may run in another.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable

from torch import Tensor


def _tensors() -> dict[int, Tensor]:
    gc.collect()
    # By type, because isinstance would import what lies behind other packages' lazy proxies.
    return {id(thing): thing for thing in gc.get_objects() if type(thing) is Tensor}


def _is_namespace(value: object) -> bool:
    """Whether this is a module's namespace, which refers to everything it has imported."""
    return isinstance(value, dict) and "__builtins__" in value


def _holds_tensors(value: object) -> bool:
    """Whether a collection, or a function's cache, contains tensors, at any depth."""
    seen, waiting = set(), [value]
    while waiting:
        thing = waiting.pop()
        if isinstance(thing, Tensor):
            return True
        is_cache = isinstance(thing, dict | list | tuple | set) or hasattr(thing, "cache_info")
        if is_cache and id(thing) not in seen and not _is_namespace(thing):
            seen.add(id(thing))
            waiting += gc.get_referents(thing)
    return False


def assert_none_outlives(call: Callable[[], Tensor]) -> None:
    """Neither a call nor its backward leaves a tensor behind."""
    before = _tensors()
    values = call()
    values.sum().backward()
    del values
    shapes = [tuple(t.shape) for key, t in _tensors().items() if key not in before]
    assert not shapes, f"tensors of these shapes are left: {shapes}"
    # Nor did an earlier call of this process.
    modules = [m for name, m in sys.modules.items() if name.startswith("rift_kernels.backends")]
    holders = [
        f"{module.__name__}.{name}"
        for module in modules
        for name, value in vars(module).items()
        if not name.startswith("__") and _holds_tensors(value)
    ]
    assert not holders, f"these hold tensors: {holders}"
