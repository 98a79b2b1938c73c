"""Verdicts on disk: complete, private, for these versions only, and never an obstacle."""

from __future__ import annotations

import multiprocessing
import os
import stat
import time
from pathlib import Path

import pytest
import torch

from rift_kernels.trust import verdicts
from rift_kernels.trust.verdicts import Kernels, Verdict

KERNELS = Kernels("triton", "gram_cka_small", "bfloat16")
MACHINE = {"gpu": "Some GPU", "driver": "570.1", "torch": "2.13.0", "kernels": "abc"}
BAD = Verdict(False, "batch: value off by 3e-01")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home" / "cache"
    monkeypatch.setenv(verdicts.ENVIRONMENT_VARIABLE, str(folder))
    return folder


def the_file(cache: Path) -> Path:
    (file,) = cache.rglob("*.json")
    return file


@pytest.mark.parametrize("verdict", [Verdict(True), BAD])
def test_what_is_written_is_read(verdict, cache) -> None:
    assert verdicts.read(MACHINE, KERNELS) is None
    assert verdicts.write(MACHINE, KERNELS, Verdict(not verdict.good))
    assert verdicts.write(MACHINE, KERNELS, verdict)
    assert verdicts.read(MACHINE, KERNELS) == verdict
    assert verdicts.read(MACHINE, KERNELS._replace(dtype="float32")) is None
    # No temporary file is left, and only this user can read the folders.
    assert [path.name for path in the_file(cache).parent.iterdir()] == [
        "triton-gram_cka_small-bfloat16.json"
    ]
    assert stat.S_IMODE(the_file(cache).stat().st_mode) == 0o600
    for folder in (the_file(cache).parent, the_file(cache).parent.parent, cache):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


@pytest.mark.parametrize("name", MACHINE)
def test_another_machine_or_version_has_its_own(name) -> None:
    verdicts.write(MACHINE, KERNELS, BAD)
    assert verdicts.read({**MACHINE, name: "another"}, KERNELS) is None


def test_what_a_verdict_depends_on(tmp_path, monkeypatch) -> None:
    device = torch.device("cpu")
    before = verdicts.identity("triton", device)
    assert before.keys() == {
        *("gpu", "architecture", "driver", "torch", "triton", "rift_kernels", "kernels")
    }
    # A user's configurations make other kernels, and so does another build.
    table = tmp_path / "table.json"
    table.write_text("{}")
    monkeypatch.setenv("RIFT_KERNELS_CONFIGS", str(table))
    assert verdicts.identity("triton", device)["kernels"] != before["kernels"]
    monkeypatch.delenv("RIFT_KERNELS_CONFIGS")
    built = tmp_path / "_C.so"
    spec = type("Spec", (), {"origin": str(built)})
    monkeypatch.setattr(verdicts.importlib.util, "find_spec", lambda _: spec)
    fingerprints = set()
    for content in (b"one build", b"another"):
        built.write_bytes(content)
        verdicts._fingerprint.cache_clear()
        fingerprints.add(verdicts.identity("cuda", device)["kernels"])
    verdicts._fingerprint.cache_clear()
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "null", "\x00\x01"),
        '{"schema": "rift_kernels verdict 1", "good": true, "seen": ""}',
        '{"schema": "rift_kernels verdict 2"}',
    ],
)
def test_a_corrupt_file_is_no_verdict_and_is_replaced(text, cache) -> None:
    verdicts.write(MACHINE, KERNELS, BAD)
    the_file(cache).write_text(text)
    assert verdicts.read(MACHINE, KERNELS) is None
    assert verdicts.write(MACHINE, KERNELS, BAD)
    assert verdicts.read(MACHINE, KERNELS) == BAD


def test_a_file_from_another_machine_is_ignored(cache) -> None:
    verdicts.write(MACHINE, KERNELS, Verdict(True))
    text = the_file(cache).read_text()
    the_file(cache).write_text(text.replace("570.1", "999.9"))
    assert verdicts.read(MACHINE, KERNELS) is None


def test_a_file_on_other_kernels_is_ignored(cache) -> None:
    """As one from before a family was renamed."""
    verdicts.write(MACHINE, KERNELS._replace(family="small"), Verdict(True))
    assert verdicts.read(MACHINE, KERNELS) is None
    old = the_file(cache)
    old.rename(old.with_name("triton-gram_cka_small-bfloat16.json"))
    assert verdicts.read(MACHINE, KERNELS) is None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_can_write_is_ignored(mode, cache) -> None:
    verdicts.write(MACHINE, KERNELS, Verdict(True))
    the_file(cache).chmod(mode)
    assert verdicts.read(MACHINE, KERNELS) is None


