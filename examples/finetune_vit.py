r"""Finetune a vision transformer on a folder of images, and preserve its pretrained features.

one GPU:      python -m examples.finetune_vit FOLDER --model google/vit-base-patch16-224-in21k \
                  --amp bf16 --out runs/vit
several GPUs: torchrun --nproc-per-node 4 -m examples.finetune_vit FOLDER \
                  --model google/vit-base-patch16-224-in21k --amp bf16 --out runs/vit
CPU:          python -m examples.finetune_vit FOLDER --model tiny-random --device cpu \
                  --epochs 3 --lr 1e-3 --out runs/tiny

FOLDER has train/CLASS/*.png and val/CLASS/*.png, or other image files. --out gets metrics.csv, the
best model as its library saves it (best), and checkpoints. With --resume, an interrupted run
continues from its last checkpoint, even within an epoch.
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

from .finetuning.images import Augmentation, Images, Preprocessing, class_names
from .finetuning.logs import summary
from .finetuning.options import has_rift, make_parser, number, rift_settings, whole_number
from .finetuning.pretrained import add_lora, get_logits, import_optional, last_block, save_model
from .finetuning.processes import join_world, report_errors
from .finetuning.trainer import Data, Losses, Trainer

TINY, TIMM = "tiny-random", "timm:"


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with report_errors(), join_world(options.device) as world:
        with report_errors(ValueError, OSError, ImportError):
            torch.manual_seed(options.seed)
            classes = class_names(options.folder)
            pretrained = not options.from_scratch
            model, preprocessing = load_model(options.model, classes, pretrained=pretrained)
            if options.image_size:
                preprocessing = preprocessing._replace(size=options.image_size)
            layers = options.layers or last_block(model)
            student = add_lora(model, options) if options.lora else model
            student = student.to(world.device)

            # RIFT, 1 of 3: the teacher is a frozen copy. Adapters need no copy, because the student
            # without them is unchanged. Plain finetuning has no teacher.
            needs_copy = has_rift(options) and not options.lora
            teacher = copy.deepcopy(student).requires_grad_(False) if needs_copy else None
            student, rift = world.wrap(student), None
            if has_rift(options):
                # RIFT, 2 of 3: the regulariser compares layers of student and teacher.
                rift = rk.RIFTRegularizer(student, teacher, layers=layers, **rift_settings(options))

            augmentation = Augmentation(options.min_crop, not options.no_flip)
            train, val = (options.folder / part for part in ("train", "val"))
            data = Data(
                Images(train, classes, preprocessing, options.seed, augmentation),
                Images(val, classes, preprocessing, options.seed),
            )
            save = partial(
                save_best, classes=classes, preprocessing=preprocessing, source=options.model
            )
            trainer = Trainer(student, rift, data, compute_losses, save, options, world)
        progress = trainer.fit()
        if world.rank == 0:
            print(summary(progress, options.out))
    return 0


def compute_losses(model: nn.Module, batch: Any, rift: rk.RIFTRegularizer | None) -> Losses:
    images, labels = batch
    logits = get_logits(model(images))
    task = cross_entropy(logits, labels)
    # RIFT, 3 of 3: one more term.
    total = task if rift is None else task + rift()
    return Losses(total, task, logits, labels)


def load_model(
    name: str, classes: Sequence[str], pretrained: bool
) -> tuple[nn.Module, Preprocessing]:
    """Load a model with a head for the classes, and the preprocessing of its images."""
    if name.startswith(TIMM):
        return _load_timm(name.removeprefix(TIMM), len(classes), pretrained)
    transformers = import_optional("transformers", f"--model {name}")
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
        return auto.from_config(config), Preprocessing()
    if not pretrained:
        config = transformers.AutoConfig.from_pretrained(name, **labels)
        return auto.from_config(config, dtype=torch.float32), read_preprocessing(name, config)
    # Autocast needs float32, whatever the file has. A head for other classes is replaced.
    model = auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
    return model, read_preprocessing(name, model.config)


def _load_timm(name: str, classes: int, pretrained: bool) -> tuple[nn.Module, Preprocessing]:
    timm = import_optional("timm", f"--model {TIMM}{name}")
    model = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    settings = timm.data.resolve_model_data_config(model)
    return model, Preprocessing(settings["input_size"][-1], settings["mean"], settings["std"])


def read_preprocessing(name: str, config: Any) -> Preprocessing:
    """Read preprocessor_config.json of a model, with defaults for what is missing."""
    module = import_optional("transformers.image_processing_base", "an image model")
    try:
        settings, _ = module.ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        settings = {}
        warnings.warn(
            f"{name} has no preprocessor_config.json: images are normalised to mean and standard "
            "deviation 0.5",
            stacklevel=2,
        )
    size = getattr(config, "image_size", None) or settings.get("size", 224)
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    if isinstance(size, list | tuple):
        size = size[0]
    default = Preprocessing()
    mean = settings.get("image_mean", default.mean)
    return Preprocessing(int(size), mean, settings.get("image_std", default.std))


def save_best(
    model: nn.Module,
    folder: Path,
    *,
    classes: Sequence[str],
    preprocessing: Preprocessing,
    source: str,
) -> None:
    """Save the model so that ``--model FOLDER`` and transformers can load it."""
    save_model(model, classes, folder)
    if source.startswith(TIMM):
        return
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": preprocessing.size, "width": preprocessing.size},
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n", "utf-8")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m examples.finetune_vit", __doc__ or "", pooling="cls")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder of the images")
    group = parser.add_argument_group("images")
    group.add_argument(
        "--model",
        required=True,
        metavar="NAME",
        help="name or folder of a transformers model, timm:NAME, or tiny-random, which needs no "
        "network and is not pretrained",
    )
    add = group.add_argument
    add("--from-scratch", action="store_true", help="the model's architecture, random weights")
    add("--image-size", type=whole_number(1), metavar="PIXELS", help="default: the model's size")
    add(
        "--min-crop",
        type=number(0, 1, above=True),
        default=0.5,
        metavar="SHARE",
        help="smallest share of the area that training images are cropped to",
    )
    add("--no-flip", action="store_true", help="do not mirror training images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; --resume continues from the last checkpoint") from None
