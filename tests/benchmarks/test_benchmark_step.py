"""The benchmark of a finetuning step: what is timed is right, and what is said of it adds up."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import files, flops, measure, step, step_table
from benchmarks.command import Job
from benchmarks.models import VIT_B_16, ViT, operations
from benchmarks.oracle import GRADIENT_TOLERANCE
from benchmarks.providers import NAIVE, WIDE, Provider, providers
from benchmarks.schema import LeftOut, Quantiles, StepWay
from benchmarks.step import SMOKE, Step, Student
from rift_kernels.dispatch import availability

CPU = torch.device("cpu")
EAGER, TRITON, CUDA = (f"rift_kernels {backend}" for backend in ("eager", "triton", "cuda"))
CLASS_TOKENS, TOKENS = step.features_of(SMOKE)
AUTOCAST = dataclasses.replace(SMOKE, autocast=True)
PROVIDERS = {provider.name: provider for provider in providers(CPU, compiled=())}
each_features = pytest.mark.parametrize("features", [CLASS_TOKENS, TOKENS], ids=str)


@pytest.fixture(scope="module")
def student() -> Student:
    return Student(SMOKE, CPU)


def _gradient(student: Student, loss: str | None = None, *way) -> Tensor:
    """The gradient at all of the student's weights."""
    Step(student, loss and PROVIDERS[loss], *way).forward().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in student.weights])
    student.model.zero_grad()
    return gradient


def test_the_model_is_a_vit_b_16() -> None:
    with torch.device("meta"):
        model = ViT(VIT_B_16)
        states = model(torch.empty(2, 3, 224, 224))
    # As many as torchvision's vit_b_16 has.
    assert sum(p.numel() for p in model.parameters()) == 86_567_656
    assert [state.shape for state in states] == [(2, 197, 768)] * 12
    assert step.PROFILES["gpu"] is VIT_B_16


def test_flops_are_those_of_the_products(student) -> None:
    """By hand: twelve products of width by width a token and layer, and two for attention."""
    t, d = 17, 16
    layers = SMOKE.depth * (2 * t * 12 * d * d + 4 * t * t * d)
    patches, head = 2 * 16 * (3 * 4 * 4) * d, 2 * d * SMOKE.classes
    forward, both = operations(Step(student))
    assert forward == SMOKE.batch * (layers + patches + head)
    # Twice that backward, but nothing wants the gradient of the images.
    assert both == 3 * forward - SMOKE.batch * patches


@each_features
def test_the_loss_is_in_the_graph_and_the_same_by_all(student, features) -> None:
    plain = _gradient(student)
    naive, ours = (_gradient(student, loss, features) - plain for loss in (NAIVE, EAGER))
    assert naive.norm() > 1e-3 * plain.norm()
    assert (naive - ours).norm() < 2e-3 * naive.norm()
    cached, running = (_gradient(student, EAGER, features, runs) for runs in (False, True))
    assert torch.equal(cached, running)
    # Class tokens do not keep the other tokens in memory.
    assert all(x.untyped_storage().nbytes() == x.nbytes for x in student.teachers(features))


def test_the_teacher_alone_changes_nothing_but_the_time(student, monkeypatch) -> None:
    plain, calls, forward = _gradient(student), [], student._teacher.forward
    steps = Step(student), Step(student, teacher_runs=True)
    monkeypatch.setattr(student._teacher, "forward", lambda x: calls.append(1) or forward(x))
    assert torch.equal(_gradient(student, None, None, True), plain)
    for way, count in zip(steps, (1, 2), strict=True):
        way.forward()
        assert len(calls) == count


