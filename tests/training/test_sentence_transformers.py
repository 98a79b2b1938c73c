"""RIFT in SentenceTransformerTrainer, whose models take a mapping as their only argument."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rift_kernels as rk

transformers = pytest.importorskip("transformers", reason="needs transformers")
datasets = pytest.importorskip("datasets", reason="needs datasets")
library = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")

from sentence_transformers.sentence_transformer import losses, modules  # noqa: E402

from rift_kernels.integrations.transformers import RIFTTrainer  # noqa: E402
from tests.support.trainers import (  # noqa: E402
    ROWS,
    VOCABULARY,
    assert_adds_gradient,
    in_order,
    settings,
    texts,
    tokenizer,
)

WIDTH = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT, as on the hub."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    transformers.BertModel(config).save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def encoder(folder: Path) -> nn.Module:
    parts = [modules.Transformer(str(folder)), modules.Pooling(WIDTH)]
    return library.SentenceTransformer(modules=parts, device="cpu")


def regulariser(model: nn.Module) -> rk.RIFTRegularizer:
    teacher = encoder(Path(model[0].model.config._name_or_path))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return rk.RIFTRegularizer(model, teacher, layers="*encoder.layer.1", pooling="mean")


def data(columns: int) -> Any:
    if columns == 1:
        labels = [i % 3 for i in range(2 * ROWS)]
        return datasets.Dataset.from_dict({"sentence": texts(), "label": labels})
    return datasets.Dataset.from_dict({"anchor": texts(), "positive": texts(seed=1)})


def compare(folder: Path, out: Path, loss: Any, columns: int) -> Any:
    arguments = library.SentenceTransformerTrainingArguments(**settings(out))
    start, student, other = (encoder(folder) for _ in range(3))
    keywords = {"args": arguments, "train_dataset": data(columns)}
    base = library.SentenceTransformerTrainer
    trainer = in_order(RIFTTrainer, base)(
        model=student, loss=loss(student), rift=regulariser(student), **keywords
    )
    plain = in_order(base)(model=other, loss=loss(other), **keywords)
    assert_adds_gradient(trainer, plain, start, regulariser, passes=columns)
    return trainer


def test_one_column(folder, tmp_path) -> None:
    trainer = compare(folder, tmp_path, losses.BatchAllTripletLoss, columns=1)
    # The mask is in the mapping; the rows of padding are not compared.
    assert list(trainer.rift.token_masks.values()) == ["0.attention_mask"]


def test_the_latest_of_several_columns_is_compared(folder, tmp_path) -> None:
    with pytest.warns(UserWarning, match="latest"):
        compare(folder, tmp_path, losses.MultipleNegativesRankingLoss, columns=2)
