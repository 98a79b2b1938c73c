"""The teacher is called as the student was, and only passes with gradients are trained on."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import warnings
import weakref
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support import tiny_models
from tests.support.tiny_models import perturbed


class Gated(nn.Module):
    """A model whose own forward has a ``mask``, and which can be run in parts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Linear(6, 8)
        self.head = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.features(x)
        return self.head(x if mask is None else x * mask.unsqueeze(-1))


def inputs(rows: int = 12, tokens: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(rows, tokens, 6, generator=torch.Generator().manual_seed(seed))


def gated(**settings: Any) -> tuple[Gated, rk.RIFTRegularizer]:
    student = Gated()
    settings = {"layers": "head", "pooling": "mean", **settings}
    return student, rk.RIFTRegularizer(student, perturbed(student), **settings)


# --- which pass counts


def test_a_pass_without_gradients_takes_nobodys_place() -> None:
    student, rift = gated()
    student(inputs())
    expected = rift().detach()
    student(inputs())
    with torch.no_grad():
        student(inputs(seed=2)[:5])
    loss = rift()
    assert torch.equal(loss.detach(), expected)
    loss.backward()
    assert student.features.weight.grad is not None
    # The other pass is forgotten with it.
    with pytest.raises(RuntimeError, match="nothing was captured"):
        rift()


def test_a_validation_compares_its_own_pass() -> None:
    """Even if the last training pass has not been compared."""
    student, rift = gated()
    student(inputs(seed=2))
    expected = rift().detach()
    student(inputs())
    with torch.no_grad():
        student(inputs(seed=2))
        assert torch.equal(rift(), expected)


def test_a_replaced_pass_warns_once() -> None:
    student, rift = gated()
    for rows in (12, 7):
        student(inputs()[:rows])
    expected = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head")
    expected.remove()
    with pytest.warns(UserWarning, match=r"only its latest pass is compared.*after each pass"):
        rift()
    for rows in (12, 7):
        student(inputs()[:rows])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rift()
    assert rift.step == 2


def test_an_export_is_no_pass() -> None:
    """Its tensors are fake."""
    student, rift = gated()
    torch.export.export(student, (inputs(),), strict=False)
    with pytest.raises(RuntimeError, match="nothing was captured"):
        rift()


@pytest.mark.parametrize("with_gradients", [True, False])
def test_a_pass_that_failed_is_no_pass(with_gradients) -> None:
    student, rift = gated(forward=lambda teacher, x: teacher(x))
    with torch.set_grad_enabled(with_gradients), pytest.raises(RuntimeError, match="must match"):
        student(torch.randn(5, 5, 6), mask=torch.randn(5, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student.head(student.features(inputs()))
        loss = rift(inputs())
        student(inputs())
        torch.testing.assert_close(rift(), loss)
    # Nor is one that the loss has refused.
    student(inputs()[:2])
    with pytest.raises(ValueError, match="at least 4 rows"):
        rift()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(inputs())
        torch.testing.assert_close(rift(), loss)


def test_a_layer_that_ran_by_itself_after_a_pass() -> None:
    """Its inputs are not those of the pass."""
    student, rift = gated()
    student(inputs(seed=2))
    student.head(student.features(inputs()))
    with pytest.raises(RuntimeError, match="the student itself was not called, only parts of it"):
        rift()
    loss = rift(inputs())
    student(inputs())
    torch.testing.assert_close(rift(), loss)


def test_two_regularisers_on_one_student_with_adapters() -> None:
    """The teacher's pass of one is not captured by the other."""
    student = tiny_models.bert_with_lora()
    first = rk.RIFTRegularizer(student, layers="*layer.0")
    second = rk.RIFTRegularizer(student, layers="*layer.1", pooling="mean")
    capture = rk.FeatureCapture(student, "*layer.1")
    losses = []
    for order in ((first, second), (second, first)):
        student(**tiny_models.text())
        before = capture.features()
        by_rift = {rift: rift() for rift in order}
        assert all(loss.requires_grad for loss in by_rift.values())
        losses.append([float(by_rift[rift].detach()) for rift in (first, second)])
        assert all(torch.equal(before[name], x) for name, x in capture.features().items())
    assert losses[0] == losses[1]
    assert min(losses[0]) > 1e-3


def test_two_regularisers_in_a_validation() -> None:
    """The teacher's pass of one is a pass without gradients, as the student's is now."""
    student = tiny_models.bert_with_lora()
    first, second = (rk.RIFTRegularizer(student, layers="*layer.1") for _ in range(2))
    with torch.no_grad():
        student(**tiny_models.text())
        assert float(first()) == float(second()) > 1e-3


# --- what the teacher is called with


def test_the_models_own_mask_is_passed_on() -> None:
    student = Gated()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head", pooling="mean")
    mask = torch.rand(12, 5, generator=torch.Generator().manual_seed(3)) > 0.4
    losses = []
    for arguments in (((), {}), ((inputs(),), {"mask": mask}), ((inputs(), mask), {})):
        student(inputs(), mask=mask)
        losses.append(float(rift(*arguments[0], **arguments[1]).detach()))
    assert losses == pytest.approx([0.0] * 3, abs=1e-6)
    student(inputs(), mask=mask)
    assert float(rift(inputs()).detach()) > 1e-3


@pytest.mark.parametrize("name", ["t5", "bart", "whisper"])
def test_decoders_get_their_labels(name) -> None:
    """Decoders of transformers make their inputs from labels."""
    student = getattr(tiny_models, name)()
    batch = tiny_models.speech() if name == "whisper" else tiny_models.text()
    batch["labels"] = tiny_models.labels()
    layers = "*decoder.block.1" if name == "t5" else "*decoder.layers.1"
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers=layers, pooling="mean")
    student(**batch)
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    # Padding among the labels is no token.
    assert list(rift.token_masks.values()) == ["labels != -100"]
    losses = []
    rift = rk.RIFTRegularizer(student, perturbed(teacher), layers=layers, pooling="mean")
    for padding in (0, 3):
        padded = nn.functional.pad(batch["labels"], (0, padding), value=-100)
        student(**{**batch, "labels": padded})
        losses.append(rift().detach())
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-6)
    assert float(losses[0]) > 1e-4


def test_statistics_of_a_decoder_need_its_labels() -> None:
    teacher = tiny_models.t5()
    batch = {**tiny_models.text(), "labels": tiny_models.labels()}
    settings = {"layers": "decoder.block.1", "pooling": "tokens", "progress": False}
    (statistics,) = rk.collect_teacher_statistics(teacher, [batch], **settings).values()
    assert float(statistics.count) == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("layer", ["*decoder.layers.1", "*decoder.layers.1.fc1"])
def test_a_decoders_own_mask_comes_before_labels(layer) -> None:
    student = tiny_models.bart()
    rift = rk.RIFTRegularizer(student, perturbed(student), layers=layer, pooling="mean")
    batch = {**tiny_models.text(), "labels": tiny_models.labels()}
    student(**batch)
    rift()
    assert list(rift.token_masks.values()) == ["labels != -100"]
    mask = torch.ones_like(batch["labels"])
    mask[:, 5:] = 0
    student(**batch, decoder_attention_mask=mask)
    rift()
    assert list(rift.token_masks.values()) == ["model.decoder.attention_mask"]


def test_a_teacher_without_labels() -> None:
    """The teacher may be the model inside the student's class, which computes no loss."""
    student = tiny_models.bert()
    teacher = perturbed(student).bert
    rift = rk.RIFTRegularizer(student, teacher, layers={"bert.encoder.layer.1": "encoder.layer.1"})
    student(**tiny_models.text(), labels=torch.zeros(8, dtype=torch.int64))
    assert rift().isfinite()


@pytest.mark.parametrize("is_autocast", [False, True])
def test_a_teacher_in_half_precision(is_autocast) -> None:
    student = Gated()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student).bfloat16(), layers="head")
    with torch.autocast("cpu", torch.bfloat16, enabled=is_autocast):
        student(inputs(), mask=torch.ones(12, 5, dtype=torch.bool))
    loss = rift()
    loss.backward()
    assert float(loss.detach()) < 1e-3


