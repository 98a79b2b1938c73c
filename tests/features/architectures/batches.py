"""Random batches of six rows, with padding where a model takes masks."""

from __future__ import annotations

import torch
from torch import Tensor

from .architecture import Batch

ROWS, FIRST_TOKEN, IMAGE_TOKEN = 6, 1, 2
LENGTHS = torch.tensor([12, 11, 9, 8, 12, 6])
TARGETS = torch.tensor([7, 6, 7, 5, 6, 7])


def valid(lengths: Tensor, extra: int = 0) -> Tensor:
    """1 for valid tokens, 0 for padding."""
    return (torch.arange(int(lengths.max()) + extra) < lengths[:, None]).long()


def ids(length: int) -> Tensor:
    """Tokens of which the first is always the same, as tokenizers have it."""
    tokens = torch.randint(3, 50, (ROWS, length))
    tokens[:, 0] = FIRST_TOKEN
    return tokens


def text() -> Batch:
    return {"input_ids": ids(12), "attention_mask": valid(LENGTHS)}


def labels() -> Batch:
    return {"labels": ids(8).masked_fill(valid(TARGETS, 1) == 0, -100)}


def text_with_labels() -> Batch:
    batch = text()
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def text_to_labels() -> Batch:
    return text() | labels()


def text_to_text() -> Batch:
    return text() | {"decoder_input_ids": ids(7), "decoder_attention_mask": valid(TARGETS)}


def text_in_a_mapping() -> Batch:
    return (text(),)


def image(size: int = 32) -> Batch:
    return {"pixel_values": torch.randn(ROWS, 3, size, size)}


def image_to_labels() -> Batch:
    return image() | labels()


def image_and_text() -> Batch:
    return image() | text()


def image_in_text(tokens: int) -> Batch:
    """Text that begins with the places of an image's tokens."""
    places, words = torch.full((ROWS, tokens), IMAGE_TOKEN), text()
    return image() | {
        "input_ids": torch.cat([places, words["input_ids"]], 1),
        "attention_mask": torch.cat([places.clamp(max=1), words["attention_mask"]], 1),
    }


def video(name: str = "pixel_values") -> Batch:
    return {name: torch.randn(ROWS, 4, 3, 16, 16)}


def sound(samples: int = 32) -> Batch:
    mask = valid(samples * LENGTHS + 16)
    return {"input_values": torch.randn(mask.shape) * mask, "attention_mask": mask}


def sound_to_labels(samples: int) -> Batch:
    return sound(samples) | labels()


def frames() -> Batch:
    mask = valid(4 * LENGTHS)
    values = torch.randn(*mask.shape, 8) * mask[..., None]
    return {"input_features": values, "attention_mask": mask}


def frames_to_labels() -> Batch:
    return frames() | labels()


def features(name: str, *shape: int) -> Batch:
    return {name: torch.randn(ROWS, *shape)}


def tensor(*shape: int) -> Batch:
    return (torch.randn(ROWS, *shape),)
