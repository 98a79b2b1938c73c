"""The benchmark of a LoRA step with RIFT: its parts are the whole, and its memory is exact."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import lora, measure, step_table
from benchmarks.command import Job
from benchmarks.lora import ADAPTERS_OFF, COPY, SMOKE, Step, adapted_vit, loss_alone
from benchmarks.measure import Call
from benchmarks.models import Finetuning
from benchmarks.schema import Bounds

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

CPU = torch.device("cpu")
N, D = SMOKE.batch, SMOKE.width
POOLINGS = ("cls", "tokens")
WAYS = ((None, None), (ADAPTERS_OFF, None), *((ADAPTERS_OFF, p) for p in POOLINGS), (COPY, "cls"))
# peft asks transformers under a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def adapted() -> Finetuning:
    return adapted_vit(SMOKE, CPU)


def _gradient(adapted: Finetuning, *way: str) -> tuple[Tensor, Tensor]:
    """The step's loss, and its gradient at all that is trained."""
    loss = Step(adapted, *way).forward()
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in adapted.weights])
    for weight in adapted.weights:
        weight.grad = None
    return loss.detach(), gradient


def test_memory_of_a_toy_is_that_by_hand() -> None:
    """exp keeps its result, and the sum is a number; in the backward come another of each."""
    x = torch.randn(1000, requires_grad=True)

    def forward() -> Tensor:
        scratch = torch.empty(3000)
        del scratch
        return x.exp().sum()

    task = Call(forward, lambda value: torch.autograd.grad(value, x))
    task.backward(task.forward())
    peak = measure.peak_memory(task, CPU)
    assert peak == {"forward": 12000, "backward": 2 * 4000 + 2 * 4, "both": 12000}
    assert measure.kept_memory(task.forward, CPU) == 4000 + 4


def test_the_peak_is_at_most_the_sum_of_its_parts(smoke) -> None:
    result = smoke("lora")
    plain = result.ways[0].memory["both"]
    for way, loss in zip(result.ways[2:4], result.losses, strict=True):
        # The activations of the student are there while the teacher runs.
        assert plain < way.memory["both"]
        assert way.memory["both"] <= plain + result.teacher_memory + loss.memory["both"]
    # Of few rows, the loss keeps the student's, centered, and a block of N x N; and the value.
    assert result.losses[0].kept == 4 * (N * D + N * N + 1)


def test_only_a_copy_costs_weights(adapted, smoke) -> None:
    *others, second = (way.weights for way in smoke("lora").ways)
    plain = sum(p.nbytes for p in adapted.model.parameters())
    teacher = Step(adapted, COPY, "cls").rift._models[1]
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    again = sum(p.nbytes for p in teacher.parameters())
    assert 0 < again < plain
    assert (others, second) == ([plain] * 4, plain + again)


def test_steps_share_weights_and_no_hooks(adapted) -> None:
    steps = Step(adapted, ADAPTERS_OFF, "cls"), Step(adapted)
    rift, plain = (step.student for step in steps)
    for name, parameter in adapted.model.named_parameters():
        assert rift.get_parameter(name) is plain.get_parameter(name) is parameter
    assert any(module._forward_hooks for module in rift.modules())
    assert not any(module._forward_hooks for module in plain.modules())


def test_the_parts_of_a_step_are_the_step(adapted) -> None:
    value, plain = _gradient(adapted)
    # The teacher by itself changes nothing.
    assert torch.equal(_gradient(adapted, ADAPTERS_OFF)[1], plain)
    for pooling in POOLINGS:
        with_rift, gradient = _gradient(adapted, ADAPTERS_OFF, pooling)
        with_copy, same = _gradient(adapted, COPY, pooling)
        assert (gradient - plain).norm() > 1e-4 * plain.norm()
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(with_rift, with_copy)
        alone = loss_alone(adapted, pooling).forward()
        assert alone > 1e-5
        torch.testing.assert_close(with_rift - value, alone, rtol=1e-2, atol=1e-6)


def test_the_teacher_pass_is_the_pretrained_models(adapted) -> None:
    features = Step(adapted, ADAPTERS_OFF).teacher_pass()
    assert not features.requires_grad
    copy = Step(adapted, COPY, "tokens")
    torch.testing.assert_close(features, copy.teacher_pass(), rtol=1e-5, atol=1e-6)
    # And the student is another by now.
    copy.student(pixel_values=adapted.images)
    (students,) = copy.rift._student.features().values()
    assert (students - features).norm() > 1e-3 * features.norm()


def test_the_full_profile_is_a_vit_b() -> None:
    profile, meta = lora.PROFILES["full"], torch.device("meta")
    with meta:
        model = adapted_vit(profile, meta).model
    assert (profile.tokens, profile.heads) == (197, 12)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    # Two matrices for each of four in twelve attentions; the head's weight and bias.
    assert len(trained) == 2 * 4 * 12 + 2
    base = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    # ViT-B/16 with a head of 100 classes instead of 1000.
    assert base == 86_567_656 - 900 * 769


