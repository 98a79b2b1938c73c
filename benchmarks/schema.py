"""The forms of result files: ``dataclasses.asdict`` writes them, :func:`parse` reads and checks.

Seconds are per clock: forward, backward or both, on a GPU between events; host, until the calls
return; wall, until the device is done. Memory is bytes per phase (forward, backward or both).
A field with a default may be absent or null. An error of None is NaN or infinite.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Quantiles:
    """Over rounds."""

    q20: float
    q50: float
    q80: float


@dataclass
class Bounds:
    """A median over rounds, and bounds that hold it with 95 %."""

    low: float
    q50: float
    high: float


@dataclass
class Spread:
    """Over pairs of features; None is infinite."""

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
    clocks: str  # a CPU's load average and MHz; what nvidia-smi says of clocks, power, throttling
    system: str
    commit: str  # of this repository, or "unknown"
    dirty: bool | None  # whether tracked files had local changes
    versions: dict[str, str | None]  # None: not installed


@dataclass(kw_only=True)
class Result:
    """The fields of every kind."""

    schema: str = ""
    profile: str  # the set of workloads
    environment: Environment


@dataclass
class Provider:
    name: str
    reason: str | None = None  # why it cannot run here


@dataclass(kw_only=True)
class Outcome:
    """A provider's part in a workload; with a reason, nothing was measured."""

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
    reason: str | None = None  # why the workload was not measured at all
    rounds: int = 0
    noise: dict[str, float] = field(default_factory=dict)  # clock: share; naive eager timed twice
    results: dict[str, Outcome] = field(default_factory=dict)


@dataclass(kw_only=True)
class Benchmark(Result):
    """``python -m benchmarks.run``."""

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
    """``python -m benchmarks.scaling``: a benchmark whose workloads lie on curves."""

    schema: str = "rift_kernels scaling 1"
    curves: list[Curve]


@dataclass
class Errors:
    reason: str | None = None  # why there are none
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
    """``python -m benchmarks.frontier``."""

    schema: str = "rift_kernels frontier 1"
    providers: list[Provider]
    pairs: int  # of random features, for each number
    curves: list[ErrorCurve]


@dataclass(kw_only=True)
class Model:
    """A vision transformer and its batch."""

    image: int  # pixels, height and width
    patch: int
    width: int  # of a token
    depth: int
    heads: int
    classes: int
    parameters: int
    batch: int
    tokens: int
    autocast: bool  # whether products are in bfloat16
    rank: int | None = None  # of an adapter
    trained: int | None = None  # numbers that are trained, if not all


@dataclass(kw_only=True)
class StepWay:
    """A way of finetuning; with a reason, it was not measured."""

    loss: str | None  # a provider; None for the plain step
    features: str | None  # what it compares
    teacher_runs: bool  # whether the teacher's forward pass is in the step
    predicted_seconds: float  # of the operations, at the peaks
    reason: str | None = None
    seconds: dict[str, Quantiles] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)  # above what was there before
    gradient_error: float | None = None  # at the student's features, relative, against float64
    wrong: bool = False


@dataclass
class LeftOut:
    """A loss that was never tried, on these features or on all, and why."""

    loss: str
    features: str | None
    reason: str


@dataclass(kw_only=True)
class Step(Result):
    """``python -m benchmarks.step``."""

    schema: str = "rift_kernels step 1"
    peaks: dict[str, Any]  # "matmul_flops", as above
    model: Model
    rounds: int = 0
    noise: dict[str, float] = field(default_factory=dict)  # clock: share; the plain step's
    ways: list[StepWay]
    left_out: list[LeftOut]


