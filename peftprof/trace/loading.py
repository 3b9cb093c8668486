"""From traces to breakdowns: reads, attributes, compares."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from peftprof.breakdowns import Breakdown, Ceilings, Comparison, Timeline
from peftprof.errors import PeftprofError, TraceError, one_line
from peftprof.records import RunRecord
from peftprof.trace import kineto, memory, nsys, nsys_export, rules, stream
from peftprof.trace.attribute import Attribution, attribute
from peftprof.trace.breakdown import make_breakdown
from peftprof.trace.ceilings import can_be
from peftprof.trace.compare import against_the_first, compare, interpreted, setting
from peftprof.trace.events import Events
from peftprof.trace.rules import Rules
from peftprof.trace.sources import Found, Source, find, named_in
from peftprof.trace.timeline import timeline
from peftprof.trace.work import work

SQLITE = b"SQLite format 3\0"

Keep = Callable[[str, Attribution], None]


@dataclass(frozen=True)
class Loaded:
    """Breakdowns of the traces found, how they compare, and how many older runs were left out.

    `comparable` is None where nothing can be said; see `compare`. `comparisons` hold every
    further run against the first, `unfair` whether their speed-up figures were asked for
    whatever the runs differ in. `timelines`, one a run, are there where asked for.
    `unreadable` says why runs of a folder are missing.
    """

    breakdowns: tuple[Breakdown, ...]
    comparable: bool | None
    differences: tuple[str, ...]
    left_out: int
    comparisons: tuple[Comparison, ...] = ()
    timelines: tuple[Timeline, ...] = ()
    unreadable: tuple[str, ...] = ()
    unfair: bool = False


@dataclass(frozen=True)
class _How:
    """What is asked of every trace; see `load`."""

    ruleset: Rules
    ceilings: Ceilings | None
    timelines: bool
    keep: Keep | None


@dataclass(frozen=True)
class _Read:
    breakdown: Breakdown
    record: RunRecord | None
    timeline: Timeline | None


def load(
    paths: Sequence[Path],
    all_runs: bool = False,
    *,
    ruleset: Rules | None = None,
    ceilings: Ceilings | None = None,
    unfair: bool = False,
    timelines: bool = False,
    keep: Keep | None = None,
) -> Loaded:
    """Read and attribute every trace that `paths` name.

    A path is a Kineto trace, an nsys export or report, a run folder, or a folder of these;
    of a folder of runs the newest four complete ones are taken, or all with `all_runs`. A
    file with several processes is several runs. `ceilings` hold for runs that measured none.
    Each run's attribution is given to `keep`, and is not held on to.

    Raises FolderError for a folder without a run to read, TraceError for a trace that
    cannot be read; a run of a folder or a process of a file that cannot be read is left out
    and named.
    """
    how = _How(ruleset or rules.load(), ceilings, timelines, keep)
    read: list[_Read] = []
    left_out, unreadable = 0, []
    for path in paths:
        found = find(path, all_runs)
        left_out += found.left_out
        unreadable += found.unreadable
        read += _readable(found, how, unreadable)
    breakdowns = tuple(one.breakdown for one in read)
    records = [one.record for one in read]
    comparable, differences = compare(records, [b.name for b in breakdowns])
    return Loaded(
        breakdowns=breakdowns,
        comparable=comparable,
        differences=tuple(differences),
        left_out=left_out,
        comparisons=against_the_first(breakdowns, records, bool(comparable) or unfair),
        timelines=tuple(one.timeline for one in read if one.timeline is not None),
        unreadable=tuple(unreadable),
        unfair=unfair,
    )


def _readable(found: Found, how: _How, unreadable: list[str]) -> Iterator[_Read]:
    """What can be read; of a folder the rest is told, unless it is all."""
    reasons: list[PeftprofError] = []
    for source in found.sources:
        try:
            runs = list(_source(source, how, unreadable))
        except PeftprofError as error:
            if found.named:
                raise
            reasons.append(error)
            continue
        yield from runs
    if found.sources and len(reasons) == len(found.sources):
        raise reasons[-1]
    unreadable += map(str, reasons)


def _source(source: Source, how: _How, unreadable: list[str]) -> Iterator[_Read]:
    """The runs of one file; processes in which nothing ran are told, unless it is all."""
    reasons: list[str] = []
    try:
        kind, processes = read(source.trace)
        for events in processes:
            name = f"{source.name} {events.process}".strip()
            try:
                found = attribute(events, how.ruleset)
                breakdown = make_breakdown(found, name, kind)
            except TraceError as error:
                reasons.append(f"{name}: {error}")
                if len(reasons) == len(processes):
                    raise
                continue
            breakdown = _complete(source, breakdown, found, how)
            if how.keep is not None:
                how.keep(name, found)
            drawn = timeline(found) if how.timelines else None
            yield _Read(breakdown, source.record, drawn)
    except TraceError as error:
        message, path = str(error), one_line(str(source.trace))
        raise TraceError(message if path in message else f"{path}: {message}") from error
    unreadable += reasons


def read(path: Path) -> tuple[str, list[Events]]:
    """Whose trace the file at `path` is, `kineto` or `nsys`, and the events of each process.

    Raises TraceError for a file that is neither, or is damaged.
    """
    if path.name.endswith(nsys_export.REPORTS):
        with tempfile.TemporaryDirectory() as folder:
            return "nsys", nsys.read(nsys_export.export(path, Path(folder)))
    if stream.beginning(path).startswith(SQLITE):
        return "nsys", nsys.read(path)
    return "kineto", [kineto.read(path)]


def _complete(source: Source, breakdown: Breakdown, found: Attribution, how: _How) -> Breakdown:
    """With what the run's record and its memory step add."""
    record = source.record
    peak, notes = None, (*_setting(record), *breakdown.notes)
    measured = record.ceilings if record is not None else None
    if measured is not None and not can_be(measured):
        measured, notes = None, (*notes, "The ceilings in run.json cannot be, and are left out.")
    measured = measured or how.ceilings
    try:
        if record is not None and record.memory_step is not None and source.folder is not None:
            trace = named_in(source.folder, record.memory_step.trace)
            peak = memory.peak(kineto.read(trace), record, how.ruleset)
        else:
            peak = memory.peak(found.events, None, how.ruleset)
    except TraceError as error:
        notes = (*notes, f"No memory: {error}")
    return replace(
        breakdown,
        work=work(found, measured),
        ceilings=measured,
        memory=peak,
        notes=notes,
    )


def _setting(record: RunRecord | None) -> Iterator[str]:
    """What the run was, as far as a reader of its times must know it."""
    if record is None:
        return
    told = {"method": "", "kernels": "kernels ", "precision": "", "batch_size": "batch size "}
    known = ((word, setting(record, key)) for key, word in told.items() if record.config.get(key))
    yield ", ".join(f"{word}{value}" for word, value in known) + "."
    if interpreted(record):
        yield "Its Triton kernels were interpreted: times have no meaning."
