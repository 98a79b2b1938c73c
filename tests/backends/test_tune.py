"""The tuner without a GPU: a model of the configurations' cost replaces the timing."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from rift_kernels.backends.triton import config
from rift_kernels.backends.triton.config import CLASSES, Config
from rift_kernels.commands import tune

LIMIT = 227 * 1024
LARGE = "covariance large bf16"


class Model:
    """A second for each field that is not at its best; configurations in ``wrong`` disagree."""

    def __init__(self, wrong: Sequence[Config] = (), **best: object) -> None:
        self.best, self.wrong, self.tried = best, wrong, []

    def agrees(self, chosen: Config) -> bool:
        self.tried.append(chosen)
        return chosen not in self.wrong

    def seconds(self, configs: Sequence[Config]) -> list[float]:
        return [1 + sum(getattr(c, name) != v for name, v in self.best.items()) for c in configs]


@pytest.fixture(autouse=True)
def _tables(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(config.ENVIRONMENT_VARIABLE, raising=False)
    config.forget()
    yield
    config.forget()


@pytest.mark.parametrize("shapes", CLASSES)
def test_candidates_can_run(shapes: str) -> None:
    base = config.lookup("sm90", shapes)
    for group in tune.groups(shapes):
        candidates = list(tune.candidates(shapes, base, group, LIMIT))
        assert candidates
        assert base not in candidates
        assert all(tune.shared_bytes(shapes, c) <= LIMIT for c in candidates)
        assert all(c.block % c.sub == 0 for c in candidates)


def test_smaller_blocks_shrink_those_of_the_backward() -> None:
    base = config.lookup("sm90", LARGE)._replace(backward=(64, 64, 128))
    candidates = tune.candidates(LARGE, base, tune.groups(LARGE)[0], LIMIT)
    assert {c.backward[2] for c in candidates if c.block == 64} == {64}


def test_less_memory_leaves_fewer_candidates() -> None:
    base, group = config.lookup("sm80", LARGE), tune.groups(LARGE)[0]
    counts = [len(list(tune.candidates(LARGE, base, group, k * 1024))) for k in (64, 99, 227)]
    assert counts == sorted(set(counts))


@pytest.mark.parametrize(
    ("shapes", "arch", "kernel", "measured"),
    [
        ("covariance large bf16", "sm90", "raw_moments_kernel", 131072),
        ("covariance large split", "sm90", "raw_moments_kernel", 122880),
        ("gram large split", "sm90", "raw_moments_kernel", 131840),
    ],
)
def test_memory_estimate(shapes: str, arch: str, kernel: str, measured: int) -> None:
    chosen = config.lookup(arch, shapes)._replace(backward_stages=1, gram_backward_stages=1)
    assert tune.shared_bytes(shapes, chosen) == pytest.approx(measured, rel=0.1), kernel


def test_finds_the_best_of_the_model() -> None:
    start = config.lookup("sm90", LARGE)
    model = Model(block=64, block_k=32, stages=3, backward_warps=4, sub=32, block_r=64)
    best, gain = tune.tune(LARGE, start, model, LIMIT, budget=60)
    assert all(getattr(best, name) == value for name, value in model.best.items())
    assert gain == pytest.approx(7)
    assert config.entry("best", LARGE, tune._as_json(best, config.FIELDS["covariance"])) == best


def test_wrong_results_do_not_count() -> None:
    start = config.lookup("sm90", LARGE)
    wrong = [c for c in tune.candidates(LARGE, start, tune.groups(LARGE)[0], LIMIT) if c.stages < 4]
    best, _ = tune.tune(LARGE, start, Model(wrong, stages=3), LIMIT, budget=60)
    assert best.stages == 4


def test_a_gain_within_noise_does_not_count() -> None:
    start = config.lookup("sm90", LARGE)

    class Noise(Model):
        def seconds(self, configs: Sequence[Config]) -> list[float]:
            return [1.0] + [0.99] * (len(configs) - 1)

    assert tune.tune(LARGE, start, Noise(), LIMIT, budget=60) == (start, 1.0)


def test_budget_is_shared_by_the_groups() -> None:
    ticks = iter(range(10**6))
    model, advanced = Model(block_r=64), []
    best, _ = tune.tune(
        LARGE,
        config.lookup("sm90", LARGE),
        model,
        LIMIT,
        budget=16,
        advance=advanced.append,
        clock=lambda: next(ticks),
    )
    assert len(model.tried) == len(advanced) < 16
    assert best.block_r == 64  # even the last group was tried


def test_file_is_resumed_and_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "configs.json"
    assert tune.finished(path, "sm90") == {}
    chosen = config.lookup("sm90", LARGE)._replace(stages=2)
    tune.write(path, "sm90", LARGE, chosen, "twice as fast")
    tune.write(path, "sm80", "gram small split", config.lookup("sm80", "gram small split"), "")
    assert tune.finished(path, "sm90") == {LARGE: chosen}
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv(config.ENVIRONMENT_VARIABLE, str(path))
    config.forget()
    assert config.lookup("sm90", LARGE) == chosen
    assert config.lookup("sm90", "covariance large split").stages != 2


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A pretended H100; the fixture lists the classes that were tried."""
    tried = []

    def trials(shapes: str, arch: str, start: Config) -> Model:
        assert arch == "sm90"
        assert start == config.lookup(arch, shapes)
        tried.append(shapes)
        return Model(block_r=16)

    properties = SimpleNamespace(major=9, minor=0, name="H100", shared_memory_per_block_optin=LIMIT)
    monkeypatch.setattr(tune, "GpuTrials", trials)
    monkeypatch.setattr(tune.availability, "reason_against", lambda *_: None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return tried


def test_command(gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="needs tqdm")
    path = tmp_path / "configs.json"
    arguments = ["--out", str(path), "--form", "covariance"]
    assert tune.main(arguments) == 0
    assert gpu == [c for c in CLASSES if c.startswith("covariance")]
    assert f"RIFT_KERNELS_CONFIGS={path}" in capsys.readouterr().out
    content = json.loads(path.read_text())
    assert "on H100" in content["_remarks"][f"sm90 {LARGE}"]
    assert content["sm90"][LARGE]["block_r"] == 16
    # Finished classes are not tried again.
    del content["sm90"][LARGE]
    path.write_text(json.dumps(content))
    gpu.clear()
    assert tune.main(arguments) == 0
    assert gpu == [LARGE]


def test_bad_file(gpu: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tqdm", reason="needs tqdm")
    path = tmp_path / "configs.json"
    path.write_text('{"sm90": {"covariance large bf16": {"block": 128}}}')
    assert tune.main(["--out", str(path)]) == 1
    assert f"{path}: sm90: {LARGE}" in capsys.readouterr().err
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
