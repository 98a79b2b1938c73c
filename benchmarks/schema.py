"""The forms of result files: ``dataclasses.asdict`` writes them, and :func:`parse` reads them.

Seconds are per clock: forward, backward or both, on a GPU between events; host, until the calls
return; wall, until the device is done; cpu, the process's time, which excludes other processes.
Memory is bytes per phase (forward, backward or both).
A field with a default may be absent or null. With a ``reason``, the rest was not measured, and the
reason says why. An error of None is NaN or infinite.
"""

from __future__ import annotations

import types
import typing
from dataclasses import dataclass, field, is_dataclass
from typing import Any


@dataclass
class Quantiles:  # over rounds
    q20: float
    q50: float
    q80: float


@dataclass
class Bounds:  # of a median over rounds, which lies between them with 95 %
    low: float
    q50: float
    high: float


@dataclass
class Spread:  # over pairs of features; None is infinite
    min: float | None
    median: float | None
    max: float | None


@dataclass
class Environment:
    date: str  # ISO 8601, UTC
    device: str  # the GPU's name, or the CPU's
    cpu: str
    cores: int  # logical cores of the machine
    threads: int  # that torch uses
    gpu: str | None
    driver: str | None
    clocks: str  # a CPU's load average; what nvidia-smi says of clocks, power, throttling
    system: str
    commit: str  # of this repository, or "unknown"
    dirty: bool | None  # whether tracked files had local changes
    versions: dict[str, str | None]  # None: not installed


@dataclass(kw_only=True)
class Result:
    schema: str = ""
    profile: str  # the set of workloads
    environment: Environment


@dataclass
class Provider:
    name: str
    reason: str | None = None


@dataclass(kw_only=True)
class Outcome:  # a provider's, of a workload
    reason: str | None = None
    seconds: dict[str, Quantiles] = field(default_factory=dict)
    relative: Bounds | None = None  # ratio to naive eager's time of the same round
    graph: Quantiles | None = None  # seconds in a CUDA graph, with features from memory
    graph_reason: str = ""  # why there is no graph
    launches: int | None = None  # kernels and copies of a call on a GPU
    memory: dict[str, int] = field(default_factory=dict)  # above the inputs
    value_error: float | None = None  # the largest, absolute, against float64
    gradient_error: float | None = None  # the largest of a layer, relative, against float64
    wrong: bool = False  # whether an error is beyond what oracle.py tolerates


@dataclass(kw_only=True)
class Workload:
    measure: str
    shape: str  # the next six fields in words
    rows: int
    width: int
    layers: int
    dtype: str
    valid: float  # share of the rows that a mask selects
    kind: str  # random features, random ones with massive activations, or real ones
    floor_seconds: float | None  # of the optimal operations or one pass over memory, at the peaks
    predicted_seconds: dict[str, float | None]  # provider: of its operations at the peak
    reason: str | None = None
    rounds: int = 0
    noise: dict[str, float] = field(default_factory=dict)  # clock: share; naive eager timed twice
    results: dict[str, Outcome] = field(default_factory=dict)


@dataclass(kw_only=True)
class Benchmark(Result):  # of python -m benchmarks.run
    schema: str = "rift_kernels benchmark 2"
    # "matmul_flops": dtype: operations a second of a large square product;
    # "copy_bytes": bytes a second, read and written by a copy
    peaks: dict[str, Any]
    providers: list[Provider]
    workloads: list[Workload]


@dataclass
class Curve:
    along: str  # the size that grows: rows, width or layers
    workloads: list[int]  # places in the list of workloads


@dataclass(kw_only=True)
class Scaling(Benchmark):
    schema: str = "rift_kernels scaling 1"
    curves: list[Curve]


@dataclass
class Errors:
    reason: str | None = None
    errors: list[Spread] = field(default_factory=list)  # relative, of the gradient, per distance


@dataclass(kw_only=True)
class ErrorCurve:
    measure: str
    rows: int
    width: int
    dtype: str
    rotated: bool  # whether students are rotated as well
    distances: list[Spread]  # 1 - CKA in float64
    rounding: list[Spread]  # error of the right gradient, rounded to the features' dtype
    results: dict[str, Errors]


