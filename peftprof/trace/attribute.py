"""What every piece of work in a trace is: its step, phase, category and layer.

docs/reading-a-breakdown.md tells the rules in words.
"""

from dataclasses import dataclass

import numpy as np

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.errors import TraceError
from peftprof.trace import rules, steps
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind
from peftprof.trace.nesting import Segments, Tree, launch_free, nest
from peftprof.trace.rules import Reach, Rules
from peftprof.trace.steps import Steps
from peftprof.trace.sweep import Cover, Pieces, Windows, cut, share_out

BACKWARD = PHASES.index("backward")
OPTIMIZER = PHASES.index("optimizer")
OTHER = PHASES.index("other")
HEAD_LOSS = CATEGORIES.index("head_loss")
OPTIMIZER_CATEGORY = CATEGORIES.index("optimizer")


@dataclass(frozen=True)
class Meaning:
    """What each event (row) is. NONE: no category, no layer, no operator.

    `category` numbers CATEGORIES; `layer` is a name's number; `shown` is the event whose
    name the work goes by.
    """

    phase: Ints
    category: Ints
    layer: Ints
    shown: Ints


@dataclass(frozen=True)
class Calls:
    """Events (rows) to count, and the step of each."""

    row: Ints
    step: Ints


@dataclass(frozen=True)
class Attribution:
    """Where the time of each step went.

    `pieces` and `idle_ns` [step, phase] sum to the windows exactly. `calls` are all
    operators or device events; `entries` are those, or ranges of ours, at which work enters
    its phase and category. `overlap_ns` is time in which further work ran beside what was
    counted.
    """

    events: Events
    meaning: Meaning
    windows: Windows
    pieces: Pieces
    calls: Calls
    entries: Calls
    idle_ns: Ints
    overlap_ns: Ints


def attribute(events: Events, ruleset: Rules | None = None) -> Attribution:
    """Attribute the trace's time. Raises TraceError when it has no steps or nothing in them."""
    ruleset = ruleset or rules.load()
    found = steps.find(events)
    if events.on_device.any():
        return _device(events, found, ruleset)
    if any("LaunchKernel" in name for name in _names_of(events, Kind.LAUNCH)):
        raise TraceError(
            "the trace has kernel launches but no kernels: the profiler could not record the "
            "device; is another profiler attached?"
        )
    return _cpu(launch_free(events), found, ruleset)


def _names_of(events: Events, kind: Kind) -> list[str]:
    return [events.names[i] for i in np.unique(events.name[events.kind == kind])]


@dataclass(frozen=True)
class _Context:
    """What the ranges and operators round each CPU event say of it."""

    tree: Tree
    phase: Ints
    layer: Ints
    operator: Ints  # row of the innermost operator, itself included
    names_category: Bools  # a range that names a category
    ranged: Ints  # category by the innermost such range
    before: Ints  # by the forward's range, head, optimizer, operators that own what is under them
    after: Ints  # by the rules of the innermost operator
    python: Bools  # in the Python body of an autograd.Function, no operator running


def _cpu(events: Events, found: Steps, ruleset: Rules) -> Attribution:
    context = _context(events, found, ruleset)
    category = _first(context.ranged, context.before, context.after)
    meaning = Meaning(context.phase, category, context.layer, context.operator)

    innermost = context.tree.innermost
    running = _running(events, context)
    own = events.thread[running.row] == found.thread
    pieces, cover = share_out([running[own], running[~own]], found.windows)
    if not len(pieces.ns):
        raise TraceError("no operator runs in the trace's steps; was the profiler active?")

    step, free = cut(innermost[events.thread[innermost.row] == found.thread], found.windows)
    idle = _table(step, context.phase[free.row], cover.free(free), len(found.windows))

    overlap = _overlap(running, pieces, found.windows)
    calls = (events.kind == Kind.OPERATOR) & ~context.python
    return Attribution(
        events=events,
        meaning=meaning,
        windows=found.windows,
        pieces=pieces,
        calls=_in_steps(events, found.windows, calls),
        entries=_in_steps(events, found.windows, _entries(events, context, meaning, calls)),
        idle_ns=idle,
        overlap_ns=overlap,
    )


def _entries(events: Events, context: _Context, meaning: Meaning, calls: Bools) -> Bools:
    """Which operators, or ranges that name a category, are not part of one of the same."""
    counted = calls | context.names_category
    around = context.tree.above(
        context.tree.inherit(np.where(counted, np.arange(len(events)), NONE))
    )
    same_category = meaning.category[around] == meaning.category
    same_phase = meaning.phase[around] == meaning.phase
    entering: Bools = counted & ~((around != NONE) & same_category & same_phase)
    return entering


