"""The documents' code runs as it stands there, and their links and paths lead somewhere."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk
from tests.training import test_trainers as trainers

ROOT = Path(__file__).parents[2]
PAGES = (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*.md"))
BLOCKS = [
    text
    for page in PAGES
    for text in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
]
# Words of each block, by the test that runs it.
WORDS = {
    "loop": "for images, labels in loader",
    "regulariser": 'layers=["encoder.layer.5"',
    "adapters": "peft.get_peft_model",
    "statistics": "rk.collect_teacher_statistics",
    "masks": "token_mask={",
    "weight": "rk.AdaptiveWeight",
    "transformers": "trainer = RIFTTrainer(model=model",
    "model_init": "model_init=load",
    "trl": "trl.SFTTrainer",
    "lightning": "RIFTCallback(rift)",
    "accelerate": "accelerator.prepare",
    "losses": "teacher_features = pretrained.features(batch)",
    "layers": "list_of_student_layers",
}


def block(name: str) -> str:
    """The one block with these words."""
    (match,) = [text for text in BLOCKS if WORDS[name] in text]
    return match


def test_every_block_is_run() -> None:
    assert sorted(BLOCKS) == sorted(map(block, WORDS))


def prose(page: Path) -> str:
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_paths_resolve(page) -> None:
    text = prose(page)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|srcset)="([^"]+)"', text)
    for link in links:
        path, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    if page.parent.name == "examples":  # which names files that its commands write
        return
    folders = [ROOT, ROOT / "rift_kernels", ROOT / "csrc", ROOT / "csrc/cka_large"]
    folders += [ROOT / "rift_kernels/backends/triton", ROOT / "tests/support/emulator"]
    for path in re.findall(r"`([\w./-]+\.(?:py|cuh?|h|cpp|json|md))`", text):
        assert any((folder / path).exists() for folder in folders), path


class Encoder(nn.Module):
    """Layers by the names of the documents."""

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
    exec(block("loop"), names)
    assert set(names["rift"].metrics()) == {"rift/similarity/encoder.layer.11", "rift/weight"}
    assert names["rift"].metrics()["rift/similarity/encoder.layer.11"] < 1
    after = list(model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_regulariser_and_weight() -> None:
    model, x = Encoder(), torch.randn(12, 8)
    names: dict[str, Any] = {"copy": copy, "rk": rk, "model": model}
    exec(block("regulariser"), names)
    regularizers = [names["rift"]]
    exec(block("weight"), names)
    for rift in (*regularizers, names["rift"]):
        model(x)
        assert rift().item() == pytest.approx(0, abs=1e-5)
    assert list(regularizers[0].distances) == ["encoder.layer.5", "encoder.layer.11"]
    assert names["rift"].step == 1
    assert names["rift"].schedule(50) == 0.5


def test_masks() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.text, self.image = nn.Module(), nn.Module()
            for tower in (self.text, self.image):
                tower.blocks = nn.ModuleList([nn.Linear(4, 4)])

        def forward(self, words: Tensor, valid: Tensor, pixels: Tensor) -> Tensor:  # noqa: ARG002
            return self.text.blocks[0](words) + self.image.blocks[0](pixels)

    model = Model()
    names = {"rk": rk, "model": model, "teacher": copy.deepcopy(model)}
    exec(block("masks"), names)
    words, pixels = torch.randn(2, 8, 5, 4)
    model(words, valid=torch.ones(8, 5).long(), pixels=pixels)
    assert names["rift"]().isfinite()
    assert names["rift"].token_masks == {"text.blocks.0": "valid", "image.blocks.0": "none"}


def test_adapters(monkeypatch) -> None:
    peft = pytest.importorskip("peft", reason="needs peft")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    monkeypatch.setattr(transformers.integrations.peft, "check_peft_version", lambda **_: None)
    model = twelve_layers()
    names: dict[str, Any] = {"peft": peft, "rk": rk, "model": model}
    exec(block("adapters"), names)
    assert any("lora" in name for name, _ in names["model"].named_parameters())
    pixels = torch.randn(6, 3, 8, 8)
    names["model"](pixels)
    assert names["rift"](pixels).item() == pytest.approx(0, abs=1e-5)


def test_statistics(tmp_path, monkeypatch) -> None:
    pytest.importorskip("safetensors", reason="needs safetensors")
    pytest.importorskip("tqdm", reason="needs tqdm")
    monkeypatch.chdir(tmp_path)
    model, x = Encoder(), torch.randn(12, 8)
    names = {"rk": rk, "model": model, "teacher": copy.deepcopy(model), "loader": [x, x, x]}
    exec(block("statistics"), names)
    model(x)
    names["rift"]().backward()
    assert len(names["rift"].layers) == 12
    assert (tmp_path / "teacher.safetensors").exists()


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
    exec(block("losses"), names)
    names["loss"].backward()
    layers = [torch.randn(12, 4), torch.randn(12, 6)]
    names |= {"list_of_student_layers": layers, "list_of_teacher_layers": layers}
    exec(block("layers"), names)


def twelve_layers() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, intermediate_size=8, num_labels=3, **sizes)
    return ViTForImageClassification(config)


def test_transformers(tmp_path) -> None:
    from transformers import TrainingArguments

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    names = {
        "rk": rk,
        "copy": copy,
        "model": twelve_layers(),
        "args": args,
        "data": trainers.Images(),
    }
    exec(block("transformers"), names)
    assert names["rift"].step == 2


def test_model_init(tmp_path) -> None:
    from transformers import TrainingArguments

    from rift_kernels.integrations.transformers import RIFTTrainer

    args = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True
    )
    names = {"rk": rk, "copy": copy, "RIFTTrainer": RIFTTrainer, "load": twelve_layers}
    names |= {"args": args, "data": trainers.Images()}
    exec(block("model_init"), names)
    names["trainer"].train()
    assert names["trainer"].rift.step == 2


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(tmp_path) -> None:
    trl = pytest.importorskip("trl", reason="needs trl")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    from rift_kernels.integrations.transformers import RIFTTrainer
    from tests.support.trainers import VOCABULARY, settings, texts, tokenizer

    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=VOCABULARY, intermediate_size=8, **sizes)
    names = {"rk": rk, "copy": copy, "trl": trl, "RIFTTrainer": RIFTTrainer}
    names |= {"model": transformers.LlamaForCausalLM(config), "tokenizer": tokenizer()}
    names |= {"args": trl.SFTConfig(**settings(tmp_path))}
    names |= {"data": datasets.Dataset.from_dict({"text": texts()})}
    exec(block("trl"), names)
    names["trainer"].train()
    assert names["rift"].step == 1


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

    code = block("lightning").replace("lightning.Trainer(", "trainer(")
    exec(code, names | {"trainer": trainer})
    assert names["rift"].step == 2


def test_accelerate() -> None:
    from accelerate import Accelerator

    model = twelve_layers().train()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names: dict[str, Any] = {
        "rk": rk,
        "accelerator": Accelerator(cpu=True),
        "model": model,
        "teacher": copy.deepcopy(model),
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "loader": torch.utils.data.DataLoader(trainers.Images(), 12),
    }
    exec(block("accelerate"), names)
    assert names["rift"].step == 4
    after = list(model.parameters())
    assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
