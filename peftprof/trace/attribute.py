"""What every piece of work in a trace is: its step, phase, category and layer.

docs/reading-a-breakdown.md tells the rules in words.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.errors import TraceError
from peftprof.trace import rules, steps
from peftprof.trace.context import OTHER, Context, first, surroundings
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind
from peftprof.trace.idle import causes
from peftprof.trace.nesting import Segments, Tree, launch_free
from peftprof.trace.rules import Reach, Rules
from peftprof.trace.sweep import Cover, Pieces, Windows, cut, share_out, table

Floats = NDArray[np.float64]

COMMUNICATION = CATEGORIES.index("communication")


@dataclass(frozen=True)
class Meaning:
    """What each event (row) is. NONE: no category, no layer, no operator, no rule.

    `category` numbers CATEGORIES; `layer` is a name's number; `shown` is the event whose
    name the work goes by; `rule` numbers `Rules.labels`.
    """

    phase: Ints
    category: Ints
    layer: Ints
    shown: Ints
    rule: Ints


@dataclass(frozen=True)
class Calls:
    """Events (rows) to count, and the step of each."""

    row: Ints
    step: Ints


@dataclass(frozen=True)
class Idle:
    """The stretches in which nothing ran, the step of each, and why.

    `cause` numbers IDLE_CAUSES; NONE on a CPU, where no device waits for anything.
    """

    step: Ints
    start: Ints
    end: Ints
    cause: Ints


@dataclass(frozen=True)
class Attribution:
    """Where the time of each step went.

    `pieces` and `idle` sum to the windows exactly; `idle_ns` is [step, phase]. `calls` are
    all operators or device events; `entries` are those, or ranges of ours, at which work
    enters its phase and category. `overlap_ns` is time in which further work ran beside
    what was counted. `collective` are the kernels that only talk to other devices, by their
    own names. `work` is everything that ran, overlapping as it did, in the whole
    trace; `steps_by` says what was taken for a step.
    """

    events: Events
    meaning: Meaning
    windows: Windows
    pieces: Pieces
    calls: Calls
    entries: Calls
    idle: Idle
    idle_ns: Ints
    overlap_ns: Floats
    collective: Bools
    work: Segments
    tree: Tree
    labels: tuple[str, ...]
    steps_by: str


@dataclass(frozen=True)
class Described:
    """The nesting of a trace's CPU events, and of each event (row) what Meaning says."""

    tree: Tree
    meaning: Meaning


def attribute(events: Events, ruleset: Rules | None = None) -> Attribution:
    """Attribute the trace's time. Raises TraceError where there is nothing in it."""
    ruleset = ruleset or rules.load()
    if events.on_device.any():
        return _device(events, ruleset)
    if any("LaunchKernel" in name for name in _names_of(events, Kind.LAUNCH)):
        raise TraceError(
            "the trace has kernel launches but no kernels: the profiler could not record the "
            "device; is another profiler attached?"
        )
    return _cpu(launch_free(events), ruleset)


def describe(events: Events, ruleset: Rules | None = None) -> Described:
    """What each CPU event of the trace is, without asking when anything ran."""
    ruleset = ruleset or rules.load()
    context = surroundings(events, next(steps.candidates(events, ruleset)), ruleset)
    return Described(context.tree, _meaning(context, ruleset))


def _meaning(context: Context, ruleset: Rules) -> Meaning:
    rule = context.rule
    return Meaning(context.phase, ruleset.category_of[rule], context.layer, context.operator, rule)


def _names_of(events: Events, kind: Kind) -> list[str]:
    return [events.names[i] for i in np.unique(events.name[events.kind == kind])]


def _cpu(events: Events, ruleset: Rules) -> Attribution:
    for found in steps.candidates(events, ruleset) if len(events) else ():
        context = surroundings(events, found, ruleset)
        running = _running(events, context)
        own = events.thread[running.row] == found.thread
        pieces, cover = share_out([running[own], running[~own]], found.windows)
        if len(pieces.ns):
            break
    else:
        raise TraceError("no operator runs in the trace; was the profiler active?")
    meaning = _meaning(context, ruleset)
    innermost = context.tree.innermost
    count = len(found.windows)
    step, free = cut(innermost[events.thread[innermost.row] == found.thread], found.windows)
    idle_ns = table(step, context.phase[free.row], cover.free(free), count, len(PHASES))
    # Nothing at all was recorded of the rest.
    busy = table(pieces.step, pieces.step * 0, pieces.ns, count, 1)[:, 0]
    idle_ns[:, OTHER] += found.windows.length - busy - idle_ns.sum(axis=1)
    gap_step, gaps = cut(_gaps(cover, found.windows), found.windows)
    is_call = (events.kind == Kind.OPERATOR) & ~context.python
    return Attribution(
        events=events,
        meaning=meaning,
        windows=found.windows,
        pieces=pieces,
        calls=_in_steps(events, found.windows, is_call),
        entries=_in_steps(events, found.windows, _entries(context, meaning, is_call)),
        idle=Idle(gap_step, gaps.start, gaps.end, np.full(len(gaps), NONE, np.int64)),
        idle_ns=idle_ns,
        overlap_ns=_overlap(running, pieces, found.windows),
        collective=np.zeros(len(events), np.bool_),
        work=running,
        tree=context.tree,
        labels=ruleset.labels,
        steps_by=found.by,
    )


