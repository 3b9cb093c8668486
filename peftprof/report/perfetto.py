"""What a breakdown found, as a trace that ui.perfetto.dev and chrome://tracing open.

The format is Chrome's trace event format: times in microseconds, a process a run, a track
for its steps, its phases, its idle time, and for each category on each thread or stream.
A category goes by its name in reports: `memcpy` would be taken for torch.profiler's own.
"""

import contextlib
import gzip
import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import orjson

from peftprof.breakdowns import CATEGORIES, IDLE_CAUSES, PHASES
from peftprof.report import words
from peftprof.report.picture import whole
from peftprof.trace.attribute import Attribution
from peftprof.trace.events import NONE, Ints, rows_of
from peftprof.trace.nesting import Segments
from peftprof.trace.sweep import Cover, cut, joined
from peftprof.trace.timeline import lane_names

OTHER = PHASES.index("other")
GROUPS = (*CATEGORIES, "unattributed")

Event = dict[str, Any]


def write(attributions: Sequence[tuple[str, Attribution]], path: Path) -> None:
    """Write the named attributions to `path`, whole, event by event; gzipped if it ends in .gz.

    Raises FolderError when the file cannot be written.
    """
    zipped = path.name.endswith(".gz")
    with whole(path, "--perfetto") as new, _opened(new, zipped) as out:
        out.write(b'{"displayTimeUnit":"ms","traceEvents":[\n')
        separator = b""
        for number, (name, found) in enumerate(attributions, 1):
            for event in events(number, name, found):
                out.write(separator + orjson.dumps(event))
                separator = b",\n"
        out.write(b"\n]}\n")


@contextlib.contextmanager
def _opened(path: Path, zipped: bool) -> Iterator[BinaryIO]:
    with path.open("wb") as raw:
        if not zipped:
            yield raw
            return
        with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=6, mtime=0, filename="") as out:
            yield out  # type: ignore[misc]  # it writes bytes, which is all that is asked of it


@dataclass(frozen=True)
class Track:
    """A line of spans that lie apart from each other: its place, its name."""

    pid: int
    tid: int
    name: str

    def about(self) -> Iterator[Event]:
        """The events that name and order it."""
        yield _metadata(self.pid, self.tid, "thread_name", {"name": self.name})
        yield _metadata(self.pid, self.tid, "thread_sort_index", {"sort_index": self.tid})

    def span(self, name: str, kind: str, start: int, end: int, args: Event) -> Event:
        """A span from `start` to `end` in nanoseconds, with `kind` as its category."""
        about = {"ph": "X", "cat": kind, "name": name, "pid": self.pid, "tid": self.tid}
        return {**about, "ts": start / 1000, "dur": (end - start) / 1000, "args": args}


def events(pid: int, name: str, found: Attribution) -> Iterator[Event]:
    """Every event of one run, which is process `pid`, track by track."""
    yield _metadata(pid, 0, "process_name", {"name": words.clean(name)})
    yield _metadata(pid, 0, "process_labels", {"labels": words.clean(found.events.device)})
    yield _metadata(pid, 0, "process_sort_index", {"sort_index": pid})
    yield from _steps(Track(pid, 1, "steps"), found)
    yield from _phases(Track(pid, 2, "phases"), found)
    yield from _idle(Track(pid, 3, "idle"), found)
    for tid, (label, lane) in enumerate(_lanes(found), 4):
        yield from _work(Track(pid, tid, label), found, lane)


def _metadata(pid: int, tid: int, name: str, args: Event) -> Event:
    return {"ph": "M", "name": name, "pid": pid, "tid": tid, "ts": 0, "args": args}


def _steps(track: Track, found: Attribution) -> Iterator[Event]:
    yield from track.about()
    windows = zip(found.windows.start.tolist(), found.windows.end.tolist(), strict=True)
    for number, (start, end) in enumerate(windows, 1):
        args = {"steps": words.clean(found.steps_by)}
        yield track.span(f"step {number} of {len(found.windows)}", "step", start, end, args)