def test_the_teacher_runs_under_the_students_autocast() -> None:
    """Not under that of the call of rift."""
    student, rift = gated()
    dtypes: list[torch.dtype] = []
    teacher = rift._models[1]
    teacher.head.register_forward_pre_hook(lambda _, call: dtypes.append(call[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        student(inputs())
    rift()
    student(inputs())
    with torch.autocast("cpu", torch.bfloat16):
        rift()
    assert dtypes == [torch.bfloat16, torch.float32]


def test_models_that_write_into_their_batch() -> None:
    """Sentence-transformers' add their outputs to the dictionary that they get."""

    class Writer(Gated):
        def forward(self, batch: dict[str, Any]) -> dict[str, Any]:
            assert "out" not in batch, "called with what an earlier pass has written"
            batch["out"] = super().forward(batch["x"])
            return batch

    student = Writer()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head")
    batch = {"x": inputs()}
    student(batch)
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    assert batch["out"].requires_grad


def test_hooks_that_change_the_arguments() -> None:
    """A copy has them, too: they change what the user gave, once."""
    student = Gated()
    student.register_forward_pre_hook(lambda _, args: (args[0].tanh(), *args[1:]))
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head", pooling="mean")
    student(inputs())
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)


@pytest.mark.usefixtures("one_process")
def test_fsdp_that_casts_the_students_inputs() -> None:
    from torch import distributed
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    student = Gated()
    teacher = copy.deepcopy(student)
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    fully_shard(student, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    rift = rk.RIFTRegularizer(student, teacher, layers="head", pooling="mean")
    seen: list[Tensor] = []
    teacher.features.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    student(inputs())
    rift()
    assert torch.equal(seen[0], inputs())


def test_labels_reach_a_model_that_takes_any_keyword() -> None:
    class Shifted(Gated):
        def forward(self, x: Tensor, **keywords: Tensor) -> Tensor:
            return super().forward(x + keywords["labels"])

    student = Shifted()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head", pooling="mean")
    for given in ({}, {"x": inputs(), "labels": inputs(seed=3)}):
        student(inputs(), labels=inputs(seed=3))
        assert float(rift(**given).detach()) == pytest.approx(0, abs=1e-6)


class NamedBatch(NamedTuple):
    x: Tensor
    attention_mask: Tensor


@dataclasses.dataclass
class DataBatch:
    x: Tensor
    attention_mask: Tensor


class Batched(Gated):
    """A model whose batch has attributes; one that is not frozen gets the output, too."""

    def forward(self, batch: Any) -> Tensor:
        output = super().forward(batch.x)
        if isinstance(batch, DataBatch):
            batch.x = output
        return output


@pytest.mark.parametrize("kind", [NamedBatch, DataBatch])
def test_batches_with_attributes(kind) -> None:
    student = Batched()
    mask = torch.arange(5) < torch.arange(12).remainder(4)[:, None] + 1
    teacher = copy.deepcopy(student).double()
    rift = rk.RIFTRegularizer(student, teacher, layers="head", pooling="mean")
    losses = []
    for padding in (3.0, -3.0):
        x = inputs()
        student(kind(torch.where(mask[..., None], x, padding), mask))
        losses.append(float(rift().detach()))
    assert losses == pytest.approx([0, 0], abs=1e-6)
    assert rift.token_masks == {"head": "attention_mask"}
    x = inputs()
    student(kind(x, mask))
    x.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        rift()


def test_outputs_of_an_encoder_keep_their_type_in_another_dtype() -> None:
    student = tiny_models.t5()
    teacher = copy.deepcopy(student).double()
    rift = rk.RIFTRegularizer(student, teacher, layers="decoder.block.1", pooling="mean")
    with torch.no_grad():
        encoded = student.encoder(**tiny_models.text())
    mask = tiny_models.text()["attention_mask"]
    student(encoder_outputs=encoded, attention_mask=mask, labels=tiny_models.labels())
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)


def test_inputs_that_changed_are_not_used() -> None:
    class Normalised(Gated):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.sub_(x.mean()))

    student = Normalised()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head")
    x = inputs()
    student(x)
    with pytest.raises(RuntimeError, match=r"changed in place after its pass .*rift\(\.\.\.\)"):
        rift()
    assert float(rift(inputs()).detach()) == pytest.approx(0, abs=1e-6)


def test_inputs_that_are_used_up_are_not_used() -> None:
    class Stacked(Gated):
        def forward(self, rows: Any) -> Tensor:
            return super().forward(torch.stack(list(rows)))

    student = Stacked()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="head", pooling="mean")
    student(iter(inputs()))
    with pytest.raises(RuntimeError, match="must not be iterators"):
        rift()
    assert float(rift(iter(inputs())).detach()) == pytest.approx(0, abs=1e-6)


