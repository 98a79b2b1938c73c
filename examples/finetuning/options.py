"""The command line that the finetuning examples share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rift_kernels as rk
from rift_kernels.features.capture import POOLINGS
from rift_kernels.losses import MEASURES

AUTO = "auto:"
# What may change between a run and its continuation. All else would make it another run.
FREE = {
    *("device", "keep", "log_every", "out", "patience", "resume", "save_every"),
    *("tensorboard", "workers"),
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """The description as written, and each option's default, but for those that are off."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def number(least: float, most: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """Of a command line: finite, from ``least`` (or above it) to ``most``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)) or (above and value == least):
            limit = f"{'above' if above else 'at least'} {least:g}"
            limit += "" if math.isinf(most) else f" and at most {most:g}"
            raise argparse.ArgumentTypeError(f"must be a number, {limit}; got {text!r}")
        return value

    return parse


def whole(least: int) -> Callable[[str], int]:
    """Of a command line: an integer of at least ``least``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {least}; got {text!r}"
            )
        return value

    return parse


def weight(text: str) -> str:
    """Of a command line: a number or auto:TARGET, as it was written."""
    if text.startswith(AUTO):
        number(0, 1, above=True)(text.removeprefix(AUTO))
        return text
    try:
        number(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (or {AUTO}0.9)") from error
    return text


def has_rift(options: argparse.Namespace) -> bool:
    """Whether there is a teacher at all."""
    return bool(options.weight.startswith(AUTO) or float(options.weight))


def rift_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What :class:`rift_kernels.RIFTRegularizer` is given by the command line."""
    strength: float | rk.AdaptiveWeight
    if options.weight.startswith(AUTO):
        target = float(options.weight.removeprefix(AUTO))
        strength = rk.AdaptiveWeight(target_similarity=target)
    else:
        strength = float(options.weight)
    settings: dict[str, Any] = {
        "measure": options.measure,
        "weight": strength,
        "pooling": options.pooling,
        # The batch of all processes is compared as one; alone, this is no group.
        "group": "world",
    }
    if options.margin:
        settings["margin"] = options.margin
    calls = options.warmup_rift * options.accumulate  # the regulariser is called in each pass
    if calls:
        settings["schedule"] = lambda step: min(1.0, step / calls)
    return settings


def resumable(options: argparse.Namespace) -> dict[str, Any]:
    """What has to be the same where a run goes on, as plain values."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in sorted(vars(options).items())
        if name not in FREE
    }


def parser_of(program: str, description: str, pooling: str) -> argparse.ArgumentParser:
    """A parser with every option that does not depend on the data."""
    parser = argparse.ArgumentParser(program, description=description, formatter_class=_Help)
    _add_model(parser.add_argument_group("what is trained"))
    _add_rift(parser.add_argument_group("RIFT"), pooling)
    _add_optimiser(parser.add_argument_group("optimisation"))
    _add_run(parser.add_argument_group("the run"))
    return parser


def _add_model(group: Any) -> None:
    add = group.add_argument
    add(
        "--lora",
        type=whole(1),
        metavar="R",
        help="train adapters of rank R and the head (needs peft) instead of everything; the "
        "student is then its own teacher, without a second copy of the weights",
    )
    add("--lora-alpha", type=number(0, above=True), metavar="A", help="default: 2 R")
    add("--lora-dropout", type=number(0, 1), default=0.05, metavar="P", help="of the adapters")
    add(
        "--lora-target",
        nargs="+",
        metavar="NAME",
        help="names of the linear layers that get adapters; default: the attention's queries and "
        "values",
    )


def _add_rift(group: Any, pooling: str) -> None:
    add = group.add_argument
    add(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="names or patterns of the layers compared, as in model.named_modules(); "
        "default: the last block",
    )
    add("--pooling", choices=POOLINGS, default=pooling, help="how a layer's tokens become rows")
    add("--measure", choices=MEASURES, default="cka", help="what is compared; see the README")
    add(
        "--weight",
        type=weight,
        default="1",
        metavar="W",
        help="of the RIFT loss beside the task's: a number, 0 for plain finetuning without a "
        "teacher, or auto:0.9 for the weight that holds the similarity at 0.9",
    )
    add(
        "--margin",
        type=number(0),
        default=0.0,
        metavar="M",
        help="no pull while 1 - similarity, or the distance, is below",
    )
    add(
        "--warmup-rift",
        type=whole(0),
        default=0,
        metavar="STEPS",
        help="the weight grows from 0 over so many steps",
    )


def _add_optimiser(group: Any) -> None:
    add = group.add_argument
    add("--epochs", type=whole(1), default=10, help="at most")
    add("--batch-size", type=whole(1), default=32, metavar="N", help="of a pass of a process")
    add("--accumulate", type=whole(1), default=1, metavar="PASSES", help=_ACCUMULATE)
    add("--lr", type=number(0, above=True), default=1e-4, help="the highest learning rate")
    add("--weight-decay", type=number(0), default=0.05, help="of AdamW, for matrices alone")
    add(
        "--warmup",
        type=number(0, 1),
        default=0.1,
        metavar="SHARE",
        help="of the steps, in which the rate grows from 0 before it falls as a cosine",
    )
    add("--clip", type=number(0), default=1.0, help="norm of the gradient at most; 0: any")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="automatic mixed precision")
    add("--patience", type=whole(0), default=0, metavar="EPOCHS", help=_PATIENCE)
    add("--seed", type=int, default=0, help="of new weights, data order, augmentation, dropout")


_ACCUMULATE = "passes a step; what an epoch has left at its end is for another"
_PATIENCE = "stop after so many epochs in which the validation accuracy did not rise; 0: never"


def _add_run(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="for everything written")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out, if any")
    add("--save-every", type=whole(0), default=0, metavar="STEPS", help=_SAVE)
    add("--keep", type=whole(1), default=2, metavar="N", help="the newest N checkpoints")
    add("--tensorboard", action="store_true", help="log to TensorBoard, too, in FOLDER/tensorboard")
    add("--log-every", type=whole(1), default=10, metavar="STEPS", help="for bar and TensorBoard")
    add("--workers", type=whole(0), default=4, metavar="N", help="processes that load data")
    add("--device", help="default: cuda where there is a GPU, else cpu")


_SAVE = "checkpoint within an epoch, too, every so many steps; 0: at the end of each epoch alone"
