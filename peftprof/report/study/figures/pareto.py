"""Accuracy, memory and throughput at once: which configurations no other beats in all three."""

from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from peftprof.report.study.figures.drawing import (
    METHODS,
    NAMES,
    QUIET,
    Drawn,
    called,
    colour_of,
    draw,
    ends,
    finite,
    from_zero,
    key,
    method_of,
    whiskers,
)
from peftprof.report.study.figures.quantities import ACCURACY, MEMORY, THROUGHPUT
from peftprof.studies import Interval, Judged

LARGEST = 420.0  # square points of the fastest configuration's mark
LINE = 0.058  # of the height, that a line of text takes


@dataclass(frozen=True)
class Point:
    """A configuration in its three quantities."""

    name: str
    accuracy: Interval
    memory: Interval
    throughput: Interval

    def beats(self, other: "Point") -> bool:
        """Whether it is as good in everything and better in something."""
        mine, others = _good(self), _good(other)
        return mine != others and all(a >= b for a, b in zip(mine, others, strict=True))


def pareto(judged: Judged) -> Drawn | None:
    """A scatter of memory and accuracy, the area of a mark its throughput; needs two points."""
    accuracy, memory, speed = (q.of(judged) for q in (ACCURACY, MEMORY, THROUGHPUT))
    points = [
        Point(name, accuracy[name], memory[name], speed[name])
        for name in accuracy
        if name in memory and name in speed and speed[name].value > 0
    ]
    if len(points) < 2:
        return None
    front = [one for one in points if not any(other.beats(one) for other in points)]

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.grid(visible=True, axis="both")
        fastest = max(point.throughput.value for point in points)
        low, high = _limits(points)
        # The largest first and the beaten before the others, so that none hides another.
        for point in sorted(points, key=lambda one: (one in front, -one.throughput.value)):
            x, y = point.memory.value, point.accuracy.value
            kept = point in front
            colour = colour_of(point.name)
            axes.errorbar(
                x, y, xerr=whiskers([point.memory]), yerr=whiskers([point.accuracy]),
                color=colour, elinewidth=0.8, alpha=0.5,
            )  # fmt: skip
            axes.scatter(
                x, y, LARGEST * point.throughput.value / fastest, zorder=3,
                facecolor=colour if kept else "none", edgecolor=colour, alpha=0.85,
            )  # fmt: skip
        steps = sorted(_front_of_two(points), key=lambda point: point.memory.value)
        axes.step(
            [point.memory.value for point in steps], [point.accuracy.value for point in steps],
            where="post", color=QUIET, linestyle=":", linewidth=1.3, zorder=2,
        )  # fmt: skip
        from_zero(axes, ends(point.memory for point in points), "x", room=1.06)
        axes.set_ylim(low, high)
        heights = _apart([(point.accuracy.value - low) / (high - low) for point in points])
        for point, height in zip(points, heights, strict=True):
            axes.annotate(
                f"{called(point.name)}: {point.throughput.value:,.3g}/s",
                (point.memory.value, point.accuracy.value),
                (1.03, height),
                textcoords="axes fraction",
                va="center",
                fontsize=8,
                arrowprops={"arrowstyle": "-", "color": QUIET, "linewidth": 0.5, "alpha": 0.6},
            )
        axes.set_xlabel(MEMORY.label)
        axes.set_ylabel(ACCURACY.label)
        methods = dict.fromkeys(method_of(point.name) for point in points)
        marks: list[Artist] = [
            Patch(color=METHODS[m], label=NAMES[m]) for m in methods if m in METHODS
        ]
        empty = Line2D([], [], linestyle="none", marker="o", markerfacecolor="white",
                       color=QUIET, label="beaten by another")  # fmt: skip
        hollow = [empty] if len(front) < len(points) else []
        line = Line2D([], [], color=QUIET, linestyle=":", label="front of memory and accuracy")
        key(figure, [*marks, *hollow, *([line] if len(steps) > 1 else [])], 5)

    says = (
        "Accuracy over peak memory; the area of a mark is samples a second, from zero",
        "Filled: no other configuration is as good in all three and better in one, by the values "
        "alone; where intervals meet, the order is not known",
        "Whiskers: 95 % intervals, of memory the lowest and the highest run",
        "The axis of the accuracy does not begin at zero",
    )
    return draw(judged, "pareto.svg", "Accuracy, memory, throughput", says, paint, (8.6, 4.6))


def _good(point: Point) -> tuple[float, float, float]:
    return point.accuracy.value, -point.memory.value, point.throughput.value


def _front_of_two(points: list[Point]) -> list[Point]:
    """Those that no other beats in memory and accuracy alone."""
    kept: list[Point] = []
    for point in sorted(points, key=lambda one: (one.memory.value, -one.accuracy.value)):
        if not kept or point.accuracy.value > kept[-1].accuracy.value:
            kept.append(point)
    return kept


def _limits(points: list[Point]) -> tuple[float, float]:
    intervals = [point.accuracy for point in points]
    shown = ends(intervals) + [one.low for one in intervals if finite(one.low)]
    margin = max(0.08 * (max(shown) - min(shown)), 0.5)
    return min(shown) - margin, max(shown) + margin


def _apart(heights: list[float]) -> list[float]:
    """Places for lines of text near `heights` (0 to 1) that do not meet, as far as they fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [0.0] * len(heights)
    free = 0.0
    for i in order:
        placed[i] = max(heights[i], free)
        free = placed[i] + LINE
    ceiling = 1.0
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - LINE
    return placed
