"""The benchmark of a finetuning step: what is timed is right, and what is said of it adds up."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import Tensor

from benchmarks import files, finetuning, flops, measure, step, step_table
from benchmarks.command import Job
from benchmarks.finetuning import CLASS_TOKENS, TOKENS, Features, Finetuning, Step, Way
from benchmarks.oracle import GRADIENT_TOLERANCE
from benchmarks.providers import NAIVE, WIDE, Provider, providers
from benchmarks.schema import LeftOut, Quantiles, StepWay
from benchmarks.vit import SMOKE as SIZE
from benchmarks.vit import VIT_B_16, Size, ViT
from rift_kernels.dispatch import availability

CPU = torch.device("cpu")
EAGER, TRITON, CUDA = (f"rift_kernels {backend}" for backend in ("eager", "triton", "cuda"))
SMOKE, GPU = step.PROFILES["smoke"], step.PROFILES["gpu"]
FEATURES = [Features(CLASS_TOKENS, torch.float32), Features(TOKENS, torch.float32)]
PLAIN = {"loss": None, "features": None, "teacher_runs": False}
each_features = pytest.mark.parametrize("features", FEATURES, ids=lambda features: features.of)


@pytest.fixture(scope="module")
def shared() -> Finetuning:
    return Finetuning(SIZE, SMOKE.batch, False, CPU)


def _gradient(shared: Finetuning, way: Way) -> Tensor:
    """The gradient at all of the student's weights."""
    Step(shared, way).forward().backward()
    gradient = torch.cat([p.grad.flatten() for p in shared.student.parameters()])
    shared.student.zero_grad()
    return gradient


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
    forward, both = step.model_flops(size, batch)
    assert forward == batch * (layers + patches + head)
    # Twice that backward, but nothing wants the gradient of the images.
    assert both == 3 * forward - batch * patches


@each_features
def test_the_loss_is_in_the_graph_and_the_same_by_all(shared, features) -> None:
    plain = _gradient(shared, Way())
    naive, ours = (_gradient(shared, Way(loss, features)) - plain for loss in (NAIVE, EAGER))
    assert naive.norm() > 1e-3 * plain.norm()
    assert (naive - ours).norm() < 2e-3 * naive.norm()
    cached, running = (_gradient(shared, Way(EAGER, features, runs)) for runs in (False, True))
    assert torch.equal(cached, running)


@pytest.mark.parametrize("backend", availability.BACKENDS)
def test_a_loss_is_by_the_backend_that_it_names(backend) -> None:
    losses = [finetuning.loss_of(f"rift_kernels {backend}", f) for f in FEATURES]
    assert [(x.backend, x.debiased) for x in losses] == [(backend, True), (backend, False)]


def test_the_teacher_alone_changes_nothing_but_the_time(shared, monkeypatch) -> None:
    plain = _gradient(shared, Way())
    calls = []
    forward = shared.teacher.forward
    monkeypatch.setattr(shared.teacher, "forward", lambda x: calls.append(1) or forward(x))
    assert torch.equal(_gradient(shared, Way(teacher_runs=True)), plain)
    assert len(calls) == 1
    _gradient(shared, Way())
    assert len(calls) == 1


def test_every_step_starts_from_the_same_weights(monkeypatch) -> None:
    shared = Finetuning(SIZE, SMOKE.batch, False, CPU)
    before = copy.deepcopy(shared.student.state_dict())
    assert not torch.equal(before["head.weight"], shared.teacher.head.weight)
    plain = Step(shared, Way())
    plain.backward(plain.forward())
    # The optimiser did its work, on the copies.
    copies = shared.optimiser.updated
    for updated, weight in zip(copies, shared.student.parameters(), strict=True):
        assert updated.isfinite().all()
        assert not torch.equal(updated, weight)
    monkeypatch.setattr(finetuning, "loss_of", lambda *_: lambda x, _: x.sum() * torch.nan)
    wrong = Step(shared, Way(NAIVE, FEATURES[1]))
    wrong.backward(wrong.forward())
    assert copies[0].isnan().all()
    for name, weight in shared.student.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(p.grad is None for p in (*shared.student.parameters(), *copies))


def test_class_tokens_of_the_teacher_do_not_keep_its_other_tokens(shared) -> None:
    for layer in shared.teachers(FEATURES[0]):
        assert layer.untyped_storage().nbytes() == layer.nbytes


