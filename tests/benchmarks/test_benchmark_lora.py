"""The benchmark of a LoRA step with RIFT: its parts are the whole, and its memory is exact."""

from __future__ import annotations

import dataclasses
import sys
import time
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rift_kernels as rk
from benchmarks import adapted, lora, measure, step_table
from benchmarks.adapted import ADAPTERS_OFF, COPY, Adapted, LossAlone, Step, TeacherPass, Way
from benchmarks.command import Job
from benchmarks.measure import Call
from benchmarks.schema import Bounds

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

CPU = torch.device("cpu")
SMOKE = lora.PROFILES["smoke"]
JOB = Job("smoke", SMOKE, CPU)
N, D = SMOKE.batch, SMOKE.size.width
# peft asks transformers under a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def shared() -> Adapted:
    return Adapted(SMOKE.size, SMOKE.batch, False, CPU)


def _gradient(shared: Adapted, way: Way) -> tuple[Tensor, Tensor]:
    """The step's loss, and its gradient at all that is trained."""
    loss = Step(shared, way).forward()
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in shared.optimiser.weights])
    for parameter in shared.optimiser.weights:
        parameter.grad = None
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


class Storages(TorchDispatchMode):
    """Counts live storages: another way than the profiler's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self._see((args, kwargs), known=True)
        results = func(*args, **(kwargs or {}))
        self._see(results, known=False)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return results

    def _see(self, tree: Any, known: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                storage = tensor.untyped_storage()
                # What comes in and was never made was there before.
                self.sizes[id(storage)] = 0 if known else storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage))


@pytest.mark.parametrize("way", [Way(), Way(ADAPTERS_OFF)], ids=["plain", "teacher"])
def test_memory_of_a_step_is_that_of_its_live_storages(shared, way) -> None:
    """The loss has more, inside of operators, where only the allocator sees it."""
    step = Step(shared, way)
    step.backward(step.forward())
    with Storages() as counted:
        step.backward(step.forward())
    assert measure.peak_memory(step, CPU)["both"] == pytest.approx(counted.peak, rel=1e-3)


def test_what_the_loss_keeps_is_that_by_hand(shared, smoke) -> None:
    """Of few rows: the student's, centered, and a block of N x N; and the value."""
    kept = measure.kept_memory(LossAlone(shared, "cls").forward, CPU)
    assert kept == 4 * (N * D + N * N + 1)
    assert smoke("lora").losses[0].kept == kept


def test_the_peak_is_at_most_the_sum_of_its_parts(smoke) -> None:
    result = smoke("lora")
    plain = result.ways[0].memory["both"]
    losses = [(way, step_table.loss_alone(result, way)) for way in result.ways]
    assert [way.pooling for way, loss in losses if loss] == ["cls", "tokens"]
    for way, loss in losses[2:4]:
        # The activations of the student are there while the teacher runs.
        assert plain < way.memory["both"]
        assert way.memory["both"] <= plain + result.teacher_memory + loss.memory["both"]
    assert lora.failures(result) == []
    result.ways[2].memory["both"] *= 10
    result.ways[3].weights += 1
    first, second = lora.failures(result)
    assert first.startswith("cls: ")
    assert second.startswith("tokens: weights ")


def test_only_a_copy_costs_weights(shared, smoke) -> None:
    weights = {(way.teacher, way.pooling): way.weights for way in smoke("lora").ways}
    plain = weights[None, None]
    assert plain == sum(p.nbytes for p in shared.parameters)
    again = sum(p.nbytes for p in shared.pretrained().parameters())
    assert 0 < again < plain
    assert weights.pop((COPY, "cls")) == plain + again
    assert set(weights.values()) == {plain}


def test_setting_up_is_measured_and_not_assumed(shared, monkeypatch) -> None:
    made = Step.__init__

    def wasteful(self: Step, *arguments: Any) -> None:
        made(self, *arguments)
        self.waste = torch.empty(1000)

    way = Way(ADAPTERS_OFF, "cls")
    step, plain = Step(shared, way), sum(p.nbytes for p in shared.parameters)
    assert lora._way(way, step, shared, CPU).weights == plain
    monkeypatch.setattr(Step, "__init__", wasteful)
    assert lora._way(way, step, shared, CPU).weights == plain + 4000


