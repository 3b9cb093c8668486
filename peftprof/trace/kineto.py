"""Reads a Kineto trace (torch.profiler's `export_chrome_trace`), JSON or gzip, into `Events`."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from peftprof.errors import TraceError
from peftprof.trace import links
from peftprof.trace.events import NONE, Events, Ints, Kind, Thread, nesting_order, number

# Categories as written by torch 1.8 to 2.13, lower case; other categories are not read.
KINDS = {
    "cpu_op": int(Kind.OPERATOR),
    "operator": int(Kind.OPERATOR),
    "user_annotation": int(Kind.RANGE),
    "cuda_runtime": int(Kind.LAUNCH),
    "cuda_driver": int(Kind.LAUNCH),
    "runtime": int(Kind.LAUNCH),
    "hip_runtime": int(Kind.LAUNCH),
    "xpu_runtime": int(Kind.LAUNCH),
    "kernel": int(Kind.KERNEL),
    "gpu_memcpy": int(Kind.MEMCPY),
    "memcpy": int(Kind.MEMCPY),
    "gpu_memset": int(Kind.MEMSET),
    "memset": int(Kind.MEMSET),
}
_OPERATOR, _RANGE = int(Kind.OPERATOR), int(Kind.RANGE)  # enum look-ups are slow in a loop
# Before torch 1.12 a record_function range came as an operator.
OUR_RANGE = re.compile(r"(step|phase|layer|op):.")

# A trace is text and shrinks about tenfold; what shrinks a hundredfold more is no trace.
MAX_BYTES = 4 << 30
MAX_RATIO = 200
RATIO_FROM_BYTES = 64 << 20
CHUNK = 1 << 20

MAX_US = 9e15  # int64 nanoseconds end at 9.22e15 microseconds
# A double holds 13 digits of microseconds to the nanosecond, and no more. Traces with
# absolute times have 16, so theirs are quoted before parsing and read as decimal text.
LONG_TIME = re.compile(rb'(?<!\\)("ts"\s*:\s*)(\d{14,}\.\d+)')
LOOK_AT = 4 << 20  # the times of one trace are all alike
CORRUPT = "is damaged; record it again"


def read(path: Path) -> Events:
    """The events of the trace at `path`.

    Raises TraceError, in one line, when it cannot be opened, is truncated, is empty, or
    is no trace of torch.profiler.
    """
    document = _parse(path, _bytes(path))
    raw = document if isinstance(document, list) else None
    if isinstance(document, dict):
        raw = document.get("traceEvents")
    if not isinstance(raw, list):
        raise TraceError(
            f"{path} is JSON but no trace: it has no traceEvents; name a trace.json(.gz)"
        )
    complete = [e for e in raw if isinstance(e, dict) and e.get("ph") == "X"]
    kinds = [_kind(event) for event in complete]
    known = [event for event, kind in zip(complete, kinds, strict=True) if kind != NONE]
    if not known:
        raise TraceError(f"{path} holds no operators and no kernels; profile at least one step")
    kind = np.array([kind for kind in kinds if kind != NONE], np.int64)
    return _table(path, known, kind, raw, document)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    if data.startswith(b"\x1f\x8b"):
        data = b"".join(_inflate(path, data))
    if not data.strip():
        raise TraceError(f"{path} is empty; record it again")
    return data


def _inflate(path: Path, data: bytes) -> Iterator[bytes]:
    """The decompressed file in pieces, never more than the limits above."""
    total = 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
            while piece := file.read(CHUNK):
                total += len(piece)
                _check_size(path, total, len(data))
                yield piece
    except EOFError as error:
        raise TraceError(f"{path} ends in the middle of its gzip; record it again") from error
    except (OSError, zlib.error) as error:
        raise TraceError(f"{path} {CORRUPT} ({error})") from error


def _check_size(path: Path, total: int, compressed: int) -> None:
    if total > MAX_BYTES:
        raise TraceError(f"{path} expands past {MAX_BYTES >> 30} GiB; profile fewer steps")
    if total > RATIO_FROM_BYTES and total > MAX_RATIO * compressed:
        raise TraceError(f"{path} expands more than {MAX_RATIO}-fold; that is no trace")


def _parse(path: Path, data: bytes) -> Any:
    if data.startswith(b"SQLite format 3"):
        raise TraceError(f"{path} is a database, not a Kineto trace")
    if not data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"{", b"[")):
        raise TraceError(f"{path} is not JSON; name a trace.json or trace.json.gz")
    if LONG_TIME.search(data, 0, LOOK_AT):
        data = LONG_TIME.sub(rb'\1"\2"', data)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        pass
    # Kineto has written bare NaN, raw control characters and broken UTF-8 in its time; the
    # slower parser of the standard library takes them.
    try:
        return json.loads(data.decode("utf-8-sig", "replace"), strict=False)
    except json.JSONDecodeError as error:
        if error.pos >= len(error.doc.rstrip()) - 1 or not data.rstrip().endswith((b"}", b"]")):
            raise TraceError(f"{path} ends in the middle of its JSON; record it again") from error
        raise TraceError(f"{path} {CORRUPT} (line {error.lineno}: {error.msg})") from error
    except (RecursionError, ValueError) as error:
        raise TraceError(f"{path} {CORRUPT}") from error


def _kind(event: dict[str, Any]) -> int:
    kind = KINDS.get(str(event.get("cat")).lower(), NONE)
    if kind == _OPERATOR and OUR_RANGE.match(str(event.get("name"))):
        return _RANGE
    return kind


def _table(
    path: Path, known: list[dict[str, Any]], kind: Ints, raw: list[Any], document: Any
) -> Events:
    start = _nanoseconds(path, [event.get("ts") for event in known])
    # An event that was never closed has no duration, or a negative one.
    duration = np.maximum(_nanoseconds(path, [event.get("dur", 0) for event in known]), 0)
    on_device = (kind >= Kind.KERNEL).tolist()
    threads, thread = number([(d, *_place(e)) for d, e in zip(on_device, known, strict=True)])
    order = nesting_order(thread, start, start + duration, kind)
    known = [known[i] for i in order.tolist()]
    start, kind, thread = start[order], kind[order], thread[order]
    names, name = number([str(event.get("name")) for event in known])
    arguments = [_arguments(event) for event in known]
    flows = _flows(path, raw, {place: i for i, place in enumerate(threads)})
    ids = links.Ids(
        correlation=_ids(arguments, "correlation"),
        external=_ids(arguments, "External id", "external id"),
        sequence=_ids(arguments, "Sequence number"),
        forward_thread=_ids(arguments, "Fwd thread id"),
    )
    return Events(
        names=names,
        kind=kind,
        name=name,
        start=start - start.min(),
        end=start - start.min() + duration[order],
        thread=thread,
        launch=links.launches(kind, thread, start, ids, flows["ac2g"]),
        forward=links.forwards(kind, thread, start, ids, flows["fwdbwd"]),
        operands=np.full(len(known), NONE, np.int64),
        bytes=np.full(len(known), NONE, np.int64),
        threads=tuple(
            Thread(tid, int(pid) if d and pid.isdecimal() else NONE) for d, pid, tid in threads
        ),
        signatures=(),
        device=_device(document, [known[i] for i in np.flatnonzero(kind >= Kind.KERNEL)]),
    )


def _place(event: dict[str, Any]) -> tuple[str, str]:
    return str(event.get("pid")), str(event.get("tid"))


def _arguments(event: dict[str, Any]) -> dict[str, Any]:
    arguments = event.get("args")
    return arguments if isinstance(arguments, dict) else {}


def _nanoseconds(path: Path, values: Sequence[Any]) -> Ints:
    """Microseconds, as numbers or as decimal text, in integer nanoseconds."""
    if any(isinstance(value, str) for value in values):
        return np.fromiter((_exact(path, value) for value in values), np.int64, len(values))
    try:
        micro = np.array(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path} has an event whose time is not a number") from error
    if not (np.abs(micro) < MAX_US).all():
        raise TraceError(f"{path} has an event whose time is out of range")
    whole = np.floor(micro)
    return whole.astype(np.int64) * 1000 + np.rint((micro - whole) * 1000).astype(np.int64)


def _exact(path: Path, value: Any) -> int:
    if not isinstance(value, str):
        return int(_nanoseconds(path, [value])[0])
    whole, _, fraction = value.partition(".")
    if not (whole + fraction).isdecimal() or len(whole) > 15 + 1:
        raise TraceError(f"{path} has an event whose time is not a number: {value[:40]!r}")
    nanoseconds = int(whole) * 1000 + int((fraction + "000")[:3])
    if nanoseconds >= MAX_US * 1000:
        raise TraceError(f"{path} has an event whose time is out of range")
    return nanoseconds


def _ids(arguments: Iterable[dict[str, Any]], *keys: str) -> Ints:
    def one(found: dict[str, Any]) -> int:
        for key in keys:
            value = found.get(key)
            if isinstance(value, int) and 0 <= value < 1 << 62:
                return value
        return NONE

    return np.fromiter((one(found) for found in arguments), np.int64)


def _flows(
    path: Path, raw: list[Any], threads: dict[tuple[bool, str, str], int]
) -> dict[str, links.Flows]:
    """The arrows of the trace by kind: launch to kernel (ac2g), forward to backward (fwdbwd)."""
    rows: dict[str, list[tuple[int, bool, int, Any]]] = {"ac2g": [], "fwdbwd": []}
    for event in raw:
        if not isinstance(event, dict) or event.get("ph") not in ("s", "f"):
            continue
        kind, identity = event.get("cat"), event.get("id")
        if kind not in ("ac2g", "fwdbwd") or "ts" not in event:
            continue
        if isinstance(identity, int) and not abs(identity) >> 62:
            out = event["ph"] == "s"
            thread = threads.get((kind == "ac2g" and not out, *_place(event)), NONE)
            rows[kind].append((identity, out, thread, event["ts"]))
    return {
        kind: links.Flows(
            identity=np.array([row[0] for row in found], np.int64),
            out=np.array([row[1] for row in found], np.bool_),
            thread=np.array([row[2] for row in found], np.int64),
            time=_nanoseconds(path, [row[3] for row in found]),
        )
        for kind, found in rows.items()
    }


def _device(document: Any, ran: list[dict[str, Any]]) -> str:
    """The name of the device that ran these kernels; `cpu` where there are none."""
    used = {str(event.get("pid")) for event in ran}
    if not used:
        return "cpu"
    listed = document.get("deviceProperties") if isinstance(document, dict) else None
    names = {
        str(device["name"])
        for device in (listed if isinstance(listed, list) else [])
        if isinstance(device, dict) and "name" in device and str(device.get("id")) in used
    }
    return ", ".join(sorted(names)) or "unknown device"
