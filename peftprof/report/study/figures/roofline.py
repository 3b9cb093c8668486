"""What each category of each method reaches of what the device can do."""

from collections.abc import Iterable

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from peftprof.breakdowns import CATEGORIES, Breakdown, Ceilings, Work
from peftprof.report.page.numbers import amount
from peftprof.report.study.figures.drawing import (
    INK,
    QUIET,
    Drawn,
    called,
    colour_of,
    draw,
    finite,
)
from peftprof.report.study.figures.quantities import profiled
from peftprof.report.words import clean, label
from peftprof.studies import Judged

MARKERS = dict(zip(CATEGORIES, "ospD^vP*Xh", strict=True))
DRAWN = 1e-12, 1e24  # beyond these a trace is nonsense, and would be the whole drawing


def roofline(judged: Judged) -> Drawn | None:
    """FLOP/s over FLOP/byte, a point a category and configuration, under the ceilings."""
    found = {
        name: run.breakdown for name, run in profiled(judged).items() if run.breakdown is not None
    }
    points = [
        (name, work.category, work.dtype, place)
        for name, breakdown in found.items()
        for work in breakdown.work
        if (place := _placed(work)) is not None
    ]
    if not points:
        return None
    ceilings = _highest(found.values())
    roofs = {} if ceilings is None else _roofs(ceilings, {dtype for _, _, dtype, _ in points})

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(visible=True, axis="both")
        across = [place[0] for *_, place in points]
        up = [place[1] for *_, place in points]
        if ceilings is not None and roofs:
            across += [rate / ceilings.bytes_per_s for rate in roofs.values()]
            up += list(roofs.values())
        axes.set_xlim(min(across) / 2.5, max(across) * 8)
        axes.set_ylim(min(up) / 2.5, max(up) * 3)
        if ceilings is not None and roofs:
            _ceilings(axes, ceilings, roofs)
        for name, category, _, (x, y) in points:
            axes.plot(
                x, y, MARKERS.get(category, "o"), markersize=8, color=colour_of(name),
                markeredgecolor="white", markeredgewidth=0.8, alpha=0.92, zorder=4,
            )  # fmt: skip
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("FLOP/s")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: amount(y, "")))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        figure.legend(handles=_key(points), loc="outside right upper")

    sources = sorted({b.ceilings.source for b in found.values() if b.ceilings is not None})
    devices = sorted({clean(b.device) for b in found.values()})
    says = (
        "What each category reached, over the least bytes that it has to move",
        f"Ceilings: the highest that any of these runs measured ({sources[0]})"
        if roofs
        else "The device's ceilings were not measured",
        f"The runs are of several devices ({', '.join(devices)})" if len(devices) > 1 else "",
    )
    return draw(judged, "roofline.svg", "Roofline", says, paint, (8.6, 4.6))


def _placed(work: Work) -> tuple[float, float] | None:
    """FLOP/byte and FLOP/s of a category over its known time; None where it has neither."""
    known_ns = work.ns * work.known
    if not (work.flops > 0 and work.bytes > 0 and known_ns > 0):
        return None
    place = work.flops / work.bytes, work.flops / known_ns * 1e9
    return place if all(DRAWN[0] < value < DRAWN[1] for value in place) else None


def _highest(breakdowns: Iterable[Breakdown]) -> Ceilings | None:
    """The highest ceilings of several measurements: a device can do what it did once."""
    found = [
        b.ceilings for b in breakdowns if b.ceilings is not None and b.ceilings.bytes_per_s > 0
    ]
    if not found:
        return None
    dtypes = {dtype for one in found for dtype in one.flops_per_s}
    return Ceilings(
        found[0].source,
        {d: max(one.flops_per_s.get(d, 0.0) for one in found) for d in sorted(dtypes)},
        max(one.bytes_per_s for one in found),
    )


def _roofs(ceilings: Ceilings, used: set[str]) -> dict[str, float]:
    """The rates of the data types in use; all that are known where none of them is."""
    known = {d: rate for d, rate in ceilings.flops_per_s.items() if rate > 0 and finite(rate)}
    return {d: rate for d, rate in known.items() if d in used} or known


def _ceilings(axes: Axes, ceilings: Ceilings, roofs: dict[str, float]) -> None:
    left, right = axes.get_xlim()
    highest, bandwidth = max(roofs.values()), ceilings.bytes_per_s
    axes.plot([left, highest / bandwidth], [left * bandwidth, highest], color=INK, linewidth=1.4)
    for dtype, rate in roofs.items():
        axes.plot([rate / bandwidth, right], [rate, rate], color=INK, linewidth=1.4)
        axes.annotate(
            f"{clean(dtype)} {amount(rate, 'FLOP/s')}", (right, rate), (-3, 4),
            textcoords="offset points", ha="right", fontsize=8,
        )  # fmt: skip
    axes.annotate(
        f"memory {amount(bandwidth, 'B/s')}", (0.01, 0.985), xycoords="axes fraction",
        va="top", fontsize=8, color=QUIET,
    )  # fmt: skip


def _key(points: list[tuple[str, str, str, tuple[float, float]]]) -> list[Artist]:
    names = dict.fromkeys(name for name, *_ in points)
    used = {category for _, category, *_ in points}
    marks: list[Artist] = [Patch(color=colour_of(name), label=called(name)) for name in names]
    return marks + [
        Line2D([], [], linestyle="none", marker=MARKERS[c], color=QUIET, label=label(c))
        for c in CATEGORIES
        if c in used
    ]
