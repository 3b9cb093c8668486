"""Why the device had nothing to do: asked of the CPU thread that launched what came next."""

import numpy as np

from peftprof.breakdowns import IDLE_CAUSES, PHASES
from peftprof.trace.context import Context
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind
from peftprof.trace.nesting import Segments
from peftprof.trace.rules import Rules
from peftprof.trace.sweep import Cover

DATA = PHASES.index("data")


def causes(events: Events, context: Context, ruleset: Rules, gaps: Segments) -> Ints:
    """For each gap, whose `row` is the device event that ended it, a number of IDLE_CAUSES.

    `queued`: the event had been launched before the gap began, so it waited for another
    stream or for its own start; or its launch is not in the trace. Otherwise the CPU was
    late. `data`: it spent most of the gap up to the launch in the data phase. `sync`: it
    had been waiting for the device inside the gap, so the queue had run empty. `launch`:
    it was busy with anything else, such as launching.
    """
    host = np.where(gaps.row != NONE, events.launch[gaps.row], NONE)
    launched = np.where(host != NONE, events.start[host], gaps.start)
    late = (host != NONE) & (launched > gaps.start)
    until = np.minimum(launched, gaps.end)  # the clocks of CPU and device may disagree
    found = np.full(len(gaps), IDLE_CAUSES.index("queued"), np.int64)
    found[late] = IDLE_CAUSES.index("launch")
    found[late & _waited(events, ruleset, gaps.start, until)] = IDLE_CAUSES.index("sync")
    found[late & _loading(context, gaps.start, until)] = IDLE_CAUSES.index("data")
    return found


def _loading(context: Context, start: Ints, end: Ints) -> Bools:
    """Whether more than half of [start, end) is the data phase on some CPU thread."""
    innermost = context.tree.innermost
    data = Cover.of(innermost[context.phase[innermost.row] == DATA])
    spent: Ints = data.until(end) - data.until(start)
    return 2 * spent > end - start


def _waited(events: Events, ruleset: Rules, start: Ints, end: Ints) -> Bools:
    """Whether a call that waits for the device ran inside [start, end)."""
    calls = events.kind == Kind.LAUNCH
    used = np.unique(events.name[calls])
    waits = [i for i in used.tolist() if ruleset.waits.fullmatch(events.names[i])]
    rows = np.flatnonzero(calls & np.isin(events.name, waits))
    if not len(rows):
        return np.zeros(len(start), np.bool_)
    rows = rows[np.argsort(events.start[rows], kind="stable")]
    reached = np.maximum.accumulate(events.end[rows])
    before = np.searchsorted(events.start[rows], end, side="left") - 1
    ran: Bools = (before >= 0) & (reached[before] > start)
    return ran
