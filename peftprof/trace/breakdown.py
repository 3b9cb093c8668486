"""An attributed trace as a `Breakdown`: medians over steps that add up."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from peftprof.breakdowns import (
    CATEGORIES,
    IDLE_CAUSES,
    PHASES,
    Breakdown,
    Communication,
    Layer,
    Operator,
    Placed,
    Row,
    Spread,
    Totals,
)
from peftprof.errors import TraceError
from peftprof.trace.attribute import COMMUNICATION, Attribution
from peftprof.trace.events import NONE, Ints, Kind
from peftprof.trace.sweep import Cover, cut

OPERATORS = 200  # kept in a breakdown; the rest is in its rows
FORWARD, BACKWARD = PHASES.index("forward"), PHASES.index("backward")

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
    whole = _whole_rules(found)
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
        idle_by_cause_ns=_idle_by_cause(found, float(idle.sum())),
        steps_by=found.steps_by,
        rank=found.events.rank,
        rules=whole,
        layers=tuple(_layers(found, float(windows.mean()))),
        communication=_communication(found, parts * factor, typical),
        totals=_totals(found),
        if_free=_if_free(found, parts),
        notes=tuple(_notes(found)),
    )


def _parts(found: Attribution) -> Floats:
    """Nanoseconds as [step, part]: phase x category, unattributed by phase, idle by phase."""
    columns = len(PHASES) * (len(CATEGORIES) + 1)
    flat = np.bincount(
        found.pieces.step * columns + _part(found, found.pieces.row),
        weights=found.pieces.ns,
        minlength=len(found.windows) * columns,
    )
    busy = flat.reshape(len(found.windows), columns)
    return np.concatenate([busy, found.idle_ns], axis=1)


def _part(found: Attribution, row: Ints) -> Ints:
    """Each event's phase x category; behind them all the unattributed, by phase."""
    category, phase = found.meaning.category[row], found.meaning.phase[row]
    unknown = len(PHASES) * len(CATEGORIES) + phase
    return np.where(category == NONE, unknown, phase * len(CATEGORIES) + category)


def _typical(parts: Floats, total: float) -> tuple[Floats, float]:
    """Each part's median over steps times one factor, so that they sum to `total`; the factor."""
    typical: Floats = np.median(parts, axis=0)
    if not typical.sum():  # no part is in most of the steps: the mean is all there is to say
        typical = parts.mean(axis=0)
    factor = float(total / typical.sum())
    return typical * factor, factor


