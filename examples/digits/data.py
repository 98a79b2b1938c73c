"""Handwritten digits as tasks: some to pretrain on, and others, transformed, to learn."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.utils import Bunch
from torch import Tensor
from torch.nn.functional import pad

OLD, NEW, SHOTS = (0, 1, 2, 3, 4, 5, 6), (7, 8, 9), 10

Images = tuple[Tensor, Tensor]  # (n, 1, 8, 8) in [0, 1], and labels
Transform = Callable[[Tensor], Tensor]


def upright(images: Tensor) -> Tensor:
    return images


def turned(images: Tensor) -> Tensor:
    """Rotate by a quarter turn, and invert."""
    return 1 - torch.rot90(images, 1, (2, 3))


def upside_down(images: Tensor) -> Tensor:
    return torch.rot90(images, 2, (2, 3))


# Learned in sequence. Each looks different, because otherwise there is nothing to forget.
TASKS: tuple[tuple[tuple[int, ...], Transform], ...] = (
    ((0, 1, 2, 3), upright),
    ((4, 5, 6), turned),
    ((7, 8, 9), upside_down),
)


class Data(NamedTuple):
    """The images of one seed, in disjoint sets."""

    pretraining: Images
    old_test: Images
    shots: Images
    new_test: Images


class Task(NamedTuple):
    """The images of one task in a sequence."""

    training: Images
    test: Images


def draw_data(seed: int, device: torch.device) -> Data:
    """Draw a seed's images. The test images are the same for every seed."""
    train, test = _split(seed)
    shots = _select(_first_shots(train, NEW), NEW, turned, device)
    new_test = _select(test, NEW, turned, device)
    pretraining, old_test = (_select(indices, OLD, upright, device) for indices in (train, test))
    return Data(pretraining, old_test, shots, new_test)


def draw_tasks(seed: int, device: torch.device) -> list[Task]:
    """Draw a sequence of tasks: all images for the first, and a few of each digit afterwards."""
    train, test = _split(seed)
    tasks: list[Task] = []
    for digits, transform in TASKS:
        shots = _first_shots(train, digits) if tasks else train
        tasks.append(Task(*(_select(part, digits, transform, device) for part in (shots, test))))
    return tasks


def _select(
    indices: np.ndarray, digits: tuple[int, ...], transform: Transform, device: torch.device
) -> Images:
    """The images of these consecutive digits among the indices, with labels from 0."""
    dataset = _dataset()
    indices = indices[np.isin(dataset.target[indices], digits)]
    images = transform(torch.tensor(dataset.images[indices], dtype=torch.float32)[:, None] / 16)
    labels = torch.tensor(dataset.target[indices] - digits[0])
    return images.contiguous().to(device), labels.to(device)


@cache
def _dataset() -> Bunch:
    return load_digits()


def _split(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of training images, in the seed's order, and of test images."""
    target = _dataset().target
    train, test = train_test_split(
        np.arange(len(target)), test_size=0.3, stratify=target, random_state=0
    )
    return np.random.default_rng(seed).permutation(train), test


def _first_shots(indices: np.ndarray, digits: tuple[int, ...]) -> np.ndarray:
    """The first ``SHOTS`` indices of each digit."""
    target = _dataset().target
    return np.concatenate([indices[target[indices] == digit][:SHOTS] for digit in digits])


def jitter(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move about half of the images by up to a pixel in each direction."""
    windows = pad(images, (1, 1, 1, 1), mode="replicate").unfold(2, 8, 1).unfold(3, 8, 1)
    shifts = torch.randint(0, 3, (2, len(images)), generator=generator)
    shifts[:, torch.rand(len(images), generator=generator) < 0.5] = 1
    row, column = shifts.to(images.device)
    return windows[torch.arange(len(images), device=images.device), :, row, column]
