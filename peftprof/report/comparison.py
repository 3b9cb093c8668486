"""Several runs: whether they may be compared, side by side, and what makes the difference."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.padding import Padding
from rich.text import Text

from peftprof.breakdowns import Breakdown, Comparison
from peftprof.report import phases, pieces, words
from peftprof.report.pieces import NAME_WIDTH, WIDE_FROM
from peftprof.report.waterfall import waterfall
from peftprof.trace import Loaded

NOT_COMPARABLE = "Not comparable:"
NOT_KNOWN = "Whether these runs are comparable is not known"


@dataclass(frozen=True)
class SideBySide:
    """Runs side by side, as many to a table as the width allows."""

    loaded: Loaded

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Verdict, tables, waterfalls."""
        runs = self.loaded.breakdowns
        yield from _verdict(self.loaded)
        for number, run in enumerate(runs, 1):
            yield pieces.line(f"{number}  ", (words.clean(run.name), "bold"), f"  {origin(run)}")
        room = max(1, (options.max_width - NAME_WIDTH) // (phases.RUN_WIDTH + 2))
        shown = phases.all_lines(runs)
        for first in range(0, len(runs), room):
            chunk = list(enumerate(runs, 1))[first : first + room]
            delta = len(runs) == 2 and room >= 3
            bars = delta and options.max_width >= WIDE_FROM
            yield Padding(phases.side_by_side(chunk, shown, delta, bars), (1, 0, 0, 0))
        yield from _below(self.loaded)


def origin(run: Breakdown) -> str:
    """Where a run was made, and its rank where there are several."""
    rank = "" if run.rank is None else f", rank {run.rank}"
    return words.clean(run.device) + rank


def unknown(loaded: Loaded) -> str:
    """Why nothing can be said on whether the runs are comparable."""
    reasons = "; ".join(words.clean(text) for text in loaded.differences)
    return f"{NOT_KNOWN}: {reasons or 'not all have a run.json'}."


def speedup(loaded: Loaded, comparison: Comparison) -> str:
    """How much faster the other run is, or why no figure is given."""
    base, other = comparison.base + 1, comparison.other + 1
    if comparison.speedup is None:
        if loaded.comparable:
            return f"No speed-up figure for {other} against {base}."
        why = "the runs are not comparable"
        if loaded.comparable is None:
            why = "whether the runs are comparable is not known"
        return f"No speed-up figure: {why} (--unfair prints it with the reasons)."
    text = f"{other} is {comparison.speedup:.2f}x as fast as {base} by the profiled steps"
    if comparison.timed_speedup is not None:
        text += f", {comparison.timed_speedup:.2f}x by the timed pass"
    text += _noise(loaded, comparison)
    if loaded.comparable:
        return f"{text}."
    if loaded.comparable is None:
        return f"{text}. Unfair: it is not known whether the runs are comparable."
    reasons = "; ".join(words.clean(text) for text in loaded.differences)
    return f"{text}. Unfair: {reasons}."


def _noise(loaded: Loaded, comparison: Comparison) -> str:
    one, two = (loaded.breakdowns[i].step_ns for i in (comparison.base, comparison.other))
    overlap = one.min <= two.max and two.min <= one.max
    return "; the ranges of their profiled steps overlap" if overlap else ""


def _verdict(loaded: Loaded) -> Iterator[Text]:
    if loaded.comparable is None:
        yield Text(f"{unknown(loaded)}\n")
    elif loaded.comparable:
        yield Text(f"{words.COMPARABLE}\n", "green")
    else:
        yield Text(NOT_COMPARABLE, "bold red")
        for difference in loaded.differences:
            yield pieces.line(f"  {words.clean(difference)}")
        yield Text()


def _below(loaded: Loaded) -> Iterator[RenderableType]:
    runs: Sequence[Breakdown] = loaded.breakdowns
    said = []
    for comparison in loaded.comparisons:
        yield Padding(waterfall(runs, comparison), (1, 0, 0, 0))
        text = speedup(loaded, comparison)
        if comparison.speedup is not None:
            yield Text(text)
        elif text not in said:  # the same refusal once, after the first waterfall
            said.append(text)
            yield pieces.note(text)
    yield from (pieces.note(text) for text in notes(runs))


def notes(runs: Sequence[Breakdown]) -> Iterator[str]:
    """What is to be said of single runs, after the numbers of those it is said of."""
    said: dict[str, list[str]] = {}
    for number, run in enumerate(runs, 1):
        for text in (words.steps_by(run.steps_by), *run.notes):
            if text:
                said.setdefault(words.clean(text), []).append(str(number))
    for text, numbers in said.items():
        yield f"{', '.join(numbers)}: {text}"