@each_features
def test_naive_code_in_float32_keeps_autocast_out(features) -> None:
    under = Finetuning(SIZE, SMOKE.batch, True, CPU)
    errors = {name: under.gradient_error(name, features) for name in (NAIVE, WIDE, EAGER)}
    assert max(errors[WIDE], errors[EAGER]) < 1e-3
    # It may even be NaN.
    assert not errors[NAIVE] < 1e-2


def test_result_is_complete(smoke) -> None:
    result = smoke("step")
    assert result.rounds == SMOKE.max_rounds
    assert set(result.noise) == set(measure.CLOCKS)
    # Without a loss, and two losses on two kinds of features; the teacher runs or does not.
    assert len(result.ways) == 10
    for way in result.ways:
        assert way.reason is None
        assert not way.wrong
        assert way.memory["both"] > 0
    reasons = {entry.loss: entry.reason for entry in result.left_out}
    for backend in availability.BACKENDS:
        expected = availability.reason_against(backend) or availability.reason_against(backend, CPU)
        assert reasons.get(f"rift_kernels {backend}") == expected


def test_what_a_gpu_would_run_runs_on_a_cpu() -> None:
    """Autocast, and features in bfloat16."""
    profile = dataclasses.replace(SMOKE, autocast=True, features=GPU.features)
    result = step.run(Job("smoke", profile, CPU, 5), providers(CPU, compiled=()))
    assert step.failures(result.ways) == []
    losses = [w.loss for w in result.ways if not w.teacher_runs]
    assert losses == [None, NAIVE, WIDE, EAGER, NAIVE, WIDE, EAGER, NAIVE, EAGER]
    assert all(w.seconds for w in result.ways)
    result.environment = dataclasses.replace(result.environment, gpu="G", driver="1")
    heading = step_table.summary(result).split("| features")[1].splitlines()[0]
    assert "the loss adds to it" in heading


def test_a_backend_that_does_not_take_the_features_says_so(monkeypatch) -> None:
    def reason(backend, _, dtypes, problem) -> str | None:
        refused = backend == "cuda" and not all(problem.gram) and torch.float32 in dtypes
        return "takes bfloat16" if refused else None

    monkeypatch.setattr(availability, "reason_against", reason)
    candidates = [Provider(NAIVE), Provider(EAGER), Provider(TRITON, reason="no GPU")]
    ways, left_out = step.plan(GPU, CPU, [*candidates, Provider(CUDA)])
    on_cuda = [w.features for w in ways if w.loss == CUDA and w.teacher_runs]
    assert on_cuda == [GPU.features[0], GPU.features[2]]
    assert not any(w.loss == TRITON for w in ways)
    assert left_out == [
        LeftOut(TRITON, None, "no GPU"),
        LeftOut(CUDA, "tokens, 12608 x 768 float32", "takes bfloat16"),
    ]


def test_predictions() -> None:
    profile = dataclasses.replace(SMOKE, autocast=True)
    peaks, count = {"float32": 10.0, "bfloat16": 100.0}, (1000, 3000)

    def seconds(*way) -> float:
        return step.predicted(Way(*way), profile, count, providers(CPU, compiled=()), peaks)

    assert seconds() == 30
    assert seconds(None, None, True) == 40
    tokens = FEATURES[1].workload(profile.size, profile.batch)
    # Autocast multiplies naive code's float32 in bfloat16, but not what is kept out of it.
    assert seconds(NAIVE, FEATURES[1]) == 30 + flops.naive(tokens) / 100
    assert seconds(WIDE, FEATURES[1]) == 30 + flops.naive(tokens) / 10
    assert seconds(EAGER, FEATURES[1], True) == 40 + flops.rift_kernels(tokens) / 10