def _phases(track: Track, found: Attribution) -> Iterator[Event]:
    """Stretches of each step in which the work that began was of one phase."""
    yield from track.about()
    windows = found.windows
    # What begins in a step, and what runs as it begins.
    step, running = cut(Cover.of(found.work).segments, windows)
    into = running.start == windows.start[step]
    begins = windows.holding(found.work.start)
    inside = begins != NONE
    work = joined([running[into], found.work[inside]])
    step = np.append(step[into], begins[inside])
    order = np.argsort(work.start, kind="stable")
    step, work = step[order], work[order]
    phase = found.meaning.phase[work.row]
    first = np.flatnonzero(np.append(True, (phase[1:] != phase[:-1]) | (step[1:] != step[:-1])))
    if not len(work):
        return
    start = work.start[first]
    # A stretch lasts as long as its work, but not into the next one.
    end = np.minimum(np.maximum.reduceat(work.end, first), windows.end[step[first]])
    end = np.minimum(end, np.append(start[1:], end[-1]))
    columns = (phase[first], start, end)
    for number, begin, stop in zip(*(c.tolist() for c in columns), strict=True):
        if number != OTHER and begin < stop:
            yield track.span(PHASES[number], "phase", begin, stop, {})


def _idle(track: Track, found: Attribution) -> Iterator[Event]:
    yield from track.about()
    idle = found.idle
    columns = (idle.start, idle.end, idle.cause)
    for start, end, cause in zip(*(c.tolist() for c in columns), strict=True):
        name = "idle" if cause == NONE else words.CAUSES[IDLE_CAUSES[cause]]
        yield track.span(name, "idle", start, end, {})


def _lanes(found: Attribution) -> Iterator[tuple[str, Segments]]:
    """The work of the steps by category, then thread; what overlaps is put side by side."""
    work = found.work[_in_steps(found)]
    group = found.meaning.category[work.row] % len(GROUPS)  # NONE is the last
    names = lane_names(found.events)
    width = len(names)
    for key, rows in rows_of(group * width + found.events.thread[work.row]):
        name = names[key % width]
        label = f"{words.label(GROUPS[key // width])}, {words.clean(name)}"
        for place, lane in enumerate(_apart(work[rows]), 1):
            yield label if place == 1 else f"{label} ({place})", lane


def _in_steps(found: Attribution) -> Ints:
    """Which of the work runs in a step, at least in part."""
    windows, work = found.windows, found.work
    at = np.minimum(np.searchsorted(windows.end, work.start, side="right"), len(windows) - 1)
    inside = (work.start < windows.end[at]) & (work.end > windows.start[at])
    return np.flatnonzero(inside).astype(np.int64)


def _apart(work: Segments) -> list[Segments]:
    """`work` in as few lines as it takes for none to hold two at a time."""
    work = work[np.argsort(work.start, kind="stable")]
    if (work.start[1:] >= work.end[:-1]).all():
        return [work]
    lines: list[tuple[int, int]] = []  # a heap: when the last of each ends, its number
    line = np.zeros(len(work), np.int64)
    for i, (start, end) in enumerate(zip(work.start.tolist(), work.end.tolist(), strict=True)):
        if lines and lines[0][0] <= start:
            line[i] = lines[0][1]
            heapq.heapreplace(lines, (end, lines[0][1]))
        else:
            line[i] = len(lines)
            heapq.heappush(lines, (end, len(lines)))
    return [work[rows] for _, rows in rows_of(line)]


def _work(track: Track, found: Attribution, lane: Segments) -> Iterator[Event]:
    yield from track.about()
    names, meaning = found.events.names, found.meaning

    @cache
    def called(name: int) -> str:
        return words.called(names[name]) or "?"

    shown = meaning.shown[lane.row]
    columns = (
        lane.start,
        lane.end,
        found.events.name[np.where(shown != NONE, shown, lane.row)],
        meaning.category[lane.row] % len(GROUPS),
        meaning.phase[lane.row],
        meaning.layer[lane.row],
        meaning.rule[lane.row],
    )
    for start, end, name, category, phase, layer, rule in zip(
        *(c.tolist() for c in columns), strict=True
    ):
        args = {"phase": PHASES[phase]}
        if layer != NONE:
            args["layer"] = called(layer)
        if rule != NONE:
            args["rule"] = words.clean(found.labels[rule])
        yield track.span(called(name), words.label(GROUPS[category]), start, end, args)