def test_a_cache_that_the_pass_filled_is_not_used() -> None:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    student = tiny_models.gpt2()
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="*h.1", pooling="last")
    batch = {"input_ids": tiny_models.text()["input_ids"]}
    is_new = "cache" in inspect.signature(student.forward).parameters
    name = "cache" if is_new else "past_key_values"
    student(**batch, **{name: transformers.DynamicCache()})
    with pytest.raises(RuntimeError, match=rf"{name} must be None .* got DynamicCache"):
        rift()
    assert float(rift(**batch).detach()) == pytest.approx(0, abs=1e-6)


def test_a_student_that_runs_in_parts() -> None:
    student, rift = gated(
        forward=lambda teacher, x, scale: teacher.head(scale * teacher.features(x))
    )
    student.head(2 * student.features(inputs()))
    with pytest.raises(RuntimeError, match="the student itself was not called, only parts of it"):
        rift()
    loss = rift(inputs(), scale=2)
    teacher = rift._models[1]
    student(inputs())
    with pytest.raises(TypeError, match="scale"):
        rift()
    expected = rk.RIFTLoss()(
        student.head(2 * student.features(inputs())).mean(1),
        teacher.head(2 * teacher.features(inputs())).mean(1).detach(),
    )
    torch.testing.assert_close(loss, expected)


