"""RIFTRegularizer, used as in a training loop."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk

ROWS, TOKENS, WIDTH = 12, 5, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.dropout = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.linear(x).tanh())


class Model(nn.Module):
    """Blocks over tokens, and a head on the first token."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 2)
        self.calls: list[tuple[bool, bool]] = []

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        self.calls.append((self.training, torch.is_grad_enabled()))
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


@pytest.fixture
def student() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def teacher(student: Model) -> Model:
    other = copy.deepcopy(student)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def inputs() -> Tensor:
    return torch.randn(ROWS, TOKENS, WIDTH, generator=torch.Generator().manual_seed(1))


def features(model: nn.Module, x: Tensor, layer: int, pooling: str = "cls") -> Tensor:
    """The features that a capture should return."""
    for block in model.blocks[: layer + 1]:
        x = block(x)
    return {"cls": x[:, 0], "mean": x.mean(1), "tokens": x.flatten(0, 1)}[pooling]


@pytest.mark.parametrize("pooling", ["cls", "mean", "tokens"])
@pytest.mark.parametrize("measure", ["cka", "procrustes", "covariance", "bures"])
def test_is_the_loss_of_the_layers(student, teacher, measure, pooling) -> None:
    student.eval()
    x = inputs()
    layers = ["blocks.0", "blocks.2"]
    rift = rk.RIFTRegularizer(
        student, teacher, layers=layers, measure=measure, weight=0.3, pooling=pooling
    )
    student(x)
    loss = rift(x)
    loss.backward()
    gradients = [p.grad.clone() for p in student.blocks.parameters()]
    student.zero_grad()
    students = [features(student, x, i, pooling) for i in (0, 2)]
    with torch.no_grad():
        teachers = [features(teacher.eval(), x, i, pooling) for i in (0, 2)]
    expected = rk.RIFTLoss(measure, weight=0.3)(students, teachers)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for gradient, parameter in zip(gradients, student.blocks.parameters(), strict=True):
        torch.testing.assert_close(gradient, parameter.grad)
    distances = rk.RIFTLoss(measure, reduction="none")(students, teachers).tolist()
    kind = "similarity" if measure in ("cka", "procrustes") else "distance"
    logged = [1 - d for d in distances] if kind == "similarity" else distances
    assert rift.metrics() == {
        "rift/weight": 0.3,
        f"rift/{kind}/blocks.0": pytest.approx(logged[0], abs=1e-6),
        f"rift/{kind}/blocks.2": pytest.approx(logged[1], abs=1e-6),
    }


def test_teacher_runs_in_eval_mode_without_gradients_and_is_left_as_it_was(student, teacher):
    teacher.blocks[1].eval()
    before = [module.training for module in teacher.modules()]
    state = torch.get_rng_state()
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.*")
    student.eval()(inputs())
    rift(inputs()).backward()
    assert teacher.calls == [(False, False)]
    assert len(student.calls) == 1
    assert [module.training for module in teacher.modules()] == before
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert torch.equal(torch.get_rng_state(), state)
    # Neither model is trained or saved with the loss.
    assert not list(rift.parameters())
    assert set(rift.state_dict()) == {"steps"}


def test_masks_and_labels(student, teacher) -> None:
    student.eval()
    x = inputs()
    attention = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    attention[:, 3:] = 0
    cut = x[:, :3]
    for pooling in ("mean", "tokens"):
        rift = rk.RIFTRegularizer(student, teacher, layers="blocks.1", pooling=pooling)
        poisoned = x.clone()
        poisoned[:, 3:] = float("nan")
        student(poisoned)
        by_attention = rift(poisoned, attention_mask=attention, labels=torch.zeros(ROWS))
        student(poisoned)
        by_mask = rift(poisoned, token_mask=attention.bool())
        student(cut)
        torch.testing.assert_close(rift(cut), by_attention)
        assert torch.equal(by_mask, by_attention)
        rift.remove()


def test_a_class_token_needs_no_mask(student, teacher) -> None:
    """It ignores masks of other shapes: longer ones with prompts, or ones with four axes."""
    student.eval()
    x = inputs()
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.1", pooling="cls")
    student(x)
    expected = rift(x)
    for shape in ((ROWS, TOKENS + 2), (ROWS, 1, TOKENS, TOKENS)):
        student(x)
        assert torch.equal(rift(x, attention_mask=torch.ones(shape)), expected)


