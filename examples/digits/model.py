"""A vision transformer small enough to train on a CPU in seconds."""

from __future__ import annotations

import torch
from torch import Tensor, nn

SIZES = {"width": 48, "depth": 2, "heads": 3}


class Transformer(nn.Module):
    """A vision transformer for 8 x 8 images: 16 patches, and a class token for the features."""

    def __init__(self, classes: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, kernel_size=2, stride=2)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.1 * torch.randn(1, 17, width))
        block = nn.TransformerEncoderLayer(
            width, heads, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        norm = nn.LayerNorm(width)
        self.blocks = nn.TransformerEncoder(block, depth, norm, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def features(self, images: Tensor) -> Tensor:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        states: Tensor = self.blocks(tokens + self.position)
        return states[:, 0]
