"""``python -m rift_kernels check``: what it says, what it leaves, and how it exits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks import schema
from rift_kernels.commands import check
from rift_kernels.trust import known_answers, self_test, verdicts
from rift_kernels.trust.self_test import Report
from rift_kernels.trust.verdicts import Kernels, Verdict

CPU = torch.device("cpu")
MACHINE = {"gpu": "Some GPU", "driver": "570.1", "triton": "3.7.1"}
SMALL = Kernels("triton", "small", "bfloat16")


class Planted:
    """Examinations without processes: of some kernels, cases come out as they are told to."""

    outcomes: ClassVar[dict[str, bool | None]] = {}

    def __init__(self, tasks, *_: object) -> None:
        self.tasks = tasks
        self.identities = {"triton": MACHINE, "cuda": MACHINE}

    def __iter__(self):
        for kernels, case in self.tasks:
            good = self.outcomes.get(f"{kernels} {case}", self.outcomes.get(str(kernels), True))
            errors = (1e-7, 2e-3) if good is not None else (None, None)
            yield Report(kernels, case, good, "" if good else "planted", *errors, seconds=0.5)


@pytest.fixture(autouse=True)
def _planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(verdicts.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(self_test, "Examination", Planted)
    monkeypatch.setattr(check, "reasons", lambda _: {"triton": None, "cuda": None})
    monkeypatch.setattr(Planted, "outcomes", {})


def run(tmp_path: Path, *options: str) -> tuple[int, dict]:
    path = tmp_path / "check.json"
    code = check.main(["--json", str(path), *options])
    result = json.loads(path.read_text())
    schema.parse(result)
    return code, result


@pytest.mark.parametrize("jobs", ["1", "5"])
def test_all_agree(jobs, tmp_path, capsys) -> None:
    code, result = run(tmp_path, "--jobs", jobs)
    assert code == 0
    assert result["complete"]
    names = {"/".join((one["backend"], one["family"], one["dtype"])) for one in result["kernels"]}
    assert names == set(map(str, known_answers.ALL))
    assert all(one["good"] for one in (*result["kernels"], *result["cases"]))
    assert result["environment"]["gpu"] == "Some GPU"
    table = capsys.readouterr().out
    assert all(str(kernels) in table for kernels in known_answers.ALL)
    # For `auto`, too.
    assert verdicts.read(MACHINE, SMALL) == Verdict(True)


@pytest.mark.parametrize(
    ("name", "kept"),
    [("small: batch", False), ("small: wide", False)],
    ids=["asked for by auto", "of the rest"],
)
def test_what_disagrees(name, kept, tmp_path, capsys) -> None:
    Planted.outcomes = {f"{SMALL} {name}": False}
    code, result = run(tmp_path)
    assert code == 1
    (wrong,) = [one for one in result["kernels"] if not one["good"]]
    assert wrong == {**SMALL._asdict(), "good": False, "seen": "planted"}
    assert "triton/small/bfloat16: WRONG: planted" in capsys.readouterr().out
    assert verdicts.read(MACHINE, SMALL) == Verdict(kept, "planted")


def test_what_could_not_be_tried(tmp_path) -> None:
    Planted.outcomes = {str(SMALL): None}
    code, _ = run(tmp_path)
    assert code == 2
    assert verdicts.read(MACHINE, SMALL) is None


def test_a_check_that_is_cut_off_leaves_what_it_found(tmp_path, monkeypatch) -> None:
    reports = Planted.__iter__

    def cut_off(self):
        for count, report in enumerate(reports(self)):
            if count == 20:
                raise KeyboardInterrupt
            yield report

    monkeypatch.setattr(
        check,
        "_side_by_side",
        lambda tasks, *_: ((report, {"triton": MACHINE}) for report in cut_off(Planted(tasks))),
    )
    with pytest.raises(KeyboardInterrupt):
        check.main(["--json", str(tmp_path / "check.json")])
    result = json.loads((tmp_path / "check.json").read_text())
    schema.parse(result)
    assert not result["complete"]
    assert len(result["cases"]) == 20


def test_order_and_choice() -> None:
    everything = check.tasks(("triton", "cuda"), [], quick=False)
    asked = check.tasks(("triton", "cuda"), [], quick=True)
    assert everything[: len(asked)] == asked
    assert len(set(everything)) == len(everything)
    assert {kernels for kernels, _ in asked} == set(known_answers.ALL)
    some = check.tasks(("triton", "cuda"), ["cuda", "bfloat16"], quick=True)
    assert {str(k) for k, _ in some} == {"cuda/small/bfloat16", "cuda/covariance/bfloat16"}
    assert not check.tasks(("triton",), ["cuda"], quick=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path) -> None:
    path = tmp_path / "check.json"
    command = [sys.executable, "-m", "rift_kernels", "check", "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "triton: not tried: Triton needs a GPU" in done.stdout
    result = json.loads(path.read_text())
    schema.parse(result)
    assert [one["name"] for one in result["backends"] if one["reason"]] == ["triton", "cuda"]
    wrong = subprocess.run([*command[:3], "chekc"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "usage: python -m rift_kernels [check ... | tune ...]; got 'chekc'" in wrong.stderr