def _in_steps(events: Events, windows: Windows, chosen: Bools) -> Calls:
    rows = np.flatnonzero(chosen)
    step = windows.holding(events.start[rows])
    return Calls(rows[step != NONE], step[step != NONE])


def _running(events: Events, context: _Context) -> Segments:
    """The stretches in which an operator runs, by what is innermost then."""
    innermost = context.tree.innermost
    operator = context.operator[innermost.row]
    # A range may be inside an operator but for its last moment.
    end = np.minimum(innermost.end, events.end[operator])
    runs = (operator != NONE) & ~context.python[innermost.row] & (innermost.start < end)
    return Segments(innermost.start, end, innermost.row)[runs]


def _device(events: Events, found: Steps, ruleset: Rules) -> Attribution:
    context = _context(events, found, ruleset)
    device = events.on_device
    host = events.launch
    launched = device & (host != NONE)
    step = np.where(launched, found.of_launch(events.start[host]), NONE)
    if not (step != NONE).any():
        raise TraceError("no kernel was launched in the trace's steps; profile whole steps")
    windows, step = steps.device_windows(events, found, step)

    meaning = Meaning(
        phase=np.where(launched, context.phase[host], OTHER),
        category=_kernel_category(events, context, ruleset),
        layer=np.where(launched, context.layer[host], NONE),
        shown=np.arange(len(events)),
    )
    rows = np.flatnonzero(device)
    work = Segments(events.start[rows], events.end[rows], rows)
    pieces, cover = share_out(_device_groups(events, meaning, work), windows)

    gap_step, gaps = cut(_gaps(cover, windows), windows)
    # The gap before an event waits for it; at the end of a window it waits for the next step.
    at_end = gaps.end == windows.end[gap_step]
    waiting = np.where(at_end | (gaps.row == NONE), OTHER, meaning.phase[gaps.row])
    idle = _table(gap_step, waiting, gaps.end - gaps.start, len(windows))

    call_step = np.where(launched, step, windows.holding(events.start))
    called = rows[call_step[rows] != NONE]
    calls = Calls(called, call_step[called])
    return Attribution(
        events=events,
        meaning=meaning,
        windows=windows,
        pieces=pieces,
        calls=calls,
        entries=calls,
        idle_ns=idle,
        overlap_ns=_overlap(work, pieces, windows),
    )


def _device_groups(events: Events, meaning: Meaning, work: Segments) -> list[Segments]:
    """Compute, communication, copies: who is counted where streams overlap, in this order."""
    copies = events.kind[work.row] != Kind.KERNEL
    talks = meaning.category[work.row] == CATEGORIES.index("communication")
    return [work[~copies & ~talks], work[~copies & talks], work[copies]]


def _gaps(cover: Cover, windows: Windows) -> Segments:
    """The uncovered stretches of the windows, each with the row of the event that ends it."""
    busy = cover.segments
    start = np.append(windows.start[0], busy.end)
    end = np.append(busy.start, windows.end[-1])
    gaps = Segments(start, end, np.append(busy.row, NONE))
    return gaps[gaps.start < gaps.end]


def _context(events: Events, found: Steps, ruleset: Rules) -> _Context:
    tree = nest(events)
    is_range, is_operator = events.kind == Kind.RANGE, events.kind == Kind.OPERATOR
    rows = np.arange(len(events))
    by_name = _range_names(events, ruleset)
    phase = tree.inherit(np.where(is_range, by_name[0][events.name], NONE))
    own_range = np.where(is_range, by_name[1][events.name], NONE)
    in_range = tree.inherit(own_range)
    layer_name = np.where(by_name[2], np.arange(len(events.names)), NONE)
    layer = tree.inherit(np.where(is_range, layer_name[events.name], NONE))
    head = np.where((layer != NONE) & by_name[3][layer], HEAD_LOSS, NONE)

    operator = tree.inherit(np.where(is_operator, rows, NONE))
    own = _operator_rules(events, tree, operator, is_operator, ruleset)
    first = tree.inherit(own[Reach.FIRST])
    within = tree.inherit(own[Reach.WITHIN], outermost=True)
    named = np.where(own[Reach.OWN] != NONE, own[Reach.OWN], own[Reach.WITHIN])
    python = (own[Reach.OWN] == rules.IDLE)[operator] & (operator != NONE)
    enclosing = tree.inherit(np.where(named == rules.IDLE, NONE, named))

    forward = tree.inherit(events.forward)

    def linked(values: Ints) -> Ints:
        return np.where(forward != NONE, values[forward], NONE)

    phase = _complete_phase(events, found, tree, phase)
    optimizer = np.where(phase == OPTIMIZER, OPTIMIZER_CATEGORY, NONE)
    return _Context(
        tree=tree,
        phase=phase,
        layer=_first(layer, linked(layer)),
        operator=operator,
        names_category=own_range != NONE,
        ranged=in_range,
        before=_first(
            first, linked(in_range), head, linked(head), optimizer, within, linked(within)
        ),
        after=_first(enclosing, linked(enclosing), own[Reach.INHERIT], linked(own[Reach.INHERIT])),
        python=python,
    )


