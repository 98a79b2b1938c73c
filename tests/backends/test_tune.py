"""The tuner without a GPU: a model of the configurations' cost replaces the timing.

``test_trials`` has the kernels compiled for sm90 and pretends to launch them; its clock is a model.
"""

import contextlib
import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from rift_kernels.backends.triton import config
from rift_kernels.backends.triton.config import CLASSES, Config
from rift_kernels.commands import tune, tune_candidates, tune_compilation
from rift_kernels.commands.tune_candidates import by_importance, distance, groups
from rift_kernels.commands.tune_compilation import Compilers, Job
from rift_kernels.commands.tune_file import TunedFile
from rift_kernels.commands.tune_trials import CandidateError, GpuError, GpuTrials
from tests import as_gpu
from tests.support import stand_in_gpu

LIMIT = 227 * 1024
LARGE, SMALL = "covariance large bf16", "gram small bf16"
NEVER = float("inf")


def completed(failure: str = "") -> Future[str]:
    future: Future[str] = Future()
    future.set_result(failure)
    return future


class Model:
    """A second for each field that is not at its best; some configurations are skipped."""

    ahead = 3

    def __init__(self, skipped: dict[Config, str] | None = None, **best: object) -> None:
        self.best, self.skipped = best, skipped or {}
        self.compiled: list[Config] = []
        self.tried: list[Config] = []

    def seconds(self, chosen: Config) -> float:
        return 1 + sum(getattr(chosen, name) != value for name, value in self.best.items())

    def compile_ahead(self, chosen: Config) -> list[Future[str]]:
        self.compiled.append(chosen)
        return [completed(), completed()]

    def speedup(self, chosen: Config, best: Config) -> float:
        self.tried.append(chosen)
        if chosen in self.skipped:
            raise CandidateError(self.skipped[chosen])
        return self.seconds(best) / self.seconds(chosen)

    def confirm(self, chosen: Config) -> None:
        pass


def searched(model: Model, shapes: str = LARGE, **options: Any) -> list[tune.State]:
    options = {"limit": LIMIT, "deadline": NEVER, **options}
    return list(tune.search(shapes, config.lookup("sm90", shapes), model, **options))


def moments(shapes: str = LARGE) -> list[Config]:
    """The candidates of the first group."""
    base = config.lookup("sm90", shapes)
    return tune_candidates.candidates(shapes, base, groups(shapes)[0], LIMIT)


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(config.ENVIRONMENT_VARIABLE, raising=False)
    config.forget()
    yield
    config.forget()


def test_classes_by_importance() -> None:
    ordered = by_importance(CLASSES)
    assert sorted(ordered) == sorted(CLASSES)
    assert ordered[:3] == [LARGE, "gram large bf16", "covariance large split"]
    assert ordered[-1] == "gram small split"


@pytest.mark.parametrize("shapes", CLASSES)
def test_candidates_can_run(shapes: str) -> None:
    base = config.lookup("sm90", shapes)
    for group in groups(shapes):
        candidates = tune_candidates.candidates(shapes, base, group, LIMIT)
        assert candidates
        assert base not in candidates
        assert all(tune_candidates.shared_bytes(shapes, c) <= LIMIT for c in candidates)
        assert all(c.block % c.sub == 0 for c in candidates)


@pytest.mark.parametrize("shapes", CLASSES)
def test_near_candidates_come_first(shapes: str) -> None:
    base = config.lookup("sm90", shapes)
    for group in groups(shapes):
        candidates = tune_candidates.candidates(shapes, base, group, LIMIT)
        distances = [distance(base, candidate) for candidate in candidates]
        assert distances == sorted(distances)
        assert distances[0] == 1


@pytest.mark.parametrize(
    ("changed", "steps"),
    [
        ({}, 0),
        ({"stages": 2}, 2),
        ({"warps": 4}, 1),
        ({"block_k": 256, "stages": 5}, 3),
        ({"backward": (64, 128, 16)}, 3),
    ],
)
def test_distance(changed: dict[str, Any], steps: int) -> None:
    base = config.lookup("sm90", LARGE)._replace(backward=(128, 128, 64))
    assert distance(base, base._replace(**changed)) == steps
    assert distance(base._replace(**changed), base) == steps


