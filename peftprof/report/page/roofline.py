"""Each category against what the device can do: FLOP/s over FLOP/byte, both logarithmic.

The roofline of Williams, Waterman and Patterson (2009): the roof is the measured bandwidth
times intensity, as far as the measured rate of products.
"""

import math
from dataclasses import dataclass

from peftprof.breakdowns import Breakdown, Ceilings, Work
from peftprof.report.page import numbers, parts
from peftprof.report.page.colours import colour_class
from peftprof.report.page.markup import Html, join, tag
from peftprof.report.page.parts import x_percent
from peftprof.report.words import digits, label

HEIGHT = 360  # pixels
TOP, BOTTOM = 22, 28  # pixels kept for names above the roof and for the scale below
LABEL_GAP = 15  # pixels between two labels
DRAWN = 1e-30, 1e30  # beyond these a trace is nonsense, and would be the whole drawing


@dataclass(frozen=True)
class _Scale:
    """Decades of both axes; places are shares of the width, and pixels of the height."""

    left: int
    right: int
    low: int
    high: int

    def x(self, intensity: float) -> float:
        return (math.log10(intensity) - self.left) / (self.right - self.left)

    def y(self, rate: float) -> float:
        share = (math.log10(rate) - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def work(number: int, run: Breakdown) -> Html:
    """The roofline where ceilings were measured, and the table of FLOPs and bytes."""
    if not run.work:
        return Html("")
    drawn = _roofline(run.work, run.ceilings) if run.ceilings else None
    if drawn is None:
        why = "This device's ceilings were not measured" if run.ceilings is None else (
            "No category has both FLOPs and bytes"
        )  # fmt: skip
        drawn = parts.note(f"{why}: there is no roofline to draw.")
    return join(drawn, _table(number, run))


def _placed(work: Work) -> tuple[float, float] | None:
    """FLOP/byte and FLOP/s of a category over its known time; None where it has neither."""
    known_ns = work.ns * work.known
    if not (work.flops > 0 and work.bytes > 0 and known_ns > 0):
        return None
    place = work.flops / work.bytes, work.flops / known_ns * 1e9
    return place if all(DRAWN[0] < value < DRAWN[1] for value in place) else None


def _roofline(found: tuple[Work, ...], ceilings: Ceilings) -> Html | None:
    points = [(w, place) for w in found if (place := _placed(w)) is not None]
    dtypes = {w.dtype for w, _ in points}
    known = {d: rate for d, rate in ceilings.flops_per_s.items() if rate > 0}
    roofs = {d: rate for d, rate in known.items() if d in dtypes} or known
    if not points or not roofs or ceilings.bytes_per_s <= 0:
        return None
    ridges = [rate / ceilings.bytes_per_s for rate in roofs.values()]
    across = [place[0] for _, place in points] + ridges
    up = [place[1] for _, place in points] + list(roofs.values())
    scale = _Scale(
        math.floor(math.log10(min(across) * 0.6)),
        math.ceil(math.log10(max(across) * 3)),
        math.floor(math.log10(min(up) * 0.6)),
        math.ceil(math.log10(max(up) * 1.2)),
    )
    drawing = tag(
        "svg",
        *_grid(scale),
        *_roofs(scale, roofs, ceilings.bytes_per_s),
        *_points(scale, points),
        width="100%",
        height=f"{HEIGHT}",
        role="img",
        aria_label="Roofline: one point a category; the table below has the figures",
    )
    caption = tag(
        "figcaption",
        f"FLOP/s reached (up) over FLOP per byte (right). Ceilings: {ceilings.source}.",
        class_="note",
    )
    return tag("figure", drawing, caption, class_="roofline")


def _grid(scale: _Scale) -> list[Html]:
    lines = []
    for power in range(scale.left, scale.right + 1, _every(scale.right - scale.left)):
        x = x_percent(scale.x(10.0**power))
        foot = f"{HEIGHT - BOTTOM}"
        lines.append(tag("line", x1=x, x2=x, y1=f"{TOP}", y2=foot, class_="grid"))
        side = "start" if power == scale.left else "end" if power == scale.right else "middle"
        words = f"{10.0**power:g}"
        lines.append(tag("text", words, x=x, y=f"{HEIGHT - 10}", text_anchor=side, class_="axis"))
    for power in range(scale.low, scale.high + 1, _every(scale.high - scale.low)):
        y = scale.y(10.0**power)
        at = f"{y:.1f}"
        lines.append(tag("line", x1="0", x2="100%", y1=at, y2=at, class_="grid"))
        if power > scale.low:
            words = numbers.amount(10.0**power, "FLOP/s")
            lines.append(tag("text", words, x="2", y=f"{y + 13:.1f}", class_="axis"))
    return lines


def _every(decades: int) -> int:
    """Of how many decades one gets a line: no more lines than can be read."""
    return -(-decades // 10)


def _roofs(scale: _Scale, roofs: dict[str, float], bandwidth: float) -> list[Html]:
    """The slope of the bandwidth as far as the highest roof, and a flat roof for each dtype."""
    lines = []
    edge = 10.0**scale.left
    highest = max(roofs.values())
    foot = max(edge, 10.0**scale.low / bandwidth)
    lines.append(
        tag(
            "line",
            tag("title", f"memory: {numbers.amount(bandwidth, 'B/s')}"),
            x1=x_percent(scale.x(foot)),
            y1=f"{scale.y(foot * bandwidth):.1f}",
            x2=x_percent(scale.x(highest / bandwidth)),
            y2=f"{scale.y(highest):.1f}",
            class_="roof",
        )
    )
    for dtype, rate in roofs.items():
        y = scale.y(rate)
        start = x_percent(scale.x(rate / bandwidth))
        words = f"{dtype} {numbers.amount(rate, 'FLOP/s')}"
        lines.append(tag("line", x1=start, x2="100%", y1=f"{y:.1f}", y2=f"{y:.1f}", class_="roof"))
        lines.append(
            tag("text", words, x="99.5%", y=f"{y - 5:.1f}", text_anchor="end", class_="ceiling")
        )
    return lines


def _points(scale: _Scale, points: list[tuple[Work, tuple[float, float]]]) -> list[Html]:
    """A point a category, its name beside it; names are moved apart where they would meet."""
    marks, names = [], []
    free = float(TOP)
    for work, (intensity, rate) in sorted(points, key=lambda point: -point[1][1]):
        x, y = scale.x(intensity), scale.y(rate)
        row = max(y + 4, free)
        free = row + LABEL_GAP
        right = x < 0.72
        at = {"x": x_percent(x + (0.02 if right else -0.02)), "y": f"{row:.1f}"}
        side = "start" if right else "end"
        end = x_percent(x + (0.016 if right else -0.016))
        title = tag(
            "title",
            f"{label(work.category)}: {numbers.amount(rate, 'FLOP/s')}, {intensity:.3g} FLOP/byte",
        )
        names.append(
            tag("line", x1=x_percent(x), y1=f"{y:.1f}", x2=end, y2=f"{row - 4:.1f}", class_="link")
        )
        names.append(tag("text", label(work.category), text_anchor=side, class_="point", **at))
        marks.append(
            tag(
                "circle", title, cx=x_percent(x), cy=f"{y:.1f}", r="6",
                class_=colour_class(work.category),
            )
        )  # fmt: skip
    return [*names, *marks]


def _table(number: int, run: Breakdown) -> Html:
    rows = [
        tag(
            "tr",
            parts.category(w.category),
            tag("td", w.dtype),
            parts.time(w.ns, digits(run.step_ns.median), f"/runs/{number}/work/{i}/ns"),
            parts.number(numbers.amount(w.flops, "FLOP") if w.flops else "-"),
            parts.number(numbers.amount(w.bytes, "B") if w.bytes else "-"),
            parts.number(numbers.percent(w.known), kind="quiet"),
            parts.number("-" if w.flops_share is None else numbers.percent(w.flops_share)),
            parts.number("-" if w.bytes_share is None else numbers.percent(w.bytes_share)),
            tag("td", w.bound or "-"),
        )
        for i, w in enumerate(run.work)
    ]
    head = ["category", "dtype", ">ms/step", ">FLOPs", ">bytes", ">known"]
    return join(
        parts.table([*head, ">of FLOP/s", ">of bytes/s", "bound by"], rows),
        parts.note(
            "Bytes are each operand read and each result written once, the least there can be. "
            "Known: the share of the time whose operands the trace tells."
        ),
    )
