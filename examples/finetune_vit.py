r"""Finetune a vision transformer on a folder of images, and keep what it was pretrained for.

one GPU:      python -m examples.finetune_vit FOLDER --model google/vit-base-patch16-224-in21k \
                  --amp bf16 --out runs/vit
several GPUs: torchrun --nproc-per-node 4 -m examples.finetune_vit FOLDER \
                  --model google/vit-base-patch16-224-in21k --amp bf16 --out runs/vit
CPU:          python -m examples.finetune_vit FOLDER --model tiny-random --device cpu \
                  --epochs 3 --lr 1e-3 --out runs/tiny

FOLDER has train/CLASS/*.png and val/CLASS/*.png, or other images. Into --out go metrics.csv, the
best model as its own library saves it (best), and checkpoints: with --resume a run that was stopped
goes on where it was, within an epoch, too.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk

from .finetuning.images import Augmentation, Images, Look, class_names
from .finetuning.logs import summary
from .finetuning.options import has_rift, number, parser_of, rift_settings, whole
from .finetuning.pretrained import last_block, logits_of, needed, save_model, with_lora
from .finetuning.processes import explained, processes
from .finetuning.trainer import Data, Losses, Trainer

TINY, TIMM = "tiny-random", "timm:"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with explained(), processes(options.device) as world:
        with explained(ValueError, OSError, ImportError):
            torch.manual_seed(options.seed)
            classes = class_names(options.folder)
            model, look = model_of(options.model, classes, pretrained=not options.from_scratch)
            if options.image_size:
                look = look._replace(size=options.image_size)
            layers = options.layers or last_block(model)
            student = with_lora(model, options) if options.lora else model
            student = student.to(world.device)

            # RIFT, 1 of 3: the teacher, a frozen copy. Adapters need none: without them, the
            # student is what it was. Nor does plain finetuning.
            copied = has_rift(options) and not options.lora
            teacher = copy.deepcopy(student).requires_grad_(False) if copied else None
            student, rift = world.wrap(student), None
            if has_rift(options):
                # RIFT, 2 of 3: what is compared, and how.
                rift = rk.RIFTRegularizer(student, teacher, layers=layers, **rift_settings(options))

            seen = Augmentation(options.min_crop, not options.no_flip)
            train, val = (options.folder / part for part in ("train", "val"))
            data = Data(
                Images(train, classes, look, options.seed, seen),
                Images(val, classes, look, options.seed),
            )
            save = partial(save_best, classes=classes, look=look, source=options.model)
            trainer = Trainer(student, rift, data, loss_of, save, options, world)
        progress = trainer.fit()
        if world.rank == 0:
            print(summary(progress, options.out))
    return 0


def loss_of(model: nn.Module, batch: Any, rift: rk.RIFTRegularizer | None) -> Losses:
    images, labels = batch
    logits = logits_of(model(images))
    task = cross_entropy(logits, labels)
    # RIFT, 3 of 3: one more term, called with what the model was called with.
    total = task if rift is None else task + rift(images)
    return Losses(total, task, logits, labels)


def model_of(name: str, classes: Sequence[str], pretrained: bool) -> tuple[nn.Module, Look]:
    """A model with a head for the classes, and what its images should look like."""
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), len(classes), pretrained)
    transformers = needed("transformers", f"--model {name}")
    labels = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: i for i, label in enumerate(classes)},
    }
    auto = transformers.AutoModelForImageClassification
    if name == TINY:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.ViTConfig(
            image_size=16,
            patch_size=4,
            intermediate_size=64,
            hidden_dropout_prob=0.1,
            **sizes,
            **labels,
        )
        return auto.from_config(config), Look()
    if not pretrained:
        config = transformers.AutoConfig.from_pretrained(name, **labels)
        return auto.from_config(config, dtype=torch.float32), look_of(name, config)
    # In float32, which autocast wants, whatever the file has; the head is new where it must be.
    model = auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
    return model, look_of(name, model.config)


def _from_timm(name: str, classes: int, pretrained: bool) -> tuple[nn.Module, Look]:
    timm = needed("timm", f"--model {TIMM}{name}")
    model = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    given = timm.data.resolve_model_data_config(model)
    return model, Look(given["input_size"][-1], given["mean"], given["std"])


def look_of(name: str, config: Any) -> Look:
    """By the preprocessor_config.json beside a model; what it does not say, as usual."""
    mixin = needed("transformers.image_processing_base", "an image model").ImageProcessingMixin
    try:
        given, _ = mixin.get_image_processor_dict(name)
    except OSError:
        given = {}
        warnings.warn(
            f"{name} has no preprocessor_config.json: images are normalised to mean and standard "
            "deviation 0.5",
            stacklevel=2,
        )
    size = getattr(config, "image_size", None) or given.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        size = size[0]
    mean, std = given.get("image_mean", Look().mean), given.get("image_std", Look().std)
    return Look(int(size), mean, std)


def save_best(
    model: nn.Module, folder: Path, *, classes: Sequence[str], look: Look, source: str
) -> None:
    """So that ``--model FOLDER``, and transformers, can take it."""
    save_model(model, classes, folder)
    if source.startswith(TIMM):
        return
    size = {"height": look.size, "width": look.size}
    norm = {"image_mean": list(look.mean), "image_std": list(look.std)}
    given = {"image_processor_type": "ViTImageProcessor", "size": size, **norm}
    (folder / "preprocessor_config.json").write_text(json.dumps(given, indent=1) + "\n", "utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("python -m examples.finetune_vit", __doc__ or "", pooling="cls")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="of the images")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="a name or a folder of a transformers model, timm:NAME, or tiny-random, which needs "
        "no network and knows nothing",
    )
    add = group.add_argument
    add("--from-scratch", action="store_true", help="its architecture with random weights")
    add("--image-size", type=whole(1), metavar="PIXELS", help="default: what the model expects")
    add(
        "--min-crop",
        type=number(0, 1, above=True),
        default=0.5,
        metavar="SHARE",
        help="images to train on are cropped to so much of their area at least",
    )
    add("--no-flip", action="store_true", help="do not mirror images to train on")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; --resume goes on from the last checkpoint") from None