def test_errors_of_the_teacher_say_so() -> None:
    student, rift = gated()
    student(inputs())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        rift(torch.randn(12, 5, 7))
    assert "This was the teacher's pass" in caught.value.__notes__[0]


# --- how far it runs


def blocks(depth: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(6, 6) for _ in range(depth)))


def calls(model: nn.Module) -> list[str]:
    """The names of the submodules in the order in which they are called from now on."""
    seen: list[str] = []
    for name, module in model.named_children():
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    return seen


def test_the_teachers_pass_ends_after_the_last_layer() -> None:
    student = blocks()
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers=["0", "2"])
    seen = calls(teacher)
    for _ in range(2):
        student(inputs()[:, 0])
        rift()
    assert seen == ["0", "1", "2", "3", "0", "1", "2"]  # the first shows that each runs once
    # Another class may call its layers in another order, or more often.
    teacher = nn.ModuleList(blocks())
    teacher.forward = lambda x: [layer(x) for layer in (*teacher, teacher[0])]
    rift = rk.RIFTRegularizer(student, teacher, layers=["0", "2"])
    seen = calls(teacher)
    for _ in range(2):
        student(inputs()[:, 0])
        rift()
    assert seen == ["0", "1", "2", "3", "0"] * 2


def test_a_teacher_that_the_user_calls_too_is_not_captured_then() -> None:
    _, rift = gated()
    for regularizer in (rift, copy.deepcopy(rift)):
        teacher = regularizer._models[1]
        outputs: list[weakref.ref[Tensor]] = []
        teacher.head.register_forward_hook(lambda _, __, x, o=outputs: o.append(weakref.ref(x)))
        teacher(inputs())
        assert outputs[0]() is None
        regularizer.student(inputs())
        assert float(regularizer().detach()) > 1e-3


