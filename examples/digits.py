"""The examples' tasks: handwritten digits, some to pretrain on, others, changed, to learn.

And the model: a vision transformer small enough to train in seconds on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch
from torch import Tensor, nn
from torch.nn.functional import pad

OLD, NEW, SHOTS = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9), 10
MODEL = {"width": 48, "depth": 2, "heads": 3}

Images = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [0, 1], and labels
Change = Callable[[Tensor], Tensor]


def upright(images: Tensor) -> Tensor:
    return images


def turned(images: Tensor) -> Tensor:
    """Turned by a quarter, and inverted."""
    return 1 - torch.rot90(images, 1, (2, 3))


def upside_down(images: Tensor) -> Tensor:
    return torch.rot90(images, 2, (2, 3))


# One after the other; each has a look of its own, or there would be nothing to forget.
TASKS: tuple[tuple[tuple[int, ...], Change], ...] = (
    ((0, 1, 2, 3), upright),
    ((4, 5, 6), turned),
    ((7, 8, 9), upside_down),
)


class Data(NamedTuple):
    """The images of one seed, no two sets of which overlap."""

    pretraining: Images
    old_test: Images
    shots: Images
    new_test: Images


class Task(NamedTuple):
    """The images of one of several tasks."""

    training: Images
    test: Images


def draw_data(seed: int, device: torch.device) -> Data:
    """Draw a seed's images. The test images are the same for every seed."""
    rest, test = _split(seed)
    shots = pick(_first(rest, NEW), NEW, turned, device)
    new_test = pick(test, NEW, turned, device)
    return Data(pick(rest, OLD, upright, device), pick(test, OLD, upright, device), shots, new_test)


def draw_tasks(seed: int, device: torch.device) -> list[Task]:
    """The tasks of a sequence: all images of the first's digits, and a few of each later one's."""
    rest, test = _split(seed)
    tasks: list[Task] = []
    for digits, change in TASKS:
        few = _first(rest, digits) if tasks else rest
        tasks.append(Task(*(pick(indices, digits, change, device) for indices in (few, test))))
    return tasks


def pick(
    indices: np.ndarray, kept: tuple[int, ...], change: Change, device: torch.device
) -> Images:
    """Those of the images that are of the digits ``kept``, which follow one another."""
    digits = _digits()
    indices = indices[np.isin(digits.target[indices], kept)]
    images = change(torch.tensor(digits.images[indices], dtype=torch.float32)[:, None] / 16)
    labels = torch.tensor(digits.target[indices] - kept[0])
    return images.contiguous().to(device), labels.to(device)


@cache
def _digits() -> Bunch:
    return load_digits()


def _split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, in the seed's order, and to test on."""
    target = _digits().target
    rest, test = train_test_split(
        np.arange(len(target)), test_size=0.3, stratify=target, random_state=0
    )
    return np.random.default_rng(seed).permutation(rest), test


def _first(indices: np.ndarray, digits: tuple[int, ...]) -> np.ndarray:
    """The first ``SHOTS`` of each digit."""
    target = _digits().target
    return np.concatenate([indices[target[indices] == digit][:SHOTS] for digit in digits])


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move about half of the images by up to a pixel in each direction."""
    windows = pad(images, (1, 1, 1, 1), mode="replicate").unfold(2, 8, 1).unfold(3, 8, 1)
    places = torch.randint(0, 3, (2, len(images)), generator=generator)
    places[:, torch.rand(len(images), generator=generator) < 0.5] = 1
    row, column = places.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, row, column]


class Transformer(nn.Module):
    """A vision transformer for 8 x 8 images: 16 patches, and a class token whose state is used."""

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
