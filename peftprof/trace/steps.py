"""The steps of a trace, and the stretch of time that each of them is measured over."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from peftprof.errors import TraceError
from peftprof.trace.events import NONE, Events, Ints, Kind
from peftprof.trace.rules import Rules
from peftprof.trace.sweep import Windows

WHOLE = "whole trace"


@dataclass(frozen=True)
class Steps:
    """The steps as ranges on one CPU `thread`, in order; `by` is the name of one, or WHOLE."""

    thread: int
    windows: Windows
    by: str

    def of_launch(self, times: Ints) -> Ints:
        """The step in which something launched at these CPU times was launched, or NONE.

        What is launched between two steps belongs to the former.
        """
        last = self.windows.end[-1]
        at = np.searchsorted(self.windows.start, times, side="right") - 1
        return np.where(times < last, at, NONE)


def candidates(events: Events, ruleset: Rules) -> Iterator[Steps]:
    """What may be the trace's steps, the best first; the last is the whole trace as one step.

    Raises TraceError for a trace that lasts no time.
    """
    ranges = events.kind == Kind.RANGE
    used = np.unique(events.name[ranges])
    for pattern in ruleset.steps:
        wanted = [i for i in used.tolist() if pattern.fullmatch(events.names[i])]
        rows = np.flatnonzero(ranges & np.isin(events.name, wanted))
        rows = rows[events.end[rows] > events.start[rows]]
        if len(rows):
            yield _on_one_thread(events, rows)
    yield _whole(events)


def _on_one_thread(events: Events, rows: Ints) -> Steps:
    threads, counts = np.unique(events.thread[rows], return_counts=True)
    thread = int(threads[np.argmax(counts)])
    rows = rows[events.thread[rows] == thread]  # ordered by start
    start, end = events.start[rows], events.end[rows]
    apart = np.ones(len(rows), np.bool_)
    apart[1:] = start[1:] >= np.maximum.accumulate(end)[:-1]  # a step inside a step is none
    by = re.sub(r"\d+$", "N", events.named(int(rows[0])))
    return Steps(thread, Windows(start[apart], end[apart]), by)


def _whole(events: Events) -> Steps:
    """From the first to the last event, on the CPU thread that has most of them."""
    start, end = int(events.start.min()), int(events.end.max())
    if start == end:
        raise TraceError("the trace's events last no time; record it again")
    operators = events.thread[events.kind == Kind.OPERATOR]
    threads = operators if len(operators) else events.thread[~events.on_device]
    thread = int(np.argmax(np.bincount(threads))) if len(threads) else NONE
    return Steps(thread, Windows(np.array([start]), np.array([end])), WHOLE)


def device_windows(events: Events, steps: Steps, launched_in: Ints) -> tuple[Windows, Ints]:
    """Each step's window on the device, and `launched_in` renumbered to the windows.

    A window begins with the first device event launched from the step and ends where the
    next begins; the last ends with its last device event or with the step on the CPU,
    whichever is later. A step that launched nothing has no window. The whole trace as a
    step lasts from its first device event to its last.
    """
    if steps.by == WHOLE:
        device = events.on_device
        span = int(events.start[device].min()), int(events.end[device].max())
        window = Windows(np.array(span[:1]), np.array(span[1:]))
        return window, np.where(device, 0, NONE)
    launched = launched_in != NONE
    working, step = np.unique(launched_in[launched], return_inverse=True)
    begin = np.full(len(working), np.iinfo(np.int64).max)
    np.minimum.at(begin, step, events.start[launched])
    # A side stream may begin the next step before this one: windows never run backwards.
    begin = np.minimum.accumulate(begin[::-1])[::-1]
    in_last = launched_in == working[-1]
    end = max(int(events.end[in_last].max()), int(steps.windows.end[working[-1]]))
    renumbered = np.full(len(events), NONE, np.int64)
    renumbered[launched] = step
    return Windows(begin, np.append(begin[1:], end)), renumbered
