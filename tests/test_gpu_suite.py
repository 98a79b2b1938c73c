"""The part of the benchmarks that is for GPUs, on a stand-in: only the hardware is missing."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import environment, files, gpu_check, run, schema, tables, workloads
from benchmarks.measure import CLOCKS
from benchmarks.providers import NAIVE, TF32
from tests import stand_in_gpu

GPU = torch.device("cuda")


@pytest.fixture
def _gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    stand_in_gpu.install(monkeypatch.setattr)
    monkeypatch.setattr(run, "PROFILES", workloads.PROFILES)
    monkeypatch.delenv("PART", raising=False)
    with stand_in_gpu.OnCPU():
        yield


@pytest.fixture
def result(_gpu: None, tmp_path: Path) -> dict[str, Any]:
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    assert path.name.startswith("stand-in-gpu-")
    return files.read(path)


def test_a_result_of_a_gpu(result: dict[str, Any]) -> None:
    where = result["environment"]
    assert where["device"] == where["gpu"] == stand_in_gpu.NAME
    assert where["driver"] == "570.1"
    assert "1980 MHz" in where["clocks"]
    assert result["profile"] == "gpu"
    names = {p["name"]: p["reason"] for p in result["providers"]}
    assert names[TF32] is None
    assert names["rift_kernels triton"] == "a stand-in has no kernels"
    for workload in result["workloads"]:
        assert workload["reason"] is None
        for name, entry in workload["results"].items():
            assert entry["reason"] is None, (name, entry)
            assert set(entry["seconds"]) == set(CLOCKS)
            assert entry["seconds"]["wall"]["q50"] >= entry["seconds"]["host"]["q50"] > 0
            # What is captured runs, and is replayed.
            assert entry["graph"]["q50"] >= 0, (name, entry["graph_reason"])
            assert entry["launches"] == 2
            assert entry["memory"] == {"forward": 4000, "backward": 4000, "both": 4000}
    text = tables.summary(result)
    assert "The device alone, in CUDA graphs" in text
    assert f"**{stand_in_gpu.NAME} (driver 570.1)" in text
    assert re.search(r"\| +TF32 +\|", text)


@pytest.mark.usefixtures("_gpu")
def test_a_provider_that_cannot_be_captured_says_why(monkeypatch, tmp_path) -> None:
    def refuse(_: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    assert run.main(["--out", str(tmp_path), "--budget", "20"]) == 0
    (path,) = tmp_path.iterdir()
    entry = files.read(path)["workloads"][0]["results"][NAIVE]
    assert entry["graph"] is None
    assert "not permitted when stream is capturing" in entry["graph_reason"]


def test_inputs_are_larger_than_the_cache(_gpu, monkeypatch) -> None:  # noqa: PT019
    """As many copies as twice the L2 cache holds, each of them in a graph once."""
    from benchmarks import graphs, measure, providers

    calls = []
    naive = providers.providers(GPU, ())[0]
    workload = workloads.Workload("cka_biased", 16, 8)
    task = measure.Task(naive, "cka_biased", workloads.features(workload, GPU))
    assert task.inputs.nbytes == 2 * 16 * 8 * 4
    forward = measure.Task.forward

    def counted(self: measure.Task) -> torch.Tensor:
        calls.append(self.inputs.students[0].data_ptr())
        return forward(self)

    monkeypatch.setattr(measure.Task, "forward", counted)
    assert set(graphs.seconds(task, GPU)) == {"q20", "q50", "q80"}
    # 2 x 4 KiB of 1 KiB each; once to warm up and once to be captured.
    assert len(set(calls)) == 8
    assert len(calls) == 16


class Parts:
    """What gpu-check starts; what takes minutes, and is the same without a GPU, is not done."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, folder: Path, real: tuple[str, ...]
    ) -> None:
        self.started: dict[str, list[str]] = {}
        self.out, self._process, self._real = folder / "out", gpu_check._process, real
        monkeypatch.setattr(gpu_check, "_process", self._start)
        monkeypatch.setattr(gpu_check.shutil, "which", lambda _: None)
        monkeypatch.setenv("OUT", str(self.out))

    def _start(self, part: str, line: list[str], log: Path, **how: Any) -> dict[str, Any]:
        self.started[part] = line
        if part not in self._real:
            if part == "tests":
                log.with_suffix(".xml").write_text('<s><testcase classname="t" name="x"/></s>')
            # Without this GPU, which takes seconds.
            line = [sys.executable, "-S", "-c", f"print({part!r})"]
        # Seconds in a process of its own, for which nothing makes it smaller.
        line = [word.replace(f"{sys.executable} -m benchmarks.host && ", "") for word in line]
        return self._process(part, line, log, **how)


