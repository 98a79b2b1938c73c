"""The benchmarks run, and say what is wrong or missing."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import baselines, host, measure, oracle, run, schema, tables
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


def test_what_cannot_run_says_why(smoke) -> None:
    result = smoke("run")
    reasons = {provider.name: provider.reason for provider in result.providers}
    assert reasons[TF32] == "TF32 needs a GPU"
    for backend in availability.BACKENDS:
        name, reason = f"rift_kernels {backend}", availability.reason_against(backend)
        assert reasons[name] == reason
        assert reason is None or f"{name}: {reason}" in tables.summary(result)


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

    def broken(_: Inputs) -> Tensor:
        raise NotImplementedError("one\ntwo")

    functions = (half, nan_gradient, no_gradient, broken)
    wrong = [Provider(f.__name__, {"cka_biased": f}) for f in functions]
    results = _entry(SMALL, [PROVIDERS[NAIVE], *wrong]).results
    assert not results[NAIVE].wrong
    assert results["half"].wrong
    assert results["half"].value_error > 0.1
    assert results["nan_gradient"].wrong
    assert results["nan_gradient"].gradient_error is None
    assert "does not require grad" in results["no_gradient"].reason
    assert _entry(SMALL, wrong[-1:]).results == {
        "broken": Outcome(reason="NotImplementedError: one")
    }


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
    inputs, three = features(workload, CPU), (NAIVE, HALF, WIDE)
    naive, half, wide = (_errors(PROVIDERS[name], workload, inputs)[1] for name in three)
    assert naive == wide < 1e-4 < 1e-3 < half
    assert not PROVIDERS[WIDE].takes(workload)


def test_settings_hold_forward_and_backward_and_no_longer() -> None:
    matmul, seen = torch.backends.cuda.matmul, []

    def value(inputs: Inputs) -> Tensor:
        seen.append(matmul.fp32_precision)
        inputs.students[0].register_hook(lambda _: seen.append(matmul.fp32_precision))
        return inputs.students[0].sum()

    provider = dataclasses.replace(PROVIDERS[TF32], measures={"": value})
    task = measure.Task(provider, "", features(SMALL, CPU))
    before = matmul.fp32_precision
    task.backward(task.forward())
    assert seen == ["tf32", "tf32"]
    assert matmul.fp32_precision == before


def test_where_the_time_of_the_host_goes(monkeypatch) -> None:
    monkeypatch.setattr(host, "SECONDS", 0.01)
    rows = [line for line in host.table().splitlines() if "without launches" in line]
    assert len(rows) == 5
    assert all(float(line.split("|")[2]) > 0 for line in rows)
    # What stands in for the GPU is gone again.
    assert plan.choose_backend("auto", CPU) == "eager"


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


def test_the_oracle_is_the_definition() -> None:
    for workload in (Workload("cka_biased", 24, 8), Workload("cka_debiased", 24, 8)):
        inputs = features(workload, CPU)
        x = inputs.students[0].detach().double().requires_grad_()
        debiased = workload.measure == "cka_debiased"
        value = reference.linear_cka(x, inputs.teachers[0].double(), debiased=debiased)
        gradients = torch.autograd.grad(value, x)
        assert max(oracle.Oracle(workload, inputs).errors(value, gradients)) < 1e-10


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--budget", "0"], "--budget: must be positive, got 0"),
        (["--device", "nonsense"], "--device: must be cpu or a usable GPU; got 'nonsense'"),
        (["--out", "/dev/null/x"], "--out must be a folder that can be written"),
    ],
)
def test_wrong_options_are_refused_in_a_line(arguments, words, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
