"""Reads a Kineto trace (torch.profiler's `export_chrome_trace`), JSON or gzip, into `Events`.

The format is Chrome's Trace Event Format; categories and arguments are as torch 1.8 to 2.13
write them, on CUDA, ROCm, XPU and without a device.
"""

import gc
import json
import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import orjson

from peftprof.errors import TraceError
from peftprof.trace import links, stream
from peftprof.trace.columns import (
    FLOWS,
    MAX_NAME,
    Columns,
    Document,
    Entry,
    InexactTimesError,
    Numbers,
    Place,
    Table,
    loosely,
)
from peftprof.trace.events import NONE, Events, Ints, Kind, MemoryLog, Thread, nesting_order

# Before torch 1.12 a record_function range came as an operator.
OUR_RANGE = re.compile(r"(step|phase|layer|op):.")

# A double holds 13 digits of microseconds to the nanosecond, and no more. Traces with
# absolute times have 16. The first of them are the same throughout (they change once in
# eleven days) and are left out before parsing; where they are not the same, the times are
# quoted and read as decimal text, which takes longer.
LONG_TIME = re.compile(rb'("ts"\s*:\s*)(\d{14,}\.\d+)')
TIME = b'"ts"'
CHANGING_DIGITS = 12

_entries = msgspec.json.Decoder(list[Entry])
_document = msgspec.json.Decoder(Document)


def read(path: Path) -> Events:
    """The events of the trace at `path`.

    Raises TraceError, in one line, when it cannot be opened, is truncated, is empty, or
    is no trace of torch.profiler.
    """
    _check_start(path)
    collecting = gc.isenabled()
    gc.disable()  # entries hold no cycles, and there are millions of them
    try:
        columns, about = _columns(path)
    finally:
        if collecting:
            gc.enable()
    return _events(path, columns, about)


def _check_start(path: Path) -> None:
    text = stream.beginning(path).lstrip(b"\xef\xbb\xbf \t\r\n\0")
    if not text:
        raise TraceError(f"{path} is empty; record it again")
    if text.startswith(b"SQLite format 3"):
        raise TraceError(f"{path} is a database, not a Kineto trace")
    if not text.startswith((b"{", b"[")):
        raise TraceError(f"{path} is not JSON; name a trace.json or trace.json.gz")


def _columns(path: Path) -> tuple[Columns, Document]:
    try:
        return _in_pieces(path, shorten=True)
    except (_UnlikeTimesError, InexactTimesError):
        return _in_pieces(path, shorten=False)


def _in_pieces(path: Path, shorten: bool) -> tuple[Columns, Document]:
    columns, parser, document = Columns(path, exact=not shorten), _Parser(shorten), None
    try:
        for document in stream.pieces(path, parser.read):
            columns.add(document.entries)
    except stream.UnreadableError:
        document = None
    if document is None:
        columns, document = Columns(path, exact=True), _read_whole(path)
        columns.add(document.entries)
    return columns, document


class _UnlikeTimesError(Exception):
    """Long times do not all begin alike."""


class _Parser:
    """Reads the pieces of one trace; the first says whether times are too long for a double."""

    def __init__(self, shorten: bool) -> None:
        self._shorten = shorten
        self._long: tuple[bytes, bytes] | None = None
        self._begun = False

    def read(self, text: bytes) -> Document:
        """A list of entries, or a document. Raises ValueError for what is no JSON."""
        if not self._shorten:
            text = LONG_TIME.sub(rb'\1"\2"', text)
        elif not self._begun:
            self._begun = True
            found = LONG_TIME.search(text)
            if found:
                key, digits = found.groups()
                same = digits[: digits.index(b".") - CHANGING_DIGITS]
                self._long = key + same, key + b"1"  # no number begins with 0
        if self._long is not None:
            text = _without_long_times(text, *self._long)
        try:
            if text.startswith(b"["):
                return Document(_entries.decode(text))
            return _document.decode(text)
        except (msgspec.DecodeError, RecursionError):
            # Types that vary, bare NaN, raw control characters, broken UTF-8: Kineto and
            # those who write its format have done all of it.
            return _loose(text)


def _without_long_times(text: bytes, long: bytes, short: bytes) -> bytes:
    if text.count(long) != text.count(TIME):
        raise _UnlikeTimesError
    return text.replace(long, short)


def _loose(text: bytes) -> Document:
    """The same with a parser that takes more. Raises ValueError for what is no JSON."""
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        try:
            value = json.loads(text.decode("utf-8-sig", "replace"), strict=False)
        except RecursionError as error:
            raise ValueError("nested too deeply") from error
    about = value if isinstance(value, dict) else {}
    raw = about.get("traceEvents") if about else value
    if not isinstance(raw, list):
        raise ValueError("no list of entries")
    entries = [entry for entry in map(loosely, raw) if entry is not None]
    return Document(entries, about.get("deviceProperties"), about.get("distributedInfo"))


