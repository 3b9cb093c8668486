"""Breakdowns in a terminal: one run as a table with bars, several side by side.

Everything is text of the trace's own making, so it is never read as markup and is rid of
control characters.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftprof.breakdowns import CATEGORIES, PHASES, Breakdown, Operator
from peftprof.trace import Loaded

STYLES = {
    "dequant": "red",
    "base_gemm": "blue",
    "adapter_gemm": "cyan",
    "attention": "magenta",
    "elementwise": "yellow",
    "embedding": "bright_magenta",
    "head_loss": "bright_blue",
    "optimizer": "green",
    "memcpy": "bright_yellow",
    "communication": "bright_cyan",
    "unattributed": "bright_red",
    "idle": "bright_black",
}
LABELS = {"base_gemm": "base GEMM", "adapter_gemm": "adapter GEMM", "head_loss": "head and loss"}
LABELS |= {"memcpy": "memory copies"}

NAMED_FROM = 0.01  # a share of unattributed time that is worth listing its operators for
NAME_WIDTH = 16
RUN_WIDTH = 14  # four runs fit 80 columns
BAR_WIDTH = 40
UNLIKE = 1.5  # longest over shortest step from which the reader is told
EIGHTHS = " ▏▎▍▌▋▊▉"


def render(loaded: Loaded, top: int = 10) -> Group:
    """`loaded` for a rich console; `top` operators are listed for a single run."""
    if len(loaded.breakdowns) == 1:
        parts = list(_single(loaded.breakdowns[0], top))
    else:
        parts = [_Comparison(loaded)]
    if loaded.left_out:
        runs = "run is" if loaded.left_out == 1 else "runs are"
        parts.append(_note(f"{loaded.left_out} older {runs} left out; --all shows every run."))
    return Group(*parts)


def clean(text: str) -> str:
    """`text` without control, formatting and unassigned characters, on one line."""
    kept = (" " if c.isspace() else c for c in text if c.isspace() or _is_visible(c))
    return " ".join("".join(kept).split())


def _is_visible(character: str) -> bool:
    return not unicodedata.category(character).startswith("C")


@dataclass(frozen=True)
class Bar:
    """A bar `share` of the whole width long; ASCII where the output knows no blocks."""

    share: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar at the width given."""
        length = self.share * min(options.max_width, BAR_WIDTH)
        if options.ascii_only:
            yield Text("#" * round(length), self.style)
            return
        whole, rest = divmod(round(length * 8), 8)
        yield Text("█" * whole + (EIGHTHS[rest] if rest else ""), self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Anything from 4 columns on."""
        return Measurement(4, min(BAR_WIDTH, options.max_width))


@dataclass(frozen=True)
class _Line:
    """One line of the table: a phase, a category in it, or one of the closing lines."""

    label: str
    ns: float
    key: tuple[str, str]  # phase, category; the same in every run
    category: str | None = None
    span: tuple[float, float] | None = None
    count: float | None = None

    @property
    def is_heading(self) -> bool:
        return self.category is None


def _lines(breakdown: Breakdown) -> Iterator[_Line]:
    """Phases with their categories, idle by phase, unattributed: they add up to the step."""
    for phase in PHASES:
        rows = [row for row in breakdown.rows if row.phase == phase]
        if not rows:
            continue
        yield _Line(phase, sum(row.ns for row in rows), (phase, ""))
        for row in sorted(rows, key=lambda row: CATEGORIES.index(row.category)):
            span = (row.min_ns, row.max_ns)
            label = LABELS.get(row.category, row.category)
            yield _Line(label, row.ns, (phase, row.category), row.category, span, row.count)
    yield _Line("idle", breakdown.idle_ns, ("idle", ""))
    for phase in PHASES:
        if breakdown.idle_by_phase_ns.get(phase, 0) > 0:
            ns = breakdown.idle_by_phase_ns[phase]
            label = "elsewhere" if phase == "other" else f"in {phase}"
            yield _Line(label, ns, ("idle", phase), "idle")
    yield _Line("unattributed", breakdown.unattributed_ns, ("unattributed", ""))


def _single(breakdown: Breakdown, top: int) -> Iterator[RenderableType]:
    yield _title(breakdown)
    yield Padding(_phases(breakdown), (1, 0, 0, 0))
    for note in _notes(breakdown):
        yield _note(note)
    if top and breakdown.operators:
        yield Padding(_operators("Longest operators", breakdown.operators[:top], breakdown), (1, 0))
    if breakdown.unattributed_ns > NAMED_FROM * breakdown.step_ns.median:
        unknown = breakdown.unattributed_operators[: max(top, 5)]
        yield Padding(_operators("What no rule places", unknown, breakdown), (1, 0))


def _title(breakdown: Breakdown) -> Text:
    step = breakdown.step_ns
    steps = "1 step" if breakdown.steps == 1 else f"{breakdown.steps} steps"
    digits = _digits(step.median)
    spread = f" ({_span(step.min, step.max, digits)})" if breakdown.steps > 1 else ""
    title = Text(clean(breakdown.name), "bold", no_wrap=True, overflow="ellipsis")
    line = (
        f"{clean(breakdown.device)}, {steps} profiled, {_ms(step.median, digits)} ms{spread} each"
    )
    return Text("\n").join([title, Text(line, "dim", no_wrap=True, overflow="ellipsis")])


def _table() -> Table:
    return Table(
        box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim", collapse_padding=True
    )


def _phases(breakdown: Breakdown) -> Table:
    table = _table()
    table.add_column("phase, category", width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for name in ("ms/step", "share", "min-max ms", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    table.expand = True
    total = breakdown.step_ns.median
    digits = _digits(total)
    lines = list(_lines(breakdown))
    longest = max([line.ns for line in lines if not line.is_heading] + [1.0])
    for line in lines:
        style = "bold" if line.is_heading else ""
        label = line.label if line.is_heading else f"  {line.label}"
        if line.is_heading and line is not lines[0]:
            table.add_row()
        table.add_row(
            Text(label, style),
            Text(_ms(line.ns, digits), style),
            Text(_share(line.ns / total), style),
            Text(_span(*line.span, digits) if line.span else "", "dim"),
            Text(f"{line.count:,.0f}" if line.count is not None else "", "dim"),
            Bar(line.ns / longest, STYLES[line.category]) if line.category else "",
        )
    step = breakdown.step_ns
    span = _span(step.min, step.max, digits)
    table.add_row()
    cells = ("step", _ms(total, digits), _share(1.0))
    table.add_row(*(Text(cell, "bold") for cell in cells), Text(span, "dim"), "", "")
    return table


def _notes(breakdown: Breakdown) -> Iterator[str]:
    if breakdown.device == "cpu":
        yield "Idle: no operator runs (Python, hooks, the framework between operators)."
    else:
        yield "Idle: nothing runs on the device, which waits for the phase named."
    step = breakdown.step_ns
    if step.max > UNLIKE * step.min:
        yield "The steps differ much: something else used the machine, or their work is unlike."
    if breakdown.overlap_ns > 0.001 * breakdown.step_ns.median:
        ms = _ms(breakdown.overlap_ns, _digits(breakdown.step_ns.median))
        yield f"Overlap: {ms} ms of further work a step ran beside what is counted here."


def _operators(title: str, operators: Sequence[Operator], breakdown: Breakdown) -> Table:
    table = _table()
    table.expand = True
    table.add_column(title.lower(), ratio=1, no_wrap=True, overflow="ellipsis")
    table.add_column("category", no_wrap=True)
    for name in ("ms/step", "share", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    digits = _digits(breakdown.step_ns.median)
    for operator in operators:
        table.add_row(
            Text(clean(operator.name).removeprefix("void ")),
            Text(LABELS.get(operator.category, operator.category), STYLES[operator.category]),
            _ms(operator.ns, digits),
            _share(operator.share),
            Text(f"{operator.count:,.0f}", "dim"),
        )
    return table


@dataclass(frozen=True)
class _Comparison:
    """Runs side by side, as many to a table as the width allows."""

    loaded: Loaded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        runs = self.loaded.breakdowns
        yield from self._verdict()
        for number, run in enumerate(runs, 1):
            yield Text.assemble(
                f"{number}  ",
                (clean(run.name), "bold"),
                f"  {clean(run.device)}",
                no_wrap=True,
                overflow="ellipsis",
            )
        room = max(1, (options.max_width - NAME_WIDTH) // (RUN_WIDTH + 2))
        keys = _all_keys(runs)
        for first in range(0, len(runs), room):
            chunk = list(enumerate(runs, 1))[first : first + room]
            delta = len(runs) == 2 and room >= 3
            yield Padding(_side_by_side(chunk, keys, delta), (1, 0, 0, 0))

    def _verdict(self) -> Iterator[Text]:
        if self.loaded.comparable is None:
            yield Text("Whether these runs are comparable is not known: not all have a run.json.\n")
        elif self.loaded.comparable:
            yield Text(
                "Comparable: the same model, data, batches, precision, seed and device.\n", "green"
            )
        else:
            yield Text("Not comparable; they differ in:", "bold red")
            for difference in self.loaded.differences:
                yield Text(f"  {clean(difference)}", no_wrap=True, overflow="ellipsis")
            yield Text()


def _all_keys(runs: Sequence[Breakdown]) -> list[_Line]:
    """One line for every phase and category that any of the runs has, in order."""
    found = {line.key: line for run in runs for line in _lines(run)}
    phases = [*PHASES, "idle", "unattributed"]

    def place(line: _Line) -> tuple[int, int]:
        phase, part = line.key
        parts: Sequence[str] = PHASES if phase == "idle" else CATEGORIES
        return phases.index(phase), parts.index(part) if part else -1

    return sorted(found.values(), key=place)


def _side_by_side(
    runs: Sequence[tuple[int, Breakdown]], keys: Sequence[_Line], delta: bool
) -> Table:
    table = _table()
    table.add_column("\nphase, category", width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for number, run in runs:
        name = Text(f"{number} {clean(run.name)}", no_wrap=True, overflow="ellipsis")
        name.truncate(RUN_WIDTH, overflow="ellipsis")
        head = Text("\n").join([name, Text("ms/step      %")])
        table.add_column(head, justify="right", width=RUN_WIDTH, no_wrap=True)
    if delta:
        table.add_column("2 - 1\nms/step", justify="right", no_wrap=True)
    digits = min(_digits(run.step_ns.median) for _, run in runs)
    times = [{line.key: line.ns for line in _lines(run)} for _, run in runs]
    totals = [run.step_ns.median for _, run in runs]

    def add(label: str, style: str, values: Sequence[float]) -> None:
        cells = [
            Text(f"{_ms(ns, digits)} {100 * ns / total:6.1f}" if ns else "-", style)
            for ns, total in zip(values, totals, strict=True)
        ]
        change = []
        if delta:
            text = f"{(values[1] - values[0]) / 1e6:+,.{digits}f}" if any(values) else "-"
            change.append(Text(text, style))
        table.add_row(Text(label, style), *cells, *change)

    for line in keys:
        if line.is_heading and line is not keys[0]:
            table.add_row()
        label = line.label if line.is_heading else f"  {line.label}"
        style = "bold" if line.is_heading else ""
        add(label, style, [found.get(line.key, 0.0) for found in times])
    table.add_row()
    add("step", "bold", totals)
    return table


def _note(text: str) -> Text:
    return Text(text, "dim")


def _digits(step_ns: float) -> int:
    """Decimals of milliseconds: three or four figures of the step."""
    return 1 if step_ns >= 1e9 else 2 if step_ns >= 1e7 else 3


def _ms(ns: float, digits: int) -> str:
    return f"{ns / 1e6:,.{digits}f}"


def _span(low: float, high: float, digits: int) -> str:
    return f"{_ms(low, digits)}-{_ms(high, digits)}"


def _share(share: float) -> str:
    return f"{100 * share:.1f} %"
