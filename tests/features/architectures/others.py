"""torch.nn's own modules, a SentenceTransformer, and models of timm."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import batches
from .architecture import (
    BIDIRECTIONAL,
    CAUSAL,
    WITH_CLS,
    WITHOUT_CLS,
    Architecture,
    Batch,
    Pooling,
    build,
    channels_first,
    channels_last,
    sequence_first,
)
from .text import TEXT


def transformer(batch_first: bool) -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2)


def masked_source(batch_first: bool) -> Batch:
    source = torch.randn(batches.ROWS, 12, 16)
    if batch_first:
        return {"src": source, "src_key_padding_mask": batches.valid(batches.LENGTHS) == 0}
    return {"src": source.transpose(0, 1)}


def convolutions(convolution: type[nn.Module]) -> nn.Module:
    first, second = convolution(3, 8, 3, padding=1), convolution(8, 16, 3, padding=1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(2))


def sentence_transformer() -> nn.Module:
    """A BERT and mean pooling, from a folder as sentence-transformers wants it."""
    import transformers
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    with tempfile.TemporaryDirectory() as folder:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(str, range(45))]
        vocabulary = Path(folder, "vocab.txt")
        vocabulary.write_text("\n".join(words), encoding="utf-8")
        transformers.BertTokenizer(str(vocabulary)).save_pretrained(folder)
        build("bert", "AutoModel", TEXT).save_pretrained(folder)
        modules = [Transformer(folder), Pooling(16, "mean")]
    return SentenceTransformer(modules=modules, device="cpu")


def timm_model(name: str, **sizes: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=3, **sizes)


def own(
    model: partial[nn.Module], shape: tuple[int, ...], layers: Any, poolings: tuple[Pooling, ...]
) -> Architecture:
    return Architecture(model, partial(batches.tensor, *shape), layers, poolings, needs="torch")


def timm(name: str, layers: str, poolings: tuple[Pooling, ...], **sizes: Any) -> Architecture:
    model = partial(timm_model, name, **sizes)
    return Architecture(model, partial(batches.tensor, 3, 32, 32), layers, poolings, needs="timm")


TORCH = {
    "nn.Conv1d": own(partial(convolutions, nn.Conv1d), (3, 20), ["0", "2"], (channels_first,)),
    "nn.Conv2d": own(partial(convolutions, nn.Conv2d), (3, 8, 8), ["0", "2"], WITHOUT_CLS),
    "nn.Conv3d": own(partial(convolutions, nn.Conv3d), (3, 4, 4, 4), ["0", "2"], WITHOUT_CLS),
    "nn.GRU": own(partial(nn.GRU, 16, 8, 2, batch_first=True), (12, 16), [""], CAUSAL),
    "nn.LSTM": own(partial(nn.LSTM, 16, 8, 2, batch_first=True), (12, 16), [""], CAUSAL),
    "nn.TransformerEncoder": Architecture(
        partial(transformer, True),
        partial(masked_source, True),
        "layers.*",
        BIDIRECTIONAL,
        needs="torch",
    ),
    "nn.TransformerEncoder with the sequence first": Architecture(
        partial(transformer, False),
        partial(masked_source, False),
        "layers.*",
        (sequence_first,),
        needs="torch",
    ),
}
SENTENCES = {
    "SentenceTransformer": Architecture(
        sentence_transformer,
        batches.text_in_a_mapping,
        "0.*model.encoder.layer.*",
        BIDIRECTIONAL,
        needs="sentence_transformers",
    ),
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2}
TIMM = {
    "ConvNeXt": timm("convnext_atto", "stages.*", WITHOUT_CLS, depths=[1] * 4, dims=[8] * 4),
    "DeiT": timm("deit_tiny_distilled_patch16_224", "blocks.*", WITH_CLS, **SMALL, num_heads=2),
    "EfficientNet": timm("test_efficientnet", "blocks.*", WITHOUT_CLS),
    "ResNet": timm("test_resnet", "layer*", WITHOUT_CLS),
    "Swin": timm(
        "swin_tiny_patch4_window7_224",
        "layers.*",
        (channels_last,),
        img_size=32,
        window_size=4,
        embed_dim=8,
        depths=(1, 1),
        num_heads=(2, 2),
        drop_path_rate=0.0,
    ),
    "ViT": timm("vit_tiny_patch16_224", "blocks.*", WITH_CLS, **SMALL, num_heads=2),
}
