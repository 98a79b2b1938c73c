"""The benchmarks run, say what is wrong or missing, and write the documents' tables."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import (
    baselines,
    environment,
    files,
    host,
    measure,
    oracle,
    predict,
    report,
    run,
    schema,
    side_by_side,
    suite,
    tables,
)
from benchmarks.providers import HALF, NAIVE, TF32, WIDE, Provider, providers
from benchmarks.workloads import MEASURES, Inputs, Workload, features
from rift_kernels.dispatch import availability, plan

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``python -m benchmarks.run --profile smoke`` writes."""
    folder = tmp_path_factory.mktemp("results")
    arguments = ["--profile", "smoke", "--device", "cpu", "--out", str(folder)]
    assert run.main(arguments) == 0
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def test_result_is_complete(result: dict[str, Any]) -> None:
    schema.validate(result)
    assert [w["measure"] for w in result["workloads"]] == list(MEASURES)
    for workload in result["workloads"]:
        assert workload["reason"] is None
        ours = workload["results"]["rift_kernels eager"]
        assert ours["reason"] is None
        assert not ours["wrong"]
        assert set(workload["noise"]) == set(measure.CLOCKS)


def test_unavailable_backends_say_why(result: dict[str, Any]) -> None:
    reasons = {provider["name"]: provider["reason"] for provider in result["providers"]}
    text = tables.summary(result)
    for backend in availability.BACKENDS:
        reason = availability.reason_against(backend)
        assert reasons[f"rift_kernels {backend}"] == reason
        assert reason is None or f"rift_kernels {backend}: {reason}" in text


def test_schema_names_the_place(result: dict[str, Any]) -> None:
    broken = copy.deepcopy(result)
    del broken["workloads"][1]["rounds"]
    with pytest.raises(ValueError, match=r"workloads\[1\]: missing keys \['rounds'\]"):
        schema.validate(broken)
    broken = copy.deepcopy(result)
    broken["workloads"][0]["results"][NAIVE]["seconds"]["both"]["q50"] = "fast"
    with pytest.raises(ValueError, match=r"seconds\.both\.q50 must be"):
        schema.validate(broken)


def test_results_are_never_overwritten(
    result: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "slug", lambda _: "same")
    paths = {files.write(result, tmp_path) for _ in range(3)}
    assert len(paths) == 3


def _entry(workload: Workload, candidates: list[Provider], seconds: float = 5) -> dict[str, Any]:
    peaks = dict.fromkeys(("float64", "float32", "bfloat16"), 1e9)
    entry = side_by_side.describe(workload, candidates, peaks, 1e9)
    side_by_side.complete(entry, workload, candidates, CPU, seconds, max_rounds=5)
    return entry


def test_wrong_answers_are_marked() -> None:
    def half(inputs: Inputs) -> Tensor:
        return baselines.cka_biased(inputs.students[0], inputs.teachers[0]) / 2

    def nan_gradient(inputs: Inputs) -> Tensor:
        return 2 * half(inputs) + 0 * (inputs.students[0].sum() * 0).sqrt()

    def no_gradient(inputs: Inputs) -> Tensor:
        return half(inputs).detach()

    candidates = [
        providers(CPU, compiled=())[0],
        *(Provider(f.__name__, {"cka_biased": f}) for f in (half, nan_gradient, no_gradient)),
    ]
    results = _entry(Workload("cka_biased", 16, 8), candidates)["results"]
    assert not results[NAIVE]["wrong"]
    assert results["half"]["wrong"]
    assert results["half"]["value_error"] > 0.1
    assert results["nan_gradient"]["wrong"]
    assert results["nan_gradient"]["gradient_error"] is None
    assert "does not require grad" in results["no_gradient"]["reason"]


def test_wrong_answers_are_not_praised(result: dict[str, Any]) -> None:
    fast = copy.deepcopy(result)
    entry = fast["workloads"][0]["results"]["rift_kernels eager"]
    entry["seconds"]["both"]["q50"] = 1e-9
    entry.update(wrong=True, gradient_error=0.3)
    text = tables.summary(fast)
    assert "**wrong** by 3e-1" in text
    assert run.failures(fast) == ["rift_kernels eager: cka_biased 16 x 8 float32: wrong"]
    assert run.failures({"workloads": [{"results": {}}]}) == ["nothing was measured"]


