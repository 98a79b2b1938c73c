"""Vision models of timm with random weights."""

from __future__ import annotations

import copy

import pytest
import torch

import rift_kernels as rk

try:
    import timm
except (ImportError, RuntimeError) as error:  # torchvision of another torch raises the latter
    pytest.skip(f"needs timm, and a torchvision of this torch: {error}", allow_module_level=True)

# By model name: the last layer that all tokens pass, and its pooling.
MODELS = {
    "vit_tiny_patch16_224": ("blocks.11", "cls"),
    "deit_tiny_distilled_patch16_224": ("blocks.11", "tokens"),
    "resnet18": ("layer4", "mean"),
    "convnext_atto": ("stages.3", "mean"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_step(name) -> None:
    layer, pooling = MODELS[name]
    torch.manual_seed(0)
    student = timm.create_model(name, num_classes=3)
    teacher = copy.deepcopy(student).eval()
    rift = rk.RIFTRegularizer(student, teacher, layers=layer, pooling=pooling)
    optimiser = torch.optim.SGD(student.parameters(), 0.01)
    images = torch.randn(6, 3, 224, 224)
    for _ in range(2):
        loss = student(images).square().mean() + rift(images)
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    assert rift.metrics()[f"rift/similarity/{layer}"] < 1


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_captures_what_timm_calls_features(name) -> None:
    model = timm.create_model(name).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad(), rk.FeatureCapture(model, "norm", "tokens") as capture:
        model(images)
        assert torch.equal(capture.features()["norm"], model.forward_features(images).flatten(0, 1))


def test_lora_is_its_own_teacher() -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3)
    student = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["qkv"]))
    rift = rk.RIFTRegularizer(student.eval(), layers="blocks.11")
    images = torch.randn(6, 3, 224, 224)
    student(images)
    loss = rift(images)
    loss.backward()
    # Before the first step the adapters have no effect.
    assert float(loss.detach()) == pytest.approx(0, abs=1e-5)
