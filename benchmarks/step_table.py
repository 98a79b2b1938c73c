"""The cost of a finetuning step as Markdown tables, for terminal and documents."""

from __future__ import annotations

from .adapted import ADAPTERS_OFF, COPY
from .measure import CPU_TIME
from .providers import OURS
from .schema import Bounds, Lora, LoraLoss, LoraWay, Quantiles, Step, StepWay
from .tables import WRONG, caption, error_text, markdown, milliseconds, not_measured

MIB = 2**20


def summary(result: Step) -> str:
    """A result's caption, its model, its table and what it lacks."""
    missing = [_where(left.loss, left.features) + f": {left.reason}" for left in result.left_out]
    for way in result.ways:
        if way.reason:
            teacher = ", with the teacher's forward" if way.teacher_runs else ""
            missing.append(f"{_where(way.loss, way.features)}{teacher}: {way.reason}")
    table = [_table(result), WRONG] if _way(result).seconds else []
    return "\n\n".join([caption(result), _model(result), *table, *not_measured(missing)])


def _where(loss: str | None, features: str | None) -> str:
    return ", ".join(filter(None, (loss or "plain step", features)))


def cost(result: Step) -> str:
    """A sentence for the README: what our fastest right loss and the teacher add to a step."""
    losses = [w for w in _cached(result) if w.seconds and (w.loss or "").startswith(OURS)]
    way = min((w for w in losses if not w.wrong), key=_seconds, default=None)
    plain, teacher = _way(result), _way(result, teacher_runs=True)
    where = f"On {result.environment.device}, a finetuning step of a ViT"
    if way is None or not plain.seconds:
        return f"{where} was not measured."
    return (
        f"{where} takes {milliseconds(_seconds(plain))}. The loss ({way.features}) adds "
        f"{_adds(result, way)} (`~`: within the noise), the teacher's forward pass "
        f"**{_difference(result, teacher, plain)}**."
    )


def predictions(result: Step) -> str:
    """The predictions, in percent of the plain step."""
    plain, teacher = _way(result), _way(result, teacher_runs=True)
    rows = [
        ["plain step", "-", milliseconds(plain.predicted_seconds)],
        ["the teacher's forward", "-", _predicted(result, teacher)],
    ]
    rows += [[str(w.features), str(w.loss), _predicted(result, w)] for w in _cached(result)[1:]]
    return markdown(["predicted", "loss by", "step"], rows)


def _model(result: Step) -> str:
    """The model, and the plain step."""
    m, plain = result.model, _way(result)
    text = (
        f"A ViT of {m.depth} layers, {m.width} wide, {m.parameters / 1e6:.3g} M "
        f"parameters, on {m.batch} images of {m.tokens} tokens in {_products(m.autocast)}"
    )
    if not plain.seconds:
        return f"{text}: not measured: {plain.reason}"
    return (
        f"{text}. Plain step: predicted {milliseconds(plain.predicted_seconds)}, measured "
        f"{milliseconds(_seconds(plain))}, noise {result.noise['both']:.1%}, "
        f"{result.rounds} rounds; peak memory {plain.memory['both'] / MIB:,.0f} MiB. "
        f"Teacher's forward pass: predicted {_predicted(result, _way(result, teacher_runs=True))}."
    )


def _products(autocast: bool) -> str:
    return "bfloat16 autocast" if autocast else "float32"


def _table(result: Step) -> str:
    on_gpu = result.environment.gpu is not None
    header = ["features", "loss by", "step", "the loss adds", "predicted"]
    header += ["wall", "the loss adds to it"] if on_gpu else []
    header += ["the teacher adds", "memory", "gradient error"]
    rows, plain = [], _way(result)
    for way in _cached(result):
        if not way.seconds:
            continue
        running = _way(result, way.loss, way.features, teacher_runs=True)
        row = [way.features or "no loss", way.loss or "-", milliseconds(_seconds(way))]
        row += [_adds(result, way), "-" if way is plain else _predicted(result, way)]
        if on_gpu:
            row += [milliseconds(_seconds(way, "wall")), _adds(result, way, "wall")]
        row.append(_difference(result, running, way))
        over = [
            f"{(w.memory['both'] - plain.memory['both']) / MIB:+,.1f}" if w.memory else "-"
            for w in (way, running)
        ]
        row.append(f"{'-' if way is plain else over[0]} / {over[1]} MiB")
        error = error_text(way.gradient_error) + (", **wrong**" if way.wrong else "")
        rows.append([*row, "-" if way is plain else error])
    return markdown(header, rows)


def _way(
    result: Step, loss: str | None = None, features: str | None = None, teacher_runs: bool = False
) -> StepWay:
    wanted = loss, features, teacher_runs
    return next(w for w in result.ways if (w.loss, w.features, w.teacher_runs) == wanted)


