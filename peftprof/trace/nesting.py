"""Which event encloses which on a CPU thread, and what is innermost at each moment."""

from dataclasses import dataclass

import numpy as np

from peftprof.trace.events import NONE, Events, Ints, Kind

# Older torch writes whole microseconds, so an event may end that much after its parent.
ROUNDING_NS = 1000


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
    inside those that outlast it.
    """
    parent = np.full(len(events), NONE, np.int64)
    depth = np.zeros(len(events), np.int64)
    segments: list[tuple[int, int, int]] = []
    cpu = np.flatnonzero(~events.on_device)
    stack: list[tuple[int, int]] = []  # (end, row) of the open events, outermost first
    now = 0
    before = NONE
    columns = (cpu, events.thread[cpu], events.start[cpu], events.end[cpu])
    for row, thread, start, end in zip(*(c.tolist() for c in columns), strict=True):
        if thread != before:
            _advance(stack, now, None, segments)
            before, now = thread, start
        _advance(stack, now, start, segments)
        now = start
        around = next((outer for ends, outer in reversed(stack) if ends + ROUNDING_NS >= end), NONE)
        if around != NONE:
            parent[row] = around
            depth[row] = depth[around] + 1
        stack.append((end, row))
    _advance(stack, now, None, segments)
    rows = np.array(segments, dtype=np.int64).reshape(-1, 3)
    levels = tuple(cpu[depth[cpu] == level] for level in range(int(depth.max(initial=0)) + 1))
    return Tree(parent, Segments(rows[:, 0], rows[:, 1], rows[:, 2]), levels)


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
