"""Which event encloses which on a CPU thread, and what is innermost at each moment."""

from dataclasses import dataclass

import numpy as np

from peftprof.errors import TraceError
from peftprof.trace.events import NONE, Events, Ints, Kind, one_key

# Older torch writes whole microseconds, so an event may end that much after its parent.
ROUNDING_NS = 1000
MAX_DEPTH = 10_000


@dataclass(frozen=True)
class Segments:
    """Stretches of time [start, end) and the event (row) that each belongs to."""

    start: Ints
    end: Ints
    row: Ints

    def __getitem__(
        self, chosen: "Ints | np.ndarray[tuple[int], np.dtype[np.bool_]]"
    ) -> "Segments":
        """The chosen stretches."""
        return Segments(self.start[chosen], self.end[chosen], self.row[chosen])

    def __len__(self) -> int:
        """Number of stretches."""
        return len(self.start)

    @property
    def columns(self) -> tuple[Ints, Ints, Ints]:
        """start, end, row."""
        return self.start, self.end, self.row


@dataclass(frozen=True)
class Tree:
    """The nesting of CPU events.

    `parent` is the enclosing event's row, or NONE (always for device events). `innermost`
    says for each thread which event was innermost when: together its union, each
    nanosecond once. `levels` lists rows by depth, so that what is passed down from parents
    is known before it is needed.
    """

    parent: Ints
    innermost: Segments
    levels: tuple[Ints, ...]

    def inherit(self, own: Ints, outermost: bool = False) -> Ints:
        """For each event the value of the nearest event round it, itself included.

        NONE is no value. With `outermost` an enclosing event's value holds before its own.
        """
        values = own.copy()
        for rows in self.levels[1:]:
            above = values[self.parent[rows]]
            first, second = (above, own[rows]) if outermost else (own[rows], above)
            values[rows] = np.where(first != NONE, first, second)
        return values

    def above(self, values: Ints) -> Ints:
        """Each event's parent's value; NONE where there is no parent."""
        return np.where(self.parent != NONE, values[self.parent], NONE)


def nest(events: Events) -> Tree:
    """The nesting of the CPU events, thread by thread.

    Where events overlap without nesting, the one that started last is innermost, and is
    inside those that outlast it. Raises TraceError for events nested past all reason.
    """
    parent = np.full(len(events), NONE, np.int64)
    depth = np.zeros(len(events), np.int64)
    cpu = np.flatnonzero(~events.on_device)
    crossing = _nest_at_once(events, cpu, parent, depth)
    apart = np.isin(events.thread[cpu], crossing)
    parts = [_stretches(events, cpu[~apart], parent), _walk(events, cpu[apart], parent, depth)]
    columns = zip(*(part.columns for part in parts), strict=True)
    if int(depth.max(initial=0)) > MAX_DEPTH:
        raise TraceError(f"events are nested more than {MAX_DEPTH} deep; that is no trace")
    order = np.argsort(depth[cpu], kind="stable")
    edges = np.cumsum(np.bincount(depth[cpu]))[:-1]
    levels = tuple(np.split(cpu[order], edges))
    return Tree(parent, Segments(*(np.concatenate(column) for column in columns)), levels)


def _nest_at_once(events: Events, cpu: Ints, parent: Ints, depth: Ints) -> Ints:
    """Fill in parents and depths; the threads where events cross, whose are not right.

    As many events are open round an event as began before it and have not ended. If all
    nest, the innermost of them is the last before it that is one less deep.
    """
    if not len(cpu):
        return cpu
    thread = events.thread[cpu]
    start, end = _edges(events, cpu)
    number = np.arange(len(cpu))
    deep = number - np.searchsorted(np.sort(end), start, side="right")
    place = deep * len(cpu) + number
    order = np.argsort(place, kind="stable")
    at = np.searchsorted(place[order], place - len(cpu)) - 1
    around = np.where(deep > 0, order[at], NONE)
    wrong = (deep > 0) & ((thread[around] != thread) | (end[around] < end))
    parent[cpu] = np.where(deep > 0, cpu[around], NONE)
    depth[cpu] = deep
    return np.unique(thread[wrong])


def _edges(events: Events, cpu: Ints) -> tuple[Ints, Ints]:
    """Starts and ends on one line, a thread behind the other; what lasts no time lasts half.

    So no start is an end of the same event, and order alone says what is inside what.
    """
    start, end = 2 * events.start[cpu], 2 * events.end[cpu]
    end = np.maximum(end, start + 1)
    key = one_key(np.tile(events.thread[cpu], 2), np.append(start, end))
    return key[: len(cpu)], key[len(cpu) :]


def _stretches(events: Events, cpu: Ints, parent: Ints) -> Segments:
    """What is innermost when, where all events nest: from each edge to the next."""
    if not len(cpu):
        return Segments(cpu, cpu, cpu)
    start, end = _edges(events, cpu)
    number = np.arange(len(cpu))
    # Of those that end together the inner one first.
    closing = (len(cpu) - 1 - np.argsort(end[::-1], kind="stable")).astype(np.int64)
    ends = end[closing]
    # At one time ends come before starts: the place of each among all edges.
    place = np.append(
        number + np.searchsorted(ends, start, side="right"),
        number + np.searchsorted(start, ends, side="left"),
    )
    time, row = np.empty(2 * len(cpu), np.int64), np.empty(2 * len(cpu), np.int64)
    time[place] = np.append(events.start[cpu], events.end[cpu[closing]])
    row[place] = np.append(cpu, parent[cpu[closing]])
    kept = (row[:-1] != NONE) & (time[:-1] < time[1:])
    return Segments(time[:-1][kept], time[1:][kept], row[:-1][kept])


def _walk(events: Events, cpu: Ints, parent: Ints, depth: Ints) -> Segments:
    """The same event by event, for threads whose events cross each other."""
    segments: list[tuple[int, int, int]] = []
    stack: list[tuple[int, int]] = []  # (end, row) of the open events, each ending before the last
    now = 0
    before = NONE
    columns = (cpu, events.thread[cpu], events.start[cpu], events.end[cpu])
    for row, thread, start, end in zip(*(c.tolist() for c in columns), strict=True):
        if thread != before:
            _advance(stack, now, None, segments)
            before, now = thread, start
        _advance(stack, now, start, segments)
        now = start
        around = NONE
        while stack and stack[-1][0] <= end:
            # What does not outlast the new event is never innermost again, nor round another
            # event than this one.
            ends, inner = stack.pop()
            if around == NONE and ends + ROUNDING_NS >= end:
                around = inner
        if around == NONE and stack:
            around = stack[-1][1]
        parent[row] = around
        depth[row] = 0 if around == NONE else depth[around] + 1
        stack.append((end, row))
    _advance(stack, now, None, segments)
    rows = np.array(segments, dtype=np.int64).reshape(-1, 3)
    return Segments(rows[:, 0], rows[:, 1], rows[:, 2])


def _advance(
    stack: list[tuple[int, int]], now: int, until: int | None, segments: list[tuple[int, int, int]]
) -> None:
    """Move from `now` to `until` (None: to the end), closing what ends on the way."""
    while stack:
        end, row = stack[-1]
        stop = end if until is None else min(end, until)
        if stop > now:
            segments.append((now, stop, row))
            now = stop
        if until is not None and end > until:
            return
        stack.pop()


def launch_free(events: Events) -> Events:
    """`events` with nothing but what `nest` needs of a trace without a device."""
    return events.take(np.flatnonzero(events.kind != Kind.LAUNCH))
