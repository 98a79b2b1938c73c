r"""Finetune a text encoder on labelled texts, and preserve its pretrained features.

one GPU:      python -m examples.finetune_text --train train.csv --val val.csv \
                  --model bert-base-uncased --lr 3e-5 --amp bf16 --out runs/text
several GPUs: torchrun --nproc-per-node 4 -m examples.finetune_text --train train.csv \
                  --val val.csv --model bert-base-uncased --lr 3e-5 --amp bf16 --out runs/text
CPU:          python -m examples.finetune_text --train train.csv --val val.csv \
                  --model tiny-random --device cpu --epochs 3 --lr 1e-3 --out runs/tiny

The files are CSV or TSV with the columns text and label, or JSON lines with these names. --out
gets metrics.csv, the best model as transformers saves it (best), and checkpoints. With --resume, an
interrupted run continues from its last checkpoint, even within an epoch.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rift_kernels as rk

from .finetuning.logs import summary
from .finetuning.options import has_rift, make_parser, rift_settings, whole_number
from .finetuning.pretrained import add_lora, get_logits, import_optional, last_block, save_model
from .finetuning.processes import join_world, report_errors
from .finetuning.texts import Collate, HashTokenizer, Texts, Tokenizer, class_names, read_lines
from .finetuning.trainer import Data, Losses, Trainer

TINY, TINY_WORDS = "tiny-random", 512


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with report_errors(), join_world(options.device) as world:
        with report_errors(ValueError, OSError, ImportError):
            torch.manual_seed(options.seed)
            columns = options.text_column, options.label_column
            train, val = (read_lines(path, *columns) for path in (options.train, options.val))
            classes = class_names(train)
            model, tokenizer = load_model(options.model, classes)
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

            collate = Collate(tokenizer, options.max_tokens)
            data = Data(Texts(train, classes), Texts(val, classes), collate)
            save = partial(save_best, classes=classes, tokenizer=tokenizer)
            trainer = Trainer(student, rift, data, compute_losses, save, options, world)
        progress = trainer.fit()
        if world.rank == 0:
            print(summary(progress, options.out))
    return 0


def compute_losses(model: nn.Module, batch: Any, rift: rk.RIFTRegularizer | None) -> Losses:
    inputs, labels = batch
    logits = get_logits(model(**inputs))
    task = cross_entropy(logits, labels)
    # RIFT, 3 of 3: one more term. The model was called with a mask, so padding is not compared.
    total = task if rift is None else task + rift()
    return Losses(total, task, logits, labels)


def load_model(name: str, classes: Sequence[str]) -> tuple[nn.Module, Tokenizer]:
    """Load a model with a head for the classes, and its tokenizer."""
    transformers = import_optional("transformers", f"--model {name}")
    labels = {
        "id2label": dict(enumerate(classes)),
        "label2id": {label: i for i, label in enumerate(classes)},
    }
    auto = transformers.AutoModelForSequenceClassification
    if name == TINY:
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = transformers.BertConfig(
            vocab_size=TINY_WORDS,
            intermediate_size=64,
            initializer_range=0.1,  # at the usual 0.02, a model this small cannot separate words
            **sizes,
            **labels,
        )
        return auto.from_config(config), HashTokenizer(TINY_WORDS)
    # Autocast needs float32, whatever the file has. A head for other classes is replaced.
    model = auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
    return model, transformers.AutoTokenizer.from_pretrained(name)


def save_best(
    model: nn.Module, folder: Path, *, classes: Sequence[str], tokenizer: Tokenizer
) -> None:
    """Save the model so that ``--model FOLDER`` and transformers can load it."""
    save_model(model, classes, folder)
    if not isinstance(tokenizer, HashTokenizer):
        tokenizer.save_pretrained(folder)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("python -m examples.finetune_text", __doc__ or "", pooling="mean")
    group = parser.add_argument_group("texts")
    add = group.add_argument
    add("--train", type=Path, required=True, metavar="FILE", help="training texts")
    add("--val", type=Path, required=True, metavar="FILE", help="validation texts")
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="name or folder of a transformers model, or tiny-random, which needs no network and "
        "is not pretrained",
    )
    add("--text-column", default="text", metavar="NAME", help="column of the texts")
    add("--label-column", default="label", metavar="NAME", help="column of the labels")
    add("--max-tokens", type=whole_number(2), default=128, metavar="N", help="cut longer texts")
    parser.set_defaults(workers=0)  # texts in memory need no data-loading processes
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; --resume continues from the last checkpoint") from None
