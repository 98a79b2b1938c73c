"""The cost of a finetuning step as a Markdown table, for terminal and documents."""

from __future__ import annotations

from typing import Any

from .oracle import GRADIENT_TOLERANCE
from .providers import OURS
from .tables import caption, error_text, markdown, milliseconds

Result = dict[str, Any]

EXPLANATION = (
    "Forward, loss, backward and optimiser step (AdamW), medians of interleaved steps; on a GPU, "
    "between events, and the wall time beside them. What the loss adds is timed with the "
    "teacher's features from a cache, and what the teacher adds is its forward pass in every "
    "step, beside that; both are in percent of the plain step. `~` marks a difference within the "
    "noise, which is that of the plain step timed twice, or two standard errors of such a "
    "difference where these are more. Memory is the peak's over the plain step's, with the "
    "teacher's features from a cache and with its forward pass. Predicted are the floating point "
    "operations of matrix products at their measured peak. Class tokens are compared by debiased "
    "CKA, and the last layer's tokens by biased CKA, for which naive code is cheapest. Under "
    "autocast naive code multiplies in bfloat16; `naive eager float32` keeps it out. A gradient "
    "error is that of the loss at the student's features, relative, against float64; more than "
    f"{GRADIENT_TOLERANCE:.0%} is **wrong**, at whatever speed."
)


def summary(result: Result) -> str:
    """A result's caption, its model, its table and what it lacks."""
    parts = [caption(result), _model(result)]
    if _way(result, None, None, False)["seconds"]:
        parts.append(_table(result))
    missing = _not_measured(result)
    if missing:
        parts.append("Not measured:\n" + "\n".join(f"- {line}" for line in missing))
    return "\n\n".join(parts)


def cost(result: Result) -> str:
    """A sentence for the README: what our fastest right loss and the teacher add to a step."""
    losses = [
        way
        for way in _cached(result)
        if way["seconds"] and (way["loss"] or "").startswith(OURS) and not way["wrong"]
    ]
    plain, teacher = (_way(result, None, None, runs) for runs in (False, True))
    where = f"On {result['environment']['device']}, a finetuning step of a ViT"
    if not losses or not plain["seconds"]:
        return f"{where} was not measured."
    way = min(losses, key=_seconds)
    return (
        f"{where} takes {milliseconds(_seconds(plain))}. The loss ({way['features']}) adds "
        f"{_adds(result, way)} (`~`: within the noise), the teacher's forward pass "
        f"**{_teacher_adds(result, plain, teacher)}**."
    )


def predictions(result: Result) -> str:
    """What is expected before anything is measured, in percent of the plain step."""
    plain, teacher = (_way(result, None, None, runs) for runs in (False, True))
    seconds = plain["predicted_seconds"]
    rows = [
        ["plain step", "-", milliseconds(seconds)],
        ["the teacher's forward", "-", _percent(teacher["predicted_seconds"] / seconds - 1)],
    ]
    for way in _cached(result)[1:]:
        rows.append([way["features"], way["loss"], _predicted(result, way)])
    return markdown(["predicted", "loss by", "step"], rows)


def _model(result: Result) -> str:
    """The model, and the plain step."""
    m = result["model"]
    dtype = "bfloat16 autocast" if m["autocast"] else "float32"
    text = (
        f"A ViT of {m['depth']} layers, {m['width']} wide, {m['parameters'] / 1e6:.3g} M "
        f"parameters, on {m['batch']} images of {m['tokens']} tokens in {dtype}"
    )
    plain, teacher = (_way(result, None, None, runs) for runs in (False, True))
    if not plain["seconds"]:
        return f"{text}: not measured: {plain['reason']}"
    share = teacher["predicted_seconds"] / plain["predicted_seconds"] - 1
    return (
        f"{text}. Plain step: predicted {milliseconds(plain['predicted_seconds'])}, measured "
        f"{milliseconds(_seconds(plain))}, noise {result['noise']['both']:.1%}, "
        f"{result['rounds']} rounds; peak memory {plain['memory']['both'] / 2**20:,.0f} MiB. "
        f"Teacher's forward pass: predicted {_percent(share)}."
    )


