"""The benchmarks run, and say what is wrong or missing."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import (
    baselines,
    files,
    host,
    measure,
    oracle,
    run,
    schema,
    suite,
    tables,
)
from benchmarks.providers import HALF, NAIVE, TF32, WIDE, Provider, providers
from benchmarks.schema import Outcome
from benchmarks.workloads import MEASURES, Inputs, Workload, features
from rift_kernels import reference
from rift_kernels.dispatch import availability, plan

CPU = torch.device("cpu")
EAGER = "rift_kernels eager"
SMALL = Workload("cka_biased", 16, 8)
PROVIDERS = {p.name: p for p in providers(CPU, compiled=())}


def test_result_is_complete(smoke) -> None:
    result = smoke("run")
    assert [w.measure for w in result.workloads] == list(MEASURES)
    for workload in result.workloads:
        assert workload.reason is None
        ours = workload.results[EAGER]
        assert ours.reason is None
        assert not ours.wrong
        assert set(workload.noise) == set(measure.CLOCKS)


@pytest.mark.parametrize("backend", availability.BACKENDS)
def test_unavailable_backends_say_why(backend, smoke) -> None:
    result = smoke("run")
    reasons = {provider.name: provider.reason for provider in result.providers}
    reason = availability.reason_against(backend)
    assert reasons[f"rift_kernels {backend}"] == reason
    assert reason is None or f"rift_kernels {backend}: {reason}" in tables.summary(result)


def _entry(workload: Workload, candidates: list[Provider], seconds: float = 5) -> schema.Workload:
    rates = dict.fromkeys(("float64", "float32", "bfloat16"), 1e9)
    peaks = {"matmul_flops": rates, "copy_bytes": 1e9}
    return run.measured(workload, candidates, peaks, CPU, seconds, max_rounds=5)


def test_wrong_answers_are_marked() -> None:
    def half(inputs: Inputs) -> Tensor:
        return baselines.cka_biased(inputs.students[0], inputs.teachers[0]) / 2

    def nan_gradient(inputs: Inputs) -> Tensor:
        return 2 * half(inputs) + 0 * (inputs.students[0].sum() * 0).sqrt()

    def no_gradient(inputs: Inputs) -> Tensor:
        return half(inputs).detach()

    wrong = [Provider(f.__name__, {"cka_biased": f}) for f in (half, nan_gradient, no_gradient)]
    results = _entry(SMALL, [PROVIDERS[NAIVE], *wrong]).results
    assert not results[NAIVE].wrong
    assert results["half"].wrong
    assert results["half"].value_error > 0.1
    assert results["nan_gradient"].wrong
    assert results["nan_gradient"].gradient_error is None
    assert "does not require grad" in results["no_gradient"].reason


def test_wrong_answers_are_not_praised(smoke) -> None:
    fast = smoke("run")
    outcome = fast.workloads[0].results[EAGER]
    outcome.seconds["both"].q50 = 1e-9
    outcome.wrong, outcome.gradient_error = True, 0.3
    assert "**wrong** by 3e-1" in tables.summary(fast)
    assert run.failures(fast) == [f"{EAGER}: cka_biased 16 x 8 float32: wrong"]
    for workload in fast.workloads:
        workload.results = {}
    assert run.failures(fast) == ["nothing was measured"]


def _errors(provider: Provider, workload: Workload, inputs: Inputs) -> tuple[float, float]:
    task = measure.Task(provider, workload.measure, inputs)
    values = task.forward()
    gradients = task.backward(values)
    if inputs.mask is not None:
        assert not gradients[0][~inputs.mask].any()
    return oracle.Oracle(workload, inputs).errors(values, gradients)


def test_masked_workloads_are_right_for_all_who_take_them() -> None:
    workload = Workload("cka_debiased", 64, 8, valid=0.6)
    inputs = features(workload, CPU)
    assert 20 < int(inputs.mask.sum()) < 60
    for provider in PROVIDERS.values():
        if provider.reason is None and workload.measure in provider.measures:
            errors = _errors(provider, workload, inputs)
            # Half precision is naive eager's own fault.
            assert provider.name == HALF or not oracle.wrong(*errors), provider.name


def test_naive_code_on_features_of_another_dtype() -> None:
    workload = Workload("cka_biased", 64, 8)
    inputs = features(workload, CPU)
    naive, half, wide = (
        _errors(PROVIDERS[name], workload, inputs)[1] for name in (NAIVE, HALF, WIDE)
    )
    assert naive == wide < 1e-4 < 1e-3 < half
    assert not PROVIDERS[WIDE].takes(workload)
    assert PROVIDERS[TF32].reason == "TF32 needs a GPU"


def test_settings_hold_forward_and_backward_and_no_longer() -> None:
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_, x: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return 2 * x

        backward = forward

    functions = {"": lambda inputs: Double.apply(inputs.students[0]).sum()}
    provider = dataclasses.replace(PROVIDERS[TF32], measures=functions)
    task = measure.Task(provider, "", features(Workload("cka_biased", 4, 4), CPU))
    before = torch.backends.cuda.matmul.fp32_precision
    task.backward(task.forward())
    assert seen == ["tf32", "tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_the_whole_suite(tmp_path, capfd) -> None:
    options = ["--profile", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert suite.main([*options, "--only", "frontier,scaling"]) == 0
    kinds = {type(files.read(path)) for path in tmp_path.iterdir()}
    assert kinds == {schema.Frontier, schema.Scaling}
    assert "--- frontier" in capfd.readouterr().out
    for wrong, message in (
        (["--only", "frontier,speed"], "must be of run, frontier, scaling, step, lora; got speed"),
        (["--profile", "full"], "full needs a GPU"),
    ):
        with pytest.raises(SystemExit):
            suite.main(wrong)
        assert message in capfd.readouterr().err
    # One that fails does not stop the others, and is named.
    assert suite.main(["--profile", "smoke", "--device", "tpu", "--only", "run,frontier"]) == 1
    assert "FAILED run\nFAILED frontier" in capfd.readouterr().out


@pytest.mark.parametrize("kind", suite.KINDS)
def test_the_suite_names_commands_that_exist(kind) -> None:
    command = suite.command(kind, "full", "cuda", Path("/x"))
    assert importlib.util.find_spec(f"benchmarks.{kind}") is not None
    assert command[command.index("--profile") + 1] == ("full" if kind == "run" else "gpu")


def test_where_the_time_of_the_host_goes(monkeypatch) -> None:
    monkeypatch.setattr(host, "SECONDS", 0.01)
    rows = [line for line in host.table().splitlines() if "without launches" in line]
    assert len(rows) == 5
    assert all(float(line.split("|")[2]) > 0 for line in rows)
    # What stands in for the GPU is gone again.
    assert plan.choose_backend("auto", CPU) == "eager"


def test_providers_that_all_fail_say_so() -> None:
    def broken(_: Inputs) -> Tensor:
        raise NotImplementedError("one\ntwo")

    entry = _entry(SMALL, [Provider(NAIVE, {"cka_biased": broken})])
    assert entry.results == {NAIVE: Outcome(reason="NotImplementedError: one")}


def test_what_does_not_fit_says_so() -> None:
    assert "budget was spent" in _entry(SMALL, [*PROVIDERS.values()], seconds=0).reason

    def slow(_: Inputs) -> Tensor:
        raise AssertionError("never called")

    hopeless = Provider("slow", {"cka_biased": slow}, flops=lambda _: 1e12)
    results = _entry(SMALL, [PROVIDERS[NAIVE], hopeless]).results
    assert "predicted to take 1000.0 s" in results["slow"].reason
    assert results[NAIVE].reason is None


def test_peak_memory_is_the_largest_sum_of_what_lives() -> None:
    mebibyte = 2**20
    student = torch.zeros(mebibyte // 4, requires_grad=True)
    # One MiB each: exp, which the backward needs, and a sum that dies.
    values = {"": lambda inputs: (inputs.students[0].exp() + 1).sum()}
    task = measure.Task(Provider("", values), "", Inputs([student], [student.detach()]))
    peaks = measure.peak_memory(task, CPU)
    assert 2 <= peaks["forward"] / mebibyte < 2.1
    # exp, and the gradient.
    assert 2 <= peaks["backward"] / mebibyte < 2.1
    assert peaks["both"] == max(peaks["forward"], peaks["backward"])


@pytest.mark.parametrize("debiased", [False, True])
def test_the_oracle_is_the_definition(debiased) -> None:
    workload = Workload("cka_debiased" if debiased else "cka_biased", 24, 8)
    inputs = features(workload, CPU)
    student = inputs.students[0].detach().double().requires_grad_()
    values = reference.linear_cka(student, inputs.teachers[0].double(), debiased=debiased)
    gradients = torch.autograd.grad(values, student)
    errors = oracle.Oracle(workload, inputs).errors(values, gradients)
    assert max(errors) < 1e-10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget: must be positive, got 0"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options, message, tmp_path, capsys
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
