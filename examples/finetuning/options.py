"""The command line that the finetuning examples share."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rift_kernels as rk
from rift_kernels.features.pooling import POOLINGS
from rift_kernels.losses import MEASURES

AUTO = "auto:"
# Options that may change when a run resumes; changing any other would make it a different run.
CHANGEABLE = {
    *("device", "keep", "log_every", "out", "patience", "resume", "save_every"),
    *("tensorboard", "workers"),
}


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the description's line breaks, and show each default unless it is None or False."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def number(low: float, high: float = math.inf, above: bool = False) -> Callable[[str], float]:
    """A parser of finite numbers from ``low`` (exclusive if ``above``) to ``high``."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high and math.isfinite(value)) or (above and value == low):
            limit = f"{'above' if above else 'at least'} {low:g}"
            limit += "" if math.isinf(high) else f" and at most {high:g}"
            raise argparse.ArgumentTypeError(f"must be a number, {limit}; got {text!r}")
        return value

    return parse


def whole_number(low: int) -> Callable[[str], int]:
    """A parser of integers that are at least ``low``."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(
                f"must be a whole number, at least {low}; got {text!r}"
            )
        return value

    return parse


def check_weight(text: str) -> str:
    """Validate a number or auto:TARGET, and return the text unchanged."""
    if text.startswith(AUTO):
        number(0, 1, above=True)(text.removeprefix(AUTO))
        return text
    try:
        number(0)(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} (or {AUTO}0.9)") from error
    return text


def has_rift(options: argparse.Namespace) -> bool:
    """Whether the options ask for a RIFT loss."""
    return bool(options.weight.startswith(AUTO) or float(options.weight))


def rift_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of :class:`rift_kernels.RIFTRegularizer` from the command line."""
    weight: float | rk.AdaptiveWeight
    if options.weight.startswith(AUTO):
        target = float(options.weight.removeprefix(AUTO))
        weight = rk.AdaptiveWeight(target_similarity=target)
    else:
        weight = float(options.weight)
    settings: dict[str, Any] = {
        "measure": options.measure,
        "weight": weight,
        "pooling": options.pooling,
        # Compares the batch of all processes as one; has no effect in a single process.
        "group": "world",
    }
    if options.margin:
        settings["margin"] = options.margin
    calls = options.warmup_rift * options.accumulate  # one call of the regulariser in each pass
    if calls:
        settings["schedule"] = lambda step: min(1.0, step / calls)
    return settings


def fixed_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The options that must not change when a run resumes, as plain values."""
    return {
        name: str(value.resolve()) if isinstance(value, Path) else value
        for name, value in sorted(vars(options).items())
        if name not in CHANGEABLE
    }


def make_parser(program: str, description: str, pooling: str) -> argparse.ArgumentParser:
    """A parser with all options that do not depend on the kind of data."""
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
        type=whole_number(1),
        metavar="R",
        help="train only adapters of rank R and the head (needs peft); the student without "
        "adapters is then the teacher, and the weights exist only once",
    )
    add("--lora-alpha", type=number(0, above=True), metavar="A", help="default: 2 R")
    add("--lora-dropout", type=number(0, 1), default=0.05, metavar="P", help="adapters' dropout")
    add(
        "--lora-target",
        nargs="+",
        metavar="NAME",
        help="names of the linear layers that get adapters; default: query and value projections "
        "of the attention",
    )


def _add_rift(group: Any, pooling: str) -> None:
    add = group.add_argument
    add(
        "--layers",
        nargs="+",
        metavar="NAME",
        help="names or patterns of the compared layers, as in model.named_modules(); "
        "default: the last block",
    )
    add("--pooling", choices=POOLINGS, default=pooling, help="the way tokens become rows")
    add("--measure", choices=MEASURES, default="cka", help="the measure; see the README")
    add(
        "--weight",
        type=check_weight,
        default="1",
        metavar="W",
        help="weight of the RIFT loss relative to the task's: a number, 0 for plain finetuning "
        "without a teacher, or auto:0.9 for the weight that holds the similarity at 0.9",
    )
    add(
        "--margin",
        type=number(0),
        default=0.0,
        metavar="M",
        help="no loss while the distance (1 - similarity) is below M",
    )
    add(
        "--warmup-rift",
        type=whole_number(0),
        default=0,
        metavar="STEPS",
        help="number of steps in which the weight grows from 0",
    )


def _add_optimiser(group: Any) -> None:
    add = group.add_argument
    add("--epochs", type=whole_number(1), default=10, help="maximum number of epochs")
    add("--batch-size", type=whole_number(1), default=32, metavar="N", help=_BATCH_SIZE)
    add("--accumulate", type=whole_number(1), default=1, metavar="PASSES", help=_ACCUMULATE)
    add("--lr", type=number(0, above=True), default=1e-4, help="the highest learning rate")
    add("--weight-decay", type=number(0), default=0.05, help="AdamW's, for matrices only")
    add(
        "--warmup",
        type=number(0, 1),
        default=0.1,
        metavar="SHARE",
        help="share of the steps in which the rate grows from 0, before a cosine decay",
    )
    add("--clip", type=number(0), default=1.0, help="maximum norm of the gradient; 0: no limit")
    add("--amp", choices=("off", "bf16", "fp16"), default="off", help="automatic mixed precision")
    add("--patience", type=whole_number(0), default=0, metavar="EPOCHS", help=_PATIENCE)
    add("--seed", type=int, default=0, help="for new weights, data order, augmentation, dropout")


_BATCH_SIZE = "examples in one pass of one process"
_ACCUMULATE = "passes in one step; incomplete steps at the end of an epoch are skipped"
_PATIENCE = "stop after this many epochs without a better validation accuracy; 0: never"


def _add_run(group: Any) -> None:
    add = group.add_argument
    add("--out", type=Path, required=True, metavar="FOLDER", help="folder for all output")
    add("--resume", action="store_true", help="resume from the newest checkpoint in --out, if any")
    add("--save-every", type=whole_number(0), default=0, metavar="STEPS", help=_SAVE)
    add("--keep", type=whole_number(1), default=2, metavar="N", help="checkpoints to keep")
    add("--tensorboard", action="store_true", help="also log to FOLDER/tensorboard")
    add("--log-every", type=whole_number(1), default=10, metavar="STEPS", help=_LOG)
    add("--workers", type=whole_number(0), default=4, metavar="N", help="data-loading processes")
    add("--device", help="default: cuda with a GPU, otherwise cpu")


_SAVE = "also save a checkpoint every STEPS steps within an epoch; 0: only after each epoch"
_LOG = "steps between updates of bar and TensorBoard"