def test_masked_workloads_are_right_for_all_who_take_them() -> None:
    workload = Workload("cka_debiased", 64, 8, valid=0.6)
    inputs = features(workload, CPU)
    assert inputs.mask is not None
    assert 20 < int(inputs.mask.sum()) < 60
    right = oracle.Oracle(workload, inputs)
    for provider in providers(CPU, compiled=()):
        if provider.reason is None and workload.measure in provider.measures:
            task = measure.Task(provider, workload.measure, inputs)
            values = task.forward()
            gradients = task.backward(values)
            off = right.errors(values, gradients)
            # Half precision is naive eager's own fault.
            assert provider.name == HALF or not oracle.wrong(*off), provider.name
            assert not gradients[0][~inputs.mask].any()


def test_naive_code_on_features_of_another_dtype() -> None:
    inputs = features(Workload("cka_biased", 64, 8), CPU)
    found = {p.name: p for p in providers(CPU, compiled=())}
    right = oracle.Oracle(Workload("cka_biased", 64, 8), inputs)
    errors = {}
    for name in (NAIVE, HALF, WIDE):
        task = measure.Task(found[name], "cka_biased", inputs)
        values = task.forward()
        errors[name] = right.errors(values, task.backward(values))[1]
    assert errors[NAIVE] == errors[WIDE] < 1e-4 < 1e-3 < errors[HALF]
    assert not found[WIDE].takes(Workload("cka_biased", 64, 8))
    assert found[TF32].reason == "TF32 needs a GPU"