def test_ways_share_weights_and_no_hooks(shared) -> None:
    student = shared.student()
    for name, parameter in shared.model.named_parameters():
        assert student.get_parameter(name) is parameter
    rift = Step(shared, Way(ADAPTERS_OFF, "cls"))
    assert any(m._forward_hooks for m in rift.student.modules())
    assert not any(m._forward_hooks for m in Step(shared, Way()).student.modules())


def test_the_parts_of_a_step_are_the_step(shared) -> None:
    value, plain = _gradient(shared, Way())
    # The teacher by itself changes nothing.
    assert torch.equal(_gradient(shared, Way(ADAPTERS_OFF))[1], plain)
    for pooling in lora.POOLINGS:
        with_rift, gradient = _gradient(shared, Way(ADAPTERS_OFF, pooling))
        with_copy, same = _gradient(shared, Way(COPY, pooling))
        assert (gradient - plain).norm() > 1e-4 * plain.norm()
        torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(with_rift, with_copy)
        alone = LossAlone(shared, pooling).forward()
        assert alone > 1e-5
        torch.testing.assert_close(with_rift - value, alone, rtol=1e-2, atol=1e-6)


def test_the_teacher_pass_is_the_pretrained_models(shared) -> None:
    def caught(model: Any) -> Tensor:
        with rk.FeatureCapture(model, shared.layer, "tokens") as capture:
            model(pixel_values=shared.batch.images)
            (features,) = capture.features().values()
        return features

    features = TeacherPass(shared, shared.student()).forward()
    assert not features.requires_grad
    teacher = shared.pretrained()
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    torch.testing.assert_close(features, caught(teacher), rtol=1e-5, atol=1e-6)
    # And the student is another by now.
    assert (caught(shared.student()) - features).norm() > 1e-3 * features.norm()


def test_every_step_starts_from_the_same_weights() -> None:
    optimiser = (own := Adapted(SMOKE.size, SMOKE.batch, False, CPU)).optimiser
    before = [p.detach().clone() for p in optimiser.weights]
    step = Step(own, Way(ADAPTERS_OFF, "tokens"))
    step.backward(step.forward())
    for weight, updated, old in zip(optimiser.weights, optimiser.updated, before, strict=True):
        assert torch.equal(weight, old)
        assert not torch.equal(updated, old)
        assert weight.grad is updated.grad is None


def test_the_full_profile_is_a_vit_b() -> None:
    size = lora.PROFILES["full"].size
    with torch.device("meta"):
        model = adapted.with_adapters(size)
    config = model.base_model.model.config
    assert (config.hidden_size, config.num_hidden_layers) == (768, 12)
    assert (config.num_attention_heads, config.intermediate_size) == (12, 3072)
    assert size.tokens == 197
    adapters = [name for name, _ in model.named_parameters() if "lora_A" in name]
    assert len(adapters) == 4 * 12
    base = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    # ViT-B/16 without its head, of 1000 classes.
    assert base == 86_567_656 - 769_000


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
    made = smoke("lora")
    plain, _, cls, _, second = made.ways
    mebibyte = 2**20
    for way, peak in zip(made.ways, (100, 104, 110, 112, 111), strict=True):
        way.memory["both"], way.weights = peak * mebibyte, 330 * mebibyte
    second.weights *= 2
    plain.seconds["both"].q50, plain.cpu_seconds.q50 = 4.0, 3.0
    cls.loss_adds = Bounds(-0.01, 0.002, 0.015)
    made.teacher_memory = 20 * mebibyte
    made.losses[0].memory["both"] = made.losses[0].kept = mebibyte // 2
    times = step_table._lora_times(made).splitlines()
    assert [cell.strip() for cell in times[2].split("|")[2:4]] == ["3000 ms", "4000 ms"]
    assert "+0.20% (-1.00% to +1.50%)" in times[4]
    # A copy's cost is its memory.
    assert len(times) == 2 + len(made.ways) - 1
    made.clock = "both"
    on_gpu = step_table._lora_times(made).splitlines()
    assert on_gpu[2].split("|")[2].strip() == "4000 ms"
    assert "wall" not in on_gpu[0]
    memory = step_table._lora_memory(made).splitlines()
    cells = [cell.strip() for cell in memory[5].split("|")[1:-1]]
    assert cells == [
        f"+ RIFT, cls, {N} x {D} float32",
        *("330.00 MiB", "110.00 MiB", "10.00 MiB", "120.50 MiB", "0.50 MiB", "0.50 MiB"),
    ]
    assert "660.00 MiB" in memory[-1]
    assert memory[-1].startswith(f"| + RIFT, cls, {N} x {D} float32, teacher a copy")