def test_a_mask_by_position(student, teacher) -> None:
    """Models of transformers are often called as ``model(ids, attention_mask)``."""
    x = inputs()
    attention = torch.ones(ROWS, TOKENS, dtype=torch.int64)
    attention[:, 3:] = 0
    rift = rk.RIFTRegularizer(student.eval(), teacher, layers="blocks.1", pooling="mean")
    student(x, attention)
    by_position = rift(x, attention)
    student(x, attention)
    assert torch.equal(by_position, rift(x, attention_mask=attention))
    student(x)
    assert not torch.equal(by_position, rift(x))


def test_a_loss_without_gradient_warns_once(student, teacher) -> None:
    """The layers are below everything trained, or the student runs under no_grad."""
    student.blocks[:2].requires_grad_(False)
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.1")
    with torch.no_grad():
        student(inputs())
        rift(inputs())
    student(inputs())
    with pytest.warns(
        UserWarning, match=r"no gradient: no trained parameter affects 'blocks.1'"
    ) as seen:
        rift(inputs())
    assert [warning.filename for warning in seen] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        student(inputs())
        rift(inputs())


def test_layers_of_another_architecture(student) -> None:
    class Other(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.deep = nn.Sequential(nn.Linear(WIDTH, 6), nn.Tanh(), nn.Linear(6, 6))

        def forward(self, x: Tensor) -> Tensor:
            return self.deep(x)

    teacher = Other()
    pairs = {"blocks.2": "deep.2", "blocks.0": "deep.0"}
    rift = rk.RIFTRegularizer(student.eval(), teacher, layers=pairs)
    assert rift.layers == ["blocks.0", "blocks.2"]
    x = inputs()
    student(x)
    rift(x)
    assert rift.metrics()["rift/similarity/blocks.2"] == pytest.approx(
        float(rk.linear_cka(features(student, x, 2), teacher(x)[:, 0]).detach()), abs=1e-5
    )


def test_statistics_replace_the_teacher(student, teacher) -> None:
    student.eval()
    teacher.eval()
    x = inputs()
    statistics = rk.collect_teacher_statistics(teacher, [x], layers="blocks.1", progress=False)
    teacher.calls.clear()
    rift = rk.RIFTRegularizer(student, statistics, layers="blocks.1", measure="covariance")
    student(x)
    loss = rift()
    loss.backward()
    assert not teacher.calls
    expected = rk.covariance_distance(features(student, x, 1), statistics["blocks.1"])
    torch.testing.assert_close(loss, expected)


def test_schedule_counts_steps_that_train(student, teacher) -> None:
    rift = rk.RIFTRegularizer(
        student.eval(), teacher, layers="blocks.1", schedule=lambda step: step / 4
    )
    x = inputs()

    def run() -> float:
        student(x)
        return float(rift(x).detach())

    first, second = run(), run()
    assert first == 0
    assert second > 0
    with torch.no_grad():
        assert run() == pytest.approx(2 * second)
    rift.eval()
    assert run() == pytest.approx(2 * second)
    rift.train()
    fresh = rk.RIFTRegularizer(student, teacher, layers="blocks.1", schedule=lambda step: step / 4)
    fresh.load_state_dict(rift.state_dict())
    assert fresh.step == rift.step == 2


def test_adaptive_weight_is_part_of_the_state(student, teacher) -> None:
    weight = rk.AdaptiveWeight(0.99, rate=0.5)
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.1", weight=weight)
    student(inputs())
    rift(inputs())
    assert rift.metrics()["rift/weight"] == float(weight.value) > 1
    assert set(rift.state_dict()) == {"loss.weight.value", "steps"}


def test_a_learned_rotation_is_trained(student, teacher) -> None:
    rift = rk.RIFTRegularizer(
        student,
        teacher,
        layers="blocks.1",
        measure="covariance",
        rotation="learned",
        student_width=WIDTH,
        teacher_width=WIDTH,
    )
    student(inputs())
    rift(inputs()).backward()
    assert all(parameter.grad is not None for parameter in rift.parameters())
    assert list(rift.parameters())


def test_features_are_compared_once(student, teacher) -> None:
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.1")
    with pytest.raises(RuntimeError, match=r"nothing was captured of 'blocks.1'"):
        rift(inputs())
    student(inputs())
    rift(inputs())
    with pytest.raises(RuntimeError, match=r"no pass of the model since .* rift\(\), which uses"):
        rift(inputs())


@pytest.mark.parametrize("layers", ["blocks.1", "blocks.*"])
def test_another_batch_than_the_students_raises(student, teacher, layers) -> None:
    rift = rk.RIFTRegularizer(student, teacher, layers=layers)
    student(inputs())
    with pytest.raises(ValueError, match="same number of rows") as caught:
        rift(inputs()[:-1])
    assert "another batch" in caught.value.__notes__[0]
    student(inputs()[:3])
    with pytest.raises(ValueError, match=r"at least 4 rows .*drop_last=True") as caught:
        rift(inputs()[:3])
    assert not hasattr(caught.value, "__notes__")


def test_layers_of_several_dtypes(student, teacher) -> None:
    """Autocast leaves norms in float32 and products in bfloat16."""
    rift = rk.RIFTRegularizer(student.eval(), teacher, layers=["blocks.0", "blocks.1.linear"])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        student(inputs())
        loss = rift(inputs())
    loss.backward()
    assert loss.isfinite()


def test_hooks_are_removed(student, teacher) -> None:
    with rk.RIFTRegularizer(student, teacher, layers="blocks.*") as rift:
        student(inputs())
        rift(inputs())
    assert not any(module._forward_hooks for module in [*student.modules(), *teacher.modules()])
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.*")
    gc.disable()
    try:
        del rift
        assert not any(module._forward_hooks for module in student.modules())
    finally:
        gc.enable()


ERRORS = {
    "teacher must not be None for a student without adapters": (ValueError, {}),
    "teacher must not share trained parameters": (ValueError, {"teacher": "student"}),
    "teacher must be an nn.Module, None or a mapping": (TypeError, {"teacher": 3}),
    "measure must be 'covariance' for statistics; got 'cka'": (
        ValueError,
        {"teacher": {"blocks.1": rk.TeacherStatistics(WIDTH)}},
    ),
    "teacher must have statistics of every layer; got 'a', without 'blocks.1'": (
        ValueError,
        {"teacher": {"a": rk.TeacherStatistics(WIDTH)}, "measure": "covariance"},
    ),
    "reduction must be 'mean' or 'sum'": (ValueError, {"teacher": "copy", "reduction": "none"}),
    "schedule must be callable or None; got float": (
        TypeError,
        {"teacher": "copy", "schedule": 0.5},
    ),
    "'nothing' matches no module": (ValueError, {"teacher": "copy", "layers": "nothing"}),
    r"layers must map names of the student's layers, not .*; got \['blocks.\*'\]": (
        ValueError,
        {"teacher": "copy", "layers": {"blocks.*": "blocks.1"}},
    ),
    r"measure must be one of": (ValueError, {"teacher": "copy", "measure": "cosine"}),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(student, message) -> None:
    error, settings = ERRORS[message]
    settings = {"layers": "blocks.1", **settings}
    models = {"student": student, "copy": copy.deepcopy(student)}
    if isinstance(settings.get("teacher"), str):
        settings["teacher"] = models[settings["teacher"]]
    with pytest.raises(error, match=message):
        rk.RIFTRegularizer(student, **settings)
    assert not any(module._forward_hooks for module in student.modules())


def test_a_setting_of_no_class_is_named(student, teacher) -> None:
    with pytest.raises(TypeError, match=r"RIFTRegularizer has no argument 'groups'.* group"):
        rk.RIFTRegularizer(student, teacher, layers="blocks.1", groups="world")


def test_what_is_compared_is_printed(student, teacher) -> None:
    rift = rk.RIFTRegularizer(student, teacher, layers="blocks.*", pooling="mean")
    assert "layers=['blocks.0', 'blocks.1', 'blocks.2'], pooling='mean', teacher=Model" in repr(
        rift
    )


def test_student_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"student must be an nn\.Module; got str"):
        rk.RIFTRegularizer("bert", layers="blocks.1")