@dataclass(kw_only=True)
class Frontier(Result):
    schema: str = "rift_kernels frontier 1"
    providers: list[Provider]
    pairs: int  # of random features, for each number
    curves: list[ErrorCurve]


@dataclass(kw_only=True)
class Model:  # a vision transformer and its batch
    image: int  # pixels, height and width
    patch: int
    width: int  # of a token
    depth: int
    heads: int
    classes: int
    parameters: int
    trained: int  # of the parameters
    rank: int | None  # of adapters, if these are trained
    batch: int
    tokens: int
    autocast: bool  # whether products are in bfloat16


@dataclass
class LossAlone:
    memory: dict[str, int]  # above its features
    kept: int  # bytes that its forward leaves
    seconds: dict[str, Quantiles] = field(default_factory=dict)
    share: Bounds | None = None  # of the plain step of the same round


@dataclass(kw_only=True)
class StepWay:  # a way of finetuning
    teacher: str | None  # "adapters off" or "a copy"; None for the plain step
    loss: str | None  # a provider, and the features that it compares
    first_layer: bool = False  # the teacher's pass ends after the first layer, not after the last
    predicted_share: float | None = None  # of what it adds, and of the plain step's operations
    reason: str | None = None
    weights: int = 0  # bytes of student and teacher
    memory: dict[str, int] = field(default_factory=dict)  # above what was there before
    seconds: dict[str, Quantiles] = field(default_factory=dict)  # none: its cost is its memory
    adds: Bounds | None = None  # share that it takes more than the plain step of the same round
    loss_adds: Bounds | None = None  # the same, more than a step with the teacher's pass alone
    alone: LossAlone | None = None
    gradient_error: float | None = None  # at the student's features, relative, against float64
    wrong: bool = False


@dataclass(kw_only=True)
class Finetuning:
    model: Model
    predicted_seconds: float  # of the plain step's operations, at the peaks
    rounds: int
    clock: str  # whose seconds shares are of: "cpu", the process's time, or "both", on a GPU
    noise: dict[str, float]  # clock: share; the plain step timed twice
    teacher_memory: int  # bytes at the peak of the teacher's pass by itself
    ways: list[StepWay]  # the plain step, the teacher's pass without a loss, and losses
    unable: list[Provider]


@dataclass(kw_only=True)
class Step(Result):
    schema: str = "rift_kernels step 2"
    peaks: dict[str, Any]  # "matmul_flops", as above
    finetunings: list[Finetuning]


@dataclass(kw_only=True)
class Kernels:
    backend: str
    family: str  # what they compute
    dtype: str
    good: bool | None  # whether they agree with known answers; None: that could not be tried
    seen: str  # what is not right, or why it could not be tried


@dataclass(kw_only=True)
class Check(Result):  # of python -m rift_kernels check, which writes it anew after each case
    schema: str = "rift_kernels check 1"
    seconds: float
    complete: bool  # whether every case is there
    backends: list[Provider]
    kernels: list[Kernels]
    cases: list[dict[str, Any]]  # with errors and seconds


KINDS = {kind.schema: kind for kind in (Benchmark, Scaling, Frontier, Step, Check)}


def parse(content: Any, form: Any = Result) -> Any:
    """A file's content, or a part of it, as a ``form``; raises where keys differ."""
    if isinstance(form, types.UnionType):
        form = typing.get_args(form)[0]
    arguments = typing.get_args(form)
    if isinstance(content, list) and arguments:
        return [parse(item, arguments[0]) for item in content]
    if isinstance(content, dict) and arguments:
        return {key: parse(item, arguments[1]) for key, item in content.items()}
    if isinstance(content, dict) and is_dataclass(form):
        build: Any = KINDS[content["schema"]] if form is Result else form
        forms = typing.get_type_hints(build)
        # A null stands for the default, unless it is a value of its own.
        return build(
            **{
                name: parse(item, forms[name])
                for name, item in content.items()
                if item is not None or isinstance(forms[name], types.UnionType)
            }
        )
    return content