def _entries(context: Context, meaning: Meaning, is_call: Bools) -> Bools:
    """Which operators, or ranges that name a category, are not part of one of the same."""
    counted = is_call | context.names_category
    around = context.tree.above(
        context.tree.inherit(np.where(counted, np.arange(len(counted)), NONE))
    )
    same_category = meaning.category[around] == meaning.category
    same_phase = meaning.phase[around] == meaning.phase
    entering: Bools = counted & ~((around != NONE) & same_category & same_phase)
    return entering


def _in_steps(events: Events, windows: Windows, chosen: Bools) -> Calls:
    rows = np.flatnonzero(chosen)
    step = windows.holding(events.start[rows])
    return Calls(rows[step != NONE], step[step != NONE])


def _running(events: Events, context: Context) -> Segments:
    """The stretches in which an operator runs, by what is innermost then."""
    innermost = context.tree.innermost
    operator = context.operator[innermost.row]
    # A range may be inside an operator but for its last moment.
    end = np.minimum(innermost.end, events.end[operator])
    runs = (operator != NONE) & ~context.python[innermost.row] & (innermost.start < end)
    return Segments(innermost.start, end, innermost.row)[runs]


def _device(events: Events, ruleset: Rules) -> Attribution:
    device, host = events.on_device, events.launch
    launched = device & (host != NONE)
    for found in steps.candidates(events, ruleset):
        step = np.where(launched, found.of_launch(events.start[host]), NONE)
        if found.by == steps.WHOLE or (step != NONE).any():
            break
    context = surroundings(events, found, ruleset)
    windows, step = steps.device_windows(events, found, step)
    rule, collective = _kernel_rules(events, context, ruleset)
    meaning = Meaning(
        phase=np.where(device, np.where(launched, context.phase[host], OTHER), context.phase),
        category=ruleset.category_of[rule],
        layer=np.where(device, np.where(launched, context.layer[host], NONE), context.layer),
        shown=np.arange(len(events)),
        rule=rule,
    )
    rows = np.flatnonzero(device)
    work = Segments(events.start[rows], events.end[rows], rows)
    pieces, cover = share_out(_device_groups(events, meaning, work), windows)

    gap_step, gaps = cut(_gaps(cover, windows), windows)
    # The gap before an event waits for it; at the end of a window it waits for the next step.
    at_end = gaps.end == windows.end[gap_step]
    waiting = np.where(at_end | (gaps.row == NONE), OTHER, meaning.phase[gaps.row])
    idle_ns = table(gap_step, waiting, gaps.end - gaps.start, len(windows), len(PHASES))

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
        idle=Idle(gap_step, gaps.start, gaps.end, causes(events, context, ruleset, gaps)),
        idle_ns=idle_ns,
        overlap_ns=_overlap(work, pieces, windows),
        collective=collective,
        work=work,
        tree=context.tree,
        labels=ruleset.labels,
        steps_by=found.by,
    )


def _device_groups(events: Events, meaning: Meaning, work: Segments) -> list[Segments]:
    """Compute, communication, copies: who is counted where streams overlap, in this order."""
    copies = events.kind[work.row] != Kind.KERNEL
    talks = meaning.category[work.row] == COMMUNICATION
    return [work[~copies & ~talks], work[~copies & talks], work[copies]]


def _gaps(cover: Cover, windows: Windows) -> Segments:
    """The uncovered stretches of the windows, each with the row of the event that ends it."""
    busy = cover.segments
    start = np.append(windows.start[0], busy.end)
    end = np.append(busy.start, windows.end[-1])
    gaps = Segments(start, end, np.append(busy.row, NONE))
    return gaps[gaps.start < gaps.end]


def _kernel_rules(events: Events, context: Context, ruleset: Rules) -> tuple[Ints, Bools]:
    """The rule of each device event, of each CPU event that of its context; the collectives."""
    used = np.unique(events.name[events.on_device])
    matched = rules.match(ruleset.kernels, [(events.names[i], "") for i in used.tolist()])
    host = events.launch

    def by_name(reach: Reach) -> Ints:
        of_name = np.full(len(events.names), NONE, np.int64)
        of_name[used] = matched.only(reach)
        return of_name[events.name]

    def from_host(values: Ints) -> Ints:
        return np.where(host != NONE, values[host], NONE)

    surely = by_name(Reach.FIRST)
    rule = first(
        from_host(context.ranged),
        surely,
        from_host(context.before),
        by_name(Reach.OWN),
        from_host(context.after),
        by_name(Reach.LAST),
        np.where(events.kind > Kind.KERNEL, rules.COPY, NONE),
    )
    collective = events.on_device & (ruleset.category_of[surely] == COMMUNICATION)
    return np.where(events.on_device, rule, context.rule), collective


def _overlap(work: Segments, pieces: Pieces, windows: Windows) -> Floats:
    """Time in each window in which work ran, once for all that ran side by side, less `pieces`.

    In doubles: what runs side by side for years is more than an int64 of nanoseconds.
    """
    time = np.append(work.start, work.end)
    change = np.repeat([1, -1], len(work))
    order = np.argsort(time, kind="stable")
    time, running = time[order], np.cumsum(change[order])
    step, parts = cut(Segments(time[:-1], time[1:], running[:-1]), windows)
    ran = np.bincount(step, parts.row * (parts.end - parts.start).astype(np.float64), len(windows))
    counted = np.bincount(pieces.step, pieces.ns, len(windows))
    beside: Floats = np.maximum(ran - counted, 0.0)
    return beside