def test_smaller_blocks_shrink_those_of_the_backward() -> None:
    base = config.lookup("sm90", LARGE)._replace(backward=(64, 64, 128))
    found = tune_candidates.candidates(LARGE, base, groups(LARGE)[0], LIMIT)
    assert {c.backward[2] for c in found if c.block == 64} == {64}


def test_less_memory_leaves_fewer_candidates() -> None:
    base, group = config.lookup("sm80", LARGE), groups(LARGE)[0]
    limits = [k * 1024 for k in (64, 99, 227)]
    counts = [len(tune_candidates.candidates(LARGE, base, group, limit)) for limit in limits]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("shapes", "arch", "kernel", "measured"),
    [
        ("covariance large bf16", "sm90", "raw_moments_kernel", 131072),
        ("covariance large split", "sm90", "raw_moments_kernel", 65536),
        ("gram large split", "sm90", "raw_moments_kernel", 131840),
    ],
)
def test_memory_estimate(shapes: str, arch: str, kernel: str, measured: int) -> None:
    chosen = config.lookup(arch, shapes)._replace(backward_stages=1, gram_backward_stages=1)
    assert tune_candidates.shared_bytes(shapes, chosen) == pytest.approx(measured, rel=0.1), kernel


def test_finds_the_best_of_the_model() -> None:
    model = Model(block=64, block_k=32, stages=3, backward_warps=4, sub=32, block_r=64)
    states = searched(model)
    best = states[-1].best
    assert all(getattr(best, name) == value for name, value in model.best.items())
    gains = {state.group: state.gain for state in states}
    assert gains["moments"] == pytest.approx(7 / 4)
    assert gains["rows"] == pytest.approx(2)
    written = tune_candidates.as_json(best, config.FIELDS["covariance"])
    assert config.entry("best", LARGE, written) == best
    assert model.compiled == model.tried


def test_candidates_that_are_skipped() -> None:
    few = [c for c in moments() if c.stages < 4]
    reasons = {c: "spill" if c.warps == 4 else "give wrong results" for c in few}
    states = [s for s in searched(Model(reasons, stages=3)) if s.group == "moments"]
    assert states[-1].best.stages == 4
    assert len(states[-1].skipped) == len(few)
    spilled = sum(reason == "spill" for reason in reasons.values())
    assert f", {spilled} spill" in str(states[-1])


def test_candidates_that_do_not_compile() -> None:
    class Broken(Model):
        def compile_ahead(self, chosen: Config) -> list[Future[str]]:
            return [completed(), completed("the compiler ended" if chosen.stages == 3 else "")]

    model = Broken(stages=3)
    states = [s for s in searched(model) if s.group == "moments"]
    assert states[-1].best.stages == 4
    assert states[-1].skipped == ("do not compile",) * sum(c.stages == 3 for c in moments())
    assert states[-1].detail == "the compiler ended"
    assert not [c for c in model.tried if c.stages == 3]


def test_candidates_that_are_not_confirmed() -> None:
    class Masked(Model):
        def confirm(self, chosen: Config) -> None:
            if chosen.stages == 3:
                raise CandidateError("spill")

    states = searched(Masked(stages=3))
    assert states[-1].best == config.lookup("sm90", LARGE)
    assert {state.gain for state in states} == {1.0}


def test_a_gain_within_noise_does_not_count() -> None:
    class Noise(Model):
        def speedup(self, *_: Config) -> float:
            return 1.01

    states = searched(Noise())
    assert {state.best for state in states} == {config.lookup("sm90", LARGE)}


def test_the_nearest_candidates_are_compiled_ahead() -> None:
    model, counts = Model(), []
    for _ in tune.search(LARGE, config.lookup("sm90", LARGE), model, LIMIT, NEVER):
        counts.append(len(model.compiled) - len(model.tried))
    assert max(counts) == model.ahead - 1
    assert model.compiled[: len(moments())] == moments()


def test_deadline() -> None:
    ticks = iter(range(10**6))
    states = searched(model := Model(stages=3), deadline=30, clock=lambda: next(ticks))
    # Two looks at the clock for each.
    assert len(model.tried) == states[-1].tried == 15
    assert states[-1].best.stages == 3
    assert states[-1].total == len(moments())


