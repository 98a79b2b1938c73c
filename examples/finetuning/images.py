"""Folders of images as a dataset, read with Pillow."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .processes import UserError
from .trainer import Examples

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}
CENTRE = 0.875  # side of the validation crop, relative to the image's shorter side


class Preprocessing(NamedTuple):
    """The image size and the normalisation that a pretrained model expects."""

    size: int = 16
    mean: Sequence[float] = (0.5, 0.5, 0.5)
    std: Sequence[float] = (0.5, 0.5, 0.5)


class Augmentation(NamedTuple):
    """Augmentation of training images: the least share of the area to crop to, and mirroring."""

    min_area: float
    flip: bool


class Images(Examples):
    """Images of FOLDER/CLASS/*, cropped, resized and normalised: (3, size, size), class.

    An augmented image depends only on the seed, the epoch and the index.

    Raises:
        UserError: a class folder is unknown or empty, or an image is unreadable.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        preprocessing: Preprocessing,
        seed: int,
        augmentation: Augmentation | None = None,
    ) -> None:
        self.size, self.seed, self.augmentation = preprocessing.size, seed, augmentation
        self.files: list[tuple[Path, int]] = []
        for name in subfolders(folder):
            if name not in classes:
                raise UserError(f"{folder / name}: there is no class {name!r} in train")
            paths = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
            if not paths:
                raise UserError(
                    f"{folder / name} must have images, {' '.join(sorted(SUFFIXES))}; got none"
                )
            self.files += [(path, classes.index(name)) for path in paths]
        normalisation = preprocessing.mean, preprocessing.std
        self.mean, self.std = (torch.tensor(values).view(3, 1, 1) for values in normalisation)

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.files[index]
        size = (self.size, self.size)
        draw = random.Random(f"{self.seed} {self.epoch} {index}")
        try:
            with Image.open(path) as file:
                box = crop_box(file.size, self.augmentation, draw)
                image = file.convert("RGB").resize(size, Image.Resampling.BICUBIC, box)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"cannot read the image {path}: {error}") from error
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        if self.augmentation is not None and self.augmentation.flip and draw.random() < 0.5:
            pixels = pixels.flip(2)
        return (pixels - self.mean) / self.std, label


def crop_box(
    size: tuple[int, int], augmentation: Augmentation | None, draw: random.Random
) -> tuple[float, float, float, float]:
    """The part of an image to resize: its centre, or a random part of nearly equal sides."""
    width, height = size
    if augmentation is None or augmentation.min_area == 1:
        side = min(size) * (CENTRE if augmentation is None else 1)
        left, top = (width - side) / 2, (height - side) / 2
        return left, top, left + side, top + side
    area = width * height * draw.uniform(augmentation.min_area, 1)
    ratio = math.exp(draw.uniform(math.log(3 / 4), math.log(4 / 3)))
    across, down = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draw.uniform(0, width - across), draw.uniform(0, height - down)
    # Rounding must not move the box outside the image.
    return left, top, min(width, left + across), min(height, top + down)


def class_names(folder: Path) -> list[str]:
    """The names of the classes, which are those of the folders in train."""
    for part in (folder, folder / "train", folder / "val"):
        if not part.is_dir():
            raise UserError(f"FOLDER must have train/CLASS/* and val/CLASS/*; got no folder {part}")
    classes = subfolders(folder / "train")
    if len(classes) < 2:
        raise UserError(
            f"{folder / 'train'} must have a folder for each of two or more classes; got {classes}"
        )
    return classes


def subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_dir())
