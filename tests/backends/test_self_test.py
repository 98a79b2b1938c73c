"""The self-test: `auto` never uses planted faults, uses good kernels, and never hangs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import rift_kernels as rk
from rift_kernels.backends import cuda
from rift_kernels.commands import info, trial
from rift_kernels.dispatch import availability, plan
from rift_kernels.trust import decisions, examination, known_answers, self_test, verdicts
from rift_kernels.trust.examination import Examination, Report
from rift_kernels.trust.verdicts import Kernels, Verdict
from tests.support import cases

pytest.importorskip("triton", reason="needs triton")

CPU = torch.device("cpu")
BF16 = (torch.bfloat16, torch.bfloat16)
SMALL = Kernels("triton", "gram_cka_small", "bfloat16")
PROBLEM = availability.Problem("cka", (True,), 16, 64)
# Kept here, because the fixtures that emulate a GPU replace it.
choose_backend = plan.choose_backend
PACKAGE = Path(rk.__file__).parent


@pytest.fixture(autouse=True)
def _first_call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without verdicts, whose features are on a device where `auto` looks for kernels."""
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "1")
    monkeypatch.setenv(verdicts.ENVIRONMENT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(plan, "_has_kernels", lambda _: True)
    only(monkeypatch, "triton")
    decisions.forget()


def only(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Of all kernels, only those of this backend can run."""
    monkeypatch.setattr(
        availability,
        "reason_against",
        lambda name, *_: None if name in (backend, "eager") else f"{name} is not for this test",
    )


class Answers:
    """Stands in for the processes: gives their reports, and records what was tested."""

    def __init__(self, **good: bool | None) -> None:
        self.good, self.tested = good, []

    def __call__(self, tasks, _device) -> list[Report]:
        self.tested.append([str(kernels) for kernels, _ in tasks])
        return [
            Report(kernels, case, self.good.get(kernels.family, True), f"{case} is planted")
            for kernels, case in tasks
        ]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answers]:
    def make(**good: bool | None) -> Answers:
        planted = Answers(**good)
        monkeypatch.setattr(self_test, "examine", planted)
        return planted

    return make


def choose(problem: availability.Problem = PROBLEM, backend: str = "auto", dtypes=BF16) -> str:
    return choose_backend(backend, CPU, dtypes, problem)


def test_good_kernels_are_tested_once(answers) -> None:
    planted = answers()
    assert [choose() for _ in range(3)] == ["triton"] * 3
    decisions.forget()  # another process, which asks the disk
    assert choose() == "triton"
    assert planted.tested == [["triton/gram_cka_small/bfloat16"] * 2]
    assert choose(PROBLEM._replace(rows=300)) == "triton"
    assert choose(dtypes=(torch.bfloat16, torch.float32)) == "triton"
    assert planted.tested[1:] == [
        ["triton/gram_cka/bfloat16"] * 2,
        ["triton/gram_cka_small/float32"] * 2,
    ]


def test_bad_kernels_are_never_used_and_warned_of_once(answers, recwarn) -> None:
    planted = answers(gram_cka_small=False)
    with pytest.warns(
        UserWarning, match=r"triton/gram_cka_small/bfloat16 .*masked layers is planted.*"
    ):
        assert choose() == "eager"
    recwarn.clear()
    assert choose() == "eager"
    assert not recwarn.list
    decisions.forget()
    with pytest.warns(UserWarning, match=r"`python -m rift_kernels check` shows more"):
        assert choose() == "eager"
    assert len(planted.tested) == 1
    # Other kernels are used, and so are these on request.
    assert choose(PROBLEM._replace(gram=(False,))) == "triton"
    assert choose(backend="triton") == "triton"


def test_the_next_backend_takes_its_place(monkeypatch) -> None:
    monkeypatch.setattr(availability, "reason_against", lambda *_: None)
    monkeypatch.setattr(
        self_test,
        "examine",
        lambda tasks, _: [Report(k, c, k.backend != "cuda", "planted") for k, c in tasks],
    )
    with pytest.warns(UserWarning, match="without the kernels cuda/gram_cka_small/bfloat16"):
        assert choose() == "triton"


def test_untested_kernels_are_not_used_and_get_no_verdict(answers) -> None:
    """For example for lack of memory on the GPU; the next process tests again."""
    planted = answers(gram_cka_small=None)
    with pytest.warns(UserWarning, match=r"could not be tested .*tests them when the GPU is free"):
        assert choose() == "eager"
    assert choose() == "eager"
    decisions.forget()
    answers()
    assert choose() == "triton"
    assert len(planted.tested) == 1


def test_settings(answers, monkeypatch) -> None:
    planted = answers(gram_cka_small=False)
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "0")
    assert choose() == "triton"
    assert not planted.tested
    decisions.forget()
    verdicts.write(verdicts.identity("triton", CPU), SMALL, Verdict(True))
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "always")
    with pytest.warns(UserWarning, match="planted"):
        assert [choose(), choose()] == ["eager"] * 2
    assert len(planted.tested) == 1
    decisions.forget()
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "never")
    with pytest.raises(
        ValueError, match=r"RIFT_KERNELS_SELF_TEST must be one of '0' .* got 'never'"
    ):
        choose()
    # A choice of the environment is explicit.
    monkeypatch.setenv(plan.ENVIRONMENT_VARIABLE, "triton")
    assert choose() == "triton"


@pytest.mark.parametrize("state", ["tracing", "capturing"])
def test_nothing_is_tested_in_a_graph(state, answers, monkeypatch, recwarn) -> None:
    planted = answers()
    with monkeypatch.context() as inside:
        if state == "tracing":
            inside.setattr(torch.compiler, "is_compiling", lambda: True)
        else:
            inside.setattr(self_test, "_is_capturing", lambda _: True)
        with pytest.warns(UserWarning, match="not been tested on this GPU yet"):
            assert choose() == "eager"
        recwarn.clear()
        assert choose() == "eager"
        assert not recwarn.list
        assert not planted.tested
    assert choose() == "triton"
    decisions.forget()
    if state == "tracing":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    else:
        monkeypatch.setattr(self_test, "_is_capturing", lambda _: True)
    # The verdict on disk is enough.
    assert choose() == "triton"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_losses_take_eager_until_kernels_were_tested(dynamic, answers) -> None:
    answers()
    x, y = cases.pair()
    compiled = torch.compile(rk.linear_cka, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with pytest.warns(UserWarning, match="while torch.compile traces"):
        value = compiled(x, y)
    torch.testing.assert_close(value, rk.linear_cka(x, y, backend="eager"))


def test_kernels_of_a_call(answers) -> None:
    planted = answers()
    choose(availability.Problem("cka", (True, False), 300, 64))
    choose(availability.Problem("covariance", (False,), 300, 64))
    choose(availability.Problem("covariance", (True,), 30, 64))
    choose(availability.Problem("procrustes", (False,), 300, 64))
    assert [sorted({name.split("/", 1)[1] for name in names}) for names in planted.tested] == [
        ["covariance_cka/bfloat16", "gram_cka/bfloat16", "gram_cka_small/bfloat16"],
        ["covariance_distance/bfloat16"],
        ["products/float32"],
    ]
    from rift_kernels.backends.triton import gram_cka_small

    assert plan.SMALL_ROWS == gram_cka_small.SMALL_GRAM_ROWS == cuda.MAX_ROWS


def test_the_report_has_the_verdicts(monkeypatch) -> None:
    for name, value in (
        ("is_available", True), ("current_device", 0), ("get_device_name", "Some GPU"),
        ("get_device_capability", (9, 0)),
    ):  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    machine = {"gpu": "Some GPU"}
    monkeypatch.setattr(verdicts, "identity", lambda *_: machine)
    monkeypatch.setenv(self_test.ENVIRONMENT_VARIABLE, "nonsense")  # the report never raises
    verdicts.write(machine, SMALL, Verdict(True))
    verdicts.write(
        machine, SMALL._replace(family="gram_cka"), Verdict(False, "batch: off by 1e+00")
    )
    lines = [" ".join(line.split()) for line in info.backend_report().splitlines()]
    assert "triton/gram_cka_small/bfloat16 works" in lines
    assert "triton/gram_cka/bfloat16 batch: off by 1e+00" in lines
    assert "triton/products/float32 not yet" in lines
    assert not any(line.startswith("cuda/") for line in lines)


# ---------------------------------------------------------------- separate processes


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """Processes import a copy of the package in which one line is changed."""
    folder = tmp_path / "planted"

    def plant(file: str, before: str, after: str) -> None:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(PACKAGE, folder / "rift_kernels", ignore=ignore, dirs_exist_ok=True)
        path = folder / "rift_kernels" / file
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, after, 1))

    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return plant


GRAM_FORM = "backends/triton/gram_form.py"
LAUNCH = "        gram_cka_small.launch(layers, config, values, saved, **settings)\n"


@pytest.mark.parametrize(
    ("file", "before", "after", "seen"),
    [
        pytest.param(
            "backends/triton/gram_cka_small.py",
            "- center_offset(sums, total, n, DEBIASED)[None, :]",
            "- 0 * center_offset(sums, total, n, DEBIASED)[None, :]",
            r"masked layers: value off by .*, gradient off by",
            id="a term dropped",
        ),
        pytest.param(
            GRAM_FORM,
            LAUNCH,
            '        raise RuntimeError("Triton Error [CUDA]: invalid device function")\n',
            "RuntimeError: .*invalid device function",
            id="a launch that fails",
        ),
        pytest.param(
            GRAM_FORM, LAUNCH, "        import os\n        os.abort()\n", "SIGABRT", id="a crash"
        ),
        pytest.param(
            GRAM_FORM,
            LAUNCH,
            "        import time\n        time.sleep(10**6)\n",
            "masked layers: never returned",
            id="one that never returns",
        ),
    ],
)
def test_planted_kernels_are_never_used(file, before, after, seen, package, monkeypatch) -> None:
    package(file, before, after)
    monkeypatch.setattr(examination, "LIMIT", 2.0 if "sleep" in after else examination.LIMIT)
    with pytest.warns(UserWarning, match=seen):
        assert choose() == "eager"
    assert choose() == "eager"
    # On disk, for all later processes.
    decisions.forget()
    monkeypatch.setattr(self_test, "examine", None)
    with pytest.warns(UserWarning, match=seen):
        assert choose() == "eager"


def test_real_kernels_are_used(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose() == "triton"
    assert verdicts.read(verdicts.identity("triton", CPU), SMALL) == Verdict(True)


def test_after_a_crash_another_process_tests_the_rest(package) -> None:
    package(GRAM_FORM, LAUNCH, "        import os\n        os.abort()\n")
    products = Kernels("triton", "products", "float32")
    tasks = [(SMALL, "gram_cka_small: masked layers"), (SMALL, "gram_cka_small: batch")]
    tasks.append((products, "products: distance of few rows"))
    crashed, skipped, good = Examination(tasks, CPU)
    assert crashed.good is False
    assert skipped[:3] == (SMALL, "gram_cka_small: batch", None)
    assert "not tried after gram_cka_small: masked layers" in skipped.seen
    assert good.good is True
    assert good.kernels == products


def test_a_process_that_cannot_start_is_no_verdict(monkeypatch) -> None:
    """As on a GPU in exclusive use, or without memory for a context."""
    task = [(SMALL, "gram_cka_small: batch")]
    (report,) = Examination(task, torch.device("cuda:77"))
    assert report.good is None
    assert "the process ended with status 1" in report.seen
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    (report,) = Examination(task, CPU)
    assert report.good is None
    assert "no process could be started" in report.seen


def test_out_of_time(package) -> None:
    package(GRAM_FORM, LAUNCH, "        import time\n        time.sleep(10**6)\n")
    reports = list(Examination([(SMALL, "gram_cka_small: batch")] * 2, CPU, seconds=1.0))
    assert [report.good for report in reports] == [None, None]
    assert {report.seen for report in reports} == {"out of time"}


@pytest.mark.parametrize(
    ("error", "good"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), None),
        (RuntimeError("CUDA-capable device(s) is/are busy or unavailable"), None),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (AssertionError(), False),
    ],
)
def test_errors_in_a_trial(error, good, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(trial, "judge", fail)
    outcome = trial.attempt(SMALL, known_answers.CASES[0], CPU)
    assert outcome.good is good
    assert type(error).__name__ in outcome.seen


def test_a_killed_process_is_no_verdict(package) -> None:
    """The system kills processes when memory runs out."""
    kill = "        import os, signal\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    package(GRAM_FORM, LAUNCH, kill)
    (report,) = Examination([(SMALL, "gram_cka_small: batch")], CPU)
    assert report.good is None
    assert "killed" in report.seen


def test_results_that_differ_between_runs(monkeypatch) -> None:
    measure, count = trial.autograd.measure, iter(range(10))

    def drift(*arguments: object) -> torch.Tensor:
        return measure(*arguments) * (1 + 1e-7 * next(count))

    monkeypatch.setattr(trial.autograd, "measure", drift)
    case = known_answers.CASES[0]
    outcome = trial.attempt(Kernels("eager", "gram_cka_small", "float32"), case, CPU)
    assert outcome == (False, "masked layers: results differ from one run to the next", None, None)


@pytest.mark.parametrize("result", ["value", "gradient"])
def test_nan_is_wrong(result, monkeypatch) -> None:
    grad = torch.autograd.grad

    def spoiled(*arguments: object) -> list[torch.Tensor]:
        gradients = list(grad(*arguments))
        gradients[0][3, 3] = float("nan")
        return gradients

    measure = trial.autograd.measure
    if result == "gradient":
        monkeypatch.setattr(torch.autograd, "grad", spoiled)
    else:
        monkeypatch.setattr(trial.autograd, "measure", lambda *a: measure(*a) * float("nan"))
    monkeypatch.setattr(trial, "REPEATS", 1)
    case = known_answers.CASES[2]
    outcome = trial.attempt(Kernels("eager", "gram_cka_small", "float32"), case, CPU)
    assert outcome.good is False
    assert f"{result} off by nan" in outcome.seen


# ---------------------------------------------------------------- CUDA kernels in the emulator


def examine_here(tasks, device) -> list[Report]:
    """The reports from this process, whose CUDA kernels are emulated."""
    named = {known_answers.key(case): case for case in known_answers.CASES}
    return [Report(k, name, *trial.attempt(k, named[name], device)) for k, name in tasks]


@pytest.fixture
def emulated_choice(monkeypatch, emulate) -> Callable[..., str]:
    """The choice of `auto` with emulated CUDA kernels."""

    def make(gpu: str) -> str:
        emulate(gpu)
        only(monkeypatch, "cuda")
        monkeypatch.setattr(self_test, "examine", examine_here)
        monkeypatch.setattr(trial, "REPEATS", 1)
        return choose()

    return make


def test_emulated_cuda_kernels_are_used(emulated_choice) -> None:
    assert emulated_choice("clusters") == "cuda"


def test_a_launch_that_fails_in_cuda(emulated_choice, monkeypatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("cka_small: cudaErrorInvalidConfiguration: invalid configuration")

    monkeypatch.setattr(cuda, "_launch", refuse)
    with pytest.warns(UserWarning, match="cudaErrorInvalidConfiguration"):
        assert emulated_choice("clusters") == "eager"


def test_a_missing_barrier(tmp_path, monkeypatch) -> None:
    """In cka_small, threads run ahead and multiply matrices that are not complete."""
    for name in ("csrc", "tests/support/emulator"):
        shutil.copytree(PACKAGE.parent / name, tmp_path / name)
    path = tmp_path / "csrc" / "cka_small" / "cka_small.cuh"
    text = path.read_text()
    written = text.index("grams.store_matrix(")
    head, tail = text[:written], text[written:]
    assert "__syncthreads();" in tail
    path.write_text(head + tail.replace("__syncthreads();", "", 1))
    # In a separate process, because this one may have loaded another extension of that name.
    result = subprocess.run(
        [sys.executable, "-c", _BROKEN, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent)},
    )
    assert result.returncode == 0, result.stderr
    reports = [Report(Kernels(*kernels), *rest) for kernels, *rest in json.loads(result.stdout)]
    only(monkeypatch, "cuda")
    monkeypatch.setattr(self_test, "examine", lambda *_: reports)
    with pytest.warns(UserWarning, match="off by"):
        assert choose() == "eager"


# Compiles the sources in a folder, and tries their kernels.
_BROKEN = """
import json, os, sys
from pathlib import Path
import torch
from rift_kernels.commands import trial
from rift_kernels.trust import known_answers
from rift_kernels.trust.verdicts import Kernels
from tests import as_gpu
from tests.support import emulated

folder = Path(sys.argv[1])
sources = [folder / s.relative_to(emulated.TESTS.parent) for s in emulated.SOURCES]
emulated.TESTS, emulated.SOURCES = folder / "tests", sources
major, shared = emulated.GPUS["clusters"]
os.environ.update(RIFT_EMULATED_MAJOR=major, RIFT_EMULATED_SHARED=shared, RIFT_EMULATED_SEED="0")
trial.REPEATS = 1
kernels = Kernels("cuda", "gram_cka_small", "bfloat16")
with as_gpu.cuda("sm90", emulated.build(folder), 3, "gram"):
    cases = known_answers.cases_of(kernels, False)
    reports = [(kernels, c.name, *trial.attempt(kernels, c, torch.device("cpu"))) for c in cases]
print(json.dumps(reports))
"""


def test_many_rows_in_emulated_cuda(emulate, monkeypatch) -> None:
    """The emulator passes a case that `auto` tests on the kernels for many rows."""
    monkeypatch.setattr(trial, "REPEATS", 1)
    kernels = Kernels("cuda", "covariance_cka", "bfloat16")
    emulate("clusters", form="covariance")
    case = next(c for c in known_answers.cases_of(kernels, False) if c.batch)
    assert trial.attempt(kernels, case, CPU).good
