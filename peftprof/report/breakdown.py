"""Breakdowns in a terminal: one run as tables with bars, several side by side.

Everything is text of the trace's own making, so it is never read as markup and is rid of
control characters.
"""

from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from peftprof.breakdowns import Breakdown
from peftprof.report import memory, phases, pieces, sections, words
from peftprof.report.comparison import SideBySide, origin
from peftprof.report.pieces import STYLES
from peftprof.report.words import LABELS, clean
from peftprof.trace import Loaded

__all__ = ["LABELS", "STYLES", "clean", "render"]


def render(loaded: Loaded, top: int = 10) -> Group:
    """`loaded` for a rich console; `top` operators, layers and rules are listed for one run."""
    parts: list[RenderableType]
    if len(loaded.breakdowns) == 1:
        parts = list(_single(loaded.breakdowns[0], top))
    else:
        parts = [SideBySide(loaded)]
    if loaded.left_out:
        parts.append(pieces.note(left_out(loaded.left_out)))
    return Group(*parts)


def left_out(count: int) -> str:
    """That older runs are not shown."""
    runs = "run is" if count == 1 else "runs are"
    return f"{count} older {runs} left out; --all shows every run."


def headline(breakdown: Breakdown) -> str:
    """Where the run was made, its steps and how long they are."""
    step = breakdown.step_ns
    decimals = words.digits(step.median)
    spread = f" ({words.span(step.min, step.max, decimals)})" if breakdown.steps > 1 else ""
    return (
        f"{origin(breakdown)}, {words.steps(breakdown.steps)} profiled, "
        f"{words.ms(step.median, decimals)} ms{spread} each"
    )


def _single(breakdown: Breakdown, top: int) -> Iterator[RenderableType]:
    title = Text(clean(breakdown.name), "bold", no_wrap=True, overflow="ellipsis")
    yield Text("\n").join([title, pieces.line((headline(breakdown), "dim"))])
    yield Padding(phases.one_run(breakdown), (1, 0, 0, 0))
    yield from (pieces.note(text) for text in sections.notes(breakdown))
    yield from sections.below(breakdown, top)
    if breakdown.memory is not None:
        yield from memory.section(breakdown.memory)
    yield from sections.rules(breakdown, top)
