"""The benchmark of a LoRA step with RIFT: its parts are the whole, and its memory is exact."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import rift_kernels as rk
from benchmarks import adapted, files, lora, lora_table, measure, report, schema
from benchmarks.adapted import ADAPTERS_OFF, COPY, Adapted, LossAlone, Setup, Step, Way

pytest.importorskip("peft", reason="needs peft")
pytest.importorskip("transformers", reason="needs transformers")

CPU = torch.device("cpu")
SMOKE = lora.PROFILES["smoke"]
N, D = SMOKE.batch, SMOKE.size.width
# peft asks transformers under a name that transformers has given up.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def shared() -> Adapted:
    return Adapted(SMOKE.size, SMOKE.batch, False, CPU)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``python -m benchmarks.lora --profile smoke`` writes."""
    folder = tmp_path_factory.mktemp("results")
    assert lora.main(["--profile", "smoke", "--device", "cpu", "--out", str(folder)]) == 0
    (path,) = folder.iterdir()
    return json.loads(path.read_text())


def _gradient(shared: Adapted, way: Way) -> tuple[Tensor, Tensor]:
    """The step's loss, and its gradient at all that is trained."""
    loss = Step(shared, way).forward()
    loss.backward()
    found = torch.cat([p.grad.flatten() for p in shared.trained])
    for parameter in shared.trained:
        parameter.grad = None
    return loss.detach(), found


class Toy:
    """Bytes that can be added up by hand."""

    def __init__(self) -> None:
        self.x = torch.randn(1000, requires_grad=True)

    def forward(self) -> Tensor:
        scratch = torch.empty(3000)
        del scratch
        return self.x.exp().sum()

    def backward(self, values: Tensor) -> None:
        torch.autograd.grad(values, self.x)


def test_memory_of_a_toy_is_that_by_hand() -> None:
    """exp keeps its result, and the sum is a number; in the backward come another of each."""
    task = Toy()
    task.backward(task.forward())
    peak = measure.peak_memory(task, CPU)
    assert peak == {"forward": 12000, "backward": 2 * 4000 + 2 * 4, "both": 12000}
    assert measure.kept_memory(task, CPU) == 4000 + 4


class Storages(TorchDispatchMode):
    """Counts live storages: another way than the profiler's."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self._see((args, kwargs), known=True)
        found = func(*args, **(kwargs or {}))
        self._see(found, known=False)
        self.peak = max(self.peak, sum(self.sizes.values()))
        return found

    def _see(self, tree: Any, known: bool) -> None:
        for tensor in tree_leaves(tree):
            if isinstance(tensor, Tensor) and id(tensor.untyped_storage()) not in self.sizes:
                storage = tensor.untyped_storage()
                # What comes in and was never made was there before.
                self.sizes[id(storage)] = 0 if known else storage.nbytes()
                weakref.finalize(storage, self.sizes.pop, id(storage))


@pytest.mark.parametrize("way", [Way(), Way(ADAPTERS_OFF)], ids=["plain", "teacher"])
def test_memory_of_a_step_is_that_of_its_live_storages(shared: Adapted, way: Way) -> None:
    """The loss has more, inside of operators, where only the allocator sees it."""
    step = Step(shared, way)
    step.backward(step.forward())
    with Storages() as counted:
        step.backward(step.forward())
    assert measure.peak_memory(step, CPU)["both"] == pytest.approx(counted.peak, rel=1e-3)


def test_what_the_loss_keeps_is_that_by_hand(shared: Adapted, result: dict[str, Any]) -> None:
    """Of few rows: the student's, centered, and a block of N x N; and the value."""
    kept = measure.kept_memory(LossAlone(shared, "cls"), CPU)
    assert kept == 4 * (N * D + N * N + 1)
    assert result["losses"][0]["kept"] == kept


def test_the_peak_is_at_most_the_sum_of_its_parts(result: dict[str, Any]) -> None:
    plain = result["ways"][0]["memory"]["both"]
    parts = list(lora_table.compared(result))
    assert [way["pooling"] for way, _ in parts] == ["cls", "tokens"]
    for way, loss in parts:
        # The activations of the student are there while the teacher runs.
        assert plain < way["memory"]["both"]
        assert way["memory"]["both"] <= plain + result["teacher_memory"] + loss["memory"]["both"]
    assert lora.failures(result) == []
    broken = copy.deepcopy(result)
    broken["ways"][2]["memory"]["both"] *= 10
    broken["ways"][3]["weights"] += 1
    first, second = lora.failures(broken)
    assert first.startswith("cls: ")
    assert second.startswith("tokens: weights ")


def test_only_a_copy_costs_weights(shared: Adapted, result: dict[str, Any]) -> None:
    weights = {(way["teacher"], way["pooling"]): way["weights"] for way in result["ways"]}
    plain = weights[None, None]
    assert plain == sum(p.nbytes for p in shared.parameters())
    again = sum(p.nbytes for p in shared.pretrained().parameters())
    assert 0 < again < plain
    assert weights.pop((COPY, "cls")) == plain + again
    assert set(weights.values()) == {plain}