def _rows(found: Attribution, parts: Floats, typical: Floats, total: float) -> Iterator[Row]:
    columns = len(PHASES) * len(CATEGORIES)
    part = _part(found, found.entries.row)
    known = part < columns
    counts = np.bincount(
        found.entries.step[known] * columns + part[known],
        minlength=len(found.windows) * columns,
    ).reshape(len(found.windows), columns)
    rules = _rules(found, _part(found, found.pieces.row))
    for i in np.flatnonzero(parts[:, :columns].any(axis=0)).tolist():
        yield Row(
            phase=PHASES[i // len(CATEGORIES)],
            category=CATEGORIES[i % len(CATEGORIES)],
            ns=float(typical[i]),
            share=float(typical[i] / total),
            count=float(np.median(counts[:, i])),
            min_ns=float(parts[:, i].min()),
            max_ns=float(parts[:, i].max()),
            rules=rules.get(i, ()),
        )


def _rules(found: Attribution, part: Ints) -> dict[int, tuple[Placed, ...]]:
    """For each part the rules that placed its time, by their share of it."""
    width = len(found.labels)
    rule = found.meaning.rule[found.pieces.row] % width  # the last label is for no rule
    sums = np.bincount(part * width + rule, weights=found.pieces.ns)
    placed: dict[int, list[tuple[int, float]]] = {}
    for key in np.flatnonzero(sums).tolist():
        placed.setdefault(key // width, []).append((key % width, float(sums[key])))
    return {part: _shares(found, rules) for part, rules in placed.items()}


def _if_free(found: Attribution, parts: Floats) -> dict[str, Spread]:
    """How many times as fast each step would be without a category, or without idle."""
    known = len(PHASES) * len(CATEGORIES)
    by_category = parts[:, :known].reshape(-1, len(PHASES), len(CATEGORIES)).sum(axis=1)
    idle = found.idle_ns.sum(axis=1)[:, None]
    windows = found.windows.length[:, None]
    spent = np.concatenate([by_category, idle], axis=1)[windows[:, 0] > 0]
    left = windows[windows[:, 0] > 0] - spent
    gains: dict[str, Spread] = {}
    for i in np.flatnonzero(spent.any(axis=0) & (left > 0).all(axis=0)).tolist():
        gain = (left[:, i] + spent[:, i]) / left[:, i]
        spread = Spread(float(np.median(gain)), float(gain.min()), float(gain.max()))
        gains[(*CATEGORIES, "idle")[i]] = spread
    return dict(sorted(gains.items(), key=lambda one: -one[1].median))


def _whole_rules(found: Attribution) -> tuple[Placed, ...]:
    """The rules that placed the busy time of all steps, no rule for the unattributed."""
    return _rules(found, np.zeros(len(found.pieces.row), np.int64)).get(0, ())


def _shares(found: Attribution, rules: list[tuple[int, float]]) -> tuple[Placed, ...]:
    total = sum(ns for _, ns in rules)
    ordered = sorted(rules, key=lambda rule: (-rule[1], rule[0]))
    return tuple(Placed(found.labels[rule] or "no rule", ns / total) for rule, ns in ordered)


def _operators(found: Attribution, step_ns: float) -> list[Operator]:
    """Every operator or kernel name by category, the longest self time first."""
    meaning, events, steps = found.meaning, found.events, len(found.windows)
    width = len(CATEGORIES) + 1  # the last place is for NONE

    def key(named: Ints, row: Ints) -> Ints:
        return events.name[named] * width + meaning.category[row] % width

    size = len(events.names) * width
    row, called = found.pieces.row, found.calls.row
    keys = key(meaning.shown[row], row)
    ns = np.bincount(keys, weights=found.pieces.ns, minlength=size)
    count = np.bincount(key(called, called), minlength=size)
    lasting = np.bincount(
        key(called, called), weights=events.end[called] - events.start[called], minlength=size
    )
    rule = _longest_rule(keys, meaning.rule[row], found.pieces.ns, len(found.labels))
    # On a device the mean is how long a kernel ran, on a CPU its self time: a call's own.
    spent = lasting if events.on_device.any() else ns
    names = (*CATEGORIES, "unattributed")
    operators = [
        Operator(
            name=events.names[k // width],
            category=names[k % width],
            ns=float(ns[k]) / steps,
            share=float(ns[k]) / steps / step_ns,
            count=float(count[k]) / steps,
            mean_ns=float(spent[k] / count[k]) if count[k] else None,
            rule=found.labels[rule[k]],
        )
        for k in np.flatnonzero(ns).tolist()
    ]
    return sorted(operators, key=lambda o: (-o.ns, o.name, o.category))


def _longest_rule(key: Ints, rule: Ints, ns: Ints, width: int) -> dict[int, int]:
    """For each key the rule with most of its time."""
    both, which = np.unique(key * width + rule % width, return_inverse=True)
    sums = np.bincount(which.reshape(-1), weights=ns)
    ordered = both[np.argsort(sums, kind="stable")]  # the longest is set last, and stays
    return dict(zip((ordered // width).tolist(), (ordered % width).tolist(), strict=True))


def _idle_by_cause(found: Attribution, idle_ns: float) -> dict[str, float]:
    """Idle time by cause, all times one factor so that it sums to `idle_ns`."""
    idle = found.idle
    known = idle.cause != NONE
    sums = np.bincount(
        idle.cause[known], weights=(idle.end - idle.start)[known], minlength=len(IDLE_CAUSES)
    )
    total = float(sums.sum())
    if not total:
        return {}
    return {
        cause: float(ns) * idle_ns / total
        for cause, ns in zip(IDLE_CAUSES, sums.tolist(), strict=True)
        if ns
    }


def _layers(found: Attribution, step_ns: float) -> Iterator[Layer]:
    """Layers in the order of the model, as far as the trace tells it: of their first forward."""
    layer = found.meaning.layer[found.pieces.row]
    phase = found.meaning.phase[found.pieces.row]
    size, steps = len(found.events.names), len(found.windows)

    def spent(chosen: Ints) -> Floats:
        return np.bincount(layer[chosen], weights=found.pieces.ns[chosen], minlength=size) / steps

    inside = layer != NONE
    forward = spent(np.flatnonzero(inside & (phase != BACKWARD)))
    backward = spent(np.flatnonzero(inside & (phase == BACKWARD)))
    both = forward + backward
    for name in np.flatnonzero(both).tolist():
        path = found.events.names[name].removeprefix("layer:").removeprefix("nn.Module: ")
        yield Layer(path, float(forward[name]), float(backward[name]), float(both[name] / step_ns))


def _communication(found: Attribution, parts: Floats, typical: Floats) -> Communication | None:
    """Of collectives on a device. What is exposed is the sum of their rows."""
    talks = found.meaning.category == COMMUNICATION
    if not found.events.on_device.any() or not talks[found.work.row].any():
        return None
    step, ran = cut(Cover.of(found.work[talks[found.work.row]]).segments, found.windows)
    total = np.bincount(step, weights=ran.end - ran.start, minlength=len(found.windows))
    own = slice(COMMUNICATION, len(PHASES) * len(CATEGORIES), len(CATEGORIES))
    factor = parts.sum() / found.windows.length.sum()
    hidden = float(np.median(factor * total - parts[:, own].sum(axis=1)))
    exposed = float(typical[own].sum())
    return Communication(exposed + hidden, hidden, exposed)


def _totals(found: Attribution) -> Totals:
    """Over the whole trace: from the first to the last piece of work."""
    work = found.work
    talks = found.collective[work.row]
    copies = np.isin(found.events.kind[work.row], (Kind.MEMCPY, Kind.MEMSET))
    span = float(work.end.max() - work.start.min())

    def union(chosen: NDArray[np.bool_]) -> float:
        covered = Cover.of(work[chosen]).segments
        return float((covered.end - covered.start).sum())

    busy = union(np.ones(len(work), np.bool_))
    return Totals(
        span, busy, span - busy, union(~talks & ~copies), union(talks & ~copies), union(copies)
    )


def _notes(found: Attribution) -> Iterator[str]:
    events = found.events
    unlinked = int(((events.launch == NONE) & events.on_device).sum())
    if unlinked:
        yield f"{unlinked} device events have no launch in the trace; their phase is other."
    if events.timeless:
        yield f"{events.timeless} events say no time and were left out."
