"""A prediction as a terminal shows it, as JSON, and as a picture."""

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftprof.advice import TERMS, Advice, CheckedRun, Prediction
from peftprof.records import encode
from peftprof.report.pieces import note, table
from peftprof.report.units import count, mib, unit_of

NAMES = {
    "base_weights": "base weights",
    "quantisation_state": "quantisation state",
    "adapters": "adapters and head",
    "gradients": "gradients",
    "optimizer_state": "optimizer state",
    "activations": "activations",
    "dequant_workspace": "dequantise workspace",
    "other": "other tensors",
    "allocator": "allocator",
    "process": "process or context",
}
WHEN = {"backward": "in a step", "evaluation": "in evaluation"}
SHOWN = 12


def render(advice: Advice, every: bool = False) -> RenderableType:
    """The best choices, what the first is made of, and its command; `every` choice if asked."""
    lines: list[RenderableType] = [
        Text(),
        Text(
            f"{advice.model}: {advice.parameters / 1e9:.2f} G parameters, {advice.layers} layers",
            "bold",
        ),
        note(f"{advice.device}, {mib(advice.memory_bytes)}; examples of {advice.tokens} tokens"),
        Text(),
        _choices(advice, every),
        Text(),
    ]
    if advice.fitting:
        first = advice.predictions[0]
        lines += [
            Text(f"first by {advice.objective}: {advice.reason}"),
            Text(),
            _terms(first),
            Text(),
            Text(advice.command, "bold", overflow="fold"),
        ]
    else:
        lines += [Text("nothing fits", "bold red"), *[Text(text) for text in advice.instead]]
    return Group(*lines, Text(), *[note(text) for text in advice.basis])