def test_what_fails_is_said_and_costs_nothing_else(monkeypatch, tmp_path, capsys) -> None:
    loss_of = finetuning.loss_of

    def broken(name: str, features: Features) -> finetuning.Loss:
        if name == EAGER and features.of == TOKENS:
            raise RuntimeError("out of order\nat all")
        right = loss_of(name, features)
        return (lambda x, y: 2 * right(x, y)) if name == EAGER else right

    monkeypatch.setattr(finetuning, "loss_of", broken)
    assert step.main(["--profile", "smoke", "--device", "cpu", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "FAILED rift_kernels eager: class tokens, 2 layers of 8 x 16 float32: wrong" in text
    assert "FAILED rift_kernels eager: tokens, 136 x 16 float32: RuntimeError: out of order" in text
    (path,) = tmp_path.iterdir()
    result = files.read(path)
    assert sum(bool(w.seconds) for w in result.ways) == 8
    row = next(r for r in step_table.summary(result).splitlines() if ", **wrong**" in r)
    # What is wrong is not praised.
    assert row.count("**") == 2
    assert "tokens, 136 x 16 float32, with the teacher's forward: RuntimeError" in text
    assert step.failures([StepWay(**PLAIN, predicted_seconds=1.0)]) == ["nothing was measured"]


def test_noise_is_the_difference_of_the_plain_step_to_itself_or_its_spread(monkeypatch) -> None:
    def rounds(tasks, *_):
        seconds = {name: 0.8 if name == step.AGAIN else 1.0 for name in tasks}
        return {name: [dict.fromkeys(measure.CLOCKS, s)] * 64 for name, s in seconds.items()}

    monkeypatch.setattr(measure, "time_rounds", rounds)
    result = step.run(Job("smoke", SMOKE, CPU, 5), providers(CPU, compiled=()))
    assert result.noise == pytest.approx(dict.fromkeys(measure.CLOCKS, 0.2))

    def noise(seconds: list[float]) -> float:
        samples = [{"both": s} for s in seconds]
        return measure.noise(samples, samples, "both")

    # Medians that agree by chance: what is left is the range from 0.8 to 1.2, over 10 rounds.
    assert noise([0.8, 1.2] * 50) == pytest.approx(2 * 0.4 / 100**0.5)
    assert noise([1.0] * 9) == 0
    # Two standard errors, by simulation.
    generator = torch.Generator().manual_seed(0)
    samples = 1 + 0.1 * torch.randn(2, 500, 40, generator=generator, dtype=torch.float64)
    medians = samples.quantile(0.5, -1)
    error = (medians[0] - medians[1]).std().item()
    spreads = [noise(once.tolist()) for once in samples[0]]
    assert sum(spreads) / len(spreads) == pytest.approx(2 * error, rel=0.15)


def _way(loss: str | None, runs: bool, seconds: float, memory: int) -> StepWay:
    return StepWay(
        loss=loss,
        features=loss and "f",
        teacher_runs=runs,
        predicted_seconds={None: 1.0, NAIVE: 1.5}.get(loss, 1.1),
        seconds={c: Quantiles(0, s, 0) for c, s in (("both", seconds), ("wall", 2 * seconds))},
        memory={"both": memory << 20},
        gradient_error=2 * GRADIENT_TOLERANCE if loss == NAIVE else 1e-6,
        wrong=loss == NAIVE,
    )


def test_a_row_of_the_table(smoke) -> None:
    made = smoke("step")
    made.environment.gpu, made.noise = "a GPU", {"both": 0.02, "wall": 0.3}
    made.ways = [
        _way(None, False, 10.0, 100),
        _way(None, True, 14.0, 102),
        _way(NAIVE, False, 15.0, 160),
        _way(NAIVE, True, 15.1, 161),
        _way(EAGER, False, 11.0, 90),
        _way(EAGER, True, 15.0, 91),
    ]
    heading, _, *lines = (
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in step_table._table(made).splitlines()
    )
    rows = [dict(zip(heading, row, strict=True)) for row in lines]
    expected = {
        "the loss adds": ["-", "+50.0%", "**+10.0%**"],
        "the teacher adds": ["+40.0%", "~+1.0%", "+40.0%"],
        "predicted": ["-", "+50.0%", "+10.0%"],
        "the loss adds to it": ["-", "+50.0%", "**~+10.0%**"],
        "wall": ["20000 ms", "30000 ms", "22000 ms"],
        "memory": ["- / +2.0 MiB", "+60.0 / +61.0 MiB", "-10.0 / -9.0 MiB"],
        "gradient error": ["-", "1e-1, **wrong**", "1e-6"],
    }
    assert {title: [row[title] for row in rows] for title in expected} == expected
    where = f"On {made.environment.device}, a finetuning step of a ViT"
    assert step_table.cost(made) == (
        f"{where} takes 10000 ms. The loss (f) adds **+10.0%** (`~`: within the noise), the "
        "teacher's forward pass **+40.0%**."
    )
    del made.ways[4:]
    assert step_table.cost(made) == f"{where} was not measured."


@pytest.mark.parametrize("budget", ["0", "-1", "nan"])
def test_a_budget_that_is_none_is_refused(budget, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        step.main(["--budget", budget])
    assert stopped.value.code == 2
    assert f"--budget: must be positive, got {budget}" in capsys.readouterr().err
