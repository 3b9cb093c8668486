"""Several runs: whether they may be compared, and what makes one slower than another."""

from peftprof.breakdowns import Comparison
from peftprof.report.page import parts
from peftprof.report.page.markup import SPACE, Html, join, tag
from peftprof.report.page.parts import ROW_HEIGHT, x_percent
from peftprof.report.words import COMPARABLE, digits
from peftprof.trace import Loaded


def verdict(loaded: Loaded) -> Html:
    """Whether the runs are comparable, and in what they differ; empty for one run."""
    if len(loaded.breakdowns) < 2:
        return Html("")
    if loaded.comparable is None:
        return tag("p", f"Whether these runs are comparable is not known: {_unknown(loaded)}.",
                   class_="verdict unknown")  # fmt: skip
    if loaded.comparable:
        return tag("p", COMPARABLE, class_="verdict yes")
    items = [tag("li", difference) for difference in loaded.differences]
    said = tag("p", tag("strong", "Not comparable."), SPACE, "The runs differ in:")
    return tag("div", said, tag("ul", *items), class_="verdict no")


def waterfalls(loaded: Loaded) -> Html:
    """For each comparison: the base step, a signed bar a category, the other step."""
    return join(*(_waterfall(loaded, i, c) for i, c in enumerate(loaded.comparisons)))


def _waterfall(loaded: Loaded, number: int, comparison: Comparison) -> Html:
    runs = loaded.breakdowns
    base, other = runs[comparison.base], runs[comparison.other]
    places = min(digits(run.step_ns.median) for run in (base, other))
    level = base.step_ns.median
    order = sorted(enumerate(comparison.bars), key=lambda item: -abs(item[1].ns))
    longest = max(_peak(level, [bar.ns for _, bar in order]), other.step_ns.median) or 1.0
    rows = [_end(comparison.base, loaded, level / longest, places, last=False)]
    for i, bar in order:
        if not bar.ns:
            continue
        after = level + bar.ns
        low, high = sorted((level / longest, after / longest))
        drawing = parts.row_bar(
            [(low, high, "slower" if bar.ns > 0 else "faster")],
            _link(level / longest, 0, 6),
            _link(after / longest, ROW_HEIGHT - 6, ROW_HEIGHT),
        )
        at = f"/comparisons/{number}/bars/{i}/ns"
        cells = (parts.category(bar.category), drawing, parts.change(bar.ns, places, at))
        rows.append(tag("tr", *cells))
        level = after
    rows.append(_end(comparison.other, loaded, other.step_ns.median / longest, places, last=True))
    at = f"/comparisons/{number}/step_ns"
    rows.append(
        tag(
            "tr",
            tag("th", "difference", scope="row"),
            tag("td"),
            parts.change(comparison.step_ns, places, at),
            class_="sum",
        )
    )
    head = tag("h3", parts.run_name(comparison.base, base), Html(" &rarr; "),
               parts.run_name(comparison.other, other))  # fmt: skip
    drawn = parts.table(["", "", ">ms/step"], rows, "waterfall")
    return tag("div", head, _speed(loaded, comparison), drawn, class_="comparison")


def _end(number: int, loaded: Loaded, share: float, places: int, last: bool) -> Html:
    """The row of a whole step, at either end of a waterfall."""
    run = loaded.breakdowns[number]
    mark = _link(share, 0, 6) if last else _link(share, ROW_HEIGHT - 6, ROW_HEIGHT)
    return tag(
        "tr",
        tag("th", parts.run_name(number, run), scope="row"),
        parts.row_bar([(0, share, "whole")], mark),
        parts.time(run.step_ns.median, places, f"/runs/{number}/step_ns/median"),
        class_="end",
    )


def _link(share: float, top: int, bottom: int) -> Html:
    x = x_percent(share)
    return tag("line", x1=x, x2=x, y1=f"{top}", y2=f"{bottom}", class_="link")


def _peak(level: float, changes: list[float]) -> float:
    highest = level
    for change in changes:
        level += change
        highest = max(highest, level)
    return highest


def _speed(loaded: Loaded, comparison: Comparison) -> Html:
    """The speed-up where it may be said, else why it may not."""
    profiled, timed = comparison.speedup, comparison.timed_speedup
    if profiled is None and timed is None:
        return parts.note(_why_not(loaded))
    said = []
    if timed is not None:
        said.append(f"{timed:.2f}\N{MULTIPLICATION SIGN} as fast, timed without a profiler")
    if profiled is not None:
        said.append(f"{profiled:.2f}\N{MULTIPLICATION SIGN} as fast in the profiled steps")
    words = f"Run {comparison.other + 1} against run {comparison.base + 1}: {'; '.join(said)}."
    if loaded.comparable:
        return tag("p", words, class_="speed")
    why = f"The runs differ in {'; '.join(loaded.differences)}"
    if loaded.comparable is None:
        why = f"Whether the runs are comparable is not known: {_unknown(loaded)}"
    return tag("p", words, SPACE, f"Unfair. {why}.", class_="speed unfair")


def _why_not(loaded: Loaded) -> str:
    if loaded.comparable is None:
        why = "whether the runs are comparable is not known"
    elif not loaded.comparable:
        why = f"the runs differ in {'; '.join(loaded.differences)}"
    else:
        return "No speed-up is given: it is not known."
    return f"No speed-up is given: {why}. With --unfair it is given all the same."


def _unknown(loaded: Loaded) -> str:
    """Why nothing can be said on whether the runs are comparable."""
    return "; ".join(loaded.differences) or "not all have a run.json"
