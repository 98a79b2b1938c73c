"""The cost of RIFT in a LoRA finetuning step as a Markdown table, for terminal and documents."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .adapted import ADAPTERS_OFF, COPY
from .measure import CPU_TIME
from .tables import caption, markdown, milliseconds

Result = dict[str, Any]

EXPLANATION = (
    "A step of transformers' ViT with random weights and peft's LoRA on its attentions: forward,"
    " task loss, backward and optimiser step (AdamW). `rk.RIFTRegularizer` compares the last "
    "layer's class tokens (`cls`) or all its tokens by debiased CKA. Times are medians of "
    "interleaved steps, on a CPU of the process's CPU time, in which nothing is that other "
    "processes take; wall times, which have it, are beside them. What is added is the median "
    "over rounds of the difference within a round, as a share of the plain step of that round, "
    "with bounds that hold this median with about 95%, whatever the distribution. What the loss "
    "adds is what such a step takes more than one with the teacher's forward pass alone, in "
    "which features are caught and nothing is compared. The loss alone, forward and backward on "
    "features that a step caught, is timed in the same rounds, most often after a step that "
    "leaves nothing in the caches, and has not the noise of whole steps. Predicted are the "
    "loss's matrix products as a share of the plain step's. Memory is exact: the largest running"
    " sum of what torch's allocator hands out and takes back in a step, above what was there "
    "before (weights, batch, optimiser). The bound is the sum of three peaks: that of the plain "
    "step, that of the teacher's pass by itself and that of the loss by itself."
)


def compared(result: Result) -> Iterator[tuple[Result, Result]]:
    """The ways with a loss whose teacher is the student, and that loss by itself."""
    alone = {loss["pooling"]: loss for loss in result["losses"]}
    for way in result["ways"]:
        if way["pooling"] and way["teacher"] == ADAPTERS_OFF:
            yield way, alone[way["pooling"]]


def summary(result: Result) -> str:
    """A result's caption, its model, and its tables of time and memory."""
    return "\n\n".join([caption(result), _model(result), _times(result), _memory(result)])


def _model(result: Result) -> str:
    m = result["model"]
    dtype = "bfloat16 autocast" if m["autocast"] else "float32"
    noise = result["noise"][result["clock"]]
    return (
        f"{m['depth']} layers, {m['width']} wide, {m['heads']} heads, {m['parameters'] / 1e6:.3g} "
        f"M parameters of which {m['trained'] / 1e6:.3g} M are trained (rank {m['rank']}), on "
        f"{m['batch']} images of {m['tokens']} tokens in {dtype}; {result['rounds']} rounds. The "
        f"plain step, timed twice, differs from itself by {noise:.1%} (noise)."
    )


def _times(result: Result) -> str:
    on_cpu = result["clock"] == CPU_TIME
    header = ["step", "CPU time", "wall time"] if on_cpu else ["step", "time"]
    header += ["adds to the plain step", "of which the loss"]
    header += ["the loss alone", "share of the plain step", "predicted"]
    alone = {way["pooling"]: loss for way, loss in compared(result)}
    rows = []
    for way in result["ways"]:
        if way["seconds"] is None:
            continue
        row = [_title(way, result), *([_time(way, True)] if on_cpu else []), _time(way, False)]
        row += [_bounds(way["adds"]), _bounds(way["loss_adds"])]
        if way["loss_adds"]:
            loss = alone[way["pooling"]]
            row += [_time(loss, on_cpu), f"**{_bounds(loss['share'])}**"]
            row += [f"{loss['predicted_share']:.2%}"]
        else:
            row += ["-"] * 3
        rows.append(row)
    return markdown(header, rows)


def _time(entry: Result, cpu: bool) -> str:
    return milliseconds((entry["cpu_seconds"] if cpu else entry["seconds"]["both"])["q50"])


def _memory(result: Result) -> str:
    header = ["step", "weights", "peak", "above the plain step", "bound"]
    header += ["the loss alone", "of which it keeps"]
    alone = {way["pooling"]: loss for way, loss in compared(result)}
    plain, teacher = result["ways"][0]["memory"]["both"], result["teacher_memory"]
    rows = [["the teacher's pass by itself", "-", _mebibytes(teacher), *["-"] * 4]]
    for way in result["ways"]:
        peak = way["memory"]["both"]
        row = [_title(way, result), _mebibytes(way["weights"]), _mebibytes(peak)]
        row += ["-"] if way is result["ways"][0] else [_mebibytes(peak - plain)]
        if way["pooling"] and way["teacher"] == ADAPTERS_OFF:
            loss = alone[way["pooling"]]
            row += [_mebibytes(plain + teacher + loss["memory"]["both"])]
            row += [_mebibytes(loss["memory"]["both"]), _mebibytes(loss["kept"])]
        else:
            row += ["-"] * 3
        rows.append(row)
    return markdown(header, rows)


def _title(way: Result, result: Result) -> str:
    if way["teacher"] is None:
        return "plain"
    if way["pooling"] is None:
        return "+ teacher's pass, nothing compared"
    features = next(x["features"] for x in result["losses"] if x["pooling"] == way["pooling"])
    teacher = ", teacher a copy" if way["teacher"] == COPY else ""
    return f"+ RIFT, {way['pooling']}, {features}{teacher}"


def _bounds(share: dict[str, float] | None) -> str:
    if share is None:
        return "-"
    low, middle, high = (f"{share[key]:+.2%}" for key in ("low", "q50", "high"))
    return f"{middle} ({low} to {high})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.2f} MiB"