def test_result_is_complete(smoke) -> None:
    result = smoke("lora")
    assert result.rounds == SMOKE.max_rounds
    assert [Way(w.teacher, w.pooling) for w in result.ways] == list(lora.WAYS)
    assert [loss.features for loss in result.losses] == ["8 x 16 float32", "136 x 16 float32"]
    assert all(0 < loss.predicted_share < 1 for loss in result.losses)
    assert {"transformers", "peft"} <= set(result.environment.versions)
    assert result.clock == measure.CPU_TIME
    assert set(result.noise) == {*measure.CLOCKS, measure.CPU_TIME}
    assert [bool(w.seconds) for w in result.ways] == [True] * 4 + [False]


def test_what_a_gpu_would_run_runs_on_a_cpu() -> None:
    """Autocast, under which the states that are compared are in bfloat16 or added up in float32."""
    result = lora.run(Job("smoke", dataclasses.replace(SMOKE, autocast=True), CPU, 5))
    assert lora.failures(result) == []
    assert "tokens in bfloat16 autocast" in step_table.lora_summary(result)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_says_what_is_missing(package, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert lora.main(["--profile", "smoke", "--device", "cpu"]) == 2
    assert "needs transformers and peft: pip install" in capsys.readouterr().err


def test_cpu_time_has_nothing_of_waiting() -> None:
    seconds = measure.time_once(Call(lambda: time.sleep(0.2)), CPU)
    assert seconds["both"] >= 0.2
    assert 0 <= seconds[measure.CPU_TIME] < 0.1


@pytest.mark.parametrize(
    ("clock", "adds", "loss_adds", "share"),
    [(measure.CPU_TIME, [None, 0.5, 0.55, 0.6], [None, None, 0.05, 0.1], 0.025),
     ("both", [None, 0, 0, 0], [None, None, 0, 0], 1)],
)  # fmt: skip
def test_shares_are_of_the_plain_step(clock, adds, loss_adds, share, shared, smoke) -> None:
    """The loss adds to the teacher's pass, and that to the plain step; by the clock asked for."""
    seconds = {"cls": 0.1, **dict(zip(map(str, lora.WAYS), (4.0, 6.0, 6.2, 6.4), strict=False))}
    samples = {
        name: [{**dict.fromkeys(measure.CLOCKS, 1.0), measure.CPU_TIME: s}] * 5
        for name, s in seconds.items()
    }
    ways = [dataclasses.replace(w, adds=None, loss_adds=None) for w in smoke("lora").ways[:4]]
    for way, entry in zip(lora.WAYS, ways, strict=False):
        lora.write_times(entry, way, samples, clock)
    assert [way.adds and way.adds.q50 for way in ways] == pytest.approx(adds)
    assert [way.loss_adds and way.loss_adds.q50 for way in ways] == pytest.approx(loss_adds)
    loss = lora._loss("cls", LossAlone(shared, "cls"), JOB, 1, samples, clock)
    assert loss.share.q50 == pytest.approx(share)


@pytest.mark.parametrize(
    ("way", "passes"),
    [*zip(lora.WAYS, ([True], *[[True, False]] * 3, [True]), strict=True)],
    ids=str,
)
def test_who_runs_in_a_step(way, passes, shared) -> None:
    """The student, then the teacher: the same modules, or a copy's."""
    step = Step(shared, way)
    calls: list[bool] = []
    base = step.student.base_model.model
    base.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    step.forward()
    assert calls == passes
