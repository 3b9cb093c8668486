"""An attributed trace as a `records.Breakdown`: medians over steps that add up."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftprof.breakdowns import CATEGORIES, PHASES, Breakdown, Operator, Row, Spread
from peftprof.errors import TraceError
from peftprof.trace.attribute import Attribution
from peftprof.trace.events import NONE, Ints

OPERATORS = 200  # kept in a breakdown; the rest is in its rows

Floats = NDArray[np.float64]


def make_breakdown(found: Attribution, name: str, source: str) -> Breakdown:
    """The breakdown of an attributed trace, called `name`. Raises TraceError for empty steps."""
    windows = found.windows.length
    step = Spread(float(np.median(windows)), float(windows.min()), float(windows.max()))
    if step.median <= 0:
        raise TraceError("the trace's steps last no time; record it again")
    parts = _parts(found)
    typical, factor = _typical(parts, step.median)
    count = len(PHASES) * len(CATEGORIES)
    unattributed = float(typical[count : count + len(PHASES)].sum())
    idle = typical[count + len(PHASES) :]
    shown = _operators(found, float(windows.mean()))
    return Breakdown(
        name=name,
        source=source,
        device=found.events.device,
        steps=len(windows),
        step_ns=step,
        rows=tuple(_rows(found, parts * factor, typical, step.median)),
        unattributed_ns=unattributed,
        idle_ns=float(idle.sum()),
        idle_by_phase_ns={p: float(ns) for p, ns in zip(PHASES, idle, strict=True) if ns > 0},
        overlap_ns=float(np.median(found.overlap_ns)),
        operators=tuple(shown[:OPERATORS]),
        unattributed_operators=tuple(o for o in shown if o.category == "unattributed")[:OPERATORS],
    )


def _parts(found: Attribution) -> Floats:
    """Nanoseconds as [step, part]: phase x category, unattributed by phase, idle by phase."""
    category = found.meaning.category[found.pieces.row]
    phase = found.meaning.phase[found.pieces.row]
    columns = len(PHASES) * (len(CATEGORIES) + 1)
    known = phase * len(CATEGORIES) + category
    unknown = len(PHASES) * len(CATEGORIES) + phase
    part = np.where(category == NONE, unknown, known)
    busy = _sums(found.pieces.step, part, found.pieces.ns, len(found.windows), columns)
    return np.concatenate([busy, found.idle_ns], axis=1)


def _sums(step: Ints, part: Ints, values: Ints, rows: int, columns: int) -> Floats:
    flat = np.zeros(rows * columns)
    np.add.at(flat, step * columns + part, values)
    return flat.reshape(rows, columns)


def _typical(parts: Floats, total: float) -> tuple[Floats, float]:
    """Each part's median over steps times one factor, so that they sum to `total`; the factor."""
    typical: Floats = np.median(parts, axis=0)
    if not typical.sum():  # no part is in most of the steps: the mean is all there is to say
        typical = parts.mean(axis=0)
    factor = float(total / typical.sum())
    return typical * factor, factor


def _rows(found: Attribution, parts: Floats, typical: Floats, total: float) -> Iterable[Row]:
    known = found.meaning.category[found.entries.row] != NONE
    row, step = found.entries.row[known], found.entries.step[known]
    part = found.meaning.phase[row] * len(CATEGORIES) + found.meaning.category[row]
    columns = len(PHASES) * len(CATEGORIES)
    counts = _sums(step, part, np.ones_like(step), len(found.windows), columns)
    for i in np.flatnonzero(parts[:, :columns].any(axis=0)):
        yield Row(
            phase=PHASES[i // len(CATEGORIES)],
            category=CATEGORIES[i % len(CATEGORIES)],
            ns=float(typical[i]),
            share=float(typical[i] / total),
            count=float(np.median(counts[:, i])),
            min_ns=float(parts[:, i].min()),
            max_ns=float(parts[:, i].max()),
        )


@dataclass
class _Sum:
    ns: float = 0.0
    count: float = 0.0


def _operators(found: Attribution, step_ns: float) -> list[Operator]:
    """Every operator or kernel name by category, the longest self time first."""
    meaning, events, steps = found.meaning, found.events, len(found.windows)
    width = len(CATEGORIES) + 1  # the last place is for NONE
    sums: dict[int, _Sum] = {}
    shown = events.name[meaning.shown[found.pieces.row]]
    keys = shown * width + meaning.category[found.pieces.row] % width
    for key, ns in zip(*_grouped(keys, found.pieces.ns), strict=True):
        sums.setdefault(key, _Sum()).ns = ns / steps
    keys = events.name[found.calls.row] * width + meaning.category[found.calls.row] % width
    for key, count in zip(*_grouped(keys, np.ones_like(keys)), strict=True):
        sums.setdefault(key, _Sum()).count = count / steps
    names = (*CATEGORIES, "unattributed")
    operators = [
        Operator(events.names[key // width], names[key % width], s.ns, s.ns / step_ns, s.count)
        for key, s in sums.items()
        if s.ns > 0
    ]
    return sorted(operators, key=lambda o: (-o.ns, o.name, o.category))


def _grouped(keys: Ints, values: Ints) -> tuple[list[int], list[float]]:
    unique, which = np.unique(keys, return_inverse=True)
    sums = np.zeros(len(unique))
    np.add.at(sums, which, values)
    return unique.tolist(), sums.tolist()