def _first(*columns: Ints) -> Ints:
    """The first value that is not NONE, row by row."""
    found = columns[0]
    for column in columns[1:]:
        found = np.where(found != NONE, found, column)
    return found


def _range_names(events: Events, ruleset: Rules) -> tuple[Ints, Ints, Bools, Bools]:
    """By name: the phase, the category, whether it is a layer, whether it is the head."""
    used = set(_names_of(events, Kind.RANGE))
    matches = [
        next((r for r in ruleset.ranges if name in used and r.match.fullmatch(name)), None)
        for name in events.names
    ]
    phase = np.array([r.phase if r else NONE for r in matches], np.int64)
    category = np.array([r.category if r else NONE for r in matches], np.int64)
    layer = np.array([bool(ruleset.layer.fullmatch(n)) for n in events.names], np.bool_)
    head = np.array([bool(ruleset.head.fullmatch(n)) for n in events.names], np.bool_)
    return phase, category, layer, head


def _operator_rules(
    events: Events, tree: Tree, operator: Ints, is_operator: Bools, ruleset: Rules
) -> dict[Reach, Ints]:
    """By reach, the category that each operator's own rule gives it."""
    above = tree.above(operator)
    parent = np.where(above != NONE, events.name[above], NONE)
    pairs = np.stack([events.name[is_operator], parent[is_operator]], axis=1)
    unique, which = np.unique(pairs, axis=0, return_inverse=True)
    matched = rules.match(
        ruleset.operators,
        [(events.names[n], events.names[p] if p != NONE else "") for n, p in unique.tolist()],
    )
    result = {}
    for reach in (Reach.FIRST, Reach.OWN, Reach.WITHIN, Reach.INHERIT):
        result[reach] = np.full(len(events), NONE, np.int64)
        result[reach][is_operator] = matched.only(reach)[which.reshape(-1)]
    return result


def _complete_phase(events: Events, found: Steps, tree: Tree, phase: Ints) -> Ints:
    """Without a phase range round it, work of the autograd engine is backward, all else other."""
    engine_name = np.array([name.startswith(rules.ENGINE) for name in events.names], np.bool_)
    engine = engine_name[events.name] & (events.kind == Kind.OPERATOR)
    under = tree.inherit(np.where(engine, BACKWARD, NONE))
    threads = np.setdiff1d(events.thread[engine], found.thread)
    on_engine_thread = np.where(np.isin(events.thread, threads), BACKWARD, OTHER)
    return _first(phase, under, on_engine_thread)


def _kernel_category(events: Events, context: _Context, ruleset: Rules) -> Ints:
    matched = rules.match(ruleset.kernels, [(name, "") for name in events.names])
    first, own, last = (
        matched.only(reach)[events.name] for reach in (Reach.FIRST, Reach.OWN, Reach.LAST)
    )
    host = events.launch

    def from_host(values: Ints) -> Ints:
        return np.where(host != NONE, values[host], NONE)

    category = _first(
        from_host(context.ranged),
        first,
        from_host(context.before),
        own,
        from_host(context.after),
        last,
    )
    return np.where(events.on_device, category, NONE)


def _table(step: Ints, phase: Ints, ns: Ints, count: int) -> Ints:
    """Sums of `ns` as [step, phase]."""
    flat = np.zeros(count * len(PHASES), np.int64)
    np.add.at(flat, step * len(PHASES) + phase, ns)
    return flat.reshape(count, len(PHASES))


def _overlap(work: Segments, pieces: Pieces, windows: Windows) -> Ints:
    step, parts = cut(work, windows)
    total = np.zeros(len(windows), np.int64)
    np.add.at(total, step, parts.end - parts.start)
    np.subtract.at(total, pieces.step, pieces.ns)
    return total
