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
    "regulariser": 'layers=["vit.layers.5"',
    "adapters": "peft.get_peft_model",
    "statistics": "rk.collect_teacher_statistics",
    "masks": "token_mask={",
    "first step": "print(rift.token_masks)",
    "weight": "margin=0.1",
    "checkpoint": "torch.save",
    "transformers": "trainer = RIFTTrainer(model=model",
    "model_init": "model_init=load",
    "trl": "trl.SFTTrainer",
    "peft_config": "peft_config=",
    "sentences": "sentence_embedding",
    "lightning": "RIFTCallback(rift)",
    "accelerate": "accelerator.prepare",
    "losses": "teacher_features = pretrained.features(batch)",
    "similarities": "similarities = rk.linear_cka",
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
        self.vit = nn.Module()
        self.vit.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(12))
        self.head = nn.Linear(8, 2)

    def features(self, x: Tensor) -> Tensor:
        for layer in self.vit.layers:
            x = x + layer(x).tanh()
        return x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def test_training_loop() -> None:
    model = twelve_layers()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    names: dict[str, Any] = {
        "model": model,
        "loader": [(torch.randn(12, 3, 8, 8), torch.arange(12) % 2) for _ in range(3)],
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
        "cross_entropy": cross_entropy,
    }
    exec(block("loop"), names)
    assert set(names["rift"].metrics()) == {"rift/similarity/vit.layers.11", "rift/weight"}
    assert names["rift"].metrics()["rift/similarity/vit.layers.11"] < 1
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
    assert list(regularizers[0].distances) == ["vit.layers.5", "vit.layers.11"]
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
    names: dict[str, Any] = {"peft": peft, "rk": rk, "model": causal_lm()}
    exec(block("adapters"), names)
    assert any("lora" in name for name, _ in names["model"].named_parameters())
    names["model"](torch.randint(VOCABULARY, (6, 5)))
    assert names["rift"]().item() == pytest.approx(0, abs=1e-5)


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


def test_similarities() -> None:
    names: dict[str, Any] = {"rk": rk, "torch": torch, "batch": tokens()}
    names["model"] = names["pretrained"] = small("Bert", "Model").eval()
    exec(block("similarities"), names)
    torch.testing.assert_close(names["similarities"], torch.ones(12))
    names["pretrained"] = small("Bert", "Model").eval()
    exec(block("similarities"), names)
    similarities = names["similarities"]
    assert similarities.max() < 0.999
    names["batch"]["input_ids"] += 1 - names["batch"]["attention_mask"]  # other padding
    exec(block("similarities"), names)
    torch.testing.assert_close(names["similarities"], similarities)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_first_step(dropout, capsys) -> None:
    """The similarity of copies is 1, unless dropout lowers it, as the page says."""
    model = small(
        "Bert",
        "ForSequenceClassification",
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=3,
    ).train()
    rift = rk.RIFTRegularizer(model, copy.deepcopy(model), layers="*layer.11", pooling="mean")
    batch = tokens() | {"labels": torch.arange(8) % 3}
    exec(block("first step"), {"model": model, "rift": rift, "batch": batch})
    assert "'bert.encoder.layer.11': 'bert.attention_mask'" in capsys.readouterr().out
    similarity = rift.metrics()["rift/similarity/bert.encoder.layer.11"]
    assert similarity < 0.95 if dropout else similarity == pytest.approx(1, abs=1e-5)


def test_checkpoint(tmp_path, monkeypatch) -> None:
    """The script that resumes takes the step that the other takes next."""
    monkeypatch.chdir(tmp_path)
    pretrained = Encoder()
    model = copy.deepcopy(pretrained)
    names: dict[str, Any] = {"copy": copy, "rk": rk, "torch": torch, "model": model}
    names["load_pretrained"] = lambda: copy.deepcopy(pretrained)
    names["optimizer"] = torch.optim.AdamW(model.parameters())
    names["rift"] = rk.RIFTRegularizer(
        model, pretrained, layers="vit.layers.11", weight=rk.AdaptiveWeight(0.9)
    )
    x = torch.randn(12, 8)

    def step(names: dict[str, Any]) -> float:
        loss = names["model"](x).square().mean() + names["rift"]()
        names["optimizer"].zero_grad()
        loss.backward()
        names["optimizer"].step()
        return loss.item()

    for _ in range(3):
        step(names)
    before = dict(names)
    exec(block("checkpoint"), names)
    assert names["model"] is not model
    assert names["rift"].step == 3
    assert [step(names), step(names)] == [step(before), step(before)]


VOCABULARY = 32


def small(family: str, head: str, **more: Any) -> nn.Module:
    """A model of transformers with twelve layers."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 12, "num_attention_heads": 2}
    config = getattr(transformers, f"{family}Config")(intermediate_size=8, **sizes, **more)
    return getattr(transformers, f"{family}{head}")(config)


def twelve_layers() -> nn.Module:
    return small("ViT", "ForImageClassification", image_size=8, patch_size=4, num_labels=3)


def causal_lm() -> nn.Module:
    return small("Llama", "ForCausalLM", vocab_size=VOCABULARY)


def tokens() -> dict[str, Tensor]:
    """Eight texts, of which some are padded."""
    mask = torch.ones(8, 5).long()
    mask[3:, 4:] = 0
    return {"input_ids": torch.randint(VOCABULARY, (8, 5)) * mask, "attention_mask": mask}


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
    peft = pytest.importorskip("peft", reason="needs peft")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    from rift_kernels.integrations.transformers import RIFTTrainer
    from tests.support.trainers import settings, texts, tokenizer

    names: dict[str, Any] = {"rk": rk, "copy": copy, "trl": trl, "peft": peft}
    names |= {"RIFTTrainer": RIFTTrainer, "model": causal_lm(), "tokenizer": tokenizer()}
    names |= {"args": trl.SFTConfig(**settings(tmp_path))}
    names |= {"data": datasets.Dataset.from_dict({"text": texts()})}
    exec(block("trl"), names)
    names["trainer"].train()
    assert names["rift"].step == 1
    exec(block("peft_config"), names | {"model": causal_lm()}, names)
    names["trainer"].train()
    assert names["trainer"].rift.step == 1
    assert isinstance(names["trainer"].rift.student, peft.PeftModel)


def test_sentences(tmp_path) -> None:
    library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    from tests.support.trainers import texts, tokenizer

    small(
        "Bert", "Model", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
    ).save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    modules = library.sentence_transformer.modules
    parts = [modules.Transformer(str(tmp_path)), modules.Pooling(8)]
    names: dict[str, Any] = {"rk": rk, "copy": copy, "objective": cross_entropy}
    names["model"] = library.SentenceTransformer(modules=parts, device="cpu").train()
    names["loader"] = [(texts(8), torch.arange(8))]
    exec(block("sentences"), names)
    assert names["rift"].metrics()["rift/similarity/1"] == pytest.approx(1, abs=1e-5)
    names["loss"].backward()
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
