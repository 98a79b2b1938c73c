"""Every architecture of the list: copies are equal, a step away has a gradient, padding is none."""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable

import pytest
import torch
from torch import nn

import rift_kernels as rk
from tests.support import tried_with

from .architectures import ARCHITECTURES
from .architectures.architecture import Architecture, Batch, Pooling, call, has_mask, padded

pytestmark = [
    pytest.mark.eager_only,
    pytest.mark.filterwarnings("error:.* have no gradient", "error:.* are the same in every row"),
    pytest.mark.filterwarnings("error:the teacher draws random numbers", "error:every token of"),
]


def selected(is_wanted: Callable[[Architecture], bool]) -> dict[str, Architecture]:
    return {
        f"{kind}-{name}": architecture
        for kind, architectures in ARCHITECTURES.items()
        for name, architecture in architectures.items()
        if is_wanted(architecture)
    }


def cases(is_wanted: Callable[[Architecture], bool] = lambda _: True) -> list:
    """Architectures with each of their poolings."""
    return [
        pytest.param(
            architecture,
            pooling,
            id=f"{name}-{pooling if isinstance(pooling, str) else pooling.__name__}",
        )
        for name, architecture in selected(is_wanted).items()
        for pooling in architecture.poolings
    ]


def started(architecture: Architecture) -> tuple[nn.Module, Batch]:
    """A model in training mode and a batch; running statistics stay as they are."""
    try:
        importlib.import_module(architecture.needs)
    except (ImportError, RuntimeError) as error:  # a torchvision of another torch raises the latter
        pytest.skip(f"needs {architecture.needs}: {error}")
    if architecture.needs == "transformers":
        pytest.importorskip("transformers", "5", reason="needs transformers 5, for its layer names")
    torch.manual_seed(0)
    model = architecture.build().train()
    with torch.no_grad():  # random weights of a library are so small that some features vanish
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, max(1, parameter[0].numel()) ** -0.5)
    for module in model.modules():
        if getattr(module, "track_running_stats", False):
            module.eval()
    return model, architecture.batch()


def regularizer(
    student: nn.Module, teacher: nn.Module, architecture: Architecture, pooling: Pooling
) -> rk.RIFTRegularizer:
    return rk.RIFTRegularizer(
        student, teacher, layers=architecture.layers, pooling=pooling, **architecture.settings
    )


def step_away(student: nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in student.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 0.3 * noise * parameter.square().mean().sqrt()


def has_gradient(module: nn.Module) -> bool:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return any(bool((gradient != 0).any()) for gradient in gradients)


@pytest.mark.parametrize(("architecture", "pooling"), cases())
def test_copies_are_equal_and_a_step_away_has_a_gradient(architecture, pooling) -> None:
    student, batch = started(architecture)
    rift = regularizer(student, copy.deepcopy(student), architecture, pooling)
    call(student, batch)
    rift()
    assert list(rift.distances) == rift.layers
    assert [float(distance) for distance in rift.distances.values()] == pytest.approx(
        [0] * len(rift.layers), abs=1e-5
    )
    step_away(student)
    called: list[nn.Module] = []
    for module in student.modules():
        if any(parameter.requires_grad for parameter in module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, _: called.append(module))
    call(student, batch)
    rift().backward()
    assert all(float(distance) > 1e-4 for distance in rift.distances.values())
    gradients = [p.grad for p in student.parameters() if p.grad is not None]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    modules = dict(student.named_modules())
    without = [name for name in rift.layers if not has_gradient(modules[name])]
    assert without == []
    assert has_gradient(called[0]), f"{type(called[0]).__name__} comes before the layers"


def check_padding(architecture: Architecture, pooling: Pooling, left: bool) -> None:
    student, batch = started(architecture)
    rift = regularizer(student, copy.deepcopy(student), architecture, pooling)
    step_away(student)
    distances = []
    for count in (0, 5):
        torch.manual_seed(1)
        call(student, padded(batch, count * architecture.stride, left))
        rift()
        distances.append([float(distance) for distance in rift.distances.values()])
    assert distances[1] == pytest.approx(distances[0], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("architecture", "pooling"), cases(lambda a: has_mask(a.batch()) and not a.reads_padding)
)
def test_padding_on_the_right_changes_nothing(architecture, pooling) -> None:
    check_padding(architecture, pooling, left=False)


@pytest.mark.parametrize(("architecture", "pooling"), cases(lambda a: a.left))
def test_padding_on_the_left_changes_nothing(architecture, pooling) -> None:
    check_padding(architecture, pooling, left=True)


@pytest.mark.parametrize("name", ARCHITECTURES["Text decoders"])
def test_the_first_token_of_a_decoder_warns(name) -> None:
    architecture = ARCHITECTURES["Text decoders"][name]
    student, batch = started(architecture)
    rift = regularizer(student, copy.deepcopy(student), architecture, "cls")
    call(student, batch)
    with pytest.warns(UserWarning, match="are the same in every row") as caught:
        rift()
    messages = " ".join(str(warning.message) for warning in caught)
    assert [name for name in rift.layers if repr(name) not in messages] == []


OTHER_AXES = selected(lambda a: all(callable(pooling) for pooling in a.poolings))


@pytest.mark.parametrize("pooling", ["cls", "mean", "tokens", "last"])
@pytest.mark.parametrize("name", OTHER_AXES)
def test_a_pooling_by_name_is_refused_where_axes_are_others(name, pooling) -> None:
    architecture = OTHER_AXES[name]
    student, batch = started(architecture)
    rift = regularizer(student, copy.deepcopy(student), architecture, pooling)
    call(student, batch)
    with pytest.raises(ValueError, match="the output of layer"):
        rift()


MADE_NUMBERS = {
    "Longformer": ARCHITECTURES["Text encoders"]["Longformer"],
    "LED": ARCHITECTURES["Text encoders with decoders"]["LED"],
}


@pytest.mark.parametrize("name", MADE_NUMBERS)
def test_a_mask_of_other_tokens_that_the_model_made_of_numbers_is_refused(name) -> None:
    """Longformer's and LED's tokens are padded to a window, and their masks are added to scores."""
    architecture = dataclasses.replace(MADE_NUMBERS[name], settings={})
    student, batch = started(architecture)
    rift = regularizer(student, copy.deepcopy(student), architecture, "mean")
    call(student, padded(batch, 1))
    with pytest.raises(TypeError, match="token_mask must be given for layers in"):
        rift()


READS_PADDING = selected(lambda a: bool(a.reads_padding))


@pytest.mark.parametrize("name", READS_PADDING)
def test_what_reads_padding_changes_without_a_regularizer(name) -> None:
    """The first row has no padding of its own, and others' padding changes it."""
    architecture = READS_PADDING[name]
    model, batch = started(architecture)
    found = []
    for count in (0, 5):
        with rk.FeatureCapture(model, architecture.layers, lambda x, _: x[0, :10]) as capture:
            call(model, padded(batch, count * architecture.stride))
            found.append(capture.features())
    assert any((found[0][layer] - found[1][layer]).abs().max() > 1e-3 for layer in found[0])


def test_the_page_has_the_list() -> None:
    """``python -m tests.support.tried_with`` writes it."""
    assert tried_with.main(["--check"]) == 0