def test_what_is_added_is_added_within_a_round() -> None:
    """A machine that becomes ten times slower changes nothing."""
    speed = [1.0, 10.0, 3.0, 1.0, 7.0]
    plain, teacher, rift = (
        [{"both": seconds * s} for s in speed] for seconds in (2.0, 3.0, 3.0625)
    )
    share = dict.fromkeys(("low", "q50", "high"), 0.03125)
    assert vars(measure.added(rift, teacher, plain)) == pytest.approx(share)
    assert measure.added(plain, None, rift).q50 == pytest.approx(2 / 3.0625)
    busy = [{"cpu": 1.0, "both": 9.0}] * 5
    assert measure.added(busy, None, [{"cpu": 4.0, "both": 1.0}] * 5, "cpu").low == 0.25
    # Ranks 41 and 60 of 100: the binomial distribution leaves 2.5 % outside on either side.
    assert measure.bounds_of([float(i) for i in range(100)]) == Bounds(40.0, 49.5, 59.0)


def test_the_table(smoke) -> None:
    result, mebibyte = smoke("lora"), 2**20
    plain, _, cls, _, second = result.ways
    plain.memory["both"], cls.memory["both"] = 100 * mebibyte, 110 * mebibyte
    cls.weights, result.teacher_memory = 330 * mebibyte, 20 * mebibyte
    plain.seconds["both"].q50, plain.cpu_seconds.q50 = 4.0, 3.0
    cls.loss_adds = Bounds(-0.01, 0.002, 0.015)
    result.losses[0].memory["both"] = result.losses[0].kept = mebibyte // 2
    assert list(step_table._times(result, plain).values())[1:3] == ["3000 ms", "4000 ms"]
    assert step_table._times(result, cls)["of which the loss"] == "+0.20% (-1.00% to +1.50%)"
    assert list(step_table._memory(result, cls).values()) == [
        f"+ RIFT, cls, {N} x {D} float32",
        *("330.00 MiB", "110.00 MiB", "10.00 MiB", "120.50 MiB", "0.50 MiB", "0.50 MiB"),
    ]
    row = step_table._memory(result, second)
    assert row["step"] == f"+ RIFT, cls, {N} x {D} float32, teacher a copy"
    # Its cost is its memory.
    assert step_table.lora_summary(result).count("teacher a copy") == 1


def test_result_is_complete(smoke) -> None:
    result = smoke("lora")
    assert result.rounds == measure.MIN_ROUNDS
    assert tuple((way.teacher, way.pooling) for way in result.ways) == WAYS
    assert [loss.features for loss in result.losses] == ["8 x 16 float32", "136 x 16 float32"]
    assert all(0 < loss.predicted_share < 1 for loss in result.losses)
    assert {"transformers", "peft"} <= set(result.environment.versions)
    assert result.clock == measure.CPU_TIME
    assert set(result.noise) == {*measure.CLOCKS, measure.CPU_TIME}
    assert [bool(way.seconds) for way in result.ways] == [True] * 4 + [False]


def test_cpu_time_has_nothing_of_waiting() -> None:
    seconds = measure.time_once(Call(lambda: time.sleep(0.2)), CPU)
    assert seconds["both"] >= 0.2
    assert 0 <= seconds[measure.CPU_TIME] < 0.1


def test_shares_are_of_the_plain_step(monkeypatch) -> None:
    """The loss adds to the teacher's pass, and that to the plain step, in CPU time on a CPU.

    What a GPU would run, with autocast.
    """
    seconds = {"plain": 4.0, "teacher": 6.0, "RIFT cls": 6.2, "RIFT tokens": 6.4, "cls": 0.1}

    def rounds(tasks: Any, *_: Any, **__: Any) -> dict[str, list[measure.Seconds]]:
        wall = dict.fromkeys(measure.CLOCKS, 1.0)
        return {name: [wall | {"cpu": seconds.get(name, 4.0)}] * 5 for name in tasks}

    monkeypatch.setattr(measure, "time_rounds", rounds)
    result = lora.run(Job("smoke", dataclasses.replace(SMOKE, autocast=True), CPU))
    adds = [way.adds and way.adds.q50 for way in result.ways]
    assert adds == pytest.approx([None, 0.5, 0.55, 0.6, None])
    loss_adds = [way.loss_adds and way.loss_adds.q50 for way in result.ways]
    assert loss_adds == pytest.approx([None, None, 0.05, 0.1, None])
    assert result.losses[0].share.q50 == pytest.approx(0.025)
    assert "tokens in bfloat16 autocast" in step_table.lora_summary(result)


@pytest.mark.parametrize(
    ("way", "passes"), [*zip(WAYS, ([True], *[[True, False]] * 3, [True]), strict=True)], ids=str
)
def test_who_runs_in_a_step(way, passes, adapted) -> None:
    """The student, then the teacher: the same modules, or a copy's."""
    step = Step(adapted, *way)
    calls: list[bool] = []
    base = step.student.base_model.model
    base.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step.forward()
    assert calls == passes
