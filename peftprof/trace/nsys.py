"""Reads an SQLite export of Nsight Systems (`nsys export --type sqlite`) into `Events`.

Exports of 2020 to 2026 differ in columns and tables; what there is is read. NVTX ranges are
ranges, or operators where PyTorch's emit_nvtx wrote them; runtime and driver calls are
launches; kernels, copies and fills, and graphs that were traced as a whole, are device work.
Left out are ranges that were never closed or that ended on another thread, and rows whose
times are no whole numbers of nanoseconds from 0 on.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from peftprof.errors import TraceError
from peftprof.trace import links, nsys_about, nsys_names, nsys_tables
from peftprof.trace.events import (
    NONE,
    Bools,
    Events,
    Ints,
    Kind,
    Operands,
    Thread,
    distinct,
    nesting_order,
)
from peftprof.trace.nsys_about import About, process_of
from peftprof.trace.nsys_tables import Export
from peftprof.trace.numbering import MAX_THREADS, Names, Numbers

ACTIVITY = "CUPTI_ACTIVITY_KIND_"
KERNELS, COPIES, FILLS, GRAPHS = (
    ACTIVITY + kind for kind in ("KERNEL", "MEMCPY", "MEMSET", "GRAPH_TRACE")
)
CALLS = (ACTIVITY + "RUNTIME", ACTIVITY + "DRIVER")
RANGES = "NVTX_EVENTS"
# Kinds of NVTX events: push/pop, start/end; the same from an imported text file.
RANGE_TYPES = (59, 60, 70, 71)

MAX_NS = 1 << 62
MAX_BYTES = 1 << 62
MAX_PROCESSES = 1024
TIMES = ("start", "end")
PLACE = ("streamId", "correlationId")
WHERE = ("deviceId", "contextId", "globalPid")

COLUMNS = (
    "kind",
    "name",
    "start",
    "end",
    "process",  # global process id
    "device",  # NONE on the CPU
    "context",
    "place",  # global thread id, or stream
    "correlation",
    "sequence",
    "backward",
    "operands",
    "bytes",
)
SAID = ("kind", "name", "sequence", "backward", "operands")
Columns = dict[str, Ints]


@dataclass(frozen=True)
class _Trace:
    """An export, and the names and operands that its columns number."""

    export: Export
    names: Names = field(default_factory=Names)
    signatures: Numbers = field(default_factory=Numbers)


def read(path: Path) -> list[Events]:
    """The events of each process in the export at `path` that has device work or ranges.

    Ordered by first event; `process` is empty where there is one. Raises TraceError, in
    one line, for a file that cannot be opened, is no export, is damaged, holds neither
    device work nor ranges, or is past the limits of nsys_tables.
    """
    with nsys_tables.opened(path) as export:
        known = {KERNELS, COPIES, FILLS, GRAPHS, *CALLS, RANGES, "StringIds"}
        if not known & export.tables:
            raise TraceError(
                f"{path} is a database but no Nsight Systems export; "
                "make one with: nsys export --type sqlite"
            )
        trace = _Trace(export)
        processes = _processes(path, [*_device_work(trace), *_calls(trace), *_ranges(trace)])
        if not processes:
            raise TraceError(
                f"{path} holds no kernels and no NVTX ranges; record it with: "
                "nsys profile -t cuda,nvtx"
            )
        about = nsys_about.read(export)
    names = tuple(trace.names)
    signatures = tuple(Operands(dims=shapes, types="") for shapes in trace.signatures)
    found = [_events(rows, names, signatures, about) for rows in processes]
    return found if len(found) > 1 else [replace(found[0], process="")]


def _part(table: str, trace: _Trace, kind: Kind, found: Columns) -> Columns:
    """`found` with the columns it lacks, and without the rows that have no time.

    Raises TraceError when that is all of them.
    """
    count = len(found["start"])
    timed = _timed(found)
    if count and not timed.any():
        raise TraceError(
            f"{trace.export.path}: no row of its table {table} has a time in nanoseconds; "
            f"{nsys_tables.AGAIN}"
        )
    # What was cut off while it ran has no end: it lasts no time.
    found["end"] = np.maximum(found["start"], found["end"])
    found["kind"] = np.broadcast_to(np.int64(kind), count)
    return _columns(found, timed)


def _columns(found: Columns, kept: Bools) -> Columns:
    chosen = slice(None) if kept.all() else kept
    nothing = np.broadcast_to(np.int64(NONE), int(kept.sum()))
    return {name: found[name][chosen] if name in found else nothing for name in COLUMNS}


def _timed(found: Columns) -> Bools:
    start, end = found["start"], found["end"]
    timed: Bools = (start >= 0) & (start < MAX_NS) & (end < MAX_NS)
    return timed


def _device_work(trace: _Trace) -> Iterator[Columns]:
    export = trace.export
    if KERNELS in export.tables:
        named = [n for n in ("demangledName", "shortName") if n in export.columns(KERNELS)]
        found = export.read(KERNELS, [*TIMES, *PLACE, *(named or ["demangledName"])], WHERE)
        text = found[named[0]]
        for other in named[1:]:
            text = np.where(text != NONE, text, found[other])
        found = {**_placed(found), "name": _named(trace, text)}
        yield _part(KERNELS, trace, Kind.KERNEL, found)
    if COPIES in export.tables:
        found = export.read(COPIES, [*TIMES, *PLACE], [*WHERE, "copyKind", "bytes"])
        words = nsys_about.copy_kinds(export)
        name = _by_value(trace, found["copyKind"], lambda k: nsys_names.copy(k, words.get(k)))
        found = {**_placed(found), "name": name, "bytes": _sizes(found["bytes"])}
        yield _part(COPIES, trace, Kind.MEMCPY, found)
    if FILLS in export.tables:
        found = export.read(FILLS, [*TIMES, *PLACE], [*WHERE, "bytes"])
        name = np.broadcast_to(np.int64(trace.names["Memset"]), len(found["start"]))
        found = {**_placed(found), "name": name, "bytes": _sizes(found["bytes"])}
        yield _part(FILLS, trace, Kind.MEMSET, found)
    if GRAPHS in export.tables:
        found = export.read(GRAPHS, [*TIMES, *PLACE], [*WHERE, "graphId"])
        graph = found["graphId"]
        name = _by_value(trace, graph, lambda g: f"CUDA graph {g}" if g != NONE else "CUDA graph")
        found = {**_placed(found), "name": name}
        yield _part(GRAPHS, trace, Kind.KERNEL, found)


def _sizes(found: Ints) -> Ints:
    """Bytes; NONE where no copy can have that many."""
    return np.where((found >= 0) & (found < MAX_BYTES), found, NONE)


def _placed(found: Columns) -> Columns:
    return {
        "start": found["start"],
        "end": found["end"],
        "process": process_of(found["globalPid"]),
        "device": np.maximum(found["deviceId"], 0),
        "context": found["contextId"],
        "place": found["streamId"],
        "correlation": found["correlationId"],
    }


def _calls(trace: _Trace) -> Iterator[Columns]:
    for table in CALLS:
        if table in trace.export.tables:
            found = trace.export.read(table, [*TIMES, "globalTid", "correlationId", "nameId"])
            call = {
                "start": found["start"],
                "end": found["end"],
                "process": process_of(found["globalTid"]),
                "place": found["globalTid"],
                "correlation": found["correlationId"],
                "name": _named(trace, found["nameId"], nsys_names.call),
            }
            yield _part(table, trace, Kind.LAUNCH, call)


def _ranges(trace: _Trace) -> Iterator[Columns]:
    """The NVTX ranges that were closed, on the thread that opened them."""
    export = trace.export
    if RANGES not in export.tables:
        return
    needed = [*TIMES, "eventType", "globalTid"]
    if not export.columns(RANGES) & {"text", "textId"}:
        needed.append("text")  # says what is missing
    known = _Said(trace)
    registered = {
        identity: known[text]
        for identity, text in export.strings(export.read(RANGES, [], ["textId"])["textId"]).items()
    }
    for found, texts in export.chunks(RANGES, needed, ["textId", "endGlobalTid"], text="text"):
        thread, end_thread = found["globalTid"], found["endGlobalTid"]
        kept = _timed(found) & (found["end"] >= 0) & np.isin(found["eventType"], RANGE_TYPES)
        kept &= (thread != NONE) & ((end_thread == NONE) | (end_thread == thread))
        ids = found["textId"].tolist()
        said = [
            known[text.decode("utf-8", "replace")]
            if (text := texts[row])
            else registered.get(ids[row]) or known[""]
            for row in np.flatnonzero(kept).tolist()
        ]
        table = np.array(said, np.int64).reshape(-1, len(SAID))
        part = _columns({**found, "process": process_of(thread), "place": thread}, kept)
        yield part | {name: table[:, i] for i, name in enumerate(SAID)}


class _Said(dict[str, tuple[int, ...]]):
    """The numbers (SAID) that the text of a range stands for."""

    def __init__(self, trace: _Trace) -> None:
        super().__init__()
        self._trace = trace

    def __missing__(self, text: str) -> tuple[int, ...]:
        found = nsys_names.meaning(text)
        numbers = (
            int(found.kind),
            self._trace.names[found.name],
            found.sequence,
            int(found.backward),
            self._trace.signatures[found.shapes] if found.shapes else NONE,
        )
        if found.name == text:  # one with a number of its own is not seen again
            self[text] = numbers
        return numbers


def _named(trace: _Trace, ids: Ints, clean: Callable[[str], str] = str) -> Ints:
    """Numbers of the names that these ids of texts stand for."""
    texts = trace.export.strings(ids)
    return _by_value(trace, ids, lambda i: clean(texts[i]) if i in texts else "unknown name")


def _by_value(trace: _Trace, values: Ints, name: Callable[[int], str]) -> Ints:
    """Numbers of the names that `name` gives to `values`, once for each distinct one."""
    found, which = distinct(values)
    numbers = [trace.names[name(value)] for value in found.tolist()]
    return np.array(numbers, np.int64)[which]


def _processes(path: Path, parts: list[Columns]) -> list[Columns]:
    """The rows of each process that has device work or ranges, by first event."""
    if not parts:
        return []
    columns = {name: np.concatenate([part.pop(name) for part in parts]) for name in COLUMNS}
    process = columns["process"]
    owners = np.unique(process[process != NONE])
    if len(owners) == 1:  # whose process is not told are the only one's
        process = columns["process"] = np.broadcast_to(owners[0], len(process))
    working = np.unique(process[columns["kind"] != Kind.LAUNCH])
    if len(working) > MAX_PROCESSES:
        raise TraceError(f"{path} holds more than {MAX_PROCESSES} processes; profile fewer")
    if len(working) > 1 or len(owners) > 1:
        order = np.argsort(process, kind="stable")
        bounds = (
            np.searchsorted(process[order], working),
            np.searchsorted(process[order], working, side="right"),
        )
        found = [
            {name: column[order[low:high]] for name, column in columns.items()}
            for low, high in zip(*bounds, strict=True)
        ]
    else:
        found = [columns] if len(working) else []
    return sorted(found, key=lambda rows: int(rows["start"].min()))


def _events(
    rows: Columns, names: tuple[str, ...], signatures: tuple[Operands, ...], about: About
) -> Events:
    threads, thread = _threads(rows, about)
    order = nesting_order(thread, rows["start"], rows["end"], rows["kind"])
    thread = thread[order]
    rows = {name: rows.pop(name)[order] for name in COLUMNS}
    kind, start, correlation = rows["kind"], rows["start"], rows["correlation"]
    zero = start.min()
    used, name = distinct(rows["name"])
    shapes, operands = _used(rows["operands"])
    nothing = np.full(len(kind), NONE, np.int64)
    ids = links.Ids(
        correlation=np.where(correlation > 0, correlation, NONE),  # 0 is none
        external=nothing,
        sequence=rows["sequence"],
        forward_thread=rows["backward"],  # which thread is not told, only that there is one
    )
    no_flows = links.Flows(nothing[:0], nothing[:0] == 0, nothing[:0], nothing[:0])
    owner, device = int(rows["process"][0]), rows["device"]
    gpus = np.unique(device[device != NONE]).tolist()
    return Events(
        names=tuple(names[i] for i in used.tolist()),
        kind=kind,
        name=name,
        start=start - zero,
        end=rows["end"] - zero,
        thread=thread,
        launch=links.launches(kind, thread, start, ids, no_flows),
        forward=links.forwards(kind, thread, start, ids, no_flows),
        operands=operands,
        bytes=rows["bytes"],
        threads=threads,
        signatures=tuple(signatures[i] for i in shapes),
        device=about.device(owner, gpus) if gpus else "cpu",
        process=about.process(owner),
    )


def _used(numbers: Ints) -> tuple[list[int], Ints]:
    """The distinct numbers, NONE apart, and the column renumbered to them."""
    found, which = distinct(numbers)
    none = int(bool(len(found)) and found[0] == NONE)  # the smallest
    return found[none:].tolist(), which - none


def _threads(rows: Columns, about: About) -> tuple[tuple[Thread, ...], Ints]:
    """The threads and streams of a process, and each row's number among them."""
    number = np.zeros(len(rows["start"]), np.int64)
    for column in (rows["place"], rows["context"], rows["device"]):
        if (column != column[0]).any():
            values, which = distinct(column)
            number = distinct(number * len(values) + which)[1]
    if int(number.max()) >= MAX_THREADS:
        raise TraceError(f"there are more than {MAX_THREADS:,} threads and streams; profile fewer")
    first = np.full(int(number.max()) + 1, 0)
    first[number] = np.arange(len(number))  # any row of each
    places = zip(rows["device"][first].tolist(), rows["place"][first].tolist(), strict=True)
    threads = tuple(
        Thread(about.thread(place), NONE) if device == NONE else Thread(f"stream {place}", device)
        for device, place in places
    )
    return threads, number
