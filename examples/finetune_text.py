r"""Finetune a text encoder on labelled texts, and keep what it was pretrained for.

one GPU:      python -m examples.finetune_text --train train.csv --val val.csv \
                  --model bert-base-uncased --lr 3e-5 --amp bf16 --out runs/text
several GPUs: torchrun --nproc-per-node 4 -m examples.finetune_text --train train.csv \
                  --val val.csv --model bert-base-uncased --lr 3e-5 --amp bf16 --out runs/text
CPU:          python -m examples.finetune_text --train train.csv --val val.csv \
                  --model tiny-random --device cpu --epochs 3 --lr 1e-3 --out runs/tiny

The files are CSV with the columns text and label, TSV, or JSON lines with these names. Into --out
go metrics.csv, the best model as transformers saves it (best), and checkpoints: with --resume a run
that was stopped goes on where it was, within an epoch, too.
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
from .finetuning.options import has_rift, parser_of, rift_settings, whole
from .finetuning.pretrained import last_block, logits_of, needed, save_model, with_lora
from .finetuning.processes import explained, processes
from .finetuning.texts import Collate, HashTokenizer, Texts, Tokenizer, labels_of, read
from .finetuning.trainer import Data, Losses, Trainer

TINY, TINY_WORDS = "tiny-random", 512


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with explained(), processes(options.device) as world:
        with explained(ValueError, OSError, ImportError):
            torch.manual_seed(options.seed)
            columns = options.text_column, options.label_column
            train, val = read(options.train, *columns), read(options.val, *columns)
            classes = labels_of(train)
            model, tokenizer = model_of(options.model, classes)
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

            collate = Collate(tokenizer, options.max_tokens)
            data = Data(Texts(train, classes), Texts(val, classes), collate)
            save = partial(save_best, classes=classes, tokenizer=tokenizer)
            trainer = Trainer(student, rift, data, loss_of, save, options, world)
        progress = trainer.fit()
        if world.rank == 0:
            print(summary(progress, options.out))
    return 0


def loss_of(model: nn.Module, batch: Any, rift: rk.RIFTRegularizer | None) -> Losses:
    inputs, labels = batch
    logits = logits_of(model(**inputs))
    task = cross_entropy(logits, labels)
    # RIFT, 3 of 3: one more term, called with what the model was called with. It finds the
    # attention mask there, so that padding is not compared.
    total = task if rift is None else task + rift(**inputs)
    return Losses(total, task, logits, labels)


def model_of(name: str, classes: Sequence[str]) -> tuple[nn.Module, Tokenizer]:
    """A model with a head for the classes, and its tokenizer."""
    transformers = needed("transformers", f"--model {name}")
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
            initializer_range=0.1,  # with the usual 0.02, words of so small a model are all alike
            **sizes,
            **labels,
        )
        return auto.from_config(config), HashTokenizer(TINY_WORDS)
    # In float32, which autocast wants, whatever the file has; the head is new where it must be.
    model = auto.from_pretrained(name, dtype=torch.float32, ignore_mismatched_sizes=True, **labels)
    return model, transformers.AutoTokenizer.from_pretrained(name)


def save_best(
    model: nn.Module, folder: Path, *, classes: Sequence[str], tokenizer: Tokenizer
) -> None:
    """So that ``--model FOLDER``, and transformers, can take it."""
    save_model(model, classes, folder)
    if not isinstance(tokenizer, HashTokenizer):
        tokenizer.save_pretrained(folder)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("python -m examples.finetune_text", __doc__ or "", pooling="mean")
    group = parser.add_argument_group("texts")
    add = group.add_argument
    add("--train", type=Path, required=True, metavar="FILE", help="texts to train on")
    add("--val", type=Path, required=True, metavar="FILE", help="texts to validate on")
    add(
        "--model",
        required=True,
        metavar="NAME",
        help="a name or a folder of a transformers model, or tiny-random, which needs no network "
        "and knows nothing",
    )
    add("--text-column", default="text", metavar="NAME", help="of the texts")
    add("--label-column", default="label", metavar="NAME", help="of the labels")
    add("--max-tokens", type=whole(2), default=128, metavar="N", help="longer texts are cut")
    parser.set_defaults(workers=0)  # reading lines takes no time
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nstopped; --resume goes on from the last checkpoint") from None