def _cached(result: Step) -> list[StepWay]:
    """The plain step and those with a loss, without the teacher's forward."""
    return [way for way in result.ways if not way.teacher_runs]


def _seconds(way: StepWay, clock: str = "both") -> float:
    return way.seconds[clock].q50


def _difference(result: Step, more: StepWay, less: StepWay, clock: str = "both") -> str:
    """A difference in percent of the plain step, marked where it is within the noise."""
    if not more.seconds:
        return "-"
    share = (_seconds(more, clock) - _seconds(less, clock)) / _seconds(_way(result), clock)
    return ("~" if abs(share) <= result.noise[clock] else "") + f"{share:+.1%}"


def _adds(result: Step, way: StepWay, clock: str = "both") -> str:
    if way.loss is None:
        return "-"
    difference = _difference(result, way, _way(result), clock)
    return f"**{difference}**" if way.loss.startswith(OURS) and not way.wrong else difference


def _predicted(result: Step, way: StepWay) -> str:
    return f"{way.predicted_seconds / _way(result).predicted_seconds - 1:+.1%}"


def loss_alone(result: Lora, way: LoraWay) -> LoraLoss | None:
    """The loss that a way adds, by itself, if its teacher is the student."""
    losses = {loss.pooling: loss for loss in result.losses}
    return losses[way.pooling] if way.pooling and way.teacher == ADAPTERS_OFF else None


def lora_summary(result: Lora) -> str:
    """A result's caption, its model, and its tables of time and memory."""
    m, noise = result.model, result.noise[result.clock]
    model = (
        f"{m.depth} layers, {m.width} wide, {m.heads} heads, {m.parameters / 1e6:.3g} "
        f"M parameters of which {(m.trained or 0) / 1e6:.3g} M are trained (rank {m.rank}), on "
        f"{m.batch} images of {m.tokens} tokens in {_products(m.autocast)}; {result.rounds} "
        f"rounds. The plain step, timed twice, differs from itself by {noise:.1%} (noise)."
    )
    return "\n\n".join([caption(result), model, _lora_times(result), _lora_memory(result)])


def _lora_times(result: Lora) -> str:
    on_cpu = result.clock == CPU_TIME
    header = ["step", "CPU time", "wall time"] if on_cpu else ["step", "time"]
    header += ["adds to the plain step", "of which the loss"]
    header += ["the loss alone", "share of the plain step", "predicted"]
    rows = []
    for way in result.ways:
        if not way.seconds:
            continue
        times = [_median(way.cpu_seconds)] if on_cpu else []
        row = [_title(way, result), *times, _median(way.seconds["both"])]
        row += [_bounds(way.adds), _bounds(way.loss_adds)]
        loss = loss_alone(result, way)
        if loss:
            row += [_median(loss.cpu_seconds if on_cpu else loss.seconds["both"])]
            row += [f"**{_bounds(loss.share)}**", f"{loss.predicted_share:.2%}"]
        rows.append(row if loss else [*row, *["-"] * 3])
    return markdown(header, rows)


def _lora_memory(result: Lora) -> str:
    header = ["step", "weights", "peak", "above the plain step", "bound"]
    header += ["the loss alone", "of which it keeps"]
    plain, teacher = result.ways[0].memory["both"], result.teacher_memory
    rows = [["the teacher's pass by itself", "-", _mebibytes(teacher), *["-"] * 4]]
    for way in result.ways:
        peak, loss = way.memory["both"], loss_alone(result, way)
        above = "-" if way is result.ways[0] else _mebibytes(peak - plain)
        row = [_title(way, result), _mebibytes(way.weights), _mebibytes(peak), above]
        if loss:
            alone = loss.memory["both"]
            row += map(_mebibytes, (plain + teacher + alone, alone, loss.kept))
        rows.append(row if loss else [*row, *["-"] * 3])
    return markdown(header, rows)


def _title(way: LoraWay, result: Lora) -> str:
    if way.teacher is None:
        return "plain"
    if way.pooling is None:
        return "+ teacher's pass, nothing compared"
    features = next(loss.features for loss in result.losses if loss.pooling == way.pooling)
    teacher = ", teacher a copy" if way.teacher == COPY else ""
    return f"+ RIFT, {way.pooling}, {features}{teacher}"


def _median(seconds: Quantiles | None) -> str:
    return milliseconds(seconds.q50) if seconds else "-"


def _bounds(share: Bounds | None) -> str:
    return f"{share.q50:+.2%} ({share.low:+.2%} to {share.high:+.2%})" if share else "-"


def _mebibytes(count: int) -> str:
    return f"{count / MIB:,.2f} MiB"