@pytest.mark.usefixtures("_gpu")
def test_gpu_check_measures_in_processes(monkeypatch, tmp_path) -> None:
    """As it does on a GPU, in each of them this one."""
    for name, value in stand_in_gpu.environment(tmp_path).items():
        monkeypatch.setenv(name, value)
    parts = Parts(monkeypatch, tmp_path, real=("bench",))
    # As after long tests: the comparison alone.
    monkeypatch.setattr(gpu_check, "START", -1e9)
    monkeypatch.setenv("PART", "bench")
    assert gpu_check.main() == 0, (parts.out / "logs" / "bench.txt").read_text()
    (path,) = parts.out.glob("stand-in-gpu-*.json")
    assert files.read(path)["environment"]["gpu"] == stand_in_gpu.NAME
    assert "moments is not done" in (parts.out / "logs" / "bench.txt").read_text()


@pytest.mark.usefixtures("_gpu")
def test_all_that_gpu_check_measures(monkeypatch, tmp_path) -> None:
    """If there is time for all of it: the commands, with their arguments."""
    parts = Parts(monkeypatch, tmp_path, real=())
    monkeypatch.setattr(gpu_check, "START", gpu_check.time.monotonic())
    monkeypatch.setenv("PART", "bench")
    assert gpu_check.main() == 0
    shell, option, lines = parts.started["bench"]
    assert (shell, option) == ("bash", "-c")
    kinds = []
    for line in lines.split(" && "):
        python, flag, module, *arguments = shlex.split(line)
        assert (python, flag) == (sys.executable, "-m")
        command = importlib.import_module(module)
        assert command.main(arguments) == 0 if arguments else command.main() == 0
        kinds.append(module.removeprefix("benchmarks."))
    assert kinds == ["moments", "host", "run", "step", "frontier"]
    results = [files.read(path) for path in parts.out.glob("stand-in-gpu-*.json")]
    assert {r["schema"] for r in results} == {schema.BENCHMARK, schema.STEP, schema.FRONTIER}
    for one in results:
        assert one["environment"]["gpu"] == stand_in_gpu.NAME
        assert one["profile"] == "gpu"
    (step,) = (r for r in results if r["schema"] == schema.STEP)
    assert all(set(way["seconds"]) == set(CLOCKS) for way in step["ways"] if not way["reason"])
    assert any(not way["reason"] for way in step["ways"])


@pytest.mark.usefixtures("_gpu")
def test_parts_of_gpu_check(monkeypatch, tmp_path, capsys) -> None:
    """All of them in order, or one; again, whatever an earlier run has left."""
    Parts(monkeypatch, tmp_path, real=())
    for part, expected in (
        (None, ["build", "tests", "sanitize", "bench"]),
        ("tests", ["build", "tests"]),
        ("sanitize", ["build", "sanitize"]),
        ("bench", ["build", "bench"]),
        ("bench", ["build", "bench"]),
    ):
        if part:
            monkeypatch.setenv("PART", part)
        assert gpu_check.main() == 0
        text = capsys.readouterr().out
        assert [line.split()[0] for line in text.splitlines() if line.endswith(" ...")] == expected
        path = Path(text.split("wrote ")[-1].strip())
        summary = json.loads(path.read_text())
        assert list(summary["parts"]) == expected
        assert summary["environment"]["device"] == stand_in_gpu.NAME
        if "sanitize" in expected:
            assert "ok: not done: compute-sanitizer is not on PATH" in text


def test_nothing_can_be_installed_there(tmp_path) -> None:
    """In the processes above, which thus show that gpu-check installs nothing."""
    folder = tmp_path / "pip"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "__main__.py").write_text("print('installed')")
    variables = {**os.environ, **stand_in_gpu.environment(tmp_path), stand_in_gpu.VARIABLE: ""}
    line = [sys.executable, "-m", "pip", "install", "torch"]
    done = subprocess.run(line, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "nothing may be installed here" in done.stderr
    assert "installed\n" not in done.stdout


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_gpu_check_installs_nothing() -> None:
    """Neither does what it depends on."""
    line = ["make", "--always-make", "--dry-run", "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(line, cwd=gpu_check.ROOT, capture_output=True, text=True, check=True)
    assert f"{sys.executable} -m benchmarks.gpu_check" in done.stdout
    assert "pip install" not in done.stdout


def test_gpu_check_ends_within_nine_minutes() -> None:
    assert sum(gpu_check.LIMITS.values()) <= 9 * 60 - 5
    for spent in (0, 100, 200, 375, 1000):
        limit = gpu_check.bench_limit(spent)
        assert gpu_check.LIMITS["bench"] <= limit <= gpu_check.MOST_FOR_BENCH
        if spent <= 375:
            assert spent + limit <= 9 * 60 - 5


def test_every_field_of_the_environment_is_in_the_schema() -> None:
    assert set(environment.describe(torch.device("cpu"))) == set(schema._HEADER["environment"])
