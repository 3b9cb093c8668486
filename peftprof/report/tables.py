"""The breakdown for spreadsheets (CSV) and for issues and pull requests (GitHub Markdown)."""

import csv
import io
import re
from collections.abc import Iterator, Sequence

from peftprof.breakdowns import IDLE_CAUSES, PHASES, Breakdown, Operator, Spread
from peftprof.report import comparison, memory, phases, sections, waterfall, words
from peftprof.report.breakdown import headline, left_out
from peftprof.trace import Loaded

COLUMNS = ["run", "source", "device", "steps", "step_ns", "phase", "category", "ns", "share"]
COLUMNS += ["min_ns", "max_ns", "count"]
FORMULA = ("=", "+", "-", "@")
# What Markdown or HTML could take for its own. An escaped pipe does not end a table's cell.
ESCAPES = {ord(c): f"\\{c}" for c in "\\`*_[]#|~$"}
LIST = re.compile(r"^(\d*)([-+=.)])")  # what would begin a list or a heading
ESCAPES |= {ord("&"): "&amp;", ord("<"): "&lt;", ord(">"): "&gt;"}

Cells = Sequence[str]


def to_csv(loaded: Loaded) -> str:
    """One table, a line for each run x phase x category.

    The `ns` of a run's lines sum to its `step_ns`: idle is in as `idle.launch`, `idle.data`,
    `idle.sync` and `idle.queued` without a phase where its causes are known, else as `idle`
    by phase. A name that a spreadsheet would take for a formula, because it begins with
    = + - or @, gets an apostrophe before it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in loaded.breakdowns:
        origin = [_guarded(run.name), _guarded(run.source), _guarded(run.device)]
        for line in _csv_lines(run):
            writer.writerow([*origin, run.steps, run.step_ns.median, *line])
    return out.getvalue()


def _csv_lines(run: Breakdown) -> Iterator[list[str | float]]:
    total = run.step_ns.median
    for row in run.rows:
        yield [row.phase, row.category, row.ns, row.share, row.min_ns, row.max_ns, row.count]
    for phase, name, ns in _idle(run):
        yield [phase, name, ns, ns / total, "", "", ""]
    yield ["", "unattributed", run.unattributed_ns, run.unattributed_ns / total, "", "", ""]


def _idle(run: Breakdown) -> Iterator[tuple[str, str, float]]:
    """Phase, name and time of the idle lines, once each: by cause where it is known."""
    by_cause, by_phase = run.idle_by_cause_ns, run.idle_by_phase_ns
    if by_cause:
        yield from (("", f"idle.{c}", by_cause[c]) for c in IDLE_CAUSES if by_cause.get(c))
    elif by_phase:
        yield from ((p, "idle", by_phase[p]) for p in PHASES if by_phase.get(p))
    else:
        yield "", "idle", run.idle_ns


def _guarded(text: str) -> str:
    text = words.clean(text)
    return f"'{text}" if text.startswith(FORMULA) else text


def to_markdown(loaded: Loaded, top: int = 10) -> str:
    """The report as GitHub Markdown; `top` operators and layers are listed for one run."""
    runs = loaded.breakdowns
    parts = list(_one(runs[0], top)) if len(runs) == 1 else list(_several(loaded))
    if loaded.left_out:
        parts.append(left_out(loaded.left_out))
    return "\n\n".join(parts) + "\n"


def escaped(text: str) -> str:
    """`text` as Markdown shows it letter by letter, in a table's cell too."""
    kept = words.clean(text).translate(ESCAPES)
    return LIST.sub(r"\1\\\2", kept)


def code(name: str) -> str:
    """A name in the type of code. Nothing in it is markup, and GitHub links nothing in it."""
    return f"<code>{escaped(name)}</code>"