def _read_whole(path: Path) -> Document:
    """The trace that cannot be read in pieces, or why it cannot be read at all."""
    text = stream.whole(path)
    try:
        return _Parser(shorten=False).read(text)
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) - 1 or not text.rstrip().endswith((b"}", b"]")):
            raise TraceError(f"{path} ends in the middle of its JSON; record it again") from error
        why = f"line {error.lineno}: {error.msg}"
        raise TraceError(f"{path} {stream.CORRUPT} ({why})") from error
    except ValueError as error:
        if "no list" in str(error):
            raise TraceError(
                f"{path} is JSON but no trace: it has no traceEvents; name a trace.json(.gz)"
            ) from error
        raise TraceError(f"{path} {stream.CORRUPT}") from error


def _events(path: Path, columns: Columns, about: Document) -> Events:
    table = columns.table("events")
    if table is None:
        raise TraceError(f"{path} holds no operators and no kernels; profile at least one step")
    on_device = table["kind"] >= Kind.KERNEL
    # A number may be a thread on the CPU and a stream on a device.
    numbers, thread = np.unique(table["place"] * 2 + on_device, return_inverse=True)
    places = [*columns.places]
    names, name, kind = _names(columns.names, table["name"], table["kind"])
    order = nesting_order(thread, table["start"], table["end"], kind)
    table = Table({key: column[order] for key, column in table.columns.items()})
    kind, name, thread, on_device = kind[order], name[order], thread[order], on_device[order]
    zero = int(table["start"].min())
    start = table["start"] - zero
    ids = links.Ids(
        *(table[key] for key in ("correlation", "external", "sequence", "forward_thread"))
    )
    flows = {cat: _flows(columns.table(cat), numbers, zero, cat) for cat in FLOWS}
    threads = tuple(_thread(places[n >> 1], bool(n & 1)) for n in numbers.tolist())
    used = {threads[t].device for t in np.unique(thread[on_device]).tolist()}
    return Events(
        names=names,
        kind=kind,
        name=name,
        start=start,
        end=table["end"] - zero,
        thread=thread,
        launch=links.launches(kind, thread, start, ids, flows["ac2g"]),
        forward=links.forwards(kind, thread, start, ids, flows["fwdbwd"]),
        operands=table["operands"],
        bytes=table["bytes"],
        threads=threads,
        signatures=columns.operands(),
        device=_device(about.devices, used) if on_device.any() else "cpu",
        rank=_rank(about.distributed),
        memory=_memory(columns.table("memory"), numbers, zero),
        timeless=columns.timeless,
    )


def _names(numbers: dict[str, int], name: Ints, kind: Ints) -> tuple[tuple[str, ...], Ints, Ints]:
    """Names cut to a length that can be matched and shown; ranges of ours by their names."""
    whole = [*numbers]
    shorter = Numbers()
    renumbered = np.array([shorter[text[:MAX_NAME]] for text in whole], np.int64)
    name = renumbered[name]
    ours = np.array([OUR_RANGE.match(text) is not None for text in shorter], np.bool_)
    is_range = ours[name] & (kind == Kind.OPERATOR)
    return tuple(shorter), name, np.where(is_range, int(Kind.RANGE), kind)


def _thread(place: Place, on_device: bool) -> Thread:
    pid, tid = place
    number = _decimal(pid)
    if not on_device:
        return Thread(f"thread {tid}"[:80], NONE)
    stream = f"{tid}"[:80].removeprefix("stream ")
    return Thread(f"stream {stream}", 0 if number is None else number)


def _decimal(value: Any) -> int | None:
    text = str(value)
    return int(text) if text.isdecimal() and len(text) < 9 else None


def _flows(table: Table | None, numbers: Ints, zero: int, cat: str) -> links.Flows:
    if table is None:
        none = np.zeros(0, np.int64)
        return links.Flows(none, none > 0, none, none)
    out = table["out"] > 0
    arrives_on_device = ~out if cat == "ac2g" else np.zeros(len(out), np.bool_)
    return links.Flows(
        identity=table["identity"],
        out=out,
        thread=_number_of(numbers, table["place"] * 2 + arrives_on_device),
        time=table["time"] - zero,
    )


def _number_of(numbers: Ints, places: Ints) -> Ints:
    at = np.minimum(np.searchsorted(numbers, places), len(numbers) - 1)
    return np.where(numbers[at] == places, at, NONE)


def _memory(table: Table | None, numbers: Ints, zero: int) -> MemoryLog | None:
    if table is None:
        return None
    order = np.argsort(table["time"], kind="stable")
    columns = {key: column[order] for key, column in table.columns.items()}
    thread = _number_of(numbers, columns.pop("place") * 2)
    return MemoryLog(thread=thread, **columns | {"time": columns["time"] - zero})


def _device(listed: Any, used: set[int]) -> str:
    """The names of the devices that ran something."""
    names = {
        str(device["name"])
        for device in (listed if isinstance(listed, list) else [])
        if isinstance(device, dict) and "name" in device and _decimal(device.get("id")) in used
    }
    return ", ".join(sorted(names)) or "unknown device"


def _rank(distributed: Any) -> int | None:
    return _decimal(distributed.get("rank")) if isinstance(distributed, dict) else None
