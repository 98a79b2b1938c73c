"""The benchmark of a finetuning step: what is timed is right, and what is said of it adds up."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import files, finetuning, flops, measure, report, schema, step, step_table
from benchmarks.finetuning import CLASS_TOKENS, TOKENS, Features, Finetuning, Step, Way
from benchmarks.oracle import GRADIENT_TOLERANCE
from benchmarks.providers import NAIVE, WIDE, Provider, providers
from benchmarks.vit import VIT_B_16, Size, ViT
from rift_kernels.dispatch import availability

CPU = torch.device("cpu")
EAGER = "rift_kernels eager"
SMOKE, GPU = step.PROFILES["smoke"], step.PROFILES["gpu"]
FEATURES = [Features(CLASS_TOKENS, torch.float32), Features(TOKENS, torch.float32)]


@pytest.fixture(scope="module")
def shared() -> Finetuning:
    return Finetuning(SMOKE.size, SMOKE.batch, False, CPU)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``python -m benchmarks.step --profile smoke`` writes."""
    folder = tmp_path_factory.mktemp("results")
    assert step.main(["--profile", "smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def _gradient(shared: Finetuning, way: Way) -> Tensor:
    """Of all of the student's weights."""
    Step(shared, way).forward().backward()
    found = torch.cat([p.grad.flatten() for p in shared.student.parameters()])
    shared.student.zero_grad()
    return found


def test_the_model_is_a_vit_b_16() -> None:
    with torch.device("meta"):
        model = ViT(VIT_B_16)
        states = model(torch.empty(2, 3, 224, 224))
    # As many as torchvision's vit_b_16 has.
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert [state.shape for state in states] == [(2, 197, 768)] * 12
    assert GPU.size == VIT_B_16


def test_flops_are_those_of_the_products() -> None:
    """By hand: twelve products of width by width a token and layer, and two for attention."""
    size, batch = Size(image=32, patch=8, width=64, depth=3, heads=4, classes=10), 2
    t, d = 17, 64
    layers = 3 * (2 * t * 12 * d * d + 4 * t * t * d)
    patches, head = 2 * 16 * (3 * 8 * 8) * d, 2 * d * 10
    count = step.model_flops(size, batch)
    assert count.forward == batch * (layers + patches + head)
    # Twice that backward, but nothing wants the gradient of the images.
    assert count.both == 3 * count.forward - batch * patches


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: features.of)
def test_the_loss_is_in_the_graph_and_the_same_by_all(
    shared: Finetuning, features: Features
) -> None:
    plain = _gradient(shared, Way())
    naive = _gradient(shared, Way(NAIVE, features)) - plain
    ours = _gradient(shared, Way(EAGER, features)) - plain
    assert naive.norm() > 1e-3 * plain.norm()
    assert (naive - ours).norm() < 2e-3 * naive.norm()


def test_a_loss_is_by_the_backend_that_it_names() -> None:
    for backend in availability.BACKENDS:
        found = [finetuning.loss_of(f"rift_kernels {backend}", f) for f in FEATURES]
        assert [(loss.backend, loss.debiased) for loss in found] == [
            (backend, True),
            (backend, False),
        ]


@pytest.mark.parametrize("features", FEATURES, ids=lambda features: features.of)
def test_cached_features_are_those_of_the_teachers_forward(
    shared: Finetuning, features: Features
) -> None:
    cached, running = (_gradient(shared, Way(EAGER, features, runs)) for runs in (False, True))
    assert torch.equal(cached, running)


def test_the_teacher_alone_changes_nothing_but_the_time(
    shared: Finetuning, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = _gradient(shared, Way())
    calls = []
    forward = shared.teacher.forward
    monkeypatch.setattr(shared.teacher, "forward", lambda x: calls.append(1) or forward(x))
    assert torch.equal(_gradient(shared, Way(teacher_runs=True)), plain)
    assert len(calls) == 1
    _gradient(shared, Way())
    assert len(calls) == 1


def test_every_step_starts_from_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = Finetuning(SMOKE.size, SMOKE.batch, False, CPU)
    before = copy.deepcopy(shared.student.state_dict())
    assert not torch.equal(before["head.weight"], shared.teacher.head.weight)
    plain = Step(shared, Way())
    plain.backward(plain.forward())
    # The optimiser did its work, on the copies.
    for updated, weight in zip(shared.updated, shared.student.parameters(), strict=True):
        assert updated.isfinite().all()
        assert not torch.equal(updated, weight)
    monkeypatch.setattr(
        finetuning, "loss_of", lambda *_: lambda student, _: student.sum() * torch.nan
    )
    wrong = Step(shared, Way(NAIVE, FEATURES[1]))
    wrong.backward(wrong.forward())
    assert shared.updated[0].isnan().all()
    for name, weight in shared.student.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(p.grad is None for p in (*shared.student.parameters(), *shared.updated))


def test_class_tokens_of_the_teacher_do_not_keep_its_other_tokens(shared: Finetuning) -> None:
    for layer in shared.teachers(FEATURES[0]):
        assert layer.untyped_storage().nbytes() == layer.nbytes


def test_naive_code_in_float32_keeps_autocast_out() -> None:
    under = Finetuning(SMOKE.size, SMOKE.batch, True, CPU)
    for features in FEATURES:
        errors = {name: under.gradient_error(name, features) for name in (NAIVE, WIDE, EAGER)}
        assert max(errors[WIDE], errors[EAGER]) < 1e-3
        # It may even be NaN.
        assert not errors[NAIVE] < 1e-2


def test_result_is_complete(result: dict[str, Any]) -> None:
    schema.validate(result)
    assert result["rounds"] == SMOKE.max_rounds
    assert set(result["noise"]) == set(measure.CLOCKS)
    # Without a loss, and two losses on two kinds of features; the teacher runs or does not.
    assert len(result["ways"]) == 10
    for way in result["ways"]:
        assert way["reason"] is None
        assert not way["wrong"]
        assert way["memory"]["both"] > 0
    reasons = {entry["loss"]: entry["reason"] for entry in result["left_out"]}
    for backend in availability.BACKENDS:
        expected = availability.reason_against(backend) or availability.reason_against(backend, CPU)
        assert reasons.get(f"rift_kernels {backend}") == expected


def test_schema_names_the_place(result: dict[str, Any]) -> None:
    broken = copy.deepcopy(result)
    broken["ways"][1]["seconds"]["wall"]["q50"] = "fast"
    with pytest.raises(ValueError, match=r"ways\[1\]\.seconds\.wall\.q50 must be"):
        schema.validate(broken)


def test_what_a_gpu_would_run_runs_on_a_cpu() -> None:
    """Autocast, and features in bfloat16."""
    profile = dataclasses.replace(SMOKE, autocast=True, features=GPU.features)
    found = step.run("smoke", profile, CPU, 5, providers(CPU, compiled=()))
    schema.validate(found)
    assert step.failures(found) == []
    losses = [w["loss"] for w in found["ways"] if not w["teacher_runs"]]
    assert losses == [None, NAIVE, WIDE, EAGER, NAIVE, WIDE, EAGER, NAIVE, EAGER]
    assert all(w["seconds"] for w in found["ways"])
    as_on_gpu = {**found, "environment": {**found["environment"], "gpu": "G", "driver": "1"}}
    heading = step_table.summary(as_on_gpu).split("| features")[1].splitlines()[0]
    assert "the loss adds to it" in heading


def test_a_backend_that_does_not_take_the_features_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reason(backend: str, _: Any, dtypes: list[torch.dtype], problem: Any) -> str | None:
        refused = backend == "cuda" and not all(problem.gram) and torch.float32 in dtypes
        return "takes bfloat16" if refused else None

    monkeypatch.setattr(availability, "reason_against", reason)
    names = (NAIVE, EAGER, "rift_kernels triton", "rift_kernels cuda")
    candidates = {name: Provider(name) for name in names}
    candidates["rift_kernels triton"] = Provider("rift_kernels triton", reason="no GPU")
    ways, left_out = step.plan(GPU, CPU, candidates)
    cuda = [w.features for w in ways if w.loss == "rift_kernels cuda" and w.teacher_runs]
    assert cuda == [GPU.features[0], GPU.features[2]]
    assert not any(w.loss == "rift_kernels triton" for w in ways)
    assert left_out == [
        {"loss": "rift_kernels triton", "features": None, "reason": "no GPU"},
        {
            "loss": "rift_kernels cuda",
            "features": "tokens, 12608 x 768 float32",
            "reason": "takes bfloat16",
        },
    ]


def test_predictions() -> None:
    candidates = {p.name: p for p in providers(CPU, compiled=())}
    profile = dataclasses.replace(SMOKE, autocast=True)
    peaks, count = {"float32": 10.0, "bfloat16": 100.0}, step.Count(forward=1000, both=3000)

    def seconds(way: Way) -> float:
        return step.predicted(way, profile, count, candidates, peaks)

    assert seconds(Way()) == 30
    assert seconds(Way(teacher_runs=True)) == 40
    tokens = FEATURES[1].workload(profile.size, profile.batch)
    # Autocast multiplies naive code's float32 in bfloat16, but not what is kept out of it.
    assert seconds(Way(NAIVE, FEATURES[1])) == 30 + flops.naive(tokens) / 100
    assert seconds(Way(WIDE, FEATURES[1])) == 30 + flops.naive(tokens) / 10
    assert seconds(Way(EAGER, FEATURES[1], True)) == 40 + flops.rift_kernels(tokens) / 10


def test_what_fails_is_said_and_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loss_of = finetuning.loss_of

    def broken(name: str, features: Features) -> finetuning.Loss:
        if name == EAGER and features.of == TOKENS:
            raise RuntimeError("out of order\nat all")
        right = loss_of(name, features)
        if name == EAGER:
            return lambda student, teacher: 2 * right(student, teacher)
        return right

    monkeypatch.setattr(finetuning, "loss_of", broken)
    assert step.main(["--profile", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAILED rift_kernels eager: class tokens, 2 layers of 8 x 16 float32: wrong" in text
    assert "FAILED rift_kernels eager: tokens, 136 x 16 float32: RuntimeError: out of order" in text
    (path,) = tmp_path.iterdir()
    found = files.read(path)
    assert sum(w["seconds"] is not None for w in found["ways"]) == 8
    row = next(r for r in step_table.summary(found).splitlines() if ", **wrong**" in r)
    # What is wrong is not praised.
    assert row.count("**") == 2
    assert "tokens, 136 x 16 float32, with the teacher's forward: RuntimeError" in text
    assert step.failures({"ways": [{"loss": None, "seconds": None}]}) == ["nothing was measured"]


def test_noise_is_the_difference_of_the_plain_step_to_itself_or_its_spread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def rounds(tasks: dict[str, Any], *_: Any) -> dict[str, Any]:
        return {
            name: [dict.fromkeys(measure.CLOCKS, 0.8 if name == step.AGAIN else 1.0)] * 64
            for name in tasks
        }

    monkeypatch.setattr(measure, "time_rounds", rounds)
    found = step.run("smoke", SMOKE, CPU, 5, providers(CPU, compiled=()))
    assert found["noise"] == pytest.approx(dict.fromkeys(measure.CLOCKS, 0.2))
    # Medians that agree by chance: what is left is the range from 0.8 to 1.2, over 10 rounds.
    wide = [0.8, 1.2] * 50
    assert measure.noise(wide, wide) == pytest.approx(2 * 0.4 / 100**0.5)
    assert measure.noise([1.0] * 9, [1.0] * 9) == 0
    # Two standard errors, by simulation.
    generator = torch.Generator().manual_seed(0)
    samples = 1 + 0.1 * torch.randn(2, 500, 40, generator=generator, dtype=torch.float64)
    medians = samples.quantile(0.5, -1)
    error = (medians[0] - medians[1]).std().item()
    spreads = [measure.noise(once.tolist(), once.tolist()) for once in samples[0]]
    assert sum(spreads) / len(spreads) == pytest.approx(2 * error, rel=0.15)


def _way(loss: str | None, runs: bool, seconds: float, memory: int) -> dict[str, Any]:
    return {
        "loss": loss,
        "features": loss and "f",
        "teacher_runs": runs,
        "predicted_seconds": {None: 1.0, NAIVE: 1.5}.get(loss, 1.1),
        "reason": None,
        "seconds": {c: {"q50": s} for c, s in (("both", seconds), ("wall", 2 * seconds))},
        "memory": {"both": memory << 20},
        "gradient_error": 2 * GRADIENT_TOLERANCE if loss == NAIVE else 1e-6,
        "wrong": loss == NAIVE,
    }


def test_a_row_of_the_table() -> None:
    made = {
        "environment": {"gpu": "a GPU"},
        "noise": {"both": 0.02, "wall": 0.3},
        "ways": [
            _way(None, False, 10.0, 100),
            _way(None, True, 14.0, 102),
            _way(NAIVE, False, 15.0, 160),
            _way(NAIVE, True, 15.1, 161),
            _way(EAGER, False, 11.0, 90),
            _way(EAGER, True, 15.0, 91),
        ],
    }
    heading, _, plain, naive, ours = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in step_table._table(made).splitlines()
    )
    rows = [dict(zip(heading, row, strict=True)) for row in (plain, naive, ours)]
    assert [row["the loss adds"] for row in rows] == ["-", "+50.0%", "**+10.0%**"]
    assert [row["the teacher adds"] for row in rows] == ["+40.0%", "~+1.0%", "+40.0%"]
    assert [row["predicted"] for row in rows] == ["-", "+50.0%", "+10.0%"]
    assert [row["the loss adds to it"] for row in rows] == ["-", "+50.0%", "**~+10.0%**"]
    assert rows[2]["wall"] == "22000 ms"
    assert [row["memory"] for row in rows] == [
        "- / +2.0 MiB",
        "+60.0 / +61.0 MiB",
        "-10.0 / -9.0 MiB",
    ]
    assert [row["gradient error"] for row in rows] == ["-", "1e-1, **wrong**", "1e-6"]


def test_the_section_of_the_documents(result: dict[str, Any], tmp_path: Path) -> None:
    page = "<!-- step:begin -->\n<!-- step:end -->"
    path = files.write({**result, "profile": "cpu"}, tmp_path)
    shown, text = report.section("step", page, tmp_path, check=False)
    assert list(shown) == [path]
    assert f"From `{path.name}`." in text
    assert "| tokens, 136 x 16 float32" in text
    again = report.section("step", report.updated(page, "step", text), tmp_path, check=True)
    assert again == (shown, text)


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_a_budget_that_is_none_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--budget", budget])
    assert stopped.value.code == 2
    assert f"--budget: must be positive, got {budget}" in capsys.readouterr().err
