"""One step drawn out: what ran when, on each CPU thread and each stream."""

import numpy as np

from peftprof.breakdowns import CATEGORIES, PHASES, Lane, Span, Timeline
from peftprof.trace.attribute import Attribution
from peftprof.trace.events import NONE, Events, Ints, Kind, rows_of
from peftprof.trace.nesting import Segments
from peftprof.trace.sweep import Cover, Windows, cut, joined


def timeline(found: Attribution, limit: int = 20_000) -> Timeline:
    """The step whose length is nearest the median, with at most `limit` spans, the longest.

    CPU threads come first, then streams. On a thread a span is what was innermost; where
    events of one stream overlap, each moment is the one's that began first.
    """
    lengths = found.windows.length
    step = int(np.argmin(np.abs(lengths - np.median(lengths))))
    start, end = found.windows.start[step], found.windows.end[step]
    window = Windows(np.array([start]), np.array([end]))
    _, parts = cut(_all_work(found), window)
    threads = rows_of(found.events.thread[parts.row])
    lanes = {thread: Cover.of(parts[rows]).segments for thread, rows in threads}

    total = sum(len(lane) for lane in lanes.values())
    drawn = _longest(lanes, total, limit)
    names = lane_names(found.events)
    return Timeline(
        step=step,
        length_ns=int(end - start),
        lanes=tuple(
            Lane(names[t], _spans(found, drawn[t], int(start)))
            for t in sorted(drawn, key=lambda t: (found.events.threads[t].device != NONE, t))
        ),
        left_out=total - sum(len(lane) for lane in drawn.values()),
    )


def _longest(lanes: dict[int, Segments], total: int, limit: int) -> dict[int, Segments]:
    """The `limit` longest of all the lanes' `total` spans, in their lanes."""
    if total <= limit:
        return lanes
    lengths = np.concatenate([lane.end - lane.start for lane in lanes.values()])
    kept = np.zeros(total, np.bool_)
    kept[np.argsort(-lengths, kind="stable")[:limit]] = True
    parts = np.split(kept, np.cumsum([len(lane) for lane in lanes.values()])[:-1])
    chosen = zip(lanes.items(), parts, strict=True)
    return {thread: lane[part] for (thread, lane), part in chosen if part.any()}


def lane_names(events: Events) -> tuple[str, ...]:
    """The names of all threads and streams; with the device where there are several."""
    several = len({thread.device for thread in events.threads} - {NONE}) > 1
    return tuple(
        f"GPU {thread.device} {thread.name}" if several and thread.device != NONE else thread.name
        for thread in events.threads
    )


def _all_work(found: Attribution) -> Segments:
    """All that ran; beside a device also the operators and launches of its CPU threads."""
    events = found.events
    if not events.on_device.any():
        return found.work
    innermost = found.tree.innermost
    calls = np.isin(events.kind[innermost.row], (Kind.OPERATOR, Kind.LAUNCH))
    return joined([innermost[calls], found.work])


def _spans(found: Attribution, lane: Segments, origin: int) -> tuple[Span, ...]:
    events, meaning = found.events, found.meaning
    shown: Ints = meaning.shown[lane.row]
    named = np.where(shown != NONE, shown, lane.row)
    columns = (
        lane.start - origin,
        lane.end - origin,
        meaning.category[lane.row],
        meaning.phase[lane.row],
        events.name[named],
    )
    return tuple(
        Span(
            start,
            end,
            CATEGORIES[category] if category != NONE else "unattributed",
            PHASES[phase] if phase != NONE else "other",
            events.names[name],
        )
        for start, end, category, phase, name in zip(*(c.tolist() for c in columns), strict=True)
    )
