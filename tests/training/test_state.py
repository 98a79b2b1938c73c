"""A regulariser as an attribute of its model: saved, averaged, copied and sent to processes."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rift_kernels as rk
from tests.support.tiny_models import perturbed


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return self.second(self.first(x))


def regularised(**settings: Any) -> Model:
    model = Model()
    settings = {"layers": "second", "pooling": "tokens", **settings}
    model.rift = rk.RIFTRegularizer(model, perturbed(model), **settings)
    return model


def step(model: Model, rows: int = 12) -> Tensor:
    x = torch.randn(rows, 5, 6, generator=torch.Generator().manual_seed(1))
    model(x, attention_mask=torch.ones(rows, 5).long())
    return model.rift()


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("is_used", [False, True])
def test_a_copy_captures_its_own_model(kind, is_used) -> None:
    model = regularised(weight=rk.AdaptiveWeight(0.9))
    if is_used:
        step(model)
        model(torch.randn(12, 5, 6))  # a pass that nobody has used
    other = COPIES[kind](model)
    assert other.rift.step == model.rift.step
    assert torch.equal(other.rift.loss.weight.value, model.rift.loss.weight.value)
    loss = step(other)
    loss.backward()
    assert torch.equal(loss, step(model))
    assert other.rift.token_masks == {"second": "attention_mask"}
    assert model.second.weight.grad is None
    assert other.second.weight.grad.abs().sum() > 0
    other.rift.remove()
    assert not other.second._forward_hooks
    assert model.second._forward_hooks


@pytest.mark.parametrize("kind", COPIES)
def test_a_copy_of_the_model_alone_captures_nothing(kind) -> None:
    model = Model()
    rift = rk.RIFTRegularizer(model, perturbed(model), layers="second", pooling="tokens")
    x = torch.randn(12, 5, 6)
    model(x)
    expected = rift().detach()
    other = COPIES[kind](model)
    model(x)
    output = other(2 * x)
    (hook,) = other.second._forward_hooks.values()
    assert hook.cells[1].output is None  # and keeps no graph alive
    assert output.requires_grad
    assert torch.equal(rift().detach(), expected)


def test_a_removed_capture_stays_removed_in_copies() -> None:
    model = regularised()
    model.rift.remove()
    other = copy.deepcopy(model)
    other(torch.randn(12, 5, 6))
    with pytest.raises(RuntimeError, match="nothing was captured"):
        other.rift()


def test_state_is_tensors() -> None:
    model = regularised(weight=rk.AdaptiveWeight(0.9), schedule=lambda step: step / 4)
    for _ in range(3):
        step(model)
    state = model.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert {name for name in state if "rift" in name} == {"rift.steps", "rift.loss.weight.value"}
    other = regularised(weight=rk.AdaptiveWeight(0.9), schedule=lambda step: step / 4)
    other.load_state_dict(state)
    assert other.rift.step == int(other.rift.steps) == 3
    assert torch.equal(step(other), step(model))
    with pytest.raises(AttributeError):
        other.rift.step = 5


def test_safetensors(tmp_path) -> None:
    safetensors = pytest.importorskip("safetensors.torch", reason="needs safetensors")
    model, other = regularised(), regularised()
    step(model)
    safetensors.save_model(model, tmp_path / "model.safetensors")
    safetensors.load_model(other, tmp_path / "model.safetensors")
    assert other.rift.step == 1


def test_a_moving_average_of_the_model() -> None:
    """As timm's ModelEmaV3 makes it, of every tensor of the state."""
    model = regularised()
    average = copy.deepcopy(model).eval()
    step(model).backward()
    with torch.no_grad():
        pairs = zip(average.state_dict().values(), model.state_dict().values(), strict=True)
        for own, theirs in pairs:
            own.lerp_(theirs, 0.5) if own.is_floating_point() else own.copy_(theirs)
    assert int(average.rift.steps) == 1
    torch.optim.swa_utils.AveragedModel(model, use_buffers=True).update_parameters(model)


def test_what_cannot_be_pickled_says_so() -> None:
    model = regularised(token_mask=lambda call: call["attention_mask"].bool())
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(model)
    assert copy.deepcopy(model) is not None


def _step_in_process(rank: int, model: Model, queue: Any) -> None:
    queue.put((rank, float(step(model).detach())))


def test_a_process_that_is_spawned() -> None:
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    model = regularised()
    torch.multiprocessing.spawn(_step_in_process, (model, queue), nprocs=1)
    assert queue.get() == (0, pytest.approx(float(step(model).detach())))


def test_the_default_dtype_changes_no_state() -> None:
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        weight = rk.AdaptiveWeight(0.999, initial=1.0, rate=1e-3)
        rotation = rk.RIFTLoss(
            "covariance", rotation="learned", student_width=4, teacher_width=4
        ).rotation
    finally:
        torch.set_default_dtype(default)
    assert {p.dtype for p in rotation.parameters()} == {torch.float32}
    for _ in range(10):
        weight(torch.tensor(0.5))
    assert weight.value.dtype == torch.float32
    assert float(weight.value) == pytest.approx(1 + 10 * 1e-3 * 0.499, rel=1e-5)