@pytest.mark.parametrize("obstacle", ["a file in the way", "read-only", "no home"])
def test_without_a_place_for_verdicts(obstacle, cache, monkeypatch) -> None:
    if obstacle == "no home":
        for name in (verdicts.ENVIRONMENT_VARIABLE, "XDG_CACHE_HOME"):
            monkeypatch.delenv(name, raising=False)

        def fail() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(Path, "home", fail)
        assert verdicts.root() is None
    elif obstacle == "a file in the way":
        cache.parent.mkdir()
        cache.write_text("")
    else:
        # Permissions would not stop root.
        def refuse(*_: object, **__: object) -> None:
            raise OSError(30, "Read-only file system")

        monkeypatch.setattr(Path, "mkdir", refuse)
    assert not verdicts.write(MACHINE, KERNELS, BAD)
    assert verdicts.read(MACHINE, KERNELS) is None
    with verdicts.locked(MACHINE, 0.0):
        pass


def test_a_full_disk_leaves_the_old_verdict(cache, monkeypatch) -> None:
    verdicts.write(MACHINE, KERNELS, BAD)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(verdicts.json, "dump", full)
    assert not verdicts.write(MACHINE, KERNELS, Verdict(True))
    assert verdicts.read(MACHINE, KERNELS) == BAD
    assert len(list(the_file(cache).parent.iterdir())) == 1


def test_places(monkeypatch) -> None:
    monkeypatch.delenv(verdicts.ENVIRONMENT_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/cache")
    monkeypatch.setattr(verdicts.sys, "platform", "linux")
    assert verdicts.root() == Path("/some/cache/rift_kernels")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert verdicts.root() == Path.home() / ".cache" / "rift_kernels"
    monkeypatch.setattr(verdicts.sys, "platform", "darwin")
    assert verdicts.root() == Path.home() / "Library" / "Caches" / "rift_kernels"


# ---------------------------------------------------------------- several processes


def _write_often(good: bool, end: float) -> None:
    while time.time() < end:
        verdicts.write(MACHINE, KERNELS, Verdict(good, "x" * (10 if good else 100_000)))


def test_a_reader_never_sees_half_a_file() -> None:
    context, end = multiprocessing.get_context("fork"), time.time() + 1.0
    verdicts.write(MACHINE, KERNELS, Verdict(True, "x" * 10))
    writers = [context.Process(target=_write_often, args=(g, end)) for g in (True, False)]
    for writer in writers:
        writer.start()
    seen = set()
    while time.time() < end:
        verdict = verdicts.read(MACHINE, KERNELS)
        assert verdict is not None
        assert len(verdict.seen) == (10 if verdict.good else 100_000)
        seen.add(verdict.good)
    for writer in writers:
        writer.join()
    assert seen


def _test_once(log: str) -> None:
    """The first call of each of several ranks."""
    with verdicts.locked(MACHINE, 60.0):
        if verdicts.read(MACHINE, KERNELS) is None:
            with Path(log).open("a") as file:
                file.write(f"{os.getpid()}\n")
            time.sleep(0.2)
            verdicts.write(MACHINE, KERNELS, Verdict(True))
    assert verdicts.read(MACHINE, KERNELS) == Verdict(True)


def test_only_one_rank_tests(tmp_path) -> None:
    context = multiprocessing.get_context("fork")
    log = tmp_path / "log"
    ranks = [context.Process(target=_test_once, args=(str(log),)) for _ in range(6)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert [rank.exitcode for rank in ranks] == [0] * 6
    assert len(log.read_text().split()) == 1


def _hold(ready, release) -> None:
    with verdicts.locked(MACHINE, 0.0):
        ready.set()
        release.wait(60)


def test_a_stuck_rank_blocks_others_only_for_a_time_and_a_dead_one_never() -> None:
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(ready, release))
    holder.start()
    assert ready.wait(60)
    start = time.monotonic()
    with verdicts.locked(MACHINE, 0.3):  # goes on without the lock after that
        assert time.monotonic() - start >= 0.3
    holder.kill()
    holder.join()
    with verdicts.locked(MACHINE, 3600.0):
        pass


def test_a_verdict_depends_on_everything_between_a_call_and_its_kernels() -> None:
    names = {path.relative_to(verdicts.PACKAGE).as_posix() for path in verdicts.sources()}
    assert names >= {
        *("backends/cuda.py", "backends/triton/configs.json", "dispatch/operators.py"),
        *("dispatch/autograd.py", "measures/cka.py", "trust/known_answers.json"),
        *("trust/known_answers.py", "commands/trial.py"),
    }
    # Every pattern matches something.
    for pattern in verdicts._SOURCES:
        assert list(verdicts.PACKAGE.glob(pattern)), pattern
