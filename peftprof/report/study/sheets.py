"""A study's tables as text, once, for the terminal, Markdown and the page."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from peftprof.report.study.paper import MACHINE, PRINTED, PROFILED
from peftprof.report.units import count, mib
from peftprof.studies import CellResult, Figure, Interval, Judged

SURE = 0.05
SAME = "not told apart"
METHODS = ("full", "lora", "qlora")


@dataclass(frozen=True)
class Sheet:
    """A table: `head` names its columns, the first is text and the others are right-aligned.

    `note` is what must be read with it.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""


def sheets(judged: Judged) -> tuple[Sheet, ...]:
    """Every table of a study, those without rows left out."""
    found = (
        _method(judged, "full", "Full fine-tuning (the paper's baseline)"),
        _method(judged, "lora", "LoRA by rank (table I)"),
        _method(judged, "qlora", "QLoRA by rank (table II)"),
        _profiled(judged),
        _comparisons(judged),
        _ladder(judged),
        _audit(judged),
        _rates(judged),
        _not_run(judged),
    )
    return tuple(sheet for sheet in found if sheet.rows)


def mark(judged: Judged) -> str:
    """What every table and figure of a shortened study says."""
    return f"quick look: {judged.study.quick}" if judged.study.quick else ""


def configurations(judged: Judged) -> list[str]:
    """Configurations that anything is known of."""
    return ordered({**judged.throughput, **judged.accuracy, **judged.memory})


def ordered(names: Iterable[str]) -> list[str]:
    """Configurations `method` or `method-rR` by method, then rank."""

    def place(name: str) -> tuple[int, str, int]:
        method, _, rank = name.partition("-r")
        known = METHODS.index(method) if method in METHODS else len(METHODS)
        return known, method, int(rank) if rank.isdecimal() else 0

    return sorted(names, key=place)


def _noted(judged: Judged, *notes: str) -> str:
    told = [mark(judged), *notes]
    return ". ".join(note.rstrip(".") for note in told if note)


def _method(judged: Judged, method: str, title: str) -> Sheet:
    names = [n for n in configurations(judged) if n == method or n.startswith(f"{method}-")]
    rows = []
    for name in names:
        paper = PRINTED.get(name)
        trained = live(judged, name)
        rows.append(
            (
                name,
                percent(judged.accuracy.get(name)),
                _plain(paper.accuracy if paper else None, "{:.2f}"),
                "" if trained is None else count(trained),
                _plain(paper.trainable if paper else None, "{:,.0f}"),
                size(judged.memory.get(name)),
                _plain(paper.peak_mb if paper else None, "{:.0f} MB"),
                interval(judged.throughput.get(name), "{:.1f}"),
                _plain(paper.samples_per_s if paper else None, "{:.1f}"),
            )
        )
    return Sheet(
        title,
        (
            "run", "accuracy %", "paper", "trained parameters", "paper", "peak memory", "paper",
            "samples/s", "paper",
        ),
        tuple(rows),
        _noted(
            judged,
            "In brackets 95 % intervals; of memory the lowest and highest run. "
            f"Paper: {MACHINE}",
        ),
    )  # fmt: skip


def _profiled(judged: Judged) -> Sheet:
    rows = []
    for name in configurations(judged):
        found = next((r for r in _runs(judged, name) if r.breakdown is not None), None)
        if found is None or found.breakdown is None or found.record is None:
            continue
        breakdown, paper = found.breakdown, PROFILED.get(name)
        trained = found.record.trainable
        rows.append(
            (
                name,
                f"{1e9 / breakdown.step_ns.median:.2f}",
                _plain(paper[0] if paper else None, "{:.2f}"),
                "" if breakdown.memory is None else mib(breakdown.memory.peak_bytes),
                _plain(paper[1] if paper else None, "{:.2f} GB"),
                "" if trained is None else f"{100 * trained.live / trained.total:.2f}",
                _plain(paper[2] if paper else None, "{:.1f}"),
            )
        )
    return Sheet(
        "Profiled runs (table III)",
        ("run", "steps/s", "paper", "peak in tensors", "paper", "trained %", "paper"),
        tuple(rows),
        _noted(judged, "A profiler slows what it records: compare these with each other only"),
    )


def _comparisons(judged: Judged) -> Sheet:
    rows = []
    for pair in judged.comparisons:
        points = pair.quantity == "accuracy"
        form, scale = ("{:+.2f}", 100) if points else ("{:.2f}x", 1)
        p = "one pair" if pair.p is None else f"{pair.p:.3f}" if pair.p >= 0.001 else "<0.001"
        even = 0 if points else 1
        apart = pair.p is not None and pair.p < SURE
        better = pair.b if pair.difference.value > even else pair.a
        rows.append(
            (
                f"{pair.b} against {pair.a}",
                "accuracy, points" if points else pair.quantity,
                interval(pair.difference, form, scale),
                p,
                f"{better} {'more accurate' if points else 'faster'}" if apart else SAME,
            )
        )
    return Sheet(
        "Paired tests",
        ("runs", "of", "difference or ratio", "p", "verdict at 5 %"),
        tuple(rows),
        _noted(
            judged,
            "Accuracy by random signs over examples, time by Student's test over pairs of seeds; "
            "not corrected for how many there are (claim C9 is)",
        ),
    )


