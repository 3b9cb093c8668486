"""Overlapping work on one time line: every nanosecond is given to one event, once."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftprof.trace.events import NONE, Ints
from peftprof.trace.nesting import Segments


@dataclass(frozen=True)
class Windows:
    """The steps' windows [start, end), in order and apart from each other."""

    start: Ints
    end: Ints

    def __len__(self) -> int:
        """Number of windows."""
        return len(self.start)

    @property
    def length(self) -> Ints:
        """Nanoseconds in each window."""
        return self.end - self.start

    def holding(self, times: Ints) -> Ints:
        """The window that each of `times` lies in, or NONE."""
        at = np.searchsorted(self.start, times, side="right") - 1
        return np.where((at >= 0) & (times < self.end[at]), at, NONE)


@dataclass(frozen=True)
class Pieces:
    """Time given to events: `ns` nanoseconds of window `step` are event `row`'s."""

    step: Ints
    row: Ints
    ns: Ints


@dataclass(frozen=True)
class Cover:
    """Stretches in order, none overlapping another."""

    segments: Segments

    @classmethod
    def of(cls, segments: Segments) -> "Cover":
        """The union of `segments`; where several overlap the earliest start holds."""
        ordered = segments[np.lexsort((segments.end, segments.start))]
        # Whatever started earlier and still runs covers all from here to its end.
        reached = np.maximum.accumulate(ordered.end) if len(ordered) else ordered.end
        start = ordered.start.copy()
        start[1:] = np.maximum(start[1:], reached[:-1])
        kept = start < ordered.end
        return cls(Segments(start[kept], ordered.end[kept], ordered.row[kept]))

    def until(self, times: Ints) -> Ints:
        """Nanoseconds covered before each of `times`."""
        if not len(self.segments):
            return np.zeros(len(times), np.int64)
        start, end = self.segments.start, self.segments.end
        total = np.concatenate([[0], np.cumsum(end - start)])
        at = np.searchsorted(start, times, side="right") - 1
        partly = np.minimum(times, end[at]) - start[at]
        return np.where(at >= 0, total[at] + partly, 0)

    def free(self, segments: Segments) -> Ints:
        """Nanoseconds of each of `segments` that are not covered."""
        covered = self.until(segments.end) - self.until(segments.start)
        return segments.end - segments.start - covered


def cut(segments: Segments, windows: Windows) -> tuple[Ints, Segments]:
    """`segments` cut at the windows' edges: the window of each stretch, and the stretches."""
    first = np.searchsorted(windows.end, segments.start, side="right")
    last = np.searchsorted(windows.start, segments.end, side="left")
    times = np.maximum(last - first, 0)
    which = np.repeat(np.arange(len(segments)), times)
    nth = np.arange(len(which)) - np.repeat(np.cumsum(times) - times, times)
    step = first[which] + nth
    start = np.maximum(segments.start[which], windows.start[step])
    end = np.minimum(segments.end[which], windows.end[step])
    kept = start < end
    return step[kept], Segments(start[kept], end[kept], segments.row[which][kept])


def share_out(groups: Sequence[Segments], windows: Windows) -> tuple[Pieces, Cover]:
    """Give every nanosecond of `windows` to one event, and say which were given.

    An earlier group goes before a later one; within a group the earliest start does.
    """
    pieces: list[Pieces] = []
    cover = Cover.of(Segments(*(np.zeros(0, np.int64),) * 3))
    for group in groups:
        step, parts = cut(Cover.of(group).segments, windows)
        pieces.append(Pieces(step, parts.row, cover.free(parts)))
        cover = Cover.of(joined([cover.segments, parts]))
    together = Pieces(
        np.concatenate([p.step for p in pieces]),
        np.concatenate([p.row for p in pieces]),
        np.concatenate([p.ns for p in pieces]),
    )
    return together, cover


def joined(parts: Sequence[Segments]) -> Segments:
    """All stretches of `parts`."""
    return Segments(
        np.concatenate([p.start for p in parts]),
        np.concatenate([p.end for p in parts]),
        np.concatenate([p.row for p in parts]),
    )


def table(row: Ints, column: Ints, values: Ints, rows: int, columns: int) -> Ints:
    """Sums of `values` as [row, column]."""
    sums = np.zeros((rows, columns), np.int64)
    np.add.at(sums, (row, column), values)
    return sums