def test_a_pass_that_others_wait_for_runs_to_its_end() -> None:
    student = blocks()
    for is_global in (False, True):
        teacher, stack = copy.deepcopy(student), []
        rift = rk.RIFTRegularizer(student, teacher, layers="1")
        push, pop = (lambda *_, s=stack: s.append(0)), (lambda *_, s=stack: s.clear())
        hooks = nn.modules.module if is_global else teacher
        before = "register_module_forward_pre_hook" if is_global else "register_forward_pre_hook"
        handles = [getattr(hooks, before)(push), getattr(hooks, before.replace("pre_", ""))(pop)]
        for _ in range(2):
            student(inputs()[:, 0])
            rift()
            assert not stack
        for handle in handles:
            handle.remove()
    logits: list[Tensor] = []
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(
        student, teacher, layers="1", forward=lambda model, x: logits.append(model(x))
    )
    for _ in range(2):
        student(inputs()[:, 0])
        rift()
    assert len(logits) == 2


def test_an_output_that_is_changed_in_place() -> None:
    """It is compared as it is at the end of both passes, also where it is the last one."""
    torch.manual_seed(0)
    student = nn.Sequential(nn.Linear(6, 6), nn.ReLU(inplace=True), nn.Linear(6, 6))
    rift = rk.RIFTRegularizer(student, copy.deepcopy(student), layers="0")
    for _ in range(2):
        student(inputs()[:, 0])
        assert float(rift().detach()) == pytest.approx(0, abs=1e-6)


def test_a_layer_that_runs_more_often_in_the_teacher() -> None:
    """Its latest output is compared, not that of the student's number of calls."""

    class Repeated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.times = nn.Linear(6, 6), 1

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(self.times):
                x = self.layer(x).tanh()
            return x

    torch.manual_seed(0)
    student = Repeated()
    teacher = perturbed(student)
    teacher.times = 3
    x = inputs()[:, 0]
    latest = teacher.layer(teacher.layer(teacher.layer(x).tanh()).tanh())
    expected = rk.RIFTLoss()(student.layer(x), latest.detach())
    rift = rk.RIFTRegularizer(student, teacher, layers="layer")
    for _ in range(2):
        student(x)
        torch.testing.assert_close(rift(), expected)


