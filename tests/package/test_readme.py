"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk
from tests.training import test_trainers as trainers

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def block(words: str) -> str:
    """The one block with these words."""
    (found,) = [text for text in BLOCKS if words in text]
    return found


class Encoder(nn.Module):
    """Layers by the names of the README."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.layer = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.head = nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        for layer in self.encoder.layer:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_training_loop() -> None:
    model = Encoder()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names: dict[str, Any] = {
        "model": model,
        "loader": [(torch.randn(12, 8), torch.arange(12) % 2) for _ in range(3)],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "cross_entropy": cross_entropy,
    }
    exec(block("for images, labels in loader"), names)
    assert set(names["rift"].metrics()) == {"rift/similarity/encoder.layer.11", "rift/weight"}
    assert names["rift"].metrics()["rift/similarity/encoder.layer.11"] < 1
    after = list(model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_losses() -> None:
    model, pretrained = Encoder(), Encoder()
    batch = torch.randn(12, 8)
    names = {
        "rk": rk,
        "torch": torch,
        "cross_entropy": cross_entropy,
        "model": model,
        "pretrained": pretrained,
        "batch": batch,
        "features": model.features(batch),
        "labels": torch.arange(12) % 2,
    }
    exec(block("teacher_features = pretrained.features(batch)"), names)
    names["loss"].backward()
    layers = [torch.randn(12, 4), torch.randn(12, 6)]
    names |= {"list_of_student_layers": layers, "list_of_teacher_layers": layers}
    exec(block("list_of_student_layers"), names)


def test_transformers(tmp_path) -> None:
    import copy

    from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, intermediate_size=8, num_labels=3, **sizes)
    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    names = {
        "rk": rk,
        "copy": copy,
        "model": ViTForImageClassification(config),
        "args": args,
        "data": trainers.Images(),
    }
    exec(block("RIFTTrainer(model=model"), names)
    assert names["rift"].step == 2


def test_lightning(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = trainers.Module()
    lightning = pytest.importorskip("lightning", reason="needs lightning")
    names = {
        "lightning": lightning,
        "rift": trainers.regulariser(module.model),
        "module": module,
        "loader": torch.utils.data.DataLoader(trainers.Images(), 12),
    }
    quiet = {"max_steps": 2, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}

    def trainer(**given: Any) -> Any:
        return trainers.lightning.Trainer(**given, **quiet, enable_progress_bar=False)

    code = block("RIFTCallback(rift)").replace("lightning.Trainer(", "trainer(")
    exec(code, names | {"trainer": trainer})
    assert names["rift"].step == 2
