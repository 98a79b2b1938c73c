"""The benchmark of a finetuning step: its parts are the whole, its memory is exact."""

from __future__ import annotations

import copy
import dataclasses
import time
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import files, flops, measure, step, step_table
from benchmarks.command import Job
from benchmarks.measure import CPU_TIME, Call
from benchmarks.models import Finetuning, operations
from benchmarks.oracle import GRADIENT_TOLERANCE
from benchmarks.providers import NAIVE, WIDE, Provider, providers
from benchmarks.schema import Bounds, StepWay
from benchmarks.step import ADAPTERS_OFF, COPY, Step, Suite, loss_alone, losses
from rift_kernels.dispatch import availability

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

CPU = torch.device("cpu")
EAGER, TRITON, CUDA = (f"rift_kernels {backend}" for backend in ("eager", "triton", "cuda"))
SMOKE, ADAPTERS = step.PROFILES["smoke"].profiles
AUTOCAST = dataclasses.replace(SMOKE, autocast=True)
N, D = SMOKE.batch, SMOKE.width
PROVIDERS = {provider.name: provider for provider in providers(CPU, compiled=())}
LOSSES = losses(SMOKE, CPU)[0]
CLASS_TOKENS, TOKENS = (loss for loss in LOSSES if loss.provider.name == EAGER)
NAIVE_CLASS_TOKENS, NAIVE_TOKENS = (loss for loss in LOSSES if loss.provider.name == NAIVE)
each_loss = pytest.mark.parametrize("loss", [CLASS_TOKENS, TOKENS], ids=str)
# peft asks transformers under a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module", params=[SMOKE, ADAPTERS], ids=["all weights", "adapters"])
def finetuning(request: pytest.FixtureRequest) -> Finetuning:
    return Finetuning(request.param, CPU)


@pytest.fixture(scope="module")
def teacher(finetuning: Finetuning) -> str:
    return ADAPTERS_OFF if finetuning.profile.rank else COPY


def _gradient(finetuning: Finetuning, *way: Any) -> tuple[Tensor, Tensor]:
    """The step's loss, and its gradient at all that is trained."""
    loss = Step(finetuning, *way).forward()
    loss.backward()
    gradient = torch.cat([weight.grad.flatten() for weight in finetuning.weights])
    for weight in finetuning.weights:
        weight.grad = None
    return loss.detach(), gradient


def test_the_full_profile_is_a_vit_b_16() -> None:
    profile, meta = step.PROFILES["full"].profiles[1], torch.device("meta")
    with meta:
        model = Finetuning(profile, meta).model
    assert (profile.tokens, profile.heads) == (197, 12)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    # Two matrices for each of four in twelve attentions; the head's weight and bias.
    assert len(trained) == 2 * 4 * 12 + 2
    base = sum(p.numel() for name, p in model.named_parameters() if "lora" not in name)
    # As many as torchvision's vit_b_16 has, with a head of 100 classes instead of 1000.
    assert base == 86_567_656 - 900 * 769
    for on_gpu in step.PROFILES["gpu"].profiles:
        same = {"classes": 100, "batch": 8, "budget": 600, "autocast": False, "rank": 8}
        assert dataclasses.replace(on_gpu, **same) == profile


def test_flops_are_those_of_the_products() -> None:
    """By hand: twelve products of width by width a token and layer, and two for attention."""
    t, d = 17, 16
    layers = SMOKE.depth * (2 * t * 12 * d * d + 4 * t * t * d)
    patches, head = 2 * 16 * (3 * 4 * 4) * d, 2 * d * SMOKE.classes
    forward, both = operations(Step(Finetuning(SMOKE, CPU)))
    assert forward == SMOKE.batch * (layers + patches + head)
    # Twice that backward, but nothing needs the gradient of the images.
    assert both == 3 * forward - SMOKE.batch * patches


def test_steps_share_weights_and_no_hooks(finetuning, teacher) -> None:
    steps = Step(finetuning, teacher, CLASS_TOKENS), Step(finetuning)
    rift, plain = (step.student for step in steps)
    for name, parameter in finetuning.model.named_parameters():
        assert rift.get_parameter(name) is plain.get_parameter(name) is parameter
    assert any(module._forward_hooks for module in rift.modules())
    assert not any(module._forward_hooks for module in plain.modules())


def test_only_a_copy_costs_weights(finetuning, teacher) -> None:
    plain = sum(p.nbytes for p in finetuning.model.parameters())
    assert Step(finetuning).weights == plain
    second = Step(finetuning, COPY, CLASS_TOKENS)
    frozen = second.rift._models[1]
    assert not any("lora" in name for name, _ in frozen.named_parameters())
    assert not any(p.requires_grad for p in frozen.parameters())
    again = sum(p.nbytes for p in frozen.parameters())
    assert 0 < again <= plain
    assert second.weights == plain + again
    own = plain if teacher == ADAPTERS_OFF else plain + again
    assert Step(finetuning, teacher).weights == Step(finetuning, teacher, TOKENS).weights == own


