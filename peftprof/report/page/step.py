"""Where the step goes: what was read, a stacked bar a run, the table of phase x category."""

from collections.abc import Iterator, Sequence

from peftprof.breakdowns import CATEGORIES, PHASES, Breakdown, Placed, Row
from peftprof.report.page import numbers, parts
from peftprof.report.page.colours import colour_class, legend
from peftprof.report.page.markup import SPACE, Html, join, tag
from peftprof.report.page.parts import x_percent
from peftprof.report.words import digits, label

LETTER = 6.6  # pixels, of a label's letter
PADDING = 14  # pixels round a label
# Classes of labels that still fit at a page of this many pixels; page.css hides the others.
WIDTHS = (("fits-340", 340), ("fits-640", 640), ("fits-980", 980))


def what_was_read(runs: Sequence[Breakdown]) -> Html:
    """One row a run: device, reader, steps and how they were found, median and range."""
    ranks = any(run.rank is not None for run in runs)
    head = ["run", "device", "read from", *(["rank"] if ranks else []), ">steps", "found by"]
    rows = []
    for i, run in enumerate(runs):
        step, places = run.step_ns, digits(run.step_ns.median)
        rank = "" if run.rank is None else f"{run.rank}"
        rows.append(
            tag(
                "tr",
                tag("td", parts.run_name(i, run)),
                parts.name(run.device),
                tag("td", run.source),
                *([tag("td", rank)] if ranks else []),
                parts.number(numbers.count(run.steps)),
                parts.name(run.steps_by or "not told"),
                parts.time(step.median, places, f"/runs/{i}/step_ns/median"),
                parts.number(numbers.between(step.min, step.max, places)),
            )
        )
    return parts.table([*head, ">step, median ms", f">min{numbers.TO}max ms"], rows, "read")


def stacked_bars(runs: Sequence[Breakdown]) -> Html:
    """One bar a run, all on one scale: phases x categories, idle, unattributed."""
    longest = max([run.step_ns.median for run in runs], default=0) or 1.0
    used = {"idle", "unattributed"} | {row.category for run in runs for row in run.rows}
    bars = [_bar(number, run, longest) for number, run in enumerate(runs)]
    return join(*bars, legend(used))


def _bar(number: int, run: Breakdown, longest: float) -> Html:
    pieces: list[Html] = []
    at = 0.0
    for title, group in _groups(number, run):
        start = at
        for category, ns, where in group:
            pieces += _segment(category, ns, at / longest, ns / longest, where)
            at += ns
        if group and at > start:
            pieces += _bracket(title, start / longest, (at - start) / longest)
    step = run.step_ns.median
    drawing = tag(
        "svg",
        *pieces,
        width="100%",
        height="72",
        role="img",
        aria_label=f"{run.name}: the step by phase and category; the table has the figures",
    )
    places = digits(step)
    time = tag("span", f"{numbers.ms(step, places)} ms", class_="total", data_ns=step)
    caption = tag("figcaption", parts.run_name(number, run), SPACE, time)
    return tag("figure", caption, drawing, class_="stack")


def _groups(number: int, run: Breakdown) -> Iterator[tuple[str, list[tuple[str, float, str]]]]:
    """Stretches of the bar under one title: (category, ns, place in the JSON) each."""
    for phase in PHASES:
        rows = [(i, row) for i, row in enumerate(run.rows) if row.phase == phase]
        rows.sort(key=lambda item: CATEGORIES.index(item[1].category))
        yield phase, [(r.category, r.ns, f"/runs/{number}/rows/{i}/ns") for i, r in rows]
    yield "idle", [("idle", run.idle_ns, f"/runs/{number}/idle_ns")]
    where = f"/runs/{number}/unattributed_ns"
    yield "unattributed", [("unattributed", run.unattributed_ns, where)]


def _segment(category: str, ns: float, start: float, width: float, at: str) -> Iterator[Html]:
    title = tag("title", f"{label(category)}: {numbers.duration(ns)}")
    yield tag(
        "rect",
        title,
        x=x_percent(start),
        y="20",
        width=x_percent(width),
        height="46",
        # A gap between neighbours would hide a narrow one.
        class_=colour_class(category) + ("" if width > 0.004 else " narrow"),
        data_ns=ns,
        data_at=at,
    )
    room = _room(width, label(category))
    if room:
        words = (
            tag("text", label(category), x="7", y="20"),
            tag("text", f"{numbers.duration(ns)}", x="7", y="36", class_="figure"),
        )
        group = tag("g", *words, class_=f"on-{category}")
        yield tag(
            "svg", group, x=x_percent(start), y="20", width=x_percent(width), height="46",
            class_=room,
        )  # fmt: skip


def _bracket(title: str, start: float, width: float) -> Iterator[Html]:
    yield tag(
        "line", x1=x_percent(start), x2=x_percent(start + width), y1="16.5", y2="16.5",
        class_="bracket",
    )  # fmt: skip
    room = _room(width, title)
    if room and title != "unattributed":
        yield tag("text", title, x=x_percent(start), y="11", class_=f"phase {room}")


def _room(width: float, words: str) -> str:
    """The class that shows words on a stretch only where the page has room for them."""
    needed = LETTER * len(words) + PADDING
    return next((name for name, pixels in WIDTHS if width * pixels >= needed), "")


def phase_tables(runs: Sequence[Breakdown]) -> Html:
    """Phase x category: one run whole; several side by side, and each whole, folded away."""
    if len(runs) == 1:
        return _whole(0, runs[0])
    folded = [
        tag("details", tag("summary", parts.run_name(i, run)), _whole(i, run))
        for i, run in enumerate(runs)
    ]
    return join(_side_by_side(runs), tag("h3", "Each run with ranges, calls and rules"), *folded)