@dataclass(kw_only=True)
class LoraWay:
    """A way of finetuning with adapters; a copy as teacher is not timed."""

    teacher: str | None  # "adapters off" or "a copy"
    pooling: str | None  # of the features that are compared
    weights: int  # bytes: the plain way's, and what setting this way up keeps
    memory: dict[str, int]
    seconds: dict[str, Quantiles] = field(default_factory=dict)
    cpu_seconds: Quantiles | None = None  # of the process, all threads
    adds: Bounds | None = None  # share that it takes more than the plain step of the same round
    loss_adds: Bounds | None = None  # the same, more than a step with the teacher's pass alone


@dataclass(kw_only=True)
class LoraLoss:
    """The loss by itself."""

    pooling: str
    features: str  # shape and dtype
    predicted_share: float  # of the plain step's operations
    seconds: dict[str, Quantiles]
    cpu_seconds: Quantiles
    share: Bounds  # of the plain step of the same round
    memory: dict[str, int]  # above its features
    kept: int  # bytes that its forward leaves


@dataclass(kw_only=True)
class Lora(Result):
    """``python -m benchmarks.lora``. The first way is the plain step."""

    schema: str = "rift_kernels lora 1"
    model: Model
    rounds: int
    clock: str  # whose seconds shares are of: "cpu", the process's time, or "both", on a GPU
    noise: dict[str, float]  # has the clock "cpu", too
    ways: list[LoraWay]
    teacher_memory: int  # bytes at the peak of the teacher's pass by itself
    losses: list[LoraLoss]


@dataclass(kw_only=True)
class Kernels:
    """Whether kernels agree with known answers; None: that could not be tried."""

    backend: str
    family: str  # what they compute
    dtype: str
    good: bool | None
    seen: str  # what is not right, or why it could not be tried


@dataclass(kw_only=True)
class Case(Kernels):
    case: str
    value_error: float | None  # absolute up to 1 and relative beyond
    gradient_error: float | None
    seconds: float | None  # compilation included


@dataclass(kw_only=True)
class Check(Result):
    """``python -m rift_kernels check``, which writes it anew after each case."""

    schema: str = "rift_kernels check 1"
    seconds: float
    complete: bool  # whether every case is there
    backends: list[Provider]
    kernels: list[Kernels]
    cases: list[Case]


_KINDS: tuple[type[Result], ...] = (Benchmark, Scaling, Frontier, Step, Lora, Check)
KINDS = {kind.schema: kind for kind in _KINDS}


def parse(content: Any) -> Result:
    """The result in a file's content.

    Raises:
        ValueError: there is none; the message says where it differs.
    """
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in KINDS:
        raise ValueError(f"result.schema must be one of {', '.join(KINDS)}; got {schema!r}")
    result: Result = _parsed(content, KINDS[schema], "result")
    return result


def _parsed(value: Any, form: Any, where: str) -> Any:
    """``value`` as the type ``form``."""
    origin, arguments = typing.get_origin(form), typing.get_args(form)
    if origin is types.UnionType:
        return None if value is None else _parsed(value, arguments[0], where)
    if form is Any or (form is float and type(value) is int):
        return value
    expected = dict if dataclasses.is_dataclass(form) else origin or form
    if not isinstance(value, expected):
        raise ValueError(f"{where} must be of type {expected.__name__}; got {value!r}")
    if origin is list:
        return [_parsed(item, arguments[0], f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        return {key: _parsed(item, arguments[1], f"{where}.{key}") for key, item in value.items()}
    if not dataclasses.is_dataclass(form):
        return value
    forms, build = typing.get_type_hints(form), typing.cast(Any, form)
    # Fields with neither a default nor a factory of one: both are then the same marker.
    required = {f.name for f in dataclasses.fields(form) if f.default is f.default_factory}
    missing, unknown = sorted(required - value.keys()), sorted(value.keys() - forms.keys())
    if missing or unknown:
        raise ValueError(f"{where}: missing keys {missing}, unknown keys {unknown}")
    # A null stands for the default.
    names = [name for name, item in value.items() if item is not None or name in required]
    return build(**{name: _parsed(value[name], forms[name], f"{where}.{name}") for name in names})
