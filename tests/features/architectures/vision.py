"""Image and video models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from . import batches
from .architecture import (
    WITH_CLS,
    WITHOUT_CLS,
    Architecture,
    Batch,
    Layers,
    Pooling,
    channels_last,
    pretrained,
)
from .text import BODY, SEQ2SEQ

IMAGE = BODY | {"image_size": 32, "patch_size": 8}
VIDEO = BODY | {"image_size": 16, "patch_size": 8, "num_frames": 4}
HEADS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16]}
RESNET = STAGES | {"embedding_size": 8}
CONVNEXT = STAGES | {"num_stages": 2, "patch_size": 2}
PATCHES = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1]}
WINDOWS = PATCHES | {"num_heads": [2, 2], "window_size": 4}
FOCAL = PATCHES | {"hidden_sizes": [8, 16], "focal_levels": [1, 1], "focal_windows": [3, 3]}
POOL = STAGES | {"num_encoder_blocks": 2, "strides": [2, 2], "patch_sizes": [3, 3]}
PYRAMID = POOL | {"num_attention_heads": [1, 2], "mlp_ratios": [2, 2], "sr_ratios": [2, 1]}
EFFICIENT = {
    **{"image_size": 32, "width_coefficient": 0.25, "hidden_dim": 320},
    **{"in_channels": [32, 32], "out_channels": [32, 64], "kernel_sizes": [3, 3]},
    **{"strides": [1, 2], "expand_ratios": [1, 2], "num_block_repeats": [1, 1]},
    **{"depthwise_padding": []},
}
HIERA = {
    **{"image_size": [32, 32], "patch_size": [3, 3], "patch_stride": [2, 2]},
    **{"patch_padding": [1, 1], "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]},
    **{"masked_unit_size": [4, 4], "query_stride": [2, 2], "num_query_pool": 1},
    "masked_unit_attention": [True, False],
}
PVT = {
    **{"image_size": 64, "depths": [1] * 4, "hidden_sizes": [8, 8, 16, 16]},
    **{"num_attention_heads": [1, 1, 2, 2], "mlp_ratios": [2] * 4},
}
LEVIT = {
    **{"image_size": 128, "hidden_sizes": [8, 16, 16], "num_attention_heads": [1, 2, 2]},
    **{"depths": [1] * 3, "key_dim": [8] * 3, "mlp_ratio": [2] * 3, "attention_ratio": [2] * 3},
}
MOBILE = {"hidden_sizes": [8] * 3, "neck_hidden_sizes": [8] * 7, "num_attention_heads": 2}
SAM = HEADS | {
    **{"image_size": 32, "patch_size": 8, "output_channels": 8, "window_size": 2},
    **{"global_attn_indexes": [1], "mlp_dim": 32},
}
DETR = {name: size for name, size in SEQ2SEQ.items() if name.endswith(("layers", "heads", "dim"))}
DETR |= {
    **{"d_model": 16, "num_queries": 5, "use_timm_backbone": False},
    "backbone_config": RESNET | {"model_type": "resnet", "out_features": ["stage2"]},
}
MAE = IMAGE | {
    **{"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1},
    **{"decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
}
VJEPA = HEADS | {
    **{"crop_size": 16, "patch_size": 8, "frames_per_clip": 4, "tubelet_size": 2},
    **{"pred_hidden_size": 16, "pred_num_hidden_layers": 1, "pred_num_attention_heads": 2},
}


def vision(
    model_type: str,
    layers: Layers,
    sizes: Mapping[str, Any] = IMAGE,
    poolings: tuple[Pooling, ...] = WITH_CLS,
    batch: Callable[[], Batch] = batches.image,
    **fields: Any,
) -> Architecture:
    return pretrained(model_type, sizes, batch, layers, poolings, **fields)


IMAGES = {
    "BEiT": vision("beit", "layers.*"),
    "ConvNeXt": vision("convnext", "encoder.stages.*", CONVNEXT, WITHOUT_CLS),
    "ConvNeXt V2": vision("convnextv2", "encoder.stages.*", CONVNEXT, WITHOUT_CLS),
    "Data2VecVision": vision("data2vec-vision", "encoder.layer.*"),
    "DeiT": vision("deit", "layers.*"),
    "DETR": vision("detr", ["encoder.layers.*", "decoder.layers.*"], DETR, WITHOUT_CLS),
    "DINOv2": vision("dinov2", "encoder.layer.*"),
    "DINOv2 with registers": vision("dinov2_with_registers", "encoder.layer.*"),
    "DINOv3": vision("dinov3_vit", "model.layer.*", IMAGE | {"pos_embed_rescale": None}),
    "EfficientNet": vision("efficientnet", "encoder.blocks.*", EFFICIENT, WITHOUT_CLS),
    "FocalNet": vision("focalnet", "encoder.stages.*", FOCAL, WITHOUT_CLS),
    "Hiera": vision("hiera", "encoder.stages.*", HIERA, WITHOUT_CLS),
    "I-JEPA": vision("ijepa", "layers.*", poolings=WITHOUT_CLS),
    "LeViT": vision("levit", "encoder.stages.*", LEVIT, WITHOUT_CLS, partial(batches.image, 128)),
    "MobileNetV2": vision("mobilenet_v2", "layer.1?", {"depth_multiplier": 0.25}, WITHOUT_CLS),
    "MobileViT": vision(
        "mobilevit", "encoder.layer.*", MOBILE, WITHOUT_CLS, partial(batches.image, 64)
    ),
    "PoolFormer": vision(
        "poolformer", "encoder.block.*.*", POOL | {"padding": [1, 1]}, WITHOUT_CLS
    ),
    "PVT": vision("pvt", "encoder.block.*.*", PVT, WITHOUT_CLS, partial(batches.image, 64)),
    "PVTv2": vision(
        "pvt_v2", "encoder.layers.*.blocks.*", PYRAMID | {"image_size": 32}, WITHOUT_CLS
    ),
    "RegNet": vision("regnet", "encoder.stages.*", RESNET | {"groups_width": 4}, WITHOUT_CLS),
    "ResNet": vision("resnet", "encoder.stages.*", RESNET, WITHOUT_CLS),
    "SAM": vision("sam_vision_model", "vision_encoder.layers.*", SAM, (channels_last,)),
    "SegFormer": vision(
        "segformer",
        "segformer.stages.*",
        PYRAMID | {"decoder_hidden_size": 8},
        WITHOUT_CLS,
        head="AutoModelForSemanticSegmentation",
    ),
    "Swin": vision("swin", "encoder.layers.*", WINDOWS, WITHOUT_CLS),
    "Swin V2": vision("swinv2", "encoder.layers.*", WINDOWS, WITHOUT_CLS),
    "ViT": vision("vit", "layers.*"),
    "ViTDet": vision(
        "vitdet",
        "encoder.layer.*",
        HEADS | {"image_size": 32, "pretrain_image_size": 32, "patch_size": 8},
        WITHOUT_CLS,
    ),
    "ViT-MAE": vision(
        "vit_mae",
        "vit.layers.*",
        MAE,
        head="AutoModelForPreTraining",
        settings={"replay_rng": True},
    ),
    "ViT-MSN": vision("vit_msn", "layers.*"),
    "YOLOS": vision("yolos", "encoder.layer.*", IMAGE | {"image_size": [32, 32]}),
}
VIDEOS = {
    "TimeSformer": vision("timesformer", "encoder.layer.*", VIDEO, batch=batches.video),
    "VideoMAE": vision("videomae", "encoder.layer.*", VIDEO, WITHOUT_CLS, batches.video),
    "ViViT": vision("vivit", "layers.*", VIDEO | {"tubelet_size": [2, 8, 8]}, batch=batches.video),
    "V-JEPA 2": vision(
        "vjepa2",
        "encoder.layer.*",
        VJEPA,
        WITHOUT_CLS,
        partial(batches.video, "pixel_values_videos"),
    ),
}