def _table(head: Cells, rows: Sequence[Cells], left: int = 1) -> str:
    """A table whose first `left` columns stand left, the others right."""
    rule = ["---" if i < left else "---:" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def _bold(text: str) -> str:
    return f"**{text}**"


def _one(run: Breakdown, top: int) -> Iterator[str]:
    yield f"### {code(run.name)}"
    yield escaped(headline(run))
    yield _rows(run)
    yield "\n".join(f"- {escaped(text)}" for text in sections.notes(run))
    if top and run.operators:
        yield _operators(run.operators[:top], run.step_ns)
    if top and run.layers:
        decimals = words.digits(run.step_ns.median)
        yield _table(
            ("longest layers", "forward ms", "backward ms", "share"),
            [
                (
                    code(layer.path),
                    words.ms(layer.forward_ns, decimals),
                    words.ms(layer.backward_ns, decimals),
                    words.percent(layer.share),
                )
                for layer in sections.longest_layers(run.layers, top)
            ],
        )
    yield from _work(run)
    yield from _memory(run)


def _rows(run: Breakdown) -> str:
    total = run.step_ns.median
    decimals = words.digits(total)
    rows: list[Cells] = []
    for line in phases.lines(run):
        label = _bold(line.label) if line.is_heading else f"&emsp;{line.label}"
        if line.key[0] == phases.BY_CAUSE:
            label = f"&emsp;of idle: {line.label}"
        ns, share = words.ms(line.ns, decimals), words.percent(line.ns / total)
        if line.is_heading:
            ns, share = _bold(ns), _bold(share)
        spread = words.span(*line.span, decimals) if line.span else ""
        rows.append((label, ns, share, spread, "" if line.count is None else f"{line.count:,.0f}"))
    step = [_bold(text) for text in ("step", words.ms(total, decimals), words.percent(1.0))]
    spread = words.span(run.step_ns.min, run.step_ns.max, decimals)
    rows.append((*step, spread, ""))
    return _table(("phase, category", "ms/step", "share", "min-max ms", "calls"), rows)


def _operators(operators: Sequence[Operator], step_ns: Spread) -> str:
    decimals = words.digits(step_ns.median)
    rows = [
        (
            code(words.called(operator.name)),
            words.label(operator.category),
            escaped(operator.rule),
            words.ms(operator.ns, decimals),
            words.percent(operator.share),
            f"{operator.count:,.0f}",
            "" if operator.mean_ns is None else words.figures(operator.mean_ns / 1e3),
        )
        for operator in operators
    ]
    head = ("longest operators", "category", "rule", "ms/step", "share", "calls", "mean us")
    return _table(head, rows, left=3)


def _work(run: Breakdown) -> Iterator[str]:
    measured = run.ceilings is not None
    rates = ("of FLOP/s", "of bytes/s", "bound by") if measured else ("GFLOP/s", "GB/s")
    rows = [
        (
            words.label(item.category),
            words.figures(item.flops / 1e9),
            words.figures(item.bytes / 1e6),
            *sections.achieved(item, measured),
            *[item.bound or "-"] * measured,
            words.percent(item.known),
        )
        for item in sections.known_work(run)
    ]
    if rows:
        yield _table(("work a step", "GFLOP", "MB", *rates, "known"), rows)
        if run.ceilings is not None:
            yield escaped(sections.ceilings(run.ceilings))


def _memory(run: Breakdown) -> Iterator[str]:
    if run.memory is None:
        return
    peak = run.memory.peak_bytes
    rows = [
        (
            words.MEMORY.get(part.part, part.part),
            words.mib(part.bytes),
            words.percent(part.bytes / peak if peak else 0.0),
        )
        for part in run.memory.parts
    ]
    rows.append((_bold("peak"), _bold(words.mib(peak)), _bold(words.percent(1.0))))
    for level in memory.levels(run.memory):
        label = f"{level.label}, timed pass" if level.is_total else f"&emsp;{level.label}"
        rows.append((label, words.mib(level.bytes, "" if level.is_total else "+"), ""))
    yield _table(("memory", "MiB", "share"), rows)
    said = [memory.where(run.memory), *run.memory.notes]
    yield "\n".join(f"- {escaped(text)}" for text in said if text)


def _several(loaded: Loaded) -> Iterator[str]:
    runs = loaded.breakdowns
    if loaded.comparable:
        yield words.COMPARABLE
    elif loaded.comparable is None:
        yield escaped(comparison.unknown(loaded))
    else:
        reasons = [f"- {escaped(text)}" for text in loaded.differences]
        yield "\n".join([_bold(comparison.NOT_COMPARABLE), "", *reasons])
    yield "\n".join(
        f"{number}. {code(run.name)} {escaped(comparison.origin(run))}"
        for number, run in enumerate(runs, 1)
    )
    yield _side_by_side(runs)
    said = []
    for compared in loaded.comparisons:
        base, other = runs[compared.base].step_ns.median, runs[compared.other].step_ns.median
        decimals = min(words.digits(base), words.digits(other))
        bars = [
            (words.label(bar.category), words.change(bar.ns, decimals))
            for bar in waterfall.grouped(compared.bars)
        ]
        first = (_bold(f"step of {compared.base + 1}"), _bold(words.ms(base, decimals)))
        last = (_bold(f"step of {compared.other + 1}"), _bold(words.ms(other, decimals)))
        yield _table((f"{compared.base + 1} to {compared.other + 1}", "ms"), [first, *bars, last])
        text = escaped(comparison.speedup(loaded, compared))
        if text not in said:
            said.append(text)
            yield text
    if found := [f"- {escaped(text)}" for text in comparison.notes(runs)]:
        yield "\n".join(found)


def _side_by_side(runs: Sequence[Breakdown]) -> str:
    decimals = min(words.digits(run.step_ns.median) for run in runs)
    times = [{line.key: line.ns for line in phases.lines(run)} for run in runs]
    totals = [run.step_ns.median for run in runs]
    rows = []
    for line in phases.all_lines(runs):
        label = _bold(line.label) if line.is_heading else f"&emsp;{line.label}"
        if line.key[0] == phases.BY_CAUSE:
            label = f"&emsp;of idle: {line.label}"
        values = [found.get(line.key, 0.0) for found in times]
        cells = []
        for ns, total in zip(values, totals, strict=True):
            cells += [words.ms(ns, decimals), words.percent(ns / total)] if ns else ["-", "-"]
        rows.append((label, *cells))
    steps = [text for total in totals for text in (words.ms(total, decimals), words.percent(1.0))]
    rows.append((_bold("step"), *(_bold(text) for text in steps)))
    head = [text for number in range(1, len(runs) + 1) for text in (f"{number}: ms", "share")]
    return _table(("phase, category", *head), rows)
