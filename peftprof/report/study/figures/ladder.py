"""What the speed-up is made of: the ladder as a waterfall."""

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from peftprof.report.study.figures.drawing import (
    FASTER,
    INK,
    OTHER,
    QUIET,
    SLOWER,
    Drawn,
    draw,
    finite,
    from_zero,
    key,
)
from peftprof.report.words import clean
from peftprof.studies import Judged, Rung

LONGEST = 34  # characters of a cause that have room beside the bars


def ladder(judged: Judged) -> Drawn | None:
    """A bar a change, in ms an example, from the time at the start to the time at the end."""
    rungs = judged.ladder
    if len(rungs) < 2 or not finite(*(rung.ns for rung in rungs)):
        return None

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=False, axis="y")
        axes.grid(visible=True, axis="x")
        total, highest = 0.0, 0.0
        for place, rung in enumerate(rungs):
            before, total = total, total + rung.ns / 1e6
            highest = max(highest, total)
            colour = OTHER if not place else SLOWER if rung.ns > 0 else FASTER
            axes.barh(place, total - before, 0.62, left=before, color=colour)
            axes.plot([total, total], [place - 0.31, place + 1.31], color=QUIET, linewidth=0.8)
            _write(axes, place, max(before, total), _told(rungs, place))
        axes.barh(len(rungs), total, 0.62, color=OTHER)
        times = rungs[0].ns / 1e6 / total if total > 0 else float("nan")
        words = f"{total:.3g} ms" + (f", {times:.2f}x in all" if finite(times) else "")
        _write(axes, len(rungs), total, words)
        names = [clean(rung.cause) for rung in rungs]
        names = [
            n if len(n) <= LONGEST else f"{n[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}" for n in names
        ]
        axes.set_yticks(range(len(rungs) + 1), [*names, "end"])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("ms an example")
        from_zero(axes, [highest], "x", room=1.42)
        key(figure, [Patch(color=FASTER, label="faster"), Patch(color=SLOWER, label="slower")])

    says = (
        f"From {rungs[0].note or 'the start'} to {rungs[-1].note or 'the end'}, one change at a "
        "time",
        "Changes add up in ms an example; factors, with 95 % intervals, multiply",
    )
    size = (8.6, 1.9 + 0.4 * len(rungs))
    return draw(judged, "ladder.svg", "What the speed-up is made of", says, paint, size)


def _write(axes: Axes, place: int, after: float, words: str) -> None:
    axes.annotate(
        words, (after, place), (6, 0), textcoords="offset points", va="center", fontsize=8,
        color=INK,
    )  # fmt: skip


def _told(rungs: tuple[Rung, ...], place: int) -> str:
    """What stands beside a bar; a factor that two rungs share stands beside the second."""
    rung = rungs[place]
    if not place:
        return f"{rung.ns / 1e6:.3g} ms"
    told = f"{rung.ns / 1e6:+.3g} ms"
    if rungs[place + 1 : place + 2] and rungs[place + 1].factor == rung.factor:
        return told
    both = " both" if place > 1 and rungs[place - 1].factor == rung.factor else ""
    told += f", {rung.factor.value:.2f}x{both}"
    low, high = rung.factor.low, rung.factor.high
    return f"{told} ({low:.2f} to {high:.2f})" if finite(low, high) else told
