"""The cost of a finetuning step as Markdown tables, for terminal and documents."""

from __future__ import annotations

from .measure import CPU_TIME
from .providers import OURS
from .schema import Bounds, LeftOut, Lora, LoraLoss, LoraWay, Model, Quantiles, Step, StepWay
from .tables import WRONG, caption, error_text, markdown, milliseconds, not_measured

ADAPTERS_OFF = "adapters off"


def summary(result: Step) -> str:
    """A result's caption, its model, its table and what it lacks."""
    m, (plain, teacher) = result.model, result.ways[:2]
    model = (
        f"A ViT of {m.depth} layers, {m.width} wide, {m.parameters / 1e6:.3g} M parameters, "
        f"{_batch(m)}. Plain step: predicted {milliseconds(plain.predicted_seconds)}, measured "
        f"{milliseconds(_seconds(plain))}, noise {result.noise['both']:.1%}, {result.rounds} "
        f"rounds; peak memory {plain.memory['both'] / 2**20:,.0f} MiB. Teacher's forward pass: "
        f"predicted {_predicted(result, teacher)}."
    )
    table = _table([_row(result, w) for w in result.ways if w.seconds and not w.teacher_runs])
    missing = [f"{title(left)}: {left.reason}" for left in result.left_out]
    missing += [f"{title(way)}: {way.reason}" for way in result.ways if way.reason]
    return "\n\n".join([caption(result), model, table, WRONG, *not_measured(missing)])


def cost(result: Step) -> str:
    """A sentence for the README: what our fastest right loss and the teacher add to a step."""
    plain, teacher, *ways = result.ways
    right = [way for way in ways if way.seconds and not way.teacher_runs and not way.wrong]
    ours = min((w for w in right if str(w.loss).startswith(OURS)), key=_seconds, default=None)
    where = f"On {result.environment.device}, a finetuning step of a ViT"
    if ours is None:
        return f"{where} was not measured."
    return (
        f"{where} takes {milliseconds(_seconds(plain))}. The loss ({ours.features}) adds "
        f"{_adds(result, ours)} (`~`: within the noise), the teacher's forward pass "
        f"**{_difference(result, teacher, plain)}**."
    )


def title(way: StepWay | LeftOut) -> str:
    teacher = "with the teacher's forward" if getattr(way, "teacher_runs", False) else None
    return ", ".join(filter(None, (way.loss or "plain step", way.features, teacher)))


def _batch(model: Model) -> str:
    products = "bfloat16 autocast" if model.autocast else "float32"
    return f"on {model.batch} images of {model.tokens} tokens in {products}"


def _table(rows: list[dict[str, str]]) -> str:
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def _row(result: Step, way: StepWay) -> dict[str, str]:
    running, plain = result.ways[result.ways.index(way) + 1], way is result.ways[0]
    peaks = [w.memory.get("both") for w in (result.ways[0], way, running)]
    over = ["-" if p is None else f"{(p - (peaks[0] or 0)) / 2**20:+,.1f}" for p in peaks]
    error = error_text(way.gradient_error) + (", **wrong**" if way.wrong else "")
    return {
        "features": way.features or "no loss",
        "loss by": way.loss or "-",
        "step": milliseconds(_seconds(way)),
        "the loss adds": _adds(result, way),
        "predicted": "-" if plain else _predicted(result, way),
        "the teacher adds": _difference(result, running, way),
        "memory": f"{'-' if plain else over[1]} / {over[2]} MiB",
        "gradient error": "-" if plain else error,
    }


def _seconds(way: StepWay) -> float:
    return way.seconds["both"].q50


def _predicted(result: Step, way: StepWay) -> str:
    return f"{way.predicted_seconds / result.ways[0].predicted_seconds - 1:+.1%}"


def _difference(result: Step, more: StepWay, less: StepWay) -> str:
    """A difference in percent of the plain step, marked where it is within the noise."""
    if not more.seconds:
        return "-"
    share = (_seconds(more) - _seconds(less)) / _seconds(result.ways[0])
    return ("~" if abs(share) <= result.noise["both"] else "") + f"{share:+.1%}"


def _adds(result: Step, way: StepWay) -> str:
    if way.loss is None:
        return "-"
    difference = _difference(result, way, result.ways[0])
    return f"**{difference}**" if way.loss.startswith(OURS) and not way.wrong else difference


def lora_summary(result: Lora) -> str:
    """A result's caption, its model, and its tables of time and memory."""
    m, noise = result.model, result.noise[result.clock]
    model = (
        f"{m.depth} layers, {m.width} wide, {m.heads} heads, {m.parameters / 1e6:.3g} M parameters "
        f"of which {(m.trained or 0) / 1e6:.3g} M are trained (rank {m.rank}), {_batch(m)}; "
        f"{result.rounds} rounds. The plain step, timed twice, differs from itself by {noise:.1%} "
        "(noise)."
    )
    times = [_times(result, way) for way in result.ways if way.seconds]
    teacher = {"step": "the teacher's pass by itself", "peak": _mebibytes(result.teacher_memory)}
    memory = [_memory(result, way) for way in result.ways]
    memory.insert(0, dict.fromkeys(memory[0], "-") | teacher)
    return "\n\n".join([caption(result), model, _table(times), _table(memory)])


def _loss_alone(result: Lora, way: LoraWay) -> LoraLoss | None:
    """The loss that a way adds, by itself, if its teacher is the student."""
    losses = (loss for loss in result.losses if loss.pooling == way.pooling)
    return next(losses, None) if way.teacher == ADAPTERS_OFF else None


def _times(result: Lora, way: LoraWay) -> dict[str, str]:
    loss, on_cpu = _loss_alone(result, way), result.clock == CPU_TIME
    alone = (loss.cpu_seconds if on_cpu else loss.seconds["both"]) if loss else None
    return {
        "step": _way(result, way),
        "CPU time": _median(way.cpu_seconds),
        "wall time" if on_cpu else "time": _median(way.seconds["both"]),
        "adds to the plain step": _bounds(way.adds),
        "of which the loss": _bounds(way.loss_adds),
        "the loss alone": _median(alone),
        "share of the plain step": f"**{_bounds(loss.share)}**" if loss else "-",
        "predicted": f"{loss.predicted_share:.2%}" if loss else "-",
    }


def _memory(result: Lora, way: LoraWay) -> dict[str, str]:
    loss, peak, plain = _loss_alone(result, way), way.memory["both"], result.ways[0].memory["both"]
    alone = loss.memory["both"] if loss else None
    return {
        "step": _way(result, way),
        "weights": _mebibytes(way.weights),
        "peak": _mebibytes(peak),
        "above the plain step": _mebibytes(peak - plain if way.teacher else None),
        "bound": _mebibytes(None if alone is None else plain + result.teacher_memory + alone),
        "the loss alone": _mebibytes(alone),
        "of which it keeps": _mebibytes(loss.kept if loss else None),
    }


def _way(result: Lora, way: LoraWay) -> str:
    if way.pooling is None:
        return "+ teacher's pass, nothing compared" if way.teacher else "plain"
    features = next(loss.features for loss in result.losses if loss.pooling == way.pooling)
    teacher = "" if way.teacher == ADAPTERS_OFF else f", teacher {way.teacher}"
    return f"+ RIFT, {way.pooling}, {features}{teacher}"


def _median(seconds: Quantiles | None) -> str:
    return milliseconds(seconds.q50) if seconds else "-"


def _bounds(share: Bounds | None) -> str:
    return f"{share.q50:+.2%} ({share.low:+.2%} to {share.high:+.2%})" if share else "-"


def _mebibytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 2**20:,.2f} MiB"
