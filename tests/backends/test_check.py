"""``python -m rift_kernels check``: its output, its files and its exit status."""

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
from rift_kernels.trust import examination, known_answers, verdicts
from rift_kernels.trust.examination import Report
from rift_kernels.trust.verdicts import Kernels, Verdict

CPU = torch.device("cpu")
MACHINE = {"gpu": "Some GPU", "driver": "570.1", "triton": "3.7.1"}
SMALL = Kernels("triton", "gram_cka_small", "bfloat16")


class Planted:
    """An examination without processes, whose outcomes are planted."""

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
    monkeypatch.setattr(examination, "Examination", Planted)
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
    names = {"/".join((k["backend"], k["family"], k["dtype"])) for k in result["kernels"]}
    assert names == set(map(str, known_answers.ALL))
    assert all(entry["good"] for entry in (*result["kernels"], *result["cases"]))
    assert result["environment"]["gpu"] == "Some GPU"
    table = capsys.readouterr().out
    assert all(str(kernels) in table for kernels in known_answers.ALL)
    # `auto` uses the verdict.
    assert verdicts.read(MACHINE, SMALL) == Verdict(True)


@pytest.mark.parametrize(
    ("name", "good"),
    [("gram_cka_small: batch", False), ("gram_cka_small: wide", False)],
    ids=["tested by auto", "another case"],
)
def test_what_disagrees(name, good, tmp_path, capsys) -> None:
    Planted.outcomes = {f"{SMALL} {name}": False}
    code, result = run(tmp_path)
    assert code == 1
    (wrong,) = [kernels for kernels in result["kernels"] if not kernels["good"]]
    assert wrong == {**SMALL._asdict(), "good": False, "seen": "planted"}
    assert "triton/gram_cka_small/bfloat16: WRONG: planted" in capsys.readouterr().out
    assert verdicts.read(MACHINE, SMALL) == Verdict(good, "planted")


def test_what_could_not_be_tried(tmp_path) -> None:
    Planted.outcomes = {str(SMALL): None}
    code, _ = run(tmp_path)
    assert code == 2
    assert verdicts.read(MACHINE, SMALL) is None


def test_an_interrupted_check_keeps_its_results(tmp_path, monkeypatch) -> None:
    reports = Planted.__iter__

    def interrupted(self):
        for count, report in enumerate(reports(self)):
            if count == 20:
                raise KeyboardInterrupt
            yield report

    monkeypatch.setattr(
        check,
        "_side_by_side",
        lambda tasks, *_: ((report, {"triton": MACHINE}) for report in interrupted(Planted(tasks))),
    )
    with pytest.raises(KeyboardInterrupt):
        check.main(["--json", str(tmp_path / "check.json")])
    result = json.loads((tmp_path / "check.json").read_text())
    schema.parse(result)
    assert not result["complete"]
    assert len(result["cases"]) == 20


def test_order_and_choice() -> None:
    everything = check.tasks(("triton", "cuda"), [], quick=False)
    first = check.tasks(("triton", "cuda"), [], quick=True)
    assert everything[: len(first)] == first
    assert len(set(everything)) == len(everything)
    assert {kernels for kernels, _ in first} == set(known_answers.ALL)
    chosen = check.tasks(("triton", "cuda"), ["cuda", "bfloat16"], quick=True)
    assert {str(k) for k, _ in chosen} == {
        "cuda/gram_cka_small/bfloat16",
        "cuda/covariance_cka/bfloat16",
    }
    assert not check.tasks(("triton",), ["cuda"], quick=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_without_a_gpu(tmp_path) -> None:
    path = tmp_path / "check.json"
    command = [sys.executable, "-m", "rift_kernels", "check", "--json", str(path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 2, run.stderr
    assert "triton: not tried: Triton needs a GPU" in run.stdout
    result = json.loads(path.read_text())
    schema.parse(result)
    assert [b["name"] for b in result["backends"] if b["reason"]] == ["triton", "cuda"]
    wrong = subprocess.run([*command[:3], "chekc"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 1
    assert "usage: python -m rift_kernels [check ... | tune ...]; got 'chekc'" in wrong.stderr