def _whole(number: int, run: Breakdown) -> Html:
    total = run.step_ns.median or 1.0
    places = digits(total)
    rows: list[Html] = []
    longest = max([r.ns for r in run.rows] + [run.idle_ns, run.unattributed_ns, 1.0])
    for phase in PHASES:
        inside = [(i, row) for i, row in enumerate(run.rows) if row.phase == phase]
        if inside:
            rows.append(_sum(phase, sum(row.ns for _, row in inside), total, places))
        inside.sort(key=lambda item: CATEGORIES.index(item[1].category))
        rows += [_row(row, f"/runs/{number}/rows/{i}/ns", longest, places) for i, row in inside]
    rows.append(_sum("idle", run.idle_ns, total, places, f"/runs/{number}/idle_ns"))
    for phase, ns in run.idle_by_phase_ns.items():
        if ns > 0:
            title = "elsewhere" if phase == "other" else f"in {phase}"
            where = f"/runs/{number}/idle_by_phase_ns/{phase}"
            rows.append(_idle(title, ns, where, longest, total, places))
    where = f"/runs/{number}/unattributed_ns"
    rows.append(_sum("unattributed", run.unattributed_ns, total, places, where))
    at = f"/runs/{number}/step_ns/median"
    rows.append(_sum("step", run.step_ns.median, total, places, at, "sum"))
    head = ["phase, category", "", ">ms/step", ">share", f">min{numbers.TO}max ms", ">calls"]
    return parts.table([*head, "placed by"], rows, "phases")


def _row(row: Row, at: str, longest: float, places: int) -> Html:
    return tag(
        "tr",
        parts.category(row.category),
        parts.row_bar([(0, row.ns / longest, colour_class(row.category))]),
        parts.time(row.ns, places, at),
        parts.number(numbers.percent(row.share)),
        parts.number(numbers.between(row.min_ns, row.max_ns, places), kind="quiet"),
        parts.number(numbers.count(row.count), kind="quiet"),
        parts.name(placed_by(row.rules)),
    )


def _idle(title: str, ns: float, at: str, longest: float, total: float, places: int) -> Html:
    return tag(
        "tr",
        tag("td", title, class_="category"),
        parts.row_bar([(0, ns / longest, "c-idle")]),
        parts.time(ns, places, at),
        parts.number(numbers.percent(ns / total)),
        tag("td", colspan="3"),
    )


def _sum(
    title: str, ns: float, total: float, places: int, at: str | None = None, kind: str = "group"
) -> Html:
    cells = (
        tag("th", title, scope="row"),
        tag("td"),
        parts.time(ns, places, at),
        parts.number(numbers.percent(ns / total)),
        tag("td", colspan="3"),
    )
    return tag("tr", *cells, class_=kind)


def placed_by(rules: Sequence[Placed]) -> str:
    """The rules that placed a time, with their shares where there are several."""
    if len(rules) == 1:
        return rules[0].rule
    return ", ".join(f"{placed.rule} {100 * placed.share:.0f} %" for placed in rules)


def _side_by_side(runs: Sequence[Breakdown]) -> Html:
    places = min(digits(run.step_ns.median) for run in runs)
    found = [
        {(row.phase, row.category): (i, row) for i, row in enumerate(run.rows)} for run in runs
    ]
    rows: list[Html] = []
    for phase in PHASES:
        keys = [(phase, c) for c in CATEGORIES if any((phase, c) in rows_ for rows_ in found)]
        if keys:
            sums = [sum(r.ns for r in run.rows if r.phase == phase) for run in runs]
            rows.append(_across(tag("th", phase, scope="row"), runs, sums, None, places, "group"))
        for key in keys:
            values = [rows_[key][1].ns if key in rows_ else None for rows_ in found]
            ats = [
                f"/runs/{n}/rows/{rows_[key][0]}/ns" if key in rows_ else None
                for n, rows_ in enumerate(found)
            ]
            rows.append(_across(parts.category(key[1]), runs, values, ats, places))
    for title in ("idle", "unattributed"):
        ats = [f"/runs/{n}/{title}_ns" for n in range(len(runs))]
        values = [run.idle_ns if title == "idle" else run.unattributed_ns for run in runs]
        rows.append(_across(tag("th", title, scope="row"), runs, values, ats, places, "group"))
    ats = [f"/runs/{n}/step_ns/median" for n in range(len(runs))]
    steps = [run.step_ns.median for run in runs]
    rows.append(_across(tag("th", "step", scope="row"), runs, steps, ats, places, "sum"))
    head = ["phase, category"]
    for n in range(len(runs)):
        head += [f">{n + 1}, ms/step", ">share"]
    if len(runs) == 2:
        head.append(f">2 {numbers.MINUS} 1, ms")
    return parts.table(head, rows, "phases")


def _across(
    title: Html,
    runs: Sequence[Breakdown],
    values: Sequence[float | None],
    ats: Sequence[str | None] | None,
    places: int,
    kind: str | None = None,
) -> Html:
    cells = [title]
    for n, (run, ns) in enumerate(zip(runs, values, strict=True)):
        if ns is None:
            cells += [parts.number("-"), tag("td")]
        else:
            share = ns / (run.step_ns.median or 1.0)
            cells.append(parts.time(ns, places, ats[n] if ats else None))
            cells.append(parts.number(numbers.percent(share), kind="quiet"))
    if len(runs) == 2:
        cells.append(parts.change((values[1] or 0.0) - (values[0] or 0.0), places))
    return tag("tr", *cells, class_=kind)