def _ladder(judged: Judged) -> Sheet:
    rows = []
    total = 0.0
    for rung in judged.ladder:
        total += rung.ns
        first = rung is judged.ladder[0]
        rows.append(
            (
                rung.cause,
                f"{rung.ns / 1e6:.2f}" if first else f"{rung.ns / 1e6:+.2f}",
                f"{total / 1e6:.2f}",
                "" if first else interval(rung.factor, "{:.2f}x"),
                rung.note,
            )
        )
    return Sheet(
        "What the speed-up is made of",
        ("change", "ms an example", "then", "times as fast", "run after it"),
        tuple(rows),
        _noted(
            judged,
            "One change at a time from the paper's baseline on; launch overhead and batch size "
            "are one change, told apart by the profile, and their factor is of both",
        ),
    )


def _audit(judged: Judged) -> Sheet:
    rows = [
        (
            f"{one.method}-r{one.rank}",
            count(one.live),
            count(one.nominal),
            count(one.as_the_paper),
            count(one.printed) if one.printed else "",
            count(one.without_gradient),
            f"{100 * one.live / one.total:.2f}",
        )
        for one in judged.study.audit
    ]
    return Sheet(
        "Trainable parameters of the paper's DistilBERT",
        (
            "adapter", "live", "nominal", "as the paper counts", "paper prints",
            "never a gradient", "% of all",
        ),
        tuple(rows),
        "Live: got a gradient in a backward pass. QLoRA's printed counts have pre_classifier "
        "twice, 590,592 parameters: PEFT keeps the original beside the copy that it trains, and "
        "unfrozen by name it counts as trainable and never gets a gradient",
    )  # fmt: skip


def _rates(judged: Judged) -> Sheet:
    tried = [r for r in judged.study.results if r.cell.part == "search"]
    rows = []
    for result in tried:
        accuracy = result.record.accuracy if result.record else None
        rate = result.cell.config["learning_rate"]
        chosen = judged.study.rates.get(result.cell.method) == rate
        rows.append(
            (
                result.cell.method,
                f"{rate:g}",
                result.state if accuracy is None else f"{100 * accuracy.accuracy:.2f}",
                "" if accuracy is None else f"{accuracy.loss:.4f}",
                "chosen" if chosen else "",
            )
        )
    return Sheet(
        "Search for the rates",
        ("method", "rate", "accuracy %", "loss", ""),
        tuple(rows),
        _noted(judged, "On training examples held out for it, not on the evaluation set"),
    )


def _not_run(judged: Judged) -> Sheet:
    rows = [(r.cell.name, r.state, r.why) for r in judged.study.results if r.state != "complete"]
    rows += [(name, "left out", why) for name, why in judged.study.left_out.items()]
    return Sheet("Runs without a result", ("run", "state", "why"), tuple(rows))


def _runs(judged: Judged, name: str) -> Iterator[CellResult]:
    method, _, rank = name.partition("-r")
    for result in judged.study.results:
        cell = result.cell
        if (cell.part, cell.method, cell.rank) == ("matrix", method, int(rank) if rank else None):
            yield result


def live(judged: Judged, name: str) -> int | None:
    """Parameters that got a gradient, in the first complete run of a configuration."""
    counts = (run.record.trainable for run in _runs(judged, name) if run.record is not None)
    return next((count.live for count in counts if count is not None), None)


def _plain(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def interval(value: Interval | None, form: str, scale: float = 1) -> str:
    """A figure and its interval, as `form` shows each."""
    if value is None:
        return ""
    shown = [form.format(scale * number) for number in (value.value, value.low, value.high)]
    return f"{shown[0]} ({shown[1]} to {shown[2]})"


def percent(value: Interval | None) -> str:
    """A share as a percentage with its interval."""
    return interval(value, "{:.2f}", 100)


def size(value: Interval | None) -> str:
    """Bytes with the lowest and the highest."""
    if value is None:
        return ""
    return f"{mib(value.value)} ({mib(value.low)} to {mib(value.high)})"


def shown(figure: Figure) -> str:
    """A figure of a verdict's evidence in words: what it is, its interval, the paper's."""
    if figure.value is None:
        return f"{figure.what}: not known"
    form = "{:.2f}x" if figure.unit == "x" else "{:.3g}"
    unit = f" {figure.unit}" if figure.unit not in ("", "x") else ""
    text = f"{figure.what}: {form.format(figure.value)}{unit}"
    if figure.low is not None and figure.high is not None:
        text += f" ({form.format(figure.low)} to {form.format(figure.high)})"
    if figure.paper is not None:
        text += f"; paper {form.format(figure.paper)}"
    return text