def _table(result: Result) -> str:
    on_gpu = result["environment"]["gpu"] is not None
    header = ["features", "loss by", "step", "the loss adds", "predicted"]
    header += ["wall", "the loss adds to it"] if on_gpu else []
    header += ["the teacher adds", "memory", "gradient error"]
    rows = []
    for way in _cached(result):
        if not way["seconds"]:
            continue
        running = _way(result, way["loss"], way["features"], True)
        row = [way["features"] or "no loss", way["loss"] or "-", milliseconds(_seconds(way))]
        row += [_adds(result, way), _predicted(result, way)]
        if on_gpu:
            wall = milliseconds(_seconds(way, "wall"))
            row += [wall, _adds(result, way, "wall")]
        row += [_teacher_adds(result, way, running), _memory(result, way, running), _error(way)]
        rows.append(row)
    return markdown(header, rows)


def _way(result: Result, loss: str | None, features: str | None, teacher_runs: bool) -> Result:
    wanted = loss, features, teacher_runs
    found: Result = next(
        w for w in result["ways"] if (w["loss"], w["features"], w["teacher_runs"]) == wanted
    )
    return found


def _cached(result: Result) -> list[Result]:
    """The plain step and those with a loss, without the teacher's forward."""
    return [way for way in result["ways"] if not way["teacher_runs"]]


def _seconds(way: Result, clock: str = "both") -> float:
    seconds: float = way["seconds"][clock]["q50"]
    return seconds


def _difference(result: Result, more: Result, less: Result, clock: str = "both") -> str:
    """In percent of the plain step, marked where it is within the noise."""
    plain = _seconds(_way(result, None, None, False), clock)
    share = (_seconds(more, clock) - _seconds(less, clock)) / plain
    return ("~" if abs(share) <= result["noise"][clock] else "") + _percent(share)


def _adds(result: Result, way: Result, clock: str = "both") -> str:
    if way["loss"] is None:
        return "-"
    found = _difference(result, way, _way(result, None, None, False), clock)
    ours = way["loss"].startswith(OURS) and not way["wrong"]
    return f"**{found}**" if ours else found


def _teacher_adds(result: Result, way: Result, running: Result) -> str:
    return _difference(result, running, way) if running["seconds"] else "-"


def _predicted(result: Result, way: Result) -> str:
    if way["loss"] is None:
        return "-"
    plain = _way(result, None, None, False)["predicted_seconds"]
    return _percent(way["predicted_seconds"] / plain - 1)


def _memory(result: Result, way: Result, running: Result) -> str:
    plain = _way(result, None, None, False)["memory"]["both"]

    def over(one: Result) -> str:
        return f"{(one['memory']['both'] - plain) / 2**20:+,.1f}" if one["memory"] else "-"

    return f"{'-' if way['loss'] is None else over(way)} / {over(running)} MiB"


def _error(way: Result) -> str:
    if way["loss"] is None:
        return "-"
    return error_text(way["gradient_error"]) + (", **wrong**" if way["wrong"] else "")


def _percent(share: float) -> str:
    """With a sign."""
    return f"{share:+.1%}"


def _not_measured(result: Result) -> list[str]:
    lines = []
    for entry in result["left_out"]:
        where = f", {entry['features']}" if entry["features"] else ""
        lines.append(f"{entry['loss']}{where}: {entry['reason']}")
    for way in result["ways"]:
        if way["reason"]:
            where = ", ".join(filter(None, (way["loss"] or "plain step", way["features"])))
            teacher = ", with the teacher's forward" if way["teacher_runs"] else ""
            lines.append(f"{where}{teacher}: {way['reason']}")
    return lines