def test_every_step_starts_from_the_same_weights() -> None:
    student = Student(SMOKE, CPU)
    before = copy.deepcopy(student.model.state_dict())
    assert not torch.equal(before["head.weight"], student._teacher.head.weight)
    plain = Step(student)
    plain.backward(plain.forward())
    # The optimiser did its work, on the copies.
    for updated, weight in zip(student.updated, student.weights, strict=True):
        assert updated.isfinite().all()
        assert not torch.equal(updated, weight)
    plain.backward(plain.forward() * torch.nan)
    assert student.updated[0].isnan().all()
    for name, weight in student.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(weight.grad is None for weight in (*student.weights, *student.updated))


def test_result_is_complete(smoke) -> None:
    result = smoke("step")
    assert result.rounds == measure.MIN_ROUNDS
    assert set(result.noise) == set(measure.CLOCKS)
    # Without a loss, and two losses on two kinds of features; the teacher runs or does not.
    assert len(result.ways) == 10
    for way in result.ways:
        assert way.reason is None
        assert not way.wrong
        assert way.memory["both"] > 0
    reasons = {entry.loss: entry.reason for entry in result.left_out}
    for backend in availability.BACKENDS:
        assert reasons.get(f"rift_kernels {backend}") == availability.reason_against(backend)


def test_under_autocast_naive_code_in_float32_is_kept_out() -> None:
    """What a GPU would run: features in bfloat16, too."""
    result = step.run(Job("smoke", AUTOCAST, CPU))
    assert step.failures(result) == []
    assert all(way.seconds for way in result.ways)
    cached = [way for way in result.ways if not way.teacher_runs]
    losses = [way.loss for way in cached]
    assert losses == [None, NAIVE, WIDE, EAGER, NAIVE, WIDE, EAGER, NAIVE, EAGER]
    errors = [way.gradient_error for way in cached]
    assert max(errors[i] for i in (2, 3, 5, 6)) < 1e-3
    # It may even be NaN, which a file does not have.
    assert all(error is None or error >= 1e-2 for error in (errors[1], errors[4]))
    assert "tokens in bfloat16 autocast" in step_table.summary(result)


def test_a_backend_that_does_not_take_the_features_is_left_out(monkeypatch) -> None:
    providers = [
        *(PROVIDERS[name] for name in (NAIVE, WIDE, EAGER)),
        Provider(TRITON, reason="no GPU"),
        Provider(CUDA, PROVIDERS[EAGER].measures, takes=lambda w: w.rows < 100),
    ]
    monkeypatch.setattr(step, "providers", lambda *_, **__: providers)
    steps, left_out = step.plan(Student(AUTOCAST, CPU), CPU)
    losses = [(s.provider.name, s.features) for s in steps[2:] if s.teacher_runs]
    assert [features for loss, features in losses if loss == CUDA] == [CLASS_TOKENS]
    assert not any(loss == TRITON for loss, _ in losses)
    assert left_out == [LeftOut(TRITON, None, "no GPU")]


def test_predictions() -> None:
    student = Student(AUTOCAST, CPU)
    peaks, count = {"float32": 10.0, "bfloat16": 100.0}, (1000, 3000)
    steps, _ = step.plan(student, CPU)
    ways = [step.predict(way, count, peaks) for way in steps]
    seconds = {(way.loss, way.features, way.teacher_runs): way.predicted_seconds for way in ways}
    assert seconds[None, None, False] == 30
    assert seconds[None, None, True] == 40
    label = "tokens, 136 x 16 float32"
    # Autocast multiplies naive code's float32 in bfloat16, but not what is kept out of it.
    assert seconds[NAIVE, label, False] == 30 + flops.naive(TOKENS) / 100
    assert seconds[WIDE, label, False] == 30 + flops.naive(TOKENS) / 10
    assert seconds[EAGER, label, True] == 40 + flops.rift_kernels(TOKENS) / 10