def test_setting_up_is_measured_and_not_assumed(
    shared: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Step.__init__

    def wasteful(self: Step, *how: Any) -> None:
        made(self, *how)
        self.waste = torch.empty(1000)

    monkeypatch.setattr(Step, "__init__", wasteful)
    assert measure.kept_memory(Setup(shared, Way(ADAPTERS_OFF, "cls")), CPU) == 4000


def test_ways_share_weights_and_no_hooks(shared: Adapted) -> None:
    own = shared.student()
    for name, parameter in shared.model.named_parameters():
        assert own.get_parameter(name) is parameter
    rift = Step(shared, Way(ADAPTERS_OFF, "cls"))
    assert any(m._forward_hooks for m in rift._student.modules())
    assert not any(m._forward_hooks for m in Step(shared, Way())._student.modules())


def test_the_parts_of_a_step_are_the_step(shared: Adapted) -> None:
    value, plain = _gradient(shared, Way())
    # The teacher by itself changes nothing.
    assert torch.equal(_gradient(shared, Way(ADAPTERS_OFF))[1], plain)
    for pooling in lora.POOLINGS:
        with_rift, found = _gradient(shared, Way(ADAPTERS_OFF, pooling))
        with_copy, same = _gradient(shared, Way(COPY, pooling))
        assert (found - plain).norm() > 1e-4 * plain.norm()
        torch.testing.assert_close(found, same, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(with_rift, with_copy)
        alone = LossAlone(shared, pooling).forward()
        assert alone > 1e-5
        torch.testing.assert_close(with_rift - value, alone, rtol=1e-2, atol=1e-6)


def test_the_teacher_pass_is_the_pretrained_models(shared: Adapted) -> None:
    found = adapted.TeacherPass(shared).forward()
    assert not found.requires_grad
    teacher = shared.pretrained()
    assert not any("lora" in name for name, _ in teacher.named_parameters())
    with rk.FeatureCapture(teacher, shared.layer, "tokens") as capture:
        teacher(pixel_values=shared.images)
        (expected,) = capture.features().values()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    # And the student is another by now.
    student = shared.student()
    with rk.FeatureCapture(student, shared.layer, "tokens") as capture:
        student(pixel_values=shared.images)
        (own,) = capture.features().values()
    assert (own - found).norm() > 1e-3 * found.norm()


def test_every_step_starts_from_the_same_weights() -> None:
    own = Adapted(SMOKE.size, SMOKE.batch, False, CPU)
    before = [p.detach().clone() for p in own.trained]
    step = Step(own, Way(ADAPTERS_OFF, "tokens"))
    step.backward(step.forward())
    for weight, updated, old in zip(own.trained, own.updated, before, strict=True):
        assert torch.equal(weight, old)
        assert not torch.equal(updated, old)
        assert weight.grad is updated.grad is None


def test_the_full_profile_is_a_vit_b() -> None:
    size = lora.PROFILES["full"].size
    with torch.device("meta"):
        model = adapted._with_adapters(size)
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
    assert measure.added(rift, teacher, plain) == pytest.approx(share)
    assert measure.added(plain, None, rift)["q50"] == pytest.approx(2 / 3.0625)
    busy = [{"cpu": 1.0, "both": 9.0}] * 5
    assert measure.added(busy, None, [{"cpu": 4.0, "both": 1.0}] * 5, "cpu")["low"] == 0.25
    found = measure.middle_of([float(i) for i in range(100)])
    # Ranks 41 and 60 of 100: the binomial distribution leaves 2.5 % outside on either side.
    assert found == {"low": 40.0, "q50": 49.5, "high": 59.0}


def test_the_table(result: dict[str, Any]) -> None:
    made = copy.deepcopy(result)
    plain, _, cls, _, second = made["ways"]
    mebibyte = 2**20
    for way, peak in zip(made["ways"], (100, 104, 110, 112, 111), strict=True):
        way["memory"]["both"], way["weights"] = peak * mebibyte, 330 * mebibyte
    second["weights"] *= 2
    plain["seconds"]["both"]["q50"], plain["cpu_seconds"]["q50"] = 4.0, 3.0
    cls["loss_adds"] = {"low": -0.01, "q50": 0.002, "high": 0.015}
    made["teacher_memory"] = 20 * mebibyte
    made["losses"][0]["memory"]["both"] = made["losses"][0]["kept"] = mebibyte // 2
    times = lora_table._times(made).splitlines()
    assert [cell.strip() for cell in times[2].split("|")[2:4]] == ["3000 ms", "4000 ms"]
    assert "+0.20% (-1.00% to +1.50%)" in times[4]
    # A copy's cost is its memory.
    assert len(times) == 2 + len(made["ways"]) - 1
    on_gpu = lora_table._times({**made, "clock": "both"}).splitlines()
    assert on_gpu[2].split("|")[2].strip() == "4000 ms"
    assert "wall" not in on_gpu[0]
    memory = lora_table._memory(made).splitlines()
    cells = [cell.strip() for cell in memory[5].split("|")[1:-1]]
    assert cells == [
        f"+ RIFT, cls, {N} x {D} float32",
        *("330.00 MiB", "110.00 MiB", "10.00 MiB", "120.50 MiB", "0.50 MiB", "0.50 MiB"),
    ]
    assert "660.00 MiB" in memory[-1]
    assert memory[-1].startswith(f"| + RIFT, cls, {N} x {D} float32, teacher a copy")


def test_result_is_complete(result: dict[str, Any]) -> None:
    schema.validate(result)
    assert result["rounds"] == SMOKE.max_rounds
    assert [(w["teacher"], w["pooling"]) for w in result["ways"]] == [
        (None, None),
        (ADAPTERS_OFF, None),
        (ADAPTERS_OFF, "cls"),
        (ADAPTERS_OFF, "tokens"),
        (COPY, "cls"),
    ]
    assert [loss["features"] for loss in result["losses"]] == ["8 x 16 float32", "136 x 16 float32"]
    assert all(0 < loss["predicted_share"] < 1 for loss in result["losses"])
    assert {"transformers", "peft"} <= set(result["environment"]["versions"])
    assert result["clock"] == measure.CPU_TIME
    assert [w["seconds"] is None for w in result["ways"]] == [False] * 4 + [True]
    broken = copy.deepcopy(result)
    broken["ways"][1]["adds"]["high"] = None
    with pytest.raises(ValueError, match=r"ways\[1\]\.adds\.high must be"):
        schema.validate(broken)


def test_what_a_gpu_would_run_runs_on_a_cpu() -> None:
    """Autocast, under which the states that are compared are in bfloat16 or added up in float32."""
    found = lora.run("smoke", dataclasses.replace(SMOKE, autocast=True), CPU, 5)
    schema.validate(found)
    assert lora.failures(found) == []
    assert "tokens in bfloat16 autocast" in lora_table.summary(found)


def test_the_documents_show_the_full_size_only(result: dict[str, Any], tmp_path: Path) -> None:
    page = "<!-- lora:begin -->\n<!-- lora:end -->"
    files.write({**result, "profile": "cpu"}, tmp_path)
    pending = report.section("lora", page, tmp_path, check=False)
    assert pending == ({}, report.pending("lora"))
    assert "benchmarks.lora --profile full" in pending[1]
    path = files.write({**result, "profile": "full"}, tmp_path)
    shown, text = report.section("lora", page, tmp_path, check=False)
    assert list(shown) == [path]
    assert f"From `{path.name}`." in text
    again = report.section("lora", report.updated(page, "lora", text), tmp_path, check=True)
    assert again == (shown, text)


@pytest.mark.parametrize("package", ["peft", "transformers"])
def test_says_what_is_missing(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as stopped:
        lora.main(["--profile", "smoke", "--device", "cpu"])
    assert stopped.value.code == 2
    assert "needs transformers and peft: pip install" in capsys.readouterr().err


def test_cpu_time_has_nothing_of_waiting() -> None:
    class Waits:
        def forward(self) -> Tensor:
            time.sleep(0.2)
            return torch.ones(())

        def backward(self, _values: object) -> None:
            """Nothing."""

    found = measure.time_once(Waits(), CPU)
    assert found["both"] >= 0.2
    assert 0 <= found[measure.CPU_TIME] < 0.1


def test_shares_are_of_the_plain_step(result: dict[str, Any]) -> None:
    """The loss adds to the teacher's pass, and that to the plain step; by the clock asked for."""
    made = copy.deepcopy(result)
    clocks = (*measure.CLOCKS, measure.CPU_TIME)
    seconds = {"cls": 0.1, "tokens": 0.2, lora.AGAIN: 4.0}
    seconds |= {str(way): s for way, s in zip(lora.WAYS, (4.0, 6.0, 6.2, 6.4), strict=False)}
    samples = {
        name: [{**dict.fromkeys(clocks, 1.0), measure.CPU_TIME: s}] * 5
        for name, s in seconds.items()
    }
    lora._write_times(made, samples, measure.CPU_TIME)
    schema.validate(made)
    assert [way["adds"] and way["adds"]["q50"] for way in made["ways"]] == pytest.approx(
        [None, 0.5, 0.55, 0.6, None]
    )
    found = [way["loss_adds"] and way["loss_adds"]["q50"] for way in made["ways"]]
    assert found == pytest.approx([None, None, 0.05, 0.1, None])
    assert [loss["share"]["q50"] for loss in made["losses"]] == pytest.approx([0.025, 0.05])
    assert set(made["noise"]) == set(clocks)
    lora._write_times(made, samples, "both")
    assert made["ways"][1]["adds"]["q50"] == 0


def test_who_runs_in_a_step(shared: Adapted) -> None:
    """The student, then the teacher: the same modules, or a copy's."""
    for way, expected in zip(lora.WAYS, ([True], *[[True, False]] * 3, [True]), strict=True):
        step = Step(shared, way)
        calls: list[bool] = []
        base = step._student.base_model.model
        base.register_forward_hook(lambda *_, calls=calls: calls.append(torch.is_grad_enabled()))
        step.forward()
        assert calls == expected, way
