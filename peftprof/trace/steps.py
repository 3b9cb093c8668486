"""The steps of a trace, and the stretch of time that each of them is measured over."""

import re
from dataclasses import dataclass

import numpy as np

from peftprof.errors import TraceError
from peftprof.trace.events import NONE, Events, Ints, Kind
from peftprof.trace.sweep import Windows

# Ours, else those of torch.profiler's own schedule.
STEP_NAMES = (re.compile(r"step:\d+"), re.compile(r"ProfilerStep#\d+"))


@dataclass(frozen=True)
class Steps:
    """The steps as ranges on one CPU `thread`, in order."""

    thread: int
    windows: Windows

    def of_launch(self, times: Ints) -> Ints:
        """The step in which something launched at these CPU times was launched, or NONE.

        What is launched between two steps belongs to the former.
        """
        last = self.windows.end[-1]
        at = np.searchsorted(self.windows.start, times, side="right") - 1
        return np.where(times < last, at, NONE)


def find(events: Events) -> Steps:
    """The steps of the trace. Raises TraceError when it has none."""
    for pattern in STEP_NAMES:
        wanted = np.array([pattern.fullmatch(name) is not None for name in events.names])
        rows = np.flatnonzero((events.kind == Kind.RANGE) & wanted[events.name])
        rows = rows[events.end[rows] > events.start[rows]]
        if len(rows):
            return _on_one_thread(events, rows)
    raise TraceError(
        "the trace has no steps: no range is named step:N or ProfilerStep#N; "
        "call profiler.step() after each training step"
    )


def _on_one_thread(events: Events, rows: Ints) -> Steps:
    threads, counts = np.unique(events.thread[rows], return_counts=True)
    thread = int(threads[np.argmax(counts)])
    rows = rows[events.thread[rows] == thread]  # ordered by start
    start, end = events.start[rows], events.end[rows]
    apart = np.ones(len(rows), np.bool_)
    apart[1:] = start[1:] >= np.maximum.accumulate(end)[:-1]  # a step inside a step is none
    return Steps(thread, Windows(start[apart], end[apart]))


def device_windows(events: Events, steps: Steps, launched_in: Ints) -> tuple[Windows, Ints]:
    """Each step's window on the device, and `launched_in` renumbered to the windows.

    A window begins with the first device event launched from the step and ends where the
    next begins; the last ends with its last device event or with the step on the CPU,
    whichever is later. A step that launched nothing has no window.
    """
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