def test_settings_hold_forward_and_backward_and_no_longer() -> None:
    seen = []

    class Double(torch.autograd.Function):
        @staticmethod
        def forward(_, x: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return 2 * x

        @staticmethod
        def backward(_, grad: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.matmul.fp32_precision)
            return 2 * grad

    tf32 = next(p for p in providers(CPU, compiled=()) if p.name == TF32)
    functions = {"": lambda inputs: Double.apply(inputs.students[0]).sum()}
    provider = dataclasses.replace(tf32, measures=functions)
    task = measure.Task(provider, "", features(Workload("cka_biased", 4, 4), CPU))
    before = torch.backends.cuda.matmul.fp32_precision
    task.backward(task.forward())
    assert seen == ["tf32", "tf32"]
    assert torch.backends.cuda.matmul.fp32_precision == before
    # And what is inherited is inherited still.
    parent = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.backends.fp32_precision = parent


def test_the_whole_suite(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--profile", "smoke", "--device", "cpu", "--out", str(tmp_path)]
    assert suite.main([*options, "--only", "frontier,scaling"]) == 0
    kinds = {files.read(path)["schema"] for path in tmp_path.iterdir()}
    assert kinds == {schema.FRONTIER, schema.SCALING}
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
def test_the_suite_names_commands_that_exist(kind: str) -> None:
    (command,) = suite.commands([kind], "full", "cuda", Path("/x")).values()
    assert importlib.util.find_spec(f"benchmarks.{kind}") is not None
    assert command[command.index("--profile") + 1] == ("full" if kind == "run" else "gpu")


def test_the_state_of_the_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    assert environment.describe(CPU)["clocks"].startswith("load average ")
    monkeypatch.setattr(environment, "_output", lambda *_: "1980 MHz, 1980 MHz, 2619 MHz, 120 W")
    assert "clocks.sm" in environment._clocks(torch.device("cuda"))
    assert "1980 MHz" in environment._clocks(torch.device("cuda"))
    monkeypatch.setattr(environment, "_output", lambda *_: environment.UNKNOWN)
    assert environment.UNKNOWN in environment._clocks(torch.device("cuda"))


def test_where_the_time_of_the_host_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SECONDS", 0.01)
    text = host.table()
    rows = [line for line in text.splitlines() if "without launches" in line]
    assert len(rows) == 5
    assert all(float(line.split("|")[2]) > 0 for line in rows)
    # What stands in for the GPU is gone again.
    assert plan.choose_backend("auto", CPU) == "eager"


def test_providers_that_all_fail_say_so() -> None:
    def broken(_: Inputs) -> Tensor:
        raise NotImplementedError("one\ntwo")

    entry = _entry(Workload("cka_biased", 16, 8), [Provider(NAIVE, {"cka_biased": broken})])
    assert entry["results"] == {NAIVE: {"reason": "NotImplementedError: one"}}


def test_what_does_not_fit_says_so() -> None:
    workload = Workload("cka_biased", 16, 8)
    candidates = providers(CPU, compiled=())
    assert "budget was spent" in _entry(workload, candidates, seconds=0)["reason"]

    def slow(_: Inputs) -> Tensor:
        raise AssertionError("never called")

    hopeless = Provider("slow", {"cka_biased": slow}, flops=lambda _: 1e12)
    results = _entry(workload, [candidates[0], hopeless])["results"]
    assert "predicted to take 1000.0 s" in results["slow"]["reason"]
    assert results[NAIVE]["reason"] is None


def test_peak_memory_is_the_largest_sum_of_what_lives() -> None:
    mebibyte = 2**20

    def values(inputs: Inputs) -> Tensor:
        # One MiB each: exp, which the backward needs, and a sum that dies.
        return (inputs.students[0].exp() + 1).sum()

    student = torch.zeros(mebibyte // 4, requires_grad=True)
    task = measure.Task(Provider("", {"": values}), "", Inputs([student], [student.detach()]))
    peaks = measure.peak_memory(task, CPU)
    assert 2 <= peaks["forward"] / mebibyte < 2.1
    # exp, and the gradient.
    assert 2 <= peaks["backward"] / mebibyte < 2.1
    assert peaks["both"] == max(peaks["forward"], peaks["backward"])


@pytest.mark.parametrize("debiased", [False, True])
def test_large_oracle_is_the_definition(debiased: bool) -> None:
    workload = Workload("cka_debiased" if debiased else "cka_biased", 24, 8)
    inputs = features(workload, CPU)
    student = inputs.students[0].detach().double().requires_grad_()
    values = oracle._large_cka(student, inputs.teachers[0].double(), debiased)
    gradients = torch.autograd.grad(values, student)
    errors = oracle.Oracle(workload, inputs).errors(values, gradients)
    assert max(errors) < 1e-10


def test_report(result: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = {
        "runs": [
            {
                **{"way": "plain", "weight": 0.0, "rate": 1e-3, "seed": seed},
                **{"new_accuracy": 80.0 + seed, "old_accuracy": 90.0},
                **{"similarity": 0.5, "step_ms": 1.0},
            }
            for seed in range(2)
        ],
        "hardware": "a machine",
        "versions": {"torch": "2"},
        "commit": "abc",
        "seconds": 3.0,
    }
    demo = tmp_path / "demo.txt"
    demo.write_text(json.dumps(record))
    options = ["--root", str(tmp_path), "--results", str(tmp_path), "--demo", str(demo)]
    pages = {page: tmp_path / page for page in (report.MEASURED, report.README, report.EXAMPLES)}
    for path in pages.values():
        path.parent.mkdir(exist_ok=True)
        path.write_text("# Title\n")
    files.write({**result, "profile": "cpu"}, tmp_path)
    assert report.main(options) == 1
    assert "needs the markers" in capsys.readouterr().err

    for page, path in pages.items():
        names = [name for name, kind in report.SECTIONS.items() if kind.page == page]
        names += ["demo"] if page == report.EXAMPLES else []
        sections = (f"<!-- {name}:begin -->\n<!-- {name}:end -->" for name in names)
        path.write_text("\n\n".join(["# Title", *sections, "The rest.\n"]))
    assert report.main([*options, "--check"]) == 1
    assert "README.md names no result for speed" in capsys.readouterr().err
    assert report.main(options) == 0
    assert report.main([*options, "--check"]) == 0
    texts = {page: path.read_text() for page, path in pages.items()}
    for text in texts.values():
        assert text.startswith("# Title\n")
        assert text.endswith("The rest.\n")
    assert result["environment"]["commit"][:12] in texts[report.MEASURED]
    assert "biased, 16 x 8 float32" in texts[report.MEASURED]
    assert "80.5 ± 0.7" in texts[report.EXAMPLES]
    assert "as fast as naive code. The worst is " in texts[report.README]

    later = {**result["environment"], "date": "2099-01-01", "cores": 99}
    newer = files.write({**result, "profile": "cpu", "environment": later}, tmp_path)
    assert report.main([*options, "--check"]) == 0
    assert report.main(options) == 0
    assert newer.name in pages[report.MEASURED].read_text()
    assert newer.name in pages[report.README].read_text()
    newer.unlink()
    assert report.main([*options, "--check"]) == 1
    assert f"{newer}, which does not exist" in capsys.readouterr().err

    for page, old, new in (
        (report.MEASURED, "16 x 8", "16 x 9"),
        (report.README, "as fast", "as slow"),
        (report.EXAMPLES, "80.5", "80.6"),
    ):
        files.write({**result, "profile": "cpu", "environment": later}, tmp_path)
        assert report.main(options) == 0
        assert report.main([*options, "--check"]) == 0
        pages[page].write_text(pages[page].read_text().replace(old, new))
        capsys.readouterr()
        assert report.main([*options, "--check"]) == 1
        assert capsys.readouterr().out.startswith(f"{pages[page]} is not what the results say")


def test_best_and_worst_leave_out_what_is_wrong() -> None:
    """By hand: naive code that is wrong is no measure of speed, nor is a wrong answer of ours."""

    def workload(measure: str, seconds: float, naive_wrong: bool = False, wrong: bool = False):
        def entry(taken: float, is_wrong: bool) -> dict[str, Any]:
            return {"reason": None, "seconds": {"both": {"q50": taken}}, "wrong": is_wrong}

        results = {NAIVE: entry(1.0, naive_wrong), "rift_kernels eager": entry(seconds, wrong)}
        return {"measure": measure, "shape": f"{seconds} s", "results": results}

    workloads = [
        workload("cka_biased", 0.5),
        workload("cka_debiased", 0.1),
        workload("bures", 4.0),
        workload("bures", 9.0, naive_wrong=True),
        workload("procrustes", 0.01, wrong=True),
    ]
    environment = {"device": "a machine"}
    text = tables.best_and_worst({"environment": environment, "workloads": workloads})
    assert text == (
        "On a machine, the best of 3 workloads is debiased CKA, 0.1 s: **10.0x** as fast as naive "
        "code. The worst is Bures, 4.0 s: **0.250x**."
    )
    text = tables.best_and_worst({"environment": environment, "workloads": workloads[3:]})
    assert text == "On a machine, no workload was measured."


def test_the_documents_are_what_the_results_say() -> None:
    assert report.main(["--check"]) == 0


def test_report_takes_the_newest_of_each_device(result: dict[str, Any], tmp_path: Path) -> None:
    for device, date, profile in (
        ("a", "2030-01-02", "cpu"),
        ("a", "2030-01-01", "cpu"),
        ("a", "2030-01-03", "smoke"),
        ("b", "2029-01-01", "gpu"),
    ):
        where = {**result["environment"], "device": device, "date": date}
        text = json.dumps({**result, "profile": profile, "environment": where})
        (tmp_path / f"{device}-{date}.json").write_text(text)
    (tmp_path / "gpu-check.json").write_text("{}")
    assert [path.name for path in files.newest(tmp_path)] == [
        "a-2030-01-02.json",
        "b-2029-01-01.json",
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--budget", "0"], "--budget: must be positive, got 0"),
        (["--out", "/dev/null/x"], "Not a directory"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_measured(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(["--out", str(tmp_path), *options])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("page", "word"),
    [(predict.KERNELS, "GFLOP"), (predict.DISTRIBUTED, "GB/s"), (predict.STATUS, "not yet")],
)
def test_the_tables_of_the_documents_are_current(
    page: str, word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict.main(["--check"]) == 0
    texts = {
        name: (predict.DOCS / name).read_text(encoding="utf-8")
        for name in (predict.KERNELS, predict.DISTRIBUTED, predict.STATUS)
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    marked = texts[page].index(":begin -->")
    wrong = texts[page][:marked] + texts[page][marked:].replace(word, "?", 1)
    (tmp_path / page).write_text(wrong, encoding="utf-8")
    assert predict.main(["--check", "--docs", str(tmp_path)]) == 1
    assert f"{page} differs" in capsys.readouterr().out
    assert predict.main(["--docs", str(tmp_path)]) == 0
    for name, text in texts.items():
        assert (tmp_path / name).read_text(encoding="utf-8") == text


def test_predicted_floors() -> None:
    """By hand, of the largest: 4 N D^2 operations each way, as many tiles as the triangle has."""
    columns, tiles, head, backward = predict.launches(predict.Shape(65536, 4096, 1, None))
    assert columns.bytes == 2 * 2 * 65536 * 4096
    assert tiles.flops == 2 * (32 * 65) * 128**2 * 65536
    assert backward.flops == 4 * 65536 * 4096**2
    assert head.flops == 0
    assert tiles.seconds == pytest.approx(tiles.flops / 790e12 + 1e-6)
