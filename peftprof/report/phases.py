"""The lines of a breakdown that add up to its step, one run or several side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.table import Table
from rich.text import Text

from peftprof.breakdowns import CATEGORIES, IDLE_CAUSES, PHASES, Breakdown
from peftprof.report import pieces, words
from peftprof.report.pieces import NAME_WIDTH, STYLES, Bar

RUN_WIDTH = 14
BY_CAUSE = "by cause"


@dataclass(frozen=True)
class Line:
    """One line of the table: a phase, a category in it, or one of the closing lines.

    A heading has no category. Idle is told twice, by phase and by cause: the lines whose
    key is (`by cause`, ...) are the same time again.
    """

    label: str
    ns: float
    key: tuple[str, str]  # phase, category; the same in every run
    category: str | None = None
    span: tuple[float, float] | None = None
    count: float | None = None

    @property
    def is_heading(self) -> bool:
        """Whether it sums up the lines below it."""
        return self.category is None


def lines(breakdown: Breakdown) -> Iterator[Line]:
    """Phases with their categories, idle by phase and cause, unattributed."""
    for phase in PHASES:
        rows = [row for row in breakdown.rows if row.phase == phase]
        if not rows:
            continue
        yield Line(phase, sum(row.ns for row in rows), (phase, ""))
        for row in sorted(rows, key=lambda row: CATEGORIES.index(row.category)):
            span = (row.min_ns, row.max_ns)
            label = words.label(row.category)
            yield Line(label, row.ns, (phase, row.category), row.category, span, row.count)
    yield Line("idle", breakdown.idle_ns, ("idle", ""))
    for phase in PHASES:
        if breakdown.idle_by_phase_ns.get(phase, 0) > 0:
            ns = breakdown.idle_by_phase_ns[phase]
            label = "elsewhere" if phase == "other" else f"in {phase}"
            yield Line(label, ns, ("idle", phase), "idle")
    for cause in IDLE_CAUSES:
        if breakdown.idle_by_cause_ns.get(cause, 0) > 0:
            ns = breakdown.idle_by_cause_ns[cause]
            yield Line(words.CAUSES[cause], ns, (BY_CAUSE, cause), "idle")
    yield Line("unattributed", breakdown.unattributed_ns, ("unattributed", ""))


def all_lines(runs: Sequence[Breakdown]) -> list[Line]:
    """One line for every phase and category that any of the runs has, in order."""
    found = {line.key: line for run in runs for line in lines(run)}
    phases = [*PHASES, "idle", BY_CAUSE, "unattributed"]
    inside: dict[str, Sequence[str]] = {"idle": PHASES, BY_CAUSE: IDLE_CAUSES}

    def place(line: Line) -> tuple[int, int]:
        phase, part = line.key
        parts = inside.get(phase, CATEGORIES)
        return phases.index(phase), parts.index(part) if part else -1

    return sorted(found.values(), key=place)


def one_run(breakdown: Breakdown) -> Table:
    """The lines of one run with their spread, calls and bars."""
    table = pieces.table(expand=True)
    table.add_column("phase, category", width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for name in ("ms/step", "share", "min-max ms", "calls"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    total = breakdown.step_ns.median
    digits = words.digits(total)
    shown = list(lines(breakdown))
    longest = max([line.ns for line in shown if not line.is_heading] + [1.0])
    before = None
    for line in shown:
        _separate(table, line, before)
        style = "bold" if line.is_heading else ""
        table.add_row(
            Text(line.label if line.is_heading else f"  {line.label}", style),
            Text(words.ms(line.ns, digits), style),
            Text(words.percent(line.ns / total), style),
            Text(words.span(*line.span, digits) if line.span else "", "dim"),
            Text(f"{line.count:,.0f}" if line.count is not None else "", "dim"),
            Bar(line.ns / longest, STYLES[line.category]) if line.category else "",
        )
        before = line
    step = breakdown.step_ns
    table.add_row()
    cells = ("step", words.ms(total, digits), words.percent(1.0))
    spread = Text(words.span(step.min, step.max, digits), "dim")
    table.add_row(*(Text(cell, "bold") for cell in cells), spread, "", "")
    return table


def _separate(table: Table, line: Line, before: Line | None) -> None:
    """What stands between a line and the one before it."""
    if before is None:
        return
    if line.is_heading:
        table.add_row()
    elif line.key[0] == BY_CAUSE != before.key[0]:
        table.add_row(Text("  or, by cause:", "dim"))


def side_by_side(
    runs: Sequence[tuple[int, Breakdown]], shown: Sequence[Line], delta: bool, bars: bool = False
) -> Table:
    """The lines `shown` of several numbered runs.

    With `delta` the second less the first, with `bars` as a bar too: red for more time.
    """
    table = pieces.table(expand=bars)
    table.add_column("\nphase, category", width=NAME_WIDTH, no_wrap=True, overflow="ellipsis")
    for number, run in runs:
        name = Text(f"{number} {words.clean(run.name)}", no_wrap=True, overflow="ellipsis")
        name.truncate(RUN_WIDTH, overflow="ellipsis")
        head = Text("\n").join([name, Text("ms/step      %")])
        table.add_column(head, justify="right", width=RUN_WIDTH, no_wrap=True)
    if delta:
        table.add_column("2 - 1\nms/step", justify="right", no_wrap=True)
    if bars:
        table.add_column("", ratio=1)
    digits = min(words.digits(run.step_ns.median) for _, run in runs)
    times = [{line.key: line.ns for line in lines(run)} for _, run in runs]
    totals = [run.step_ns.median for _, run in runs]
    longest = _furthest(shown, times) if bars else 0.0

    def add(label: str, style: str, values: Sequence[float], bar: bool = False) -> None:
        cells: list[Text | Bar] = [
            Text(f"{words.ms(ns, digits)} {100 * ns / total:6.1f}" if ns else "-", style)
            for ns, total in zip(values, totals, strict=True)
        ]
        if delta:
            text = words.change(values[1] - values[0], digits) if any(values) else "-"
            cells.append(Text(text, style))
        if bar and longest:
            apart = values[1] - values[0]
            cells.append(Bar(abs(apart) / longest, "green" if apart < 0 else "red"))
        table.add_row(Text(label, style), *cells)

    before = None
    for line in shown:
        _separate(table, line, before)
        style = "bold" if line.is_heading else ""
        label = line.label if line.is_heading else f"  {line.label}"
        add(label, style, [found.get(line.key, 0.0) for found in times], not line.is_heading)
        before = line
    table.add_row()
    add("step", "bold", totals)
    return table


def _furthest(shown: Sequence[Line], times: Sequence[dict[tuple[str, str], float]]) -> float:
    """The largest difference of two runs in any line that is no heading."""
    keys = [line.key for line in shown if not line.is_heading]
    return max((abs(times[1].get(key, 0.0) - times[0].get(key, 0.0)) for key in keys), default=0.0)