@each_loss
def test_the_parts_of_a_step_are_the_step(loss, finetuning, teacher) -> None:
    value, plain = _gradient(finetuning)
    # The teacher by itself changes nothing.
    assert torch.equal(_gradient(finetuning, teacher)[1], plain)
    with_rift, gradient = _gradient(finetuning, teacher, loss)
    with_copy, same = _gradient(finetuning, COPY, loss)
    assert (gradient - plain).norm() > 1e-4 * plain.norm()
    torch.testing.assert_close(gradient, same, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(with_rift, with_copy)
    whole = Step(finetuning, teacher, loss)
    assert [x.shape for x in whole.outputs()] == [(N, SMOKE.tokens, D)] * loss.features.layers
    call = loss_alone(whole, loss, StepWay(teacher=teacher, loss=str(loss)), CPU)
    values = call.forward()
    alone = (1 - values).mean()
    # Of class tokens, the gradient of a layer is one of all its tokens.
    assert [g.shape for g in call.backward(values)] == [x.shape for x in whole.outputs()]
    assert alone > 1e-5
    torch.testing.assert_close(with_rift - value, alone, rtol=1e-2, atol=1e-6)


def test_the_loss_is_the_same_by_all() -> None:
    finetuning = Finetuning(SMOKE, CPU)
    plain = _gradient(finetuning)[1]
    naive, ours = (_gradient(finetuning, COPY, loss)[1] - plain for loss in (NAIVE_TOKENS, TOKENS))
    assert naive.norm() > 1e-3 * plain.norm()
    assert (naive - ours).norm() < 2e-3 * naive.norm()


def test_the_teacher_pass_is_the_pretrained_models(finetuning, teacher) -> None:
    (features,) = Step(finetuning, teacher).teacher_pass()
    assert not features.requires_grad
    second = Step(finetuning, COPY, TOKENS)
    torch.testing.assert_close(features, *second.teacher_pass(), rtol=1e-5, atol=1e-6)
    # And the student is another by now.
    (outputs,) = second.outputs()
    assert (outputs.flatten(0, 1) - features).norm() > 1e-3 * features.norm()


def test_who_runs_in_a_step(finetuning, teacher) -> None:
    """The student, then the teacher: the same modules, or a copy's."""
    shared = teacher == ADAPTERS_OFF
    for way, passes in (
        ((), [True]),
        ((teacher,), [True, False] if shared else [True]),
        ((teacher, TOKENS), [True, False] if shared else [True]),
        ((COPY, CLASS_TOKENS), [True]),
    ):
        one = Step(finetuning, *way)
        calls: list[bool] = []
        base = one.student.base_model.model if shared else one.student
        base.register_forward_pre_hook(
            lambda *_, calls=calls: calls.append(torch.is_grad_enabled())
        )
        one.forward()
        assert calls == passes


def test_every_step_starts_from_the_same_weights(finetuning) -> None:
    before = copy.deepcopy(finetuning.model.state_dict())
    plain = Step(finetuning)
    plain.backward(plain.forward())
    # The optimiser did its work, on the copies.
    for updated, weight in zip(finetuning.updated, finetuning.weights, strict=True):
        assert updated.isfinite().all()
        assert not torch.equal(updated, weight)
    plain.backward(plain.forward() * torch.nan)
    assert finetuning.updated[0].isnan().all()
    for name, weight in finetuning.model.state_dict().items():
        assert torch.equal(weight, before[name]), name
    assert all(weight.grad is None for weight in (*finetuning.weights, *finetuning.updated))


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
    for part in smoke("step").finetunings:
        plain = part.ways[0].memory["both"]
        for way in (way for way in part.ways if way.seconds and way.alone):
            # The activations of the student are there while the teacher runs.
            assert plain < way.memory["both"]
            assert way.memory["both"] <= plain + part.teacher_memory + way.alone.memory["both"]
        # Of few rows, the loss keeps each layer's, centered, and a block of N x N; and the value.
        (kept,) = {w.alone.kept for w in part.ways if w.loss == str(CLASS_TOKENS)}
        assert kept == 2 * 4 * (N * D + N * N + 1)


def test_cpu_time_has_nothing_of_waiting() -> None:
    seconds = measure.time_once(Call(lambda: time.sleep(0.2)), CPU)
    assert seconds["both"] >= 0.2
    assert 0 <= seconds[CPU_TIME] < 0.1


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


def test_result_is_complete(smoke) -> None:
    result = smoke("step")
    assert {"transformers", "peft"} <= set(result.environment.versions)
    full, adapters = result.finetunings
    for part in (full, adapters):
        assert part.rounds == measure.MIN_ROUNDS
        assert part.clock == CPU_TIME
        assert set(part.noise) == set(measure.CLOCKS)
        assert [way.loss for way in part.ways[:6]] == [None, None, *map(str, LOSSES)]
        # Naive code that does not center is wrong near its teacher.
        assert not any(way.wrong for way in part.ways if way.loss != str(NAIVE_CLASS_TOKENS))
        assert all(way.memory["both"] > 0 and way.weights > 0 for way in part.ways)
        assert all(0 < way.predicted_share < 1 for way in part.ways[1:7])
        reasons = {entry.name: entry.reason for entry in part.unable}
        for backend in availability.BACKENDS:
            assert reasons.get(f"rift_kernels {backend}") == availability.reason_against(backend)
    assert [bool(way.seconds) for way in full.ways] == [True] * 7
    assert [bool(way.seconds) for way in adapters.ways] == [True] * 7 + [False]
    assert [way.teacher for way in adapters.ways] == [None, *[ADAPTERS_OFF] * 6, COPY]


def test_under_autocast_naive_code_in_float32_is_kept_out() -> None:
    """What a GPU would run: features in bfloat16, too."""
    result = step.run(Job("smoke", Suite((AUTOCAST,), 64), CPU))
    assert list(step.failures(result)) == []
    (part,) = result.finetunings
    assert all(way.seconds for way in part.ways)
    names = [str(way.loss).split(", ")[0] for way in part.ways[2:] if way.loss]
    assert names == [NAIVE, WIDE, EAGER, NAIVE, WIDE, EAGER, NAIVE, EAGER]
    errors = [way.gradient_error for way in part.ways[2:] if way.loss]
    assert max(errors[i] for i in (2, 4, 5)) < 1e-3
    # It may even be NaN, which a file does not have.
    assert all(error is None or error >= 1e-2 for error in (errors[0], errors[3]))
    assert "tokens in bfloat16 autocast" in step_table.summary(result)


def test_a_backend_that_does_not_take_the_features_is_left_out(monkeypatch) -> None:
    candidates = [
        *(PROVIDERS[name] for name in (NAIVE, WIDE, EAGER)),
        Provider(TRITON, reason="no GPU"),
        Provider(CUDA, PROVIDERS[EAGER].measures, takes=lambda w: w.rows < 100),
    ]
    monkeypatch.setattr(step, "providers", lambda *_, **__: candidates)
    compared, unable = losses(AUTOCAST, CPU)
    assert [loss.pooling for loss in compared if loss.provider.name == CUDA] == ["cls"]
    assert not any(loss.provider.name == TRITON for loss in compared)
    assert [(p.name, p.reason) for p in unable] == [(TRITON, "no GPU")]


def test_predictions(monkeypatch) -> None:
    monkeypatch.setattr(measure, "matmul_peak", lambda dtype, *_: 1e9 * 16 / dtype.itemsize)
    result = step.run(Job("smoke", Suite((AUTOCAST,), 64), CPU))
    (part,) = result.finetunings
    forward, both = operations(Step(Finetuning(AUTOCAST, CPU)))
    assert part.predicted_seconds == both / 8e9
    shares = {way.loss: way.predicted_share for way in part.ways}
    assert part.ways[1].predicted_share == forward / both
    # Autocast multiplies naive code's float32 in bfloat16, but not what is kept out of it.
    tokens = TOKENS.features
    for name, operation, peak in (
        (NAIVE, flops.naive, 8e9),
        (WIDE, flops.naive, 4e9),
        (EAGER, flops.rift_kernels, 4e9),
    ):
        share = operation(tokens) / peak / part.predicted_seconds
        label = f"{name}, tokens, {tokens.shape}"
        assert shares[label] == pytest.approx(share)


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
    assert "FAILED rift_kernels eager, class tokens, 2 layers of 8 x 16 float32: wrong" in text
    assert "FAILED rift_kernels eager, tokens, 136 x 16 float32: RuntimeError: out of order" in text
    assert "- rift_kernels eager, tokens, 136 x 16 float32: RuntimeError" in text
    (path,) = tmp_path.iterdir()
    result = files.read(path)
    assert [sum(bool(w.seconds) for w in part.ways) for part in result.finetunings] == [6, 6]
    rows = step_table.summary(result).splitlines()
    row = next(r for r in rows if EAGER in r and ", **wrong**" in r)
    # What is wrong is not praised.
    assert row.count("**") == 2


def _rounds(seconds: dict[str, float]) -> Any:
    """Stands in for measure.time_rounds: CPU seconds by task, a second where none are given."""

    def rounds(tasks: Any, *_: Any, **__: Any) -> dict[str, list[measure.Seconds]]:
        wall = dict.fromkeys(measure.CLOCKS, 1.0)
        return {name: [wall | {CPU_TIME: seconds.get(name, 1.0)}] * 64 for name in tasks}

    return rounds


def test_shares_are_of_the_plain_step(monkeypatch) -> None:
    """The loss adds to the teacher's pass, and that to the plain step, in CPU time on a CPU."""
    seconds = {
        "plain": 4.0,
        "again": 4.0,
        "teacher": 6.0,
        str(TOKENS): 6.2,
        "teacher's first layer": 4.4,
    }
    monkeypatch.setattr(measure, "time_rounds", _rounds(seconds | {f"{TOKENS} alone": 0.1}))
    (part,) = step.run(Job("smoke", Suite((ADAPTERS,), 64), CPU)).finetunings
    plain, teacher, *_, tokens, first_layer, second = part.ways
    assert plain.adds is plain.loss_adds is second.adds is teacher.loss_adds is None
    adds = (teacher.adds.q50, tokens.adds.q50, first_layer.adds.q50)
    assert adds == pytest.approx((0.5, 0.55, 0.1))
    assert first_layer.predicted_share == teacher.predicted_share / ADAPTERS.depth
    assert tokens.loss_adds.q50 == pytest.approx(0.05)
    assert tokens.alone.share.q50 == pytest.approx(0.025)


def test_noise_is_the_difference_of_the_plain_step_to_itself_or_its_spread(monkeypatch) -> None:
    monkeypatch.setattr(measure, "time_rounds", _rounds({"again": 0.8}))
    (part,) = step.run(Job("smoke", Suite((SMOKE,), 64), CPU)).finetunings
    assert part.noise == dict.fromkeys(measure.CLOCKS, 0.0) | {CPU_TIME: pytest.approx(0.2)}

    def noise(seconds: list[float]) -> float:
        samples = [{"both": s} for s in seconds]
        return measure.noise(samples, samples, "both")

    # Medians that agree by chance: what is left is the range from 0.8 to 1.2, over 10 rounds.
    assert noise([0.8, 1.2] * 50) == pytest.approx(2 * 0.4 / 100**0.5)


def test_the_tables(smoke) -> None:
    result, mebibyte = smoke("step"), 2**20
    part = result.finetunings[-1]
    plain, teacher, naive, ours, *_, second = part.ways
    plain.memory["both"], ours.memory["both"] = 100 * mebibyte, 110 * mebibyte
    ours.weights, part.teacher_memory = 330 * mebibyte, 20 * mebibyte
    plain.seconds["both"].q50, plain.seconds[CPU_TIME].q50 = 4.0, 3.0
    teacher.adds, ours.loss_adds = Bounds(0.4, 0.5, 0.6), Bounds(-0.01, 0.002, 0.015)
    naive.gradient_error, naive.wrong = 2 * GRADIENT_TOLERANCE, True
    ours.alone.share, ours.gradient_error = Bounds(0.01, 0.02, 0.03), 1e-6
    ours.alone.memory["both"] = ours.alone.kept = mebibyte // 2
    assert list(step_table._times(part, plain).values())[1:3] == ["3000 ms", "4000 ms"]
    row = step_table._times(part, ours)
    assert row["of which the loss"] == "+0.20% (-1.00% to +1.50%)"
    assert row["share of the plain step"] == "**2.00% (1.00% to 3.00%)**"
    assert row["gradient error"] == "1e-6"
    assert step_table._times(part, naive)["gradient error"] == "1e-1, **wrong**"
    assert list(step_table._memory(part, ours).values()) == [
        f"+ {CLASS_TOKENS}",
        *("330.00 MiB", "110.00 MiB", "10.00 MiB", "120.50 MiB", "0.50 MiB", "0.50 MiB"),
    ]
    label = f"+ {NAIVE_CLASS_TOKENS}, teacher a copy"
    assert step_table._memory(part, second)["step"] == label
    # Its cost is its memory.
    assert step_table.summary(result).count("teacher a copy") == 1
    for way in part.ways[4:6]:
        way.wrong, way.alone.share = True, Bounds(0.001, 0.001, 0.001)
    where = f"On {result.environment.device}, a LoRA step of a ViT of 0 M weights"
    assert step_table.cost(result) == (
        f"{where} takes 4000 ms. The loss ({CLASS_TOKENS}) takes **2.00%** of that, and the "
        "teacher's forward pass adds **50%**."
    )
    del part.ways[2:]
    assert step_table.cost(result) == f"{where} was not measured."