def _choices(advice: Advice, every: bool) -> Table:
    shown = table()
    shown.add_column("method", no_wrap=True)
    shown.add_column("kernels", no_wrap=True)
    for name in ("rank", "batch"):
        shown.add_column(name, justify="right")
    shown.add_column("prec.")
    shown.add_column("ckpt")
    rows = advice.predictions if every else worth_showing(advice)
    unit, size = unit_of(max(prediction.peak_bytes for prediction in rows))
    for name in (f"peak, {unit}", "step", "samples/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("fits")
    for prediction in rows:
        c = prediction.choice
        full = c.method == "full"
        fits = prediction.needed_bytes <= advice.memory_bytes
        shown.add_row(
            c.method,
            "" if full else c.kernels,
            "" if full else str(c.rank),
            str(c.batch_size),
            c.precision,
            "yes" if c.checkpointing else "",
            size(prediction.peak_bytes),
            _seconds(prediction.step_s),
            "?" if prediction.samples_per_s is None else f"{prediction.samples_per_s:.3g}",
            "" if fits else "no",
            style="" if fits else "bright_black",
        )
    return shown


def worth_showing(advice: Advice) -> list[Prediction]:
    """The best of each way to compute, then what is next, a dozen in all."""
    best: list[Prediction] = []
    seen: set[tuple[object, ...]] = set()
    for prediction in advice.predictions:
        c = prediction.choice
        way = (c.method, c.precision, c.checkpointing, c.kernels)
        if way not in seen:
            seen.add(way)
            best.append(prediction)
    return best[:SHOWN] if len(best) >= SHOWN else best


def _terms(prediction: Prediction) -> Table:
    unit, size = unit_of(prediction.peak_bytes)
    shown = table()
    shown.add_column("peak memory of the first")
    shown.add_column("bytes", justify="right", no_wrap=True)
    shown.add_column(unit, justify="right", no_wrap=True)
    for term in TERMS:
        if prediction.terms[term]:
            shown.add_row(NAMES[term], count(prediction.terms[term]), size(prediction.terms[term]))
    shown.add_row(
        f"in all, {WHEN[prediction.moment]}",
        count(prediction.peak_bytes),
        f"{size(prediction.low_bytes)} to {size(prediction.high_bytes)}",
        style="bold",
    )
    if prediction.loading_bytes > prediction.low_bytes:
        loading = prediction.loading_bytes
        shown.add_row("while it is loaded", count(loading), size(loading), style="bold")
    if prediction.step_s is not None:
        shown.add_row(
            "a step",
            _seconds(prediction.step_s),
            f"{_seconds(prediction.low_s)} to {_seconds(prediction.high_s)}",
        )
    return shown


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def to_json(advice: Advice) -> dict[str, Any]:
    """Everything, with the figures that follow from others."""
    found: dict[str, Any] = encode(advice)
    for made, prediction in zip(found["predictions"], advice.predictions, strict=True):
        made["step_s"] = prediction.step_s
        made["samples_per_s"] = prediction.samples_per_s
        made["fits"] = prediction.needed_bytes <= advice.memory_bytes
    return found


def render_check(
    checked: Sequence[CheckedRun], left_out: Sequence[str] = (), every: bool = False
) -> RenderableType:
    """Predictions beside measurements, run by run, and the errors in all; `every` term if asked."""
    shown = table()
    shown.add_column("run", overflow="fold")
    for name in ("peak", "predicted", "error", "step", "predicted", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for run in checked:
        shown.add_row(
            run.name,
            "?" if run.measured_bytes is None else mib(run.measured_bytes),
            mib(run.predicted_bytes),
            _percent(run.memory_error),
            _seconds(run.measured_s),
            _seconds(run.predicted_s),
            _percent(run.time_error),
        )
    lines: list[RenderableType] = [Text(), shown, Text()]
    if every:
        lines += [part for run in checked if run.parts for part in (_parts(run), Text())]
    for what, errors in (
        ("memory", [r.memory_error for r in checked]),
        ("time", [r.time_error for r in checked]),
    ):
        lines.append(Text(f"{what}: {in_all([e for e in errors if e is not None])}"))
    return Group(*lines, *[note(text) for text in left_out])


def _parts(run: CheckedRun) -> Table:
    """Each part of the tensors' peak in the memory step, predicted and measured."""
    shown = table()
    shown.add_column(run.name, overflow="fold")
    for name in ("predicted, bytes", "measured, bytes", "error"):
        shown.add_column(name, justify="right", no_wrap=True)
    for term, (predicted, measured) in run.parts.items():
        if predicted or measured:
            error = _percent(predicted / measured - 1) if measured else ""
            shown.add_row(NAMES[term], count(predicted), count(measured), error)
    return shown


def render_compared(checked: Sequence[CheckedRun], left_out: Sequence[str]) -> RenderableType:
    """One run's prediction in a line, several runs' errors in two."""
    lines: list[RenderableType] = [note(text) for text in left_out]
    if len(checked) == 1:
        (run,) = checked
        peak = f"peak {mib(run.predicted_bytes)} ({_percent(run.memory_error) or 'not measured'})"
        step = f"step {_seconds(run.predicted_s)} ({_percent(run.time_error) or 'not compared'})"
        lines.append(note(f"predicted   {peak}, {step}"))
    elif checked:
        memory = [e for run in checked if (e := run.memory_error) is not None]
        times = [e for run in checked if (e := run.time_error) is not None]
        lines.append(note(f"predicted   memory: {in_all(memory)}"))
        lines.append(note(f"            time: {in_all(times)}"))
    return Group(*lines)


def in_all(errors: Sequence[float]) -> str:
    """The usual error and the worst, in words."""
    if not errors:
        return "nothing to compare"
    sizes = sorted(abs(error) for error in errors)
    middle = sizes[len(sizes) // 2]
    worst = max(errors, key=abs)
    if len(sizes) == 1:
        return f"1 run, {100 * worst:+.1f} %"
    return f"{len(sizes)} runs, half within {100 * middle:.1f} %, worst {100 * worst:+.1f} %"


def _percent(error: float | None) -> str:
    return "" if error is None else f"{100 * error:+.1f} %"


def check_json(checked: Sequence[CheckedRun], left_out: Sequence[str]) -> dict[str, Any]:
    """The error table for machines."""
    rows = [
        encode(run) | {"memory_error": run.memory_error, "time_error": run.time_error}
        for run in checked
    ]
    return {"version": 1, "runs": rows, "left_out": list(left_out)}
