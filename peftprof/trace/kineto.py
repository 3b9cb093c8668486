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
    Columns,
    Document,
    Entry,
    InexactTimesError,
    Place,
    Table,
    loosely,
    raw_json,
)
from peftprof.trace.events import NONE, Bools, Events, Ints, Kind, MemoryLog, Thread, nesting_order
from peftprof.trace.numbering import MAX_NAME

# Before torch 1.12 a record_function range came as an operator: ours, and those that PyTorch,
# its examples and Lightning open.
A_RANGE = re.compile(
    r"(step|phase|layer|op):.|ProfilerStep#|Optimizer\.\w+#|enumerate\(DataLoader\)#|\[pl\]\["
    r"|## .* ##$|DistributedDataParallel\.|FullyShardedDataParallel\.|(nccl|gloo|mpi):[^:]"
)
# What torch.compile made runs in a range, and on a CPU no operator tells of it.
GENERATED = re.compile(r"## Call CompiledFxGraph ")

# A double holds 13 digits of microseconds to the nanosecond, and no more. Traces with
# absolute times have 16. The first of them are the same throughout (they change once in
# eleven days) and are left out before parsing; where they are not the same, the times are
# quoted and read as decimal text, which takes longer.
LONG_TIME = re.compile(rb'("ts"\s*:\s*)(\d{14,}\.\d+)')
TIME = b'"ts"'
TRUNCATED = "Input data was truncated"  # msgspec's words
CHANGING_DIGITS = 12

MAX_LOOSE = 8 << 20  # bytes that are made Python objects of, which take some thirty times as much
MAX_ABOUT = 1 << 20  # bytes of what a trace says of its devices
MAX_SPAN_NS = 1 << 62  # 146 years; twice a time is still an int64

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
    except stream.UnreadableError as error:
        raise TraceError(f"{path} {_why(error.why)}") from error
    assert document is not None  # the last piece is always there
    return columns, document


def _why(error: ValueError) -> str:
    """What is wrong with a trace whose last piece could not be read for `error`."""
    cut_off = str(error) == TRUNCATED
    if isinstance(error, json.JSONDecodeError):
        text = error.doc.rstrip()
        cut_off = error.pos >= len(text) - 1 or not text.endswith(("}", "]"))
    if cut_off:
        return "ends in the middle of its JSON; record it again"
    if isinstance(error, _NoListError):
        return "is JSON but no trace: it has no traceEvents; name a trace.json(.gz)"
    return f"{stream.CORRUPT} ({error})"


class _NoListError(ValueError):
    """JSON without a list of entries."""


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
        except (msgspec.DecodeError, RecursionError) as error:
            if str(error) == TRUNCATED:
                raise ValueError(TRUNCATED) from error
            # Types that vary, bare NaN, raw control characters, broken UTF-8: Kineto and
            # those who write its format have done all of it.
            return _loose(text)


def _without_long_times(text: bytes, long: bytes, short: bytes) -> bytes:
    if text.count(long) != text.count(TIME):
        raise _UnlikeTimesError
    return text.replace(long, short)


def _loose(text: bytes) -> Document:
    """The same with a parser that takes more. Raises ValueError for what is no JSON."""
    if len(text) > MAX_LOOSE:
        raise ValueError("an event of megabytes in JSON that is not strict")
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
        raise _NoListError
    entries = [entry for entry in map(loosely, raw) if entry is not None]
    described = (raw_json(about.get(key)) for key in ("deviceProperties", "distributedInfo"))
    return Document(entries, *described)


def _events(path: Path, columns: Columns, about: Document) -> Events:
    table = columns.table("events")
    if table is None:
        raise TraceError(f"{path} holds no operators and no kernels; profile at least one step")
    on_device = table["kind"] >= Kind.KERNEL
    # A number may be a thread on the CPU and a stream on a device.
    numbers, thread = np.unique(table["place"] * 2 + on_device, return_inverse=True)
    places = [*columns.places]
    names = tuple(columns.names)
    name, kind = table["name"], _kinds(names, table["name"], table["kind"])
    order = nesting_order(thread, table["start"], table["end"], kind)
    table = Table({key: column[order] for key, column in table.columns.items()})
    kind, name, thread, on_device = kind[order], name[order], thread[order], on_device[order]
    zero = int(table["start"].min())
    if int(table["end"].max()) - zero >= MAX_SPAN_NS:
        raise TraceError(f"{path} has events more than 146 years apart; record it again")
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
        device=_device(_value(about.devices), used) if on_device.any() else "cpu",
        rank=_rank(_value(about.distributed)),
        memory=_memory(columns.table("memory"), numbers, zero),
        timeless=columns.timeless,
    )


def _kinds(names: tuple[str, ...], name: Ints, kind: Ints) -> Ints:
    """The kinds, where the name says more than the category."""

    def named(pattern: re.Pattern[str]) -> Bools:
        matches: Bools = np.array([pattern.match(text) is not None for text in names], np.bool_)
        return matches[name]

    kind = np.where(named(A_RANGE) & (kind == Kind.OPERATOR), int(Kind.RANGE), kind)
    if not (kind >= Kind.KERNEL).any():
        kind = np.where(named(GENERATED), int(Kind.OPERATOR), kind)
    return kind


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


def _value(raw: msgspec.Raw) -> Any:
    """The JSON; None where there is none, and for more than can be meant."""
    text = bytes(raw)
    try:
        return orjson.loads(text) if len(text) <= MAX_ABOUT else None
    except orjson.JSONDecodeError:  # empty, or nested without end
        return None


def _device(listed: Any, used: set[int]) -> str:
    """The names of the devices that ran something."""
    names = {
        str(device["name"])[:MAX_NAME]
        for device in (listed if isinstance(listed, list) else [])
        if isinstance(device, dict) and "name" in device and _decimal(device.get("id")) in used
    }
    return ", ".join(sorted(names)) or "unknown device"


def _rank(distributed: Any) -> int | None:
    return _decimal(distributed.get("rank")) if isinstance(distributed, dict) else None
