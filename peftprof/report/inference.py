"""What serving costs, in a terminal: a table for each phase, and what was checked."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.progress import TimeRemainingColumn as TimeLeft
from rich.table import Table
from rich.text import Text

from peftprof.inferences import Cell, Checks, InferenceRecord, Ratio
from peftprof.inferences import Progress as Heard
from peftprof.report import words
from peftprof.report.units import mib

TITLES = {
    "forward": "forward: one call classifies the batch",
    "prefill": "prefill: the prompt, to the first token",
    "decode": "decode: one token more for each sequence",
}
LINE_EVERY_S = 10.0


def render(record: InferenceRecord, folder: Path) -> RenderableType:
    """The figures of `record`, what was checked, and the command that reads the traces."""
    what = record.run if record.run is not None else record.model.name
    config = record.config
    how = f"{config['precision']} on {config['device']}, kernels {config['kernels']}"
    parts: list[RenderableType] = [Text(), Text(f"serving {words.clean(what)}, {how}", "bold")]
    phases = dict.fromkeys(cell.phase for cell in record.cells)
    for phase in phases:
        parts += [Text(), Text(TITLES.get(phase, phase)), _table(record, phase)]
    facts = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in _facts(record):
        facts.add_row(name, Text(words.clean(value)))
    parts += [Text(), facts, Text(), Text(f"folder      {folder}", overflow="fold")]
    files = [trace for trace in record.traces if trace.file is not None]
    for phase in dict.fromkeys(trace.phase for trace in files):
        read = f"python -m peftprof breakdown {folder}/*-{phase}.json.gz"
        parts.append(Text(f"read it     {read}", overflow="fold"))
    return Group(*parts)


def _table(record: InferenceRecord, phase: str) -> Table:
    own = [cell for cell in record.cells if cell.phase == phase]
    examples = any(cell.examples_per_s is not None for cell in own)
    energy = any(cell.joules for cell in own)
    # All of it is to fit into 80 columns.
    apart = 1 if energy else 2
    table = Table(box=None, pad_edge=False, padding=(0, apart, 0, 0), header_style="dim")
    table.add_column("batch x len", no_wrap=True)
    heads = ["p50 ms", "p95", "p99"] + ["ex/s"] * examples + ["tok/s", "peak"]
    for head in [*heads, *["mJ/tok"] * energy, "x base (95 %)"]:
        table.add_column(head, justify="right", no_wrap=True)
    for batch, length in dict.fromkeys((cell.batch, cell.length) for cell in own):
        table.add_row(Text(f"{batch} x {length}", "bold"))
        for cell in own:
            if (cell.batch, cell.length) == (batch, length):
                table.add_row(*_row(cell, examples, energy))
    return table


def _row(cell: Cell, examples: bool, energy: bool) -> Iterable[Text]:
    yield Text(f"  {cell.variant}")
    if cell.p50_ns is None or cell.p95_ns is None or cell.p99_ns is None:
        yield from [Text("-")] * (5 + examples + energy)
        yield Text("no memory" if cell.absent else "not measured")  # why stands below
        return
    for ns in (cell.p50_ns, cell.p95_ns, cell.p99_ns):
        yield Text(_time(ns))
    if examples:
        yield Text(_number(cell.examples_per_s))
    yield Text(_number(cell.tokens_per_s))
    yield Text("-" if cell.peak_bytes is None else mib(cell.peak_bytes))
    if energy:
        yield Text(_energy(cell))
    yield Text(_ratio(cell.ratio))


def _time(ns: float) -> str:
    """Milliseconds, or from ten seconds on seconds, in at most six characters."""
    return f"{ns / 1e9:.1f} s" if ns >= 1e10 else words.figures(ns / 1e6)


def _number(value: float | None) -> str:
    """A rate in at most six characters."""
    if value is None:
        return "-"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e5, "k")):
        if value >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g} {letter}"
    return words.figures(value)


def _energy(cell: Cell) -> str:
    """Millijoules a token, of all counters together."""
    if not cell.joules:
        return "-"
    tokens = cell.calls * cell.batch * (1 if cell.phase == "decode" else cell.length)
    return words.figures(1e3 * sum(cell.joules.values()) / tokens)


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f} (one round)"
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


def _facts(record: InferenceRecord) -> Iterator[tuple[str, str]]:
    yield "dense", record.dense
    if record.adapter is not None:
        yield "adapter", record.adapter
    yield from _checks(record)
    yield "inputs", record.inputs.source
    sizes = ", ".join(f"{one.variant} {mib(one.weight_bytes)}" for one in record.footprints)
    if sizes:
        yield "tensors", sizes
    yield "peak", record.memory
    for why in dict.fromkeys(cell.peak_absent for cell in record.cells if cell.peak_absent):
        yield "", f"peak absent: {why}"
    if not any(cell.joules for cell in record.cells):
        reasons = "; ".join(dict.fromkeys(record.energy_absent.values()))
        yield "energy", "not measurable here" + (f": {reasons}" if reasons else "")
    for why in dict.fromkeys(cell.absent for cell in record.cells if cell.absent):
        yield "absent", why
    rounds = sorted({cell.ratio.rounds for cell in record.cells if cell.ratio is not None})
    calls = sorted({cell.calls for cell in record.cells if cell.calls})
    if calls:
        text = f"{_span(calls)} calls a variant"
        if rounds:
            text += f" in {_span(rounds)} rounds, variants in turn; x base is time, paired by round"
        yield "timed", text


def _span(numbers: list[int]) -> str:
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def _checks(record: InferenceRecord) -> Iterator[tuple[str, str]]:
    checks: Checks = record.checks
    for of, against in (
        ("weights", "W + s B A in float64"),
        ("logits", "stock PEFT, unmerged, in fp32"),
    ):
        equal = ", ".join(
            f"{one.variant} {one.precision} {one.error:.0e} (allowed {one.allowed:.0e})"
            for one in checks.equal
            if one.of == of
        )
        if equal:
            yield f"{of} equal", f"{equal}: against {against}"
    if checks.effect is not None:
        yield "effect", f"the adapter moves the logits by {words.percent(checks.effect)}"
    untrained = record.task == "classify" and record.run is None
    for one in checks.drift:
        what = "next tokens" if record.task == "generate" else "classes"
        note = " (of a head that nobody trained)" if untrained else ""
        yield (
            f"{one.variant} drift",
            f"logits {one.max_difference:.2g} at most and {one.mean_difference:.2g} "
            f"in the mean from {one.against}; {one.changed} of {one.predictions} {what} "
            f"are others{note}",
        )


# --- While it is measured


@contextlib.contextmanager
def watching(console: Console | None) -> Iterator[Heard]:
    """Progress on `console`: live on a terminal, lines elsewhere; None shows nothing."""
    if console is None:
        yield Silent()
    elif not console.is_terminal:
        yield Lines(console)
    else:
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn())
        more = (TextColumn("{task.fields[figures]}"), TimeLeft(compact=True))
        with Progress(*columns, *more, console=console) as bars:
            yield Bars(bars)


class Silent:
    """Nobody looks."""

    def begin(self, what: str, total: int) -> None:
        """A part starts."""

    def done(self, figures: str) -> None:
        """A piece is done."""


class Bars:
    """A bar for each part."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def begin(self, what: str, total: int) -> None:
        """A bar of its own."""
        self.task = self.progress.add_task(what, total=total, figures="")

    def done(self, figures: str) -> None:
        """Move the bar."""
        self.progress.update(self.task, advance=1, figures=figures)


class Lines:
    """A line for each part, and at most every ten seconds one for a piece."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock

    def begin(self, what: str, total: int) -> None:
        """One line."""
        self.what, self.total, self.number, self.last = what, total, 0, self.clock()
        self._say(f"{what}: {total} part{'s' * (total != 1)}")

    def done(self, figures: str) -> None:
        """A line when the last one is old enough."""
        self.number += 1
        if self.clock() - self.last >= LINE_EVERY_S:
            self.last = self.clock()
            self._say(f"{self.what}: {self.number}/{self.total}  {figures}".rstrip())

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)
