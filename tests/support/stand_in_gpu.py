"""A stand-in GPU for the benchmarks: the parts of torch.cuda that they use, on a CPU.

Clocks, graphs, memory, names and limits exist; tensors "on the GPU" are in the CPU's memory, and
rift_kernels' kernels report that they cannot run. ``install`` replaces torch.cuda in this process
and makes its benchmarks small. A process started with ``environment()`` does so on its own, as do
its children; these cannot install packages.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

NAME = "Stand-in GPU"
VARIABLE = "RIFT_STAND_IN_GPU"
Set = Callable[[Any, str, Any], None]


class Event:
    """A point in time."""

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing
        self._at = 0.0

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        return (end._at - self._at) * 1e3


class Graph:
    """A graph whose capture runs once and whose replay does nothing."""

    captured = False

    def replay(self) -> None:
        assert self.captured


class Stream:
    cuda_stream = 0

    def wait_stream(self, _: Stream) -> None:
        pass


class Generator(torch.Generator):
    """A generator on the CPU, whatever the device."""

    def __new__(cls, *_: Any) -> Generator:
        return super().__new__(cls)


def _is_on_gpu(place: object) -> bool:
    return isinstance(place, str | torch.device) and torch.device(place).type == "cuda"


class OnCPU(TorchFunctionMode):
    """Creates tensors for the GPU on the CPU."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs and torch.device(kwargs["device"] or "cpu").type == "cuda":
            kwargs["device"] = torch.device("cpu")
        if function is torch.Tensor.to:
            args = tuple("cpu" if _is_on_gpu(arg) else arg for arg in args)
        return function(*args, **kwargs)


@contextlib.contextmanager
def _profile(activities: list[Any]) -> Iterator[Any]:
    """A profile of one call on the host and two kernels."""
    assert len(activities) == 2
    kinds = [SimpleNamespace(name=name) for name in ("CPU", "CUDA", "CUDA")]
    yield SimpleNamespace(events=lambda: [SimpleNamespace(device_type=kind) for kind in kinds])


@contextlib.contextmanager
def _capture(graph: Graph) -> Iterator[None]:
    yield
    graph.captured = True


def _query(*command: str, **_: Any) -> Any:
    text = "570.1" if any("driver_version" in word for word in command[0]) else "1980 MHz, 700 W"
    return SimpleNamespace(stdout=text, returncode=0)


def install(put: Set = setattr) -> None:
    """Replace torch.cuda; ``put`` sets an attribute, and may undo that later."""
    from benchmarks import environment, frontier, host, measure, step, workloads
    from rift_kernels.dispatch import availability

    properties = SimpleNamespace(L2_cache_size=2**12, multi_processor_count=2, total_memory=2**30)
    replacements: dict[str, Any] = {
        "is_available": lambda: True,
        "get_device_name": lambda *_: NAME,
        "get_device_capability": lambda *_: (9, 0),
        "get_device_properties": lambda *_: properties,
        "synchronize": lambda *_: None,
        "memory_allocated": lambda *_: 1000,
        "max_memory_allocated": lambda *_: 5000,
        "reset_peak_memory_stats": lambda *_: None,
        "current_stream": lambda *_: Stream(),
        "is_current_stream_capturing": lambda: False,
        "stream": lambda _: contextlib.nullcontext(),
        "graph": _capture,
        "Event": Event,
        "CUDAGraph": Graph,
        "Stream": Stream,
    }
    for name, replacement in replacements.items():
        put(torch.cuda, name, replacement)
    put(measure, "profile", _profile)
    put(torch, "Generator", Generator)
    reason = availability.reason_against
    put(
        availability,
        "reason_against",
        lambda name, *rest: reason(name, *rest) if name == "eager" else "a stand-in has no kernels",
    )
    run = subprocess.run
    put(
        environment,
        "subprocess",
        SimpleNamespace(
            run=lambda command, **options: (_query if command[0] == "nvidia-smi" else run)(
                command, **options
            ),
            CalledProcessError=subprocess.CalledProcessError,
        ),
    )
    for module in (workloads, step, frontier):
        profiles: dict[str, Any] = getattr(module, "PROFILES")  # noqa: B009
        put(
            module,
            "PROFILES",
            {**profiles, **dict.fromkeys(("headline", "gpu", "full"), profiles["smoke"])},
        )
    put(host, "SECONDS", 0.01)


# Runs when a process starts. ``pip`` and ``python -m pip`` both import pip.
_SITE = """
import os, sys

def refuse_to_install(event, arguments):
    if event == "import" and arguments[0].split(".")[0] in ("pip", "ensurepip"):
        raise RuntimeError("nothing may be installed here")

sys.addaudithook(refuse_to_install)
if os.environ.get({variable!r}):
    sys.path.insert(0, {root!r})
    from tests.support import stand_in_gpu
    stand_in_gpu.install()
    stand_in_gpu.OnCPU().__enter__()
"""


def environment(folder: Path) -> dict[str, str]:
    """Environment variables for a process that has this GPU from its start."""
    root = Path(__file__).parents[2]
    text = _SITE.format(variable=VARIABLE, root=str(root))
    (folder / "sitecustomize.py").write_text(text)
    paths = [str(folder), str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    # Threads that wait for one another are slow if other jobs run.
    return {VARIABLE: "1", "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
