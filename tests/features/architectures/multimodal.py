"""Models of transformers that read images or sound together with text."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from . import batches
from .architecture import BIDIRECTIONAL, CAUSAL, Architecture, Batch, Layers, pretrained
from .text import BODY, GROUPED, TEXT
from .vision import IMAGE

TOWERS = ["vision_model.encoder.layers.*", "text_model.encoder.layers.*"]
WORDS = TEXT | {"bos_token_id": 1, "eos_token_id": 2}
PAIR = {"text_config": WORDS, "vision_config": IMAGE}
AUDIO = {
    **{"window_size": 2, "num_mel_bins": 8, "spec_size": 32, "depths": [1, 1]},
    **{"num_attention_heads": [2, 2], "num_hidden_layers": 2, "hidden_size": 16},
    **{"patch_size": 4, "patch_stride": [4, 4], "patch_embeds_hidden_size": 8},
    "num_classes": 3,
}
OPT = TEXT | {"model_type": "opt", "word_embed_proj_dim": 16, "ffn_dim": 32}
QWEN_TEXT = TEXT | {
    "num_key_value_heads": 1,
    "rope_parameters": {
        **{"rope_type": "default", "rope_theta": 10000.0},
        "mrope_section": [2, 1, 1],
    },
}
QWEN_IMAGE = {
    **{"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    **{"patch_size": 8, "mlp_ratio": 2},
}
LAYOUT = {
    **{"input_size": 32, "patch_size": 8, "coordinate_size": 3, "shape_size": 2},
    "max_2d_position_embeddings": 64,
}
VISION_START, VIDEO_TOKEN = 1, 49


def pair(
    model_type: str,
    layers: Layers = TOWERS,
    poolings: tuple[str, ...] = BIDIRECTIONAL,
    **sizes: Any,
) -> Architecture:
    """Two encoders, of which only the one of text has a mask."""
    return pretrained(model_type, PAIR | sizes, batches.image_and_text, layers, poolings)


def sound_and_text() -> Batch:
    sound = batches.features("input_features", 1, 128, 8)
    return batches.text() | sound | {"is_longer": torch.zeros(batches.ROWS, 1, dtype=torch.bool)}


def patches_in_text() -> Batch:
    """As Qwen2-VL wants them: the patches of all images in one tensor, without an axis of rows."""
    batch = batches.image_in_text(4)
    start = torch.full((batches.ROWS, 1), VISION_START)
    tokens = torch.cat([start, batch["input_ids"]], 1)
    return {
        "input_ids": tokens,
        "attention_mask": torch.cat([torch.ones_like(start), batch["attention_mask"]], 1),
        "mm_token_type_ids": (tokens == batches.IMAGE_TOKEN).long(),
        "pixel_values": torch.randn(batches.ROWS * 16, 3 * 2 * 8 * 8),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * batches.ROWS),
    }


def typed_image_in_text(image_type: int) -> Batch:
    """With a type of 0 or 1 for the image's tokens, and the other for the text's."""
    batch = batches.image_in_text(16)
    is_image = batch["input_ids"] == batches.IMAGE_TOKEN
    return batch | {"token_type_ids": (is_image == bool(image_type)).long()}


def images_in_text() -> Batch:
    batch = batches.image_in_text(4)
    return batch | {"pixel_values": batch["pixel_values"].unsqueeze(1)}


def regions_and_text() -> Batch:
    regions = batches.features("visual_embeds", 5, 8)
    ones = torch.ones(batches.ROWS, 5, dtype=torch.long)
    regions |= {"visual_attention_mask": ones, "visual_token_type_ids": ones}
    return batches.text() | regions


def with_regions(call: Mapping[str, Any]) -> Tensor:
    return torch.cat([call["attention_mask"], call["visual_attention_mask"]], 1).bool()


def image_first(call: Mapping[str, Any]) -> Tensor:
    """The mask of an image's 17 tokens and then the text's."""
    return nn.functional.pad(call["attention_mask"].bool(), (17, 0), value=True)


def image_last(call: Mapping[str, Any]) -> Tensor:
    return nn.functional.pad(call["attention_mask"].bool(), (0, 17), value=True)


def image_in_page() -> Batch:
    return batches.image() | page()


def patches_and_text() -> Batch:
    """Images of different sizes, so that patches, too, have padding."""
    sizes = torch.tensor([[4, 4], [3, 4], [4, 4], [2, 4], [4, 4], [3, 4]])
    return batches.text() | {
        "pixel_values": torch.randn(batches.ROWS, 16, 3 * 8 * 8),
        "pixel_attention_mask": batches.valid(sizes.prod(1)),
        "spatial_shapes": sizes,
    }


def page() -> Batch:
    return batches.text() | {"bbox": torch.zeros(batches.ROWS, 12, 4, dtype=torch.long)}


MULTIMODAL = {
    "BLIP": pair("blip", [TOWERS[0], "text_model.encoder.layer.*"], projection_dim=16),
    "BLIP for captions": pretrained(
        "blip",
        PAIR | {"text_config": WORDS | {"encoder_hidden_size": 16}},
        batches.image_and_text,
        [TOWERS[0], "text_decoder.bert.encoder.layer.*"],
        CAUSAL,
        "BlipForConditionalGeneration",
    ),
    "BLIP-2": pretrained(
        "blip-2",
        {
            "qformer_config": TEXT | {"encoder_hidden_size": 16},
            "text_config": OPT,
            "vision_config": IMAGE,
            "num_query_tokens": 16,
            "image_token_index": batches.IMAGE_TOKEN,
        },
        partial(batches.image_in_text, 16),
        [TOWERS[0], "qformer.encoder.layer.*", "language_model.model.decoder.layers.*"],
        CAUSAL,
        settings={"token_mask": {"qformer.*": None}},
    ),
    "Chinese-CLIP": pair(
        "chinese_clip",
        [TOWERS[0], "text_model.encoder.layer.*"],
        text_config=TEXT,
        projection_dim=16,
    ),
    "CLAP": pretrained(
        "clap",
        {"text_config": WORDS, "audio_config": AUDIO, "projection_dim": 16},
        sound_and_text,
        ["audio_model.audio_encoder.layers.*", "text_model.encoder.layer.*"],
        CAUSAL,
    ),
    "CLIP": pair("clip", poolings=CAUSAL, projection_dim=16),
    "FLAVA": pretrained(
        "flava",
        {
            "text_config": TEXT,
            "image_config": IMAGE,
            "multimodal_config": BODY,
            "image_codebook_config": {},
            "hidden_size": 16,
            "projection_dim": 16,
        },
        batches.image_and_text,
        ["image_model.encoder.layer.*", "text_model.encoder.layer.*"],
        BIDIRECTIONAL,
        settings={"token_mask": {"image_model.*": None}},
    ),
    "Gemma 3 with images": pretrained(
        "gemma3",
        {
            "text_config": TEXT | GROUPED,
            "vision_config": IMAGE,
            "mm_tokens_per_image": 16,
            "image_token_id": batches.IMAGE_TOKEN,
        },
        partial(typed_image_in_text, 1),
        ["model.vision_tower.encoder.layers.*", "model.language_model.layers.*"],
        CAUSAL,
        "AutoModelForImageTextToText",
    ),
    "GIT": pretrained(
        "git",
        TEXT | {"vision_config": IMAGE},
        batches.image_and_text,
        ["git.image_encoder.vision_model.encoder.layers.*", "git.encoder.layer.*"],
        CAUSAL,
        "AutoModelForCausalLM",
        settings={"token_mask": {"git.encoder.*": image_first}},
    ),
    "Idefics3": pretrained(
        "idefics3",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": IMAGE,
            "scale_factor": 2,
            "image_token_id": batches.IMAGE_TOKEN,
        },
        images_in_text,
        "model.text_model.layers.*",
        CAUSAL,
        "AutoModelForImageTextToText",
    ),
    "LayoutLM": pretrained("layoutlm", TEXT, page, "encoder.layer.*", BIDIRECTIONAL),
    "LayoutLMv3": pretrained(
        "layoutlmv3",
        TEXT | LAYOUT,
        image_in_page,
        "encoder.layer.*",
        BIDIRECTIONAL,
        settings={"token_mask": image_last},
    ),
    "LLaVA": pretrained(
        "llava",
        {
            "text_config": TEXT | {"model_type": "llama"},
            "vision_config": IMAGE | {"model_type": "clip_vision_model"},
            "image_token_index": batches.IMAGE_TOKEN,
            "vision_feature_layer": -1,
        },
        partial(batches.image_in_text, 16),
        ["model.vision_tower.encoder.layers.*", "model.language_model.layers.*"],
        CAUSAL,
        "AutoModelForImageTextToText",
    ),
    "PaliGemma": pretrained(
        "paligemma",
        {
            "text_config": TEXT | GROUPED | {"model_type": "gemma"},
            "projection_dim": 16,
            "vision_config": IMAGE | {"model_type": "siglip_vision_model"},
            "image_token_id": batches.IMAGE_TOKEN,
        },
        partial(typed_image_in_text, 0),
        ["model.vision_tower.encoder.layers.*", "model.language_model.layers.*"],
        CAUSAL,
        "AutoModelForImageTextToText",
    ),
    "Qwen2-VL": pretrained(
        "qwen2_vl",
        {
            "text_config": QWEN_TEXT,
            "vision_config": QWEN_IMAGE,
            "video_token_id": VIDEO_TOKEN,
            "image_token_id": batches.IMAGE_TOKEN,
            "vision_start_token_id": VISION_START,
        },
        patches_in_text,
        "model.language_model.layers.*",
        CAUSAL,
        "AutoModelForImageTextToText",
    ),
    "SigLIP": pair("siglip"),
    "SigLIP 2": pretrained(
        "siglip2",
        {"text_config": WORDS, "vision_config": BODY | {"patch_size": 8, "num_patches": 16}},
        patches_and_text,
        TOWERS,
        BIDIRECTIONAL,
        settings={"token_mask": {TOWERS[0]: "pixel_attention_mask"}},
    ),
    "VisionEncoderDecoder (TrOCR and Donut)": pretrained(
        "vision-encoder-decoder",
        {
            "encoder": IMAGE | {"model_type": "vit"},
            "decoder": TEXT
            | {"model_type": "gpt2", "is_decoder": True, "add_cross_attention": True},
            "decoder_start_token_id": 1,
            "pad_token_id": 0,
        },
        batches.image_to_labels,
        ["encoder.layers.*", "decoder.transformer.h.*"],
        CAUSAL,
        "VisionEncoderDecoderModel",
    ),
    "ViLT": pretrained(
        "vilt",
        TEXT | IMAGE,
        batches.image_and_text,
        "encoder.layer.*",
        BIDIRECTIONAL,
        settings={"token_mask": image_last, "replay_rng": True},
    ),
    "VisionTextDualEncoder": pretrained(
        "vision-text-dual-encoder",
        {
            "vision_config": IMAGE | {"model_type": "vit"},
            "projection_dim": 16,
            "text_config": TEXT | {"model_type": "bert"},
        },
        batches.image_and_text,
        ["vision_model.layers.*", "text_model.encoder.layer.*"],
        BIDIRECTIONAL,
        "VisionTextDualEncoderModel",
        settings={"token_mask": {"vision_model.*": None}},
    ),
    "VisualBERT": pretrained(
        "visual_bert",
        TEXT | {"visual_embedding_dim": 8},
        regions_and_text,
        "encoder.layer.*",
        BIDIRECTIONAL,
        settings={"token_mask": with_regions},
    ),
}
