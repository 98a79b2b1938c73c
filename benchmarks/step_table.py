"""The cost of a finetuning step as Markdown tables, for terminal and documents."""

from __future__ import annotations

from .measure import CPU_TIME
from .providers import OURS
from .schema import Bounds, Finetuning, Step, StepWay
from .tables import WRONG, caption, error_text, milliseconds, not_measured, table

ADAPTERS_OFF, COPY = "adapters off", "a copy"


def summary(result: Step) -> str:
    """A result's caption, the tables of each finetuning, and what it lacks."""
    parts = [caption(result)]
    missing = []
    for finetuning in result.finetunings:
        timed = [way for way in finetuning.ways if way.seconds]
        parts += [_model(finetuning), table([_times(finetuning, way) for way in timed])]
        plain, *rows = [_memory(finetuning, w) for w in finetuning.ways if w.reason is None]
        peak = _mebibytes(finetuning.teacher_memory)
        parts += [table([plain, {"step": "the teacher's pass by itself", "peak": peak}, *rows])]
        missing += [f"{provider.name}: {provider.reason}" for provider in finetuning.unable]
        missing += [f"{way.loss}: {way.reason}" for way in finetuning.ways if way.reason]
    return "\n\n".join([*parts, WRONG, *not_measured(missing)])


def cost(result: Step) -> str:
    """A sentence for the README: what our fastest right loss and the teacher add to a step."""
    finetuning = result.finetunings[-1]
    plain, teacher, *ways = finetuning.ways
    ours = [w for w in ways if str(w.loss).startswith(OURS) and w.alone and not w.wrong]
    shares = {way.loss: way.alone.share for way in ours if way.alone and way.alone.share}
    m = finetuning.model
    kind = "a LoRA step" if m.rank else "a finetuning step"
    where = f"On {result.environment.device}, {kind} of a ViT of {m.parameters / 1e6:.0f} M weights"
    if not shares:
        return f"{where} was not measured."
    loss = min(shares, key=lambda name: shares[name].q50)
    return (
        f"{where} takes {milliseconds(plain.seconds['both'].q50)}. The loss ({loss}) takes "
        f"**{shares[loss].q50:.2%}** of that, and the teacher's forward pass adds "
        f"**{teacher.adds.q50 if teacher.adds else 0:.0%}**."
    )


def _model(finetuning: Finetuning) -> str:
    m = finetuning.model
    trained = "all of them trained"
    if m.rank:
        trained = f"{m.trained / 1e6:.3g} M of them trained (adapters of rank {m.rank}, the head)"
    products = "bfloat16 autocast" if m.autocast else "float32"
    plain = finetuning.ways[0]
    return (
        f"A ViT of {m.depth} layers, {m.width} wide, {m.parameters / 1e6:.3g} M parameters, "
        f"{trained}; {m.batch} images of {m.tokens} tokens in {products}; {finetuning.rounds} "
        f"rounds. Plain step: predicted {milliseconds(finetuning.predicted_seconds)}, measured "
        f"{milliseconds(plain.seconds['both'].q50)}, noise "
        f"{finetuning.noise[finetuning.clock]:.1%}."
    )


def _times(finetuning: Finetuning, way: StepWay) -> dict[str, str]:
    alone, on_cpu = way.alone, finetuning.clock == CPU_TIME
    share = _bounds(alone.share if alone else None)
    praised = str(way.loss).startswith(OURS) and not way.wrong
    error = error_text(way.gradient_error) + ", **wrong**" * way.wrong
    return {
        "step": _title(way),
        **({"CPU time": milliseconds(way.seconds[CPU_TIME].q50)} if on_cpu else {}),
        "wall time" if on_cpu else "time": milliseconds(way.seconds["both"].q50),
        "adds to the plain step": _bounds(way.adds, "+"),
        "of which the loss": _bounds(way.loss_adds, "+"),
        "the loss alone": milliseconds(alone.seconds[finetuning.clock].q50) if alone else "",
        "share of the plain step": f"**{share}**" if praised else share,
        "predicted": "" if way.predicted_share is None else f"{way.predicted_share:.2%}",
        "gradient error": error if alone else "",
    }


def _memory(finetuning: Finetuning, way: StepWay) -> dict[str, str]:
    alone, peak = way.alone, way.memory["both"]
    plain, loss = finetuning.ways[0].memory["both"], alone.memory["both"] if alone else None
    return {
        "step": _title(way),
        "weights": _mebibytes(way.weights),
        "peak": _mebibytes(peak),
        "above the plain step": _mebibytes(peak - plain if way.teacher else None),
        "bound": _mebibytes(None if loss is None else plain + finetuning.teacher_memory + loss),
        "the loss alone": _mebibytes(loss),
        "of which it keeps": _mebibytes(alone.kept if alone else None),
    }


def _title(way: StepWay) -> str:
    if way.loss is None:
        until = " that ends after the first layer" if way.first_layer else ""
        return f"+ teacher's pass{until}, nothing compared" if way.teacher else "plain"
    return f"+ {way.loss}" + ("" if way.seconds else f", teacher {way.teacher}")


def _bounds(share: Bounds | None, sign: str = "") -> str:
    if share is None:
        return ""
    low, middle, high = (f"{x:{sign}.2%}" for x in vars(share).values())
    return f"{middle} ({low} to {high})"


def _mebibytes(count: int | None) -> str:
    return "" if count is None else f"{count / 2**20:,.2f} MiB"