def test_a_layer_that_runs_several_times() -> None:
    """The latest of its outputs is compared, as it is of the student's."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.after = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, times: int = 3) -> Tensor:
            for _ in range(times):
                x = self.layer(x).tanh()
            return self.after(x)

    torch.manual_seed(0)
    student = Shared()
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers="layer")
    seen = calls(teacher)
    for times in (3, 2, 4):
        student(inputs()[:, 0], times)
        assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    assert seen == [*["layer"] * 3, "after", *["layer"] * 2, "after", *["layer"] * 4, "after"]


@pytest.mark.usefixtures("one_process")
def test_a_teacher_whose_parameters_move_runs_to_its_end() -> None:
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    student, teacher = blocks(), blocks()
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    for part in (*teacher, teacher):
        fully_shard(part, mesh=mesh)
    rift = rk.RIFTRegularizer(student, teacher, layers="0")
    seen = calls(teacher)
    for _ in range(2):
        student(inputs()[:, 0])
        assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    assert seen == ["0", "1", "2", "3"] * 2
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    teacher = accelerate.cpu_offload(blocks(), torch.device("cpu"))
    rift = rk.RIFTRegularizer(student, teacher, layers="0")
    seen = calls(teacher)
    for _ in range(2):
        student(inputs()[:, 0])
        rift()
    assert seen == ["0", "1", "2", "3"] * 2


def test_the_teacher_keeps_no_cache() -> None:
    student = tiny_models.gpt2()
    teacher = copy.deepcopy(student)
    arguments: list[Any] = []
    teacher.transformer.h[0].register_forward_pre_hook(
        lambda _, args, kwargs: arguments.append((*args, *kwargs.values())), with_kwargs=True
    )
    rift = rk.RIFTRegularizer(student, teacher, layers="*h.1", pooling="last")
    for keywords in ({}, {"use_cache": True}):
        student(**tiny_models.text(), **keywords)
        rift()
    assert len(arguments) == 2
    assert not any("Cache" in type(each).__name__ for call in arguments for each in call)


def test_sequences_packed_into_one() -> None:
    """Models of transformers tell them apart by their positions, if there is no cache."""
    student = tiny_models.gpt2()
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers="*h.1", pooling="tokens")
    ids = tiny_models.text(rows=1, tokens=12)["input_ids"]
    positions = torch.arange(12).remainder(4).unsqueeze(0)
    for keywords in ({}, {"use_cache": False}):
        student(input_ids=ids, position_ids=positions, **keywords)
        assert float(rift().detach()) == pytest.approx(0, abs=1e-6)


# --- autocast


def dtypes_of(layer: nn.Module) -> list[torch.dtype]:
    """The dtypes of the layer's outputs from now on."""
    seen: list[torch.dtype] = []
    layer.register_forward_hook(lambda _, __, output: seen.append(output.dtype))
    return seen


class Mixed(Gated):
    """A model that computes its head in float32."""

    def forward(self, x: Tensor, _: Tensor | None = None) -> Tensor:
        x = self.features(x)
        with torch.autocast("cpu", enabled=False):
            return self.head(x.float())


def test_a_layer_that_switches_autocast_off() -> None:
    student = Mixed()
    teacher = copy.deepcopy(student)
    rift = rk.RIFTRegularizer(student, teacher, layers=["features", "head"], pooling="mean")
    seen = dtypes_of(teacher.features)
    with torch.autocast("cpu", torch.bfloat16):
        student(inputs())
    assert float(rift().detach()) == pytest.approx(0, abs=1e-6)
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("way", ["the student", "in place", "around it"])
def test_autocast_of_a_compiled_student(way) -> None:
    torch.compiler.reset()
    student: Any = Gated()
    teacher = copy.deepcopy(student)
    settings = {"backend": "eager", "fullgraph": True}
    if way == "in place":
        student.compile(**settings)
    compiled = student if way == "in place" else torch.compile(student, **settings)
    captured = compiled if way == "the student" else student
    rift = rk.RIFTRegularizer(captured, teacher, layers="features", pooling="mean")
    seen = dtypes_of(teacher.features)
    for is_on in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_on):
            compiled(inputs())
        rift()
    assert seen == [torch.bfloat16, torch.float32]


# --- compiled


@pytest.mark.parametrize("compiled", ["the student", "in place", "around it"])
def test_compiled_students(compiled) -> None:
    losses = []
    for is_compiled in (False, True):
        torch.compiler.reset()
        student = tiny_models.bert()
        teacher = perturbed(student)
        run: Any = student
        if is_compiled and compiled == "the student":
            run = student = torch.compile(student, backend="aot_eager")
        if is_compiled and compiled == "in place":
            student.compile(backend="aot_eager")
        rift = rk.RIFTRegularizer(student, teacher, layers="*layer.*", pooling="mean")
        if is_compiled and compiled == "around it":
            run = torch.compile(student, backend="aot_eager")
        for tokens in (7, 7, 9):
            run(**tiny_models.text(tokens=tokens))
            loss = rift()
            loss.backward()
            losses.append(float(loss.detach()))
        assert set(rift.token_masks.values()) == {"bert.attention_mask"}
    assert losses[:3] == pytest.approx(losses[3:], rel=1e-4)
    assert min(losses) > 1e-3
