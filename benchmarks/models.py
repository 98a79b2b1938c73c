"""What is finetuned: a vision transformer with random weights, its batch and its optimiser."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate
from torch.utils.flop_counter import FlopCounterMode

from . import measure, schema


@dataclass(frozen=True)
class Profile:
    """A ViT on square images, its batch, seconds, and the width of the product at its peak."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    classes: int
    batch: int
    budget: float
    probe: int = 0
    autocast: bool = False

    @property
    def tokens(self) -> int:
        return (self.image // self.patch) ** 2 + 1

    def model(self, weights: list[Tensor], rank: int | None = None) -> schema.Model:
        """The description in a result file."""
        form: dict[str, Any] = dataclasses.asdict(self) | {"tokens": self.tokens, "rank": rank}
        del form["budget"], form["probe"]
        return schema.Model(**form, parameters=sum(weight.numel() for weight in weights))


VIT_B_16 = Profile(224, 16, 768, 12, 12, 1000, batch=64, budget=90, probe=8192, autocast=True)
# Without a budget: as few rounds as there may be.
SMOKE = Profile(16, 4, 16, 2, 2, 4, batch=8, budget=0, probe=64)


class ViT(nn.Module):
    """Returns the states after every layer, (batch, tokens, D); the last state is normalised.

    There is no dropout: leave it in training mode, for evaluation has a shortcut of torch's own.
    """

    def __init__(self, profile: Profile) -> None:
        super().__init__()
        d, patch = profile.width, profile.patch
        self.patches = nn.Conv2d(3, d, patch, stride=patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, d))
        self.position = nn.Parameter(0.02 * torch.randn(1, profile.tokens, d))
        form: Any = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        layers = (
            nn.TransformerEncoderLayer(d, profile.heads, 4 * d, **form)
            for _ in range(profile.depth)
        )
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(d)
        self.head = nn.Linear(d, profile.classes)

    def forward(self, images: Tensor) -> list[Tensor]:
        tokens = self.token.expand(len(images), -1, -1), self.patches(images).flatten(2).mT
        states = [torch.cat(tokens, dim=1) + self.position]
        for layer in self.layers:
            states.append(layer(states[-1]))
        return [*states[1:-1], self.norm(states[-1])]


class Finetuning:
    """A model, a batch, and AdamW, which updates copies of the trained weights.

    So every step starts from the same weights, even after a loss whose gradient is NaN.
    """

    def __init__(self, model: Any, profile: Profile, device: torch.device) -> None:
        self.model, self.profile = model, profile
        self.autocast = partial(torch.autocast, device.type, torch.bfloat16, profile.autocast)
        coarse = torch.randn(profile.batch, 3, 4, 4, device=device)
        # Patches of an image are alike, and images differ, as photographs do.
        self.images = interpolate(coarse, size=(profile.image,) * 2, mode="bilinear")
        self.labels = torch.randint(profile.classes, (profile.batch,), device=device)
        self.weights = [weight for weight in model.parameters() if weight.requires_grad]
        self.updated = [weight.detach().clone().requires_grad_() for weight in self.weights]
        self._adamw = torch.optim.AdamW(self.updated, fused=True)

    def backward(self, loss: Tensor) -> None:
        """The backward, and the optimiser's step; no gradient stays in memory."""
        loss.backward()  # type: ignore[no-untyped-call,unused-ignore]
        for weight, updated in zip(self.weights, self.updated, strict=True):
            weight.grad, updated.grad = None, weight.grad
        self._adamw.step()
        self._adamw.zero_grad()


def operations(step: measure.Timed) -> tuple[int, int]:
    """Counted operations of the products, forward, and with the backward."""
    # torch does not count those of all fused attentions.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = step.forward()
        forward = counter.get_total_flops()
        step.backward(loss)
    return forward, counter.get_total_flops()
