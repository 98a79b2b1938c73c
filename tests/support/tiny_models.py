"""Models of transformers from tiny configurations, with random weights and without dropout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

ROWS, VOCABULARY = 8, 50
_SIZES = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
_ENCODER_DECODER = {
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "dropout": 0.0,
    "pad_token_id": 1,
}


def perturbed(model: nn.Module, scale: float = 0.1) -> nn.Module:
    """A teacher that differs from the student, so that the loss has a gradient."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return other


def text(rows: int = ROWS, tokens: int = 7) -> dict[str, Tensor]:
    """A batch of token ids, padded on the right."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, VOCABULARY, (rows, tokens), generator=generator)
    lengths = torch.randint(2, tokens + 1, (rows, 1), generator=generator)
    mask = (torch.arange(tokens) < lengths).long()
    return {"input_ids": ids, "attention_mask": mask}


def labels(rows: int = ROWS) -> Tensor:
    """Targets of as many tokens as :func:`text` has, with padding."""
    targets = torch.randint(5, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(2))
    targets[::2, 4:] = -100
    return targets


def speech(rows: int = ROWS) -> dict[str, Tensor]:
    """Log-mel spectrograms."""
    generator = torch.Generator().manual_seed(1)
    return {"input_features": torch.randn(rows, 8, 40, generator=generator)}


def bert(**settings: Any) -> nn.Module:
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, **_SIZES, **dropout, **settings}
    return _model("BertForSequenceClassification", "BertConfig", **settings)


def bert_with_lora() -> nn.Module:
    """A BERT with adapters that have an effect, as after some steps."""
    peft = pytest.importorskip("peft", reason="needs peft")
    student = peft.get_peft_model(bert(), peft.LoraConfig(target_modules=["query", "value"]))
    for name, parameter in student.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter)
    return student


def gpt2() -> nn.Module:
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY}
    return _model("GPT2LMHeadModel", "GPT2Config", **sizes, **dropout, **ids)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    ids = {"decoder_start_token_id": 0, "vocab_size": VOCABULARY}
    return _model("T5ForConditionalGeneration", "T5Config", dropout_rate=0.0, **sizes, **ids)


def bart() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "max_position_embeddings": 20}
    return _model("BartForConditionalGeneration", "BartConfig", **_ENCODER_DECODER, **sizes)


def whisper() -> nn.Module:
    sizes = {"vocab_size": VOCABULARY, "num_mel_bins": 8}
    positions = {"max_source_positions": 20, "max_target_positions": 20}
    ids = {"bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 4}
    settings = {**_ENCODER_DECODER, **sizes, **positions, **ids}
    return _model("WhisperForConditionalGeneration", "WhisperConfig", **settings)


def wav2vec2(layerdrop: float = 0.0, depth: int = 2) -> nn.Module:
    dropout = ("hidden_dropout", "attention_dropout", "feat_proj_dropout", "activation_dropout")
    convolutions = {
        "conv_dim": (8, 8),
        "conv_kernel": (4, 4),
        "conv_stride": (2, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
    }
    settings = {"layerdrop": layerdrop, "apply_spec_augment": False, "vocab_size": 20}
    settings |= {**dict.fromkeys(dropout, 0.0), **convolutions, **_SIZES}
    return _model("Wav2Vec2ForCTC", "Wav2Vec2Config", num_hidden_layers=depth, **settings)


def audio(rows: int = ROWS, samples: int = 200) -> dict[str, Tensor]:
    """Waveforms and the mask of their samples."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(100, samples + 1, (rows, 1), generator=generator)
    mask = (torch.arange(samples) < lengths).long()
    waves = torch.randn(rows, samples, generator=generator) * mask
    return {"input_values": waves, "attention_mask": mask}


def vit_mae() -> nn.Module:
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_attention_heads": 2,
        "decoder_intermediate_size": 32,
        "decoder_num_hidden_layers": 1,
    }
    settings = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 2, **_SIZES, **decoder}
    return _model("ViTMAEForPreTraining", "ViTMAEConfig", **settings)


def clip() -> nn.Module:
    sizes = {"num_hidden_layers": 2, **_SIZES}
    ids = {"bos_token_id": 0, "eos_token_id": 4}
    return _model(
        "CLIPModel",
        "CLIPConfig",
        text_config={"vocab_size": VOCABULARY, "max_position_embeddings": 20, **ids, **sizes},
        vision_config={"image_size": 16, "patch_size": 4, **sizes},
        projection_dim=8,
    )


def images(rows: int = ROWS) -> Tensor:
    return torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(3))


def _model(model: str, config: str, **settings: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    return getattr(transformers, model)(getattr(transformers, config)(**settings))
