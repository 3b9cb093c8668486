"""Where a step's time goes, and what the memory at its peak is made of, method by method."""

from collections.abc import Iterable, Mapping

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from peftprof.breakdowns import MEMORY_PARTS, PHASES, Breakdown
from peftprof.report.page.colours import COLOURS, ORDER
from peftprof.report.page.memory import COLOURS as PARTS
from peftprof.report.study.figures.drawing import (
    INK,
    Drawn,
    called,
    draw,
    from_zero,
    key,
)
from peftprof.report.study.figures.quantities import batches, profiled
from peftprof.report.words import MEMORY, clean, label
from peftprof.studies import Judged

PROFILER = "Profiled steps, which a profiler slows: compare them with each other only"
BAR = 0.78  # of the distance between two bars
MIB = 2**20


def operators(judged: Judged) -> Drawn | None:
    """A profiled step of each configuration, stacked by category: whole, and phase by phase."""
    runs = profiled(judged)
    found = {name: run.breakdown for name, run in runs.items() if run.breakdown is not None}
    if not found:
        return None
    phases = [p for p in PHASES if any(sum(_phase(b, p).values()) > 0 for b in found.values())]
    used = [c for c in ORDER if any(_whole(b).get(c, 0) > 0 for b in found.values())]

    def paint(figure: Figure) -> None:
        left, right = figure.subplots(
            1, 2, sharey=True, width_ratios=(len(found) + 1, (len(found) + 1) * len(phases) or 1)
        )
        whole = {place: _whole(b) for place, b in enumerate(found.values())}
        _stacks(left, whole, used, COLOURS)
        left.set_xticks(list(whole), [called(name) for name in found], rotation=90)
        left.set_title("whole step")
        left.set_ylabel("ms a step")
        left.set_xlim(-0.7, len(found) - 0.3)
        places: dict[int, str] = {}
        split: dict[int, Mapping[str, float]] = {}
        for number, phase in enumerate(phases):
            start = number * (len(found) + 1)
            for place, (name, breakdown) in enumerate(found.items(), start):
                places[place], split[place] = called(name), _phase(breakdown, phase)
            right.text(
                start + (len(found) - 1) / 2, 0.99, phase, ha="center", va="top",
                transform=right.get_xaxis_transform(), fontsize=9,
            )  # fmt: skip
        _stacks(right, split, used, COLOURS)
        right.set_xticks(list(places), list(places.values()), rotation=90)
        right.set_xlim(-0.9, len(phases) * (len(found) + 1) - 1.1)
        right.set_title("by phase")
        tops = [sum(stack.values()) for stack in whole.values()]
        from_zero(left, tops, room=1.14)
        key(figure, [Patch(color=COLOURS[c][0], label=label(c)) for c in used], 6)

    says = (
        "Milliseconds of the median profiled step by category",
        "Unattributed time has no phase and stands in the whole step alone",
        PROFILER,
        batches(runs),
    )
    bars = len(found) * (1 + len(phases))
    size = (max(8.6, 2.5 + 0.36 * bars), 4.8)
    return draw(judged, "operators.svg", "Operator time of a step", says, paint, size)


def memory(judged: Judged) -> Drawn | None:
    """The peak of each profiled configuration, stacked by what held it."""
    runs = profiled(judged)
    found = {
        called(name, "\n"): {part.part: part.bytes / MIB for part in run.breakdown.memory.parts}
        for name, run in runs.items()
        if run.breakdown is not None and run.breakdown.memory is not None
    }
    found = {name: stack for name, stack in found.items() if sum(stack.values()) > 0}
    if not found:
        return None
    used = [p for p in MEMORY_PARTS if any(stack.get(p, 0) > 0 for stack in found.values())]
    colours = {part: COLOURS[PARTS[part]] for part in MEMORY_PARTS}

    def paint(figure: Figure) -> None:
        axes = figure.add_subplot()
        stacks = dict(enumerate(found.values()))
        _stacks(axes, stacks, used, colours)
        for place, stack in stacks.items():
            whole = sum(stack.values())
            axes.annotate(
                f"{whole:,.0f}", (place, whole), (0, 3), textcoords="offset points",
                ha="center", fontsize=8,
            )  # fmt: skip
        axes.set_xticks(list(stacks), list(found))
        axes.set_xlim(-0.8, len(found) - 0.2)
        axes.set_ylabel("MiB at the peak")
        from_zero(axes, [sum(stack.values()) for stack in found.values()])
        # As the bars are stacked: the last on top.
        marks = [Patch(color=colours[p][0], label=MEMORY.get(p, clean(p))) for p in used[::-1]]
        figure.legend(handles=marks, loc="outside right upper")

    kinds = sorted({
        run.breakdown.memory.source
        for run in runs.values()
        if run.breakdown is not None and run.breakdown.memory is not None
    })  # fmt: skip
    says = (
        "Bytes of tensors at the peak of the memory step, by what held them",
        f"By {', '.join(kinds)}",
        batches(runs).replace("so the steps are of unequal work", "and activations with them"),
    )
    return draw(judged, "memory-parts.svg", "Memory at the peak", says, paint)


def _whole(breakdown: Breakdown) -> dict[str, float]:
    """Milliseconds by category of a step, idle and unattributed among them."""
    found = _by_category((row.category, row.ns) for row in breakdown.rows)
    found["idle"] = found.get("idle", 0.0) + breakdown.idle_ns / 1e6
    found["unattributed"] = found.get("unattributed", 0.0) + breakdown.unattributed_ns / 1e6
    return found


def _phase(breakdown: Breakdown, phase: str) -> dict[str, float]:
    """Milliseconds by category of one phase, its idle time among them."""
    found = _by_category((row.category, row.ns) for row in breakdown.rows if row.phase == phase)
    found["idle"] = found.get("idle", 0.0) + breakdown.idle_by_phase_ns.get(phase, 0.0) / 1e6
    return found


def _by_category(rows: Iterable[tuple[str, float]]) -> dict[str, float]:
    found: dict[str, float] = {}
    for category, ns in rows:
        known = category if category in COLOURS else "unattributed"
        found[known] = found.get(known, 0.0) + ns / 1e6
    return found


def _stacks(
    axes: Axes,
    stacks: Mapping[int, Mapping[str, float]],
    used: Iterable[str],
    colours: Mapping[str, tuple[str, str]],
) -> None:
    """A bar at each place, from zero, its pieces in the order of `used`."""
    below = dict.fromkeys(stacks, 0.0)
    for name in used:
        heights = [stack.get(name, 0.0) for stack in stacks.values()]
        axes.bar(
            list(stacks), heights, BAR, bottom=list(below.values()), color=colours[name][0],
            edgecolor="white", linewidth=0.4,
        )  # fmt: skip
        below = {
            place: low + height for (place, low), height in zip(below.items(), heights, strict=True)
        }
    axes.tick_params(axis="x", length=0, labelcolor=INK)
