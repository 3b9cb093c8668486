"""A waterfall: from one run's step to another's, by category, adding up."""

import math
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from peftprof.breakdowns import Bar, Breakdown, Comparison
from peftprof.report import pieces, words
from peftprof.report.pieces import NAME_WIDTH, Floating

REST = "the rest"
SMALL = 0.02  # of the longest bar: what is smaller goes into the rest
MOST = 10


def grouped(bars: Sequence[Bar]) -> list[Bar]:
    """The largest bars first; the tiny ones as one, so that the sum stays what it is."""
    ordered = sorted((bar for bar in bars if bar.ns), key=lambda bar: -abs(bar.ns))
    if not ordered:
        return []
    floor = SMALL * abs(ordered[0].ns)
    kept = [bar for bar in ordered[:MOST] if abs(bar.ns) >= floor]
    rest = ordered[len(kept) :]
    if len(rest) < 2:
        return ordered
    return [*kept, Bar(REST, math.fsum(bar.ns for bar in rest))]


def waterfall(runs: Sequence[Breakdown], comparison: Comparison) -> Table:
    """The step of run `base`, what each category adds or takes, the step of run `other`.

    The bars float at the running total; their axis spans the totals that occur, not zero.
    """
    base = runs[comparison.base].step_ns.median
    other = runs[comparison.other].step_ns.median
    bars = grouped(comparison.bars)
    totals = [base]
    for bar in bars:
        totals.append(totals[-1] + bar.ns)
    low, high = min(*totals, other), max(*totals, other)
    reach = max(high - low, 1e-9)

    decimals = min(words.digits(base), words.digits(other))
    table = pieces.table(expand=True)
    head = f"{comparison.base + 1} to {comparison.other + 1}"
    table.add_column(head, width=NAME_WIDTH, no_wrap=True)
    table.add_column("ms/step", justify="right", no_wrap=True)
    table.add_column(f"of {comparison.base + 1}", justify="right", no_wrap=True)
    table.add_column("", ratio=1)

    def step(run: int, ns: float) -> None:
        at = (ns - low) / reach
        cells = (f"step of {run + 1}", words.ms(ns, decimals), words.percent(ns / base))
        table.add_row(*(Text(cell, "bold") for cell in cells), Floating(at, at, "bold"))

    step(comparison.base, base)
    for bar, before, after in zip(bars, totals, totals[1:], strict=False):
        table.add_row(
            Text(f"  {words.label(bar.category)}"),
            words.change(bar.ns, decimals),
            Text(f"{100 * bar.ns / base:+.1f} %", "dim"),
            Floating(
                (before - low) / reach, (after - low) / reach, "green" if bar.ns < 0 else "red"
            ),
        )
    step(comparison.other, other)
    return table
