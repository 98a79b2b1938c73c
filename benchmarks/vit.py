"""A vision transformer of ordinary form, as a model to finetune: random weights, no download."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Size:
    """Square images and patches, in pixels, and a transformer whose MLPs are four times as wide."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1


VIT_B_16 = Size(image=224, patch=16, width=768, depth=12, heads=12, classes=1000)
SMOKE = Size(image=16, patch=4, width=16, depth=2, heads=2, classes=4)


class ViT(nn.Module):
    """Returns the states after every layer, (batch, tokens, D); the last state is normalised.

    There is no dropout, so that training and evaluation differ only in a shortcut of torch's own
    layers, which other models do not have: leave it in training mode.
    """

    def __init__(self, size: Size) -> None:
        super().__init__()
        d = size.width
        self.patches = nn.Conv2d(3, d, size.patch, stride=size.patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, d))
        self.position = nn.Parameter(0.02 * torch.randn(1, size.tokens, d))
        form: Any = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(d, size.heads, 4 * d, **form) for _ in range(size.depth)
        )
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, size.classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        patches = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(images), -1, -1), patches], dim=1)
        states = [tokens + self.position]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return [*states[1:-1], self.norm(states[-1])]

    def logits(self, states: list[Tensor]) -> Tensor:
        logits: Tensor = self.head(states[-1][:, 0])
        return logits