def test_what_fails_is_said_and_costs_nothing_else(monkeypatch, tmp_path, capsys) -> None:
    def broken(_) -> Tensor:
        raise RuntimeError("out of order\nat all")

    right = PROVIDERS[EAGER].measures["cka_debiased"]
    measures = {"cka_biased": broken, "cka_debiased": lambda inputs: 2 * right(inputs)}
    ours = dataclasses.replace(PROVIDERS[EAGER], measures=measures)
    candidates = (PROVIDERS | {EAGER: ours}).values()
    monkeypatch.setattr(step, "providers", lambda *_, **__: candidates)
    assert step.main(["--profile", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAILED rift_kernels eager: class tokens, 2 layers of 8 x 16 float32: wrong" in text
    assert "FAILED rift_kernels eager: tokens, 136 x 16 float32: RuntimeError: out of order" in text
    assert "tokens, 136 x 16 float32, with the teacher's forward: RuntimeError" in text
    (path,) = tmp_path.iterdir()
    result = files.read(path)
    assert sum(bool(way.seconds) for way in result.ways) == 8
    row = next(r for r in step_table.summary(result).splitlines() if ", **wrong**" in r)
    # What is wrong is not praised.
    assert row.count("**") == 2


def test_noise_is_the_difference_of_the_plain_step_to_itself_or_its_spread(monkeypatch) -> None:
    def rounds(tasks, *_, **__):
        seconds = {name: 0.8 if name == "again" else 1.0 for name in tasks}
        return {name: [dict.fromkeys(measure.CLOCKS, s)] * 64 for name, s in seconds.items()}

    monkeypatch.setattr(measure, "time_rounds", rounds)
    result = step.run(Job("smoke", SMOKE, CPU))
    assert result.noise == pytest.approx(dict.fromkeys(measure.CLOCKS, 0.2))

    def noise(seconds: list[float]) -> float:
        samples = [{"both": s} for s in seconds]
        return measure.noise(samples, samples, "both")

    # Medians that agree by chance: what is left is the range from 0.8 to 1.2, over 10 rounds.
    assert noise([0.8, 1.2] * 50) == pytest.approx(2 * 0.4 / 100**0.5)


def _way(loss: str | None, runs: bool, seconds: float, memory: int) -> StepWay:
    return StepWay(
        loss=loss,
        features=loss and "f",
        teacher_runs=runs,
        predicted_seconds={None: 1.0, NAIVE: 1.5}.get(loss, 1.1),
        seconds={"both": Quantiles(0, seconds, 0)},
        memory={"both": memory << 20},
        gradient_error=2 * GRADIENT_TOLERANCE if loss == NAIVE else 1e-6,
        wrong=loss == NAIVE,
    )


def test_a_row_of_the_table(smoke) -> None:
    result = smoke("step")
    result.noise, seconds, memory = (
        {"both": 0.02},
        (10, 14, 15, 15.1, 11, 15),
        (100, 102, 160, 161, 90, 91),
    )
    cases = [(loss, runs) for loss in (None, NAIVE, EAGER) for runs in (False, True)]
    result.ways = [
        _way(*case) for case in zip(*zip(*cases, strict=True), seconds, memory, strict=True)
    ]
    rows = [step_table._row(result, way) for way in result.ways[::2]]
    expected = {
        "the loss adds": ["-", "+50.0%", "**+10.0%**"],
        "the teacher adds": ["+40.0%", "~+1.0%", "+40.0%"],
        "predicted": ["-", "+50.0%", "+10.0%"],
        "memory": ["- / +2.0 MiB", "+60.0 / +61.0 MiB", "-10.0 / -9.0 MiB"],
        "gradient error": ["-", "1e-1, **wrong**", "1e-6"],
    }
    assert {title: [row[title] for row in rows] for title in expected} == expected
    where = f"On {result.environment.device}, a finetuning step of a ViT"
    assert step_table.cost(result) == (
        f"{where} takes 10000 ms. The loss (f) adds **+10.0%** (`~`: within the noise), the "
        "teacher's forward pass **+40.0%**."
    )
    del result.ways[4:]
    assert step_table.cost(result) == f"{where} was not measured."