def test_deadline_while_something_compiles() -> None:
    class Slow(Model):
        def compile_ahead(self, _: Config) -> list[Future[str]]:
            return [Future()]

    states = searched(model := Slow(), deadline=time.monotonic() + 0.1)
    assert [state.tried for state in states] == [0]
    assert not model.tried


def test_finished_groups_are_not_tried_again() -> None:
    states = searched(Model(), finished={"moments", "heads"})
    assert list(dict.fromkeys(state.group for state in states)) == ["backward", "rows"]


def test_file_is_resumed_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs.json"
    chosen = config.lookup("sm90", LARGE)._replace(stages=2)
    other = config.lookup("sm90", "covariance large split")
    file = TunedFile(path, "sm90")
    assert file.start(LARGE) == config.lookup("sm90", LARGE)
    file.keep(LARGE, chosen)
    TunedFile(path, "sm80").finish(LARGE, "moments", "1.00x")
    resumed = TunedFile(path, "sm90")
    assert resumed.start(LARGE) == chosen
    assert resumed.start(SMALL) == config.lookup("sm90", SMALL)
    assert not resumed.finished(LARGE)
    resumed.finish(LARGE, "moments", "2.00x")
    assert TunedFile(path, "sm90").finished(LARGE) == {"moments": "2.00x"}
    assert TunedFile(path, "sm80").finished(LARGE) == {"moments": "1.00x"}
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv(config.ENVIRONMENT_VARIABLE, str(path))
    config.forget()
    assert config.lookup("sm90", LARGE) == chosen
    assert config.lookup("sm90", "covariance large split") == other


def pretend(put: Any) -> None:
    """A pretended H100, with tensors in the CPU's memory."""
    stand_in_gpu.install(put)
    properties = SimpleNamespace(
        major=9, minor=0, multi_processor_count=132, shared_memory_per_block_optin=LIMIT
    )
    put(tune.availability, "reason_against", lambda *_: None)
    put(torch.version, "hip", None)
    put(torch.cuda, "current_device", lambda: 0)
    put(torch.cuda, "get_device_properties", lambda _: properties)
    put(driver, "_active", tune_compilation.Target(GPUTarget("cuda", 90, 32)))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended H100, with a model of its kernels; the fixture lists the classes tried."""
    pytest.importorskip("tqdm", reason="needs tqdm")
    tried = []

    def trials(shapes: str, arch: str, *_: object) -> Model:
        assert arch == "sm90"
        tried.append(shapes)
        return Model(block_r=16)

    pretend(monkeypatch.setattr)
    monkeypatch.setattr(tune, "GpuTrials", trials)
    return tried


def test_command(gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configs.json"
    arguments = ["--out", str(path), "--form", "covariance"]
    assert tune.main(arguments) == 0
    assert gpu == [c for c in by_importance(CLASSES) if c.startswith("covariance")]
    assert f"RIFT_KERNELS_CONFIGS={path}" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert content["_finished"]["sm90"][LARGE]["rows"] == "2.00x as fast"
    assert content["_finished"]["sm90"][LARGE]["moments"] == "1.00x as fast"
    assert content["sm90"][LARGE]["block_r"] == 16
    # Finished groups are not tried again.
    del content["_finished"]["sm90"][LARGE]["rows"]
    path.write_text(json.dumps(content))
    gpu.clear()
    assert tune.main(arguments) == 0
    assert gpu == [LARGE]


@pytest.mark.usefixtures("gpu")
def test_only_what_is_faster_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "GpuTrials", lambda *_: Model())
    path = tmp_path / "configs.json"
    assert tune.main(["--out", str(path)]) == 0
    content = json.loads(path.read_text())
    assert "sm90" not in content
    assert content["_finished"]["sm90"].keys() == set(CLASSES)


class Stops(Model):
    """Ends after a few candidates."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(stages=3)
        self.error = error

    def speedup(self, chosen: Config, best: Config) -> float:
        if len(self.tried) == 20:
            raise self.error
        return super().speedup(chosen, best)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "goes on from here"),
        (GpuError("illegal memory access"), 1, "illegal memory access"),
    ],
)
def test_what_was_found_before_an_end_is_kept(
    error: BaseException,
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune, "GpuTrials", lambda *_: Stops(error))
    path = tmp_path / "configs.json"
    assert tune.main(["--out", str(path)]) == code
    output = capsys.readouterr()
    assert message in output.err
    assert f"RIFT_KERNELS_CONFIGS={path}" in output.out
    content = json.loads(path.read_text())
    assert content["sm90"][LARGE]["stages"] == 3
    assert "_finished" not in content


