"""Architectures that the regulariser is tried with, by kind and name."""

from __future__ import annotations

from . import multimodal, others, sound, text, vision
from .architecture import Architecture

ARCHITECTURES: dict[str, dict[str, Architecture]] = {
    "Text encoders": text.ENCODERS,
    "Text decoders": text.DECODERS,
    "Text encoders with decoders": text.ENCODER_DECODERS,
    "Images": vision.IMAGES,
    "Videos": vision.VIDEOS,
    "Sound": sound.SOUND,
    "Several modalities": multimodal.MULTIMODAL,
    "Series": sound.SERIES,
    "torch.nn": others.TORCH,
    "sentence-transformers": others.SENTENCES,
    "timm": others.TIMM,
}
