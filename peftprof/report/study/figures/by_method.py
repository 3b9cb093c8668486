"""The paper's figures 1 to 3: every method and rank side by side."""

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from peftprof.report.page.colours import ink
from peftprof.report.study.figures.drawing import (
    INK,
    METHODS,
    NAMES,
    PAPER,
    QUIET,
    Drawn,
    called,
    colour_of,
    draw,
    ends,
    from_zero,
    key,
    method_of,
    short,
    whiskers,
)
from peftprof.report.study.figures.quantities import ACCURACY, MEMORY, TRAINED, Quantity
from peftprof.report.study.paper import MACHINE
from peftprof.studies import Interval, Judged

LOW = 0.14  # a bar below this share of the axis has no room for its value inside


def by_method(judged: Judged) -> list[Drawn]:
    """Accuracy, peak memory, trained parameters."""
    found = []
    if bars := ACCURACY.of(judged):
        found.append(_bars(judged, bars, ACCURACY, "fig01-accuracy.svg", "Fig. 1: accuracy"))
    if bars := MEMORY.of(judged):
        found.append(_bars(judged, bars, MEMORY, "fig02-memory.svg", "Fig. 2: peak memory"))
    if counts := TRAINED.of(judged):
        found.append(_counts(judged, counts))
    return found


def paper_says(quantity: Quantity, ours: dict[str, Interval], where: str = "right") -> str:
    """The sentence of a caption about the paper's marks; empty where there are none."""
    if not quantity.paper(ours):
        return ""
    own = f", on the axis to the {where}" if where and quantity.apart(ours) else ""
    mb = "; its MB as printed" if quantity is MEMORY else ""
    return f"Open diamonds{own}: what the paper prints ({MACHINE}{mb})"


def paper_marks(axes: Axes, quantity: Quantity, ours: dict[str, Interval]) -> list[float]:
    """Put the paper's values at the places of ours; those on the same axis, for its end.

    Values of quite another size get an axis of their own, to the right.
    """
    theirs = quantity.paper(ours)
    places = [place for place, name in enumerate(ours) if name in theirs]
    if not places:
        return []
    own = quantity.apart(ours)
    on = axes
    if own:
        on = axes.twinx()
        on.grid(visible=False)
        on.spines["left"].set_visible(False)
        on.spines["right"].set_visible(True)
        on.set_ylabel(PAPER, color=QUIET)
        on.tick_params(axis="y", labelcolor=QUIET)
        if quantity is TRAINED:
            on.yaxis.set_major_formatter(FuncFormatter(short))
        from_zero(on, theirs.values())
    on.plot(places, list(theirs.values()), **open_diamond())
    return [] if own else list(theirs.values())


def open_diamond() -> dict[str, Any]:
    """How the paper's values are marked everywhere."""
    return {
        "linestyle": "none", "marker": "D", "markersize": 6, "markerfacecolor": "none",
        "markeredgecolor": INK, "markeredgewidth": 1.1, "label": PAPER, "zorder": 5,
    }  # fmt: skip


def handles(names: dict[str, Interval], paper: bool) -> list[Artist]:
    """The methods' colours, and the paper's mark where it is used."""
    methods = dict.fromkeys(map(method_of, names))
    found: list[Artist] = [
        Patch(color=METHODS[method], label=NAMES[method]) for method in methods if method in METHODS
    ]
    return [*found, Line2D([], [], **open_diamond())] if paper else found


def _bars(
    judged: Judged, found: dict[str, Interval], quantity: Quantity, file: str, title: str
) -> Drawn:
    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        values = [one.value for one in found.values()]
        axes.bar(
            range(len(found)),
            values,
            width=0.72,
            color=[colour_of(name) for name in found],
            yerr=whiskers(found.values()),
            error_kw={"ecolor": INK, "elinewidth": 1, "capsize": 3},
        )
        axes.set_xticks(range(len(found)), [called(name, "\n") for name in found])
        axes.set_ylabel(quantity.label)
        from_zero(axes, [*ends(found.values()), *paper_marks(axes, quantity, found)])
        top = axes.get_ylim()[1]
        for place, (name, value) in enumerate(zip(found, values, strict=True)):
            inside = value > LOW * top
            axes.annotate(
                quantity.form.format(value),
                (place, 0 if inside else max(ends([found[name]]))),
                (0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=ink(colour_of(name)) if inside else INK,
            )
        key(figure, handles(found, bool(quantity.paper(found))))

    says = (
        f"{quantity.words.capitalize()} by method and rank",
        quantity.whiskers,
        paper_says(quantity, found),
    )
    return draw(judged, file, title, says, paint)


def _counts(judged: Judged, found: dict[str, Interval]) -> Drawn:
    """Points, not bars: on a logarithmic scale a bar has no zero to begin at."""

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        theirs = TRAINED.paper(found)
        axes.set_yscale("log")
        for place, (name, one) in enumerate(found.items()):
            axes.plot(place, one.value, "o", markersize=6, color=colour_of(name))
            axes.annotate(
                short(one.value), (place, one.value), (0, -15), textcoords="offset points",
                ha="center", fontsize=8,
            )  # fmt: skip
            if name in theirs:
                axes.plot(place, theirs[name], **open_diamond() | {"markersize": 9})
        values = [*(one.value for one in found.values()), *theirs.values()]
        axes.set_ylim(min(values) / 3, max(values) * 4)
        axes.set_xticks(range(len(found)), [called(name, "\n") for name in found])
        axes.set_xlim(-0.6, len(found) - 0.4)
        axes.set_ylabel(f"{TRAINED.label}, log scale")
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        key(figure, handles(found, bool(theirs)))

    says = (
        "Parameters that got a gradient, on a logarithmic scale",
        paper_says(TRAINED, found, where=""),
    )
    title = "Fig. 3: trained parameters"
    return draw(judged, "fig03-trained-parameters.svg", title, says, paint)