def test_time_is_over(gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configs.json"
    assert tune.main(["--out", str(path), "--minutes", "0"]) == 0
    assert not gpu
    assert "The time is over" in capsys.readouterr().out


@pytest.mark.usefixtures("gpu")
def test_kernels_in_use_that_do_not_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def trials(shapes: str, *_: object) -> Model:
        if shapes == LARGE:
            raise CandidateError("do not compile", "PTXASError:\n no such target")
        return Model(block_r=16)

    monkeypatch.setattr(tune, "GpuTrials", trials)
    path = tmp_path / "configs.json"
    assert tune.main(["--out", str(path), "--form", "covariance"]) == 1
    error = capsys.readouterr().err
    assert f"{LARGE}: the kernels in use do not compile: PTXASError: no such target" in error
    assert len(json.loads(path.read_text())["sm90"]) == 5  # the other classes


def test_bad_file(gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "configs.json"
    path.write_text('{"sm90": {"covariance large bf16": {"block": 128}}}')
    assert tune.main(["--out", str(path)]) == 1
    assert f"{path}: sm90: {LARGE}" in capsys.readouterr().err
    assert not gpu


def test_file_that_cannot_be_written(
    gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune.main(["--out", str(tmp_path / "none" / "configs.json")]) == 1
    assert os.strerror(errno.ENOENT) in capsys.readouterr().err
    assert not gpu


@pytest.mark.usefixtures("gpu")
def test_without_tqdm(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert tune.main([]) == 2
    assert "pip install 'rift_kernels[bench]'" in capsys.readouterr().err


def test_without_a_gpu(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "rift_kernels", "tune", "--out", str(tmp_path / "configs.json")],
        cwd=Path(__file__).parents[2],
        # Even if this machine has a GPU.
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert "needs a GPU" in result.stderr
    assert not list(tmp_path.iterdir())


# What a process of Compilers may be given. It imports this module.
class Crashes:
    preload = staticmethod(lambda _: os.abort())


class Hangs:
    preload = staticmethod(lambda _: time.sleep(100))


class Fails:
    @staticmethod
    def preload(text: str) -> None:
        raise ValueError(text)


class Prints:
    preload = staticmethod(lambda _: os.system("echo noise") or print("noise"))


def test_processes_that_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune_compilation, "TIMEOUT", 20)
    # A process that survives has its job's outcome, and goes on with the next one.
    names = ["Fails", "Crashes", "Prints", "Fails"]
    with Compilers(GPUTarget("cuda", 90, 32), workers=1) as compilers:
        jobs = [Job(__name__, name, "", f"text {i}") for i, name in enumerate(names)]
        outcomes = [compilers.submit(job) for job in jobs]
        assert compilers.submit(jobs[0]) is outcomes[0]
        assert [outcome.result() for outcome in outcomes] == [
            "ValueError: text 0",
            "the compiler ended with status -6",
            "",
            "ValueError: text 3",
        ]
        monkeypatch.setattr(tune_compilation, "TIMEOUT", 0.5)
        hanging = compilers.submit(Job(__name__, "Hangs", "", ""))
        assert hanging.result() == "the compiler ended with status -9"


class Clock:
    """The time of a GPU that is busy only with launches."""

    now = 0.0


class Event:
    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = Clock.now

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: "Event") -> float:
        return (end.at - self.at) * 1e3


class Graph:
    def replay(self) -> None:
        Clock.now += self.seconds


@contextlib.contextmanager
def capture(graph: Graph) -> Iterator[None]:
    begin = Clock.now
    yield
    graph.seconds = Clock.now - begin


class Driver(tune_compilation.Target):
    """Launches set results to 0 and advance the clock; 16 columns at a time are fastest, 32 spill,
    512 columns a program need too much memory."""

    def __init__(self, target: GPUTarget) -> None:
        super().__init__(target)
        self.launched: list[str] = []
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": LIMIT}, load_binary=self._load
        )

    def get_current_device(self) -> "Driver":
        # Not the number of a real GPU, whose kernels these are not.
        return self

    def _load(self, *_: object) -> tuple[int, int, int, int, int]:
        return 0, 0, 100, self.spills, 1024

    def launcher_cls(self, source: Any, _: Any) -> Any:
        constants = {source.fn.arg_names[i[0]]: v for i, v in source.constants.items()}
        depth = constants["BLOCK_K"]
        is_forward = source.fn.__name__ == "gram_cka_small_kernel"
        self.spills = 8 if is_forward and depth == 32 else 0

        def launch(*arguments: Any) -> None:
            self.launched.append(source.fn.__name__)
            if is_forward and constants["PROGRAMS"] == 2:
                raise RuntimeError("out of resource: shared memory, and so on")
            Clock.now += 1 if is_forward and depth == 16 else 2
            for argument in arguments:
                for tensor in argument if isinstance(argument, tuple) else (argument,):
                    if isinstance(tensor, torch.Tensor):
                        tensor.zero_()

        return launch


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trials(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuTrials]:
    """Trials of few rows on a pretended H100, whose kernels compile, but compute nothing."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(cache))
    target = GPUTarget("cuda", 90, 32)
    with as_gpu.triton("sm90"), Compilers(target, workers=2) as compilers:
        pretend(monkeypatch.setattr)
        for name, value in (("Event", Event), ("CUDAGraph", Graph), ("graph", capture)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(driver, "_active", Driver(target))
        with stand_in_gpu.OnCPU():
            yield GpuTrials(SMALL, "sm90", config.lookup("sm90", SMALL), compilers)


def test_trials(trials: GpuTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_here = []

    def listen(*, cache_hit: bool, src: Any, **_: Any) -> None:
        if not cache_hit:
            compiled_here.append(src.fn.__name__)

    monkeypatch.setattr(knobs.compilation, "listener", listen)
    start = config.lookup("sm90", SMALL)
    assert start.small_k == 64

    def speedup(**fields: object) -> float:
        """What the search does with a candidate."""
        chosen = start._replace(**fields)
        assert [outcome.result() for outcome in trials.compile_ahead(chosen)] in ([], [""])
        driver.active.launched.clear()
        return trials.speedup(chosen, start)

    assert speedup(small_k=16) == 2
    # The loss, then the launches that are timed: before and after.
    assert driver.active.launched == [
        *("gram_cka_small_kernel", "gram_backward_kernel"),
        *("gram_cka_small_kernel", "gram_cka_small_kernel"),
    ]
    assert speedup(gram_backward=(64, 128, 64)) == 1
    assert driver.active.launched[2:] == ["gram_backward_kernel", "gram_backward_kernel"]
    for fields, reason in (
        ({"small_k": 32}, "spill"),
        ({"small_share": 512}, "need too much memory"),
        ({"head_warps": 8}, "change nothing"),
    ):
        with pytest.raises(CandidateError, match=f"^{reason}$"):
            speedup(**fields)
    # Processes have compiled all of it.
    assert not compiled_here

    best = start._replace(small_k=16)
    trials.confirm(best)
    assert trials.speedup(start, best) == 0.5
    assert not compiled_here


def test_wrong_results_do_not_count(trials: GpuTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    start = config.lookup("sm90", SMALL)
    results = GpuTrials._results

    def wrong(self: GpuTrials, chosen: Config, masked: bool) -> list[torch.Tensor]:
        value, gradient = results(self, chosen, masked)
        return [value, gradient + (masked and chosen.small_k == 16)]

    monkeypatch.setattr(GpuTrials, "_results", wrong)
    chosen = start._replace(small_k=16)
    assert trials.speedup(chosen, start) == 2
    with pytest.raises(CandidateError, match="wrong results"):
        trials.confirm(chosen)


def test_gpu_that_does_not_respond(trials: GpuTrials, monkeypatch: pytest.MonkeyPatch) -> None:
    start = config.lookup("sm90", SMALL)

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(CandidateError, match=r"^fail$"):
        trials.speedup(start._replace(small_k=16), start)
    monkeypatch.setattr(torch, "zeros", broken)
    with pytest.raises(GpuError, match="illegal memory access"):
        trials.speedup(start._replace(small_k=16), start)
