"""Entries of a Kineto trace as columns: a piece of the trace at a time, then all together."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from peftprof.errors import TraceError
from peftprof.trace.events import NONE, Ints, Kind, Operands
from peftprof.trace.numbering import Names, Places, Signatures

# Categories as written by torch 1.8 to 2.13, lower case; other categories are not read.
KINDS = {
    "cpu_op": int(Kind.OPERATOR),
    "operator": int(Kind.OPERATOR),
    "user_annotation": int(Kind.RANGE),
    "python_function": int(Kind.RANGE),  # of these only modules
    "cuda_runtime": int(Kind.LAUNCH),
    "cuda_driver": int(Kind.LAUNCH),
    "runtime": int(Kind.LAUNCH),
    "hip_runtime": int(Kind.LAUNCH),
    "hip_driver": int(Kind.LAUNCH),
    "xpu_runtime": int(Kind.LAUNCH),
    "xpu_driver": int(Kind.LAUNCH),
    "mtia_runtime": int(Kind.LAUNCH),
    "privateuse1_runtime": int(Kind.LAUNCH),
    "privateuse1_driver": int(Kind.LAUNCH),
    "kernel": int(Kind.KERNEL),
    "gpu_memcpy": int(Kind.MEMCPY),
    "memcpy": int(Kind.MEMCPY),
    "gpu_memset": int(Kind.MEMSET),
    "memset": int(Kind.MEMSET),
}
PYTHON = "python_function"
MODULE = "nn.Module: "
FLOWS = ("ac2g", "fwdbwd")
# Operators whose work is only told by the values of their scalars.
TOLD_BY_VALUES = re.compile(
    r"bitsandbytes::.*|peftprof::.*|aten::.*(conv|_scaled_mm|attention).*", re.DOTALL
)

NUMBER = re.compile(r"-?\d+(\.\d*)?(e[+-]?\d+)?|-?inf", re.ASCII)
MAX_US = 4.5e15  # from 1827 to 2112; a time and a duration together are still an int64 of ns
EXACT_US = 2**53 / 1000  # above it a double knows no nanoseconds
MAX_ID = 1 << 62
MAX_CATEGORIES = 1000  # that are remembered not to be read
MAX_ENTRIES = 50_000_000  # of a trace; an hour of training has fewer

RAW = {"dims": "Input Dims", "types": "Input type", "concrete": "Concrete Inputs"}
_NOTHING = msgspec.Raw(b"")


class InexactTimesError(Exception):
    """Times so long that a double may have lost their fraction: they must be read as text."""


class Arguments(msgspec.Struct, gc=False):
    """What peftprof reads of an entry's `args`."""

    correlation: int = NONE
    external: int = msgspec.field(default=NONE, name="External id")
    external_lower: int = msgspec.field(default=NONE, name="external id")
    sequence: int = msgspec.field(default=NONE, name="Sequence number")
    forward_thread: int = msgspec.field(default=NONE, name="Fwd thread id")
    dims: msgspec.Raw = msgspec.field(default=_NOTHING, name="Input Dims")
    types: msgspec.Raw = msgspec.field(default=_NOTHING, name="Input type")
    concrete: msgspec.Raw = msgspec.field(default=_NOTHING, name="Concrete Inputs")
    bytes: int = NONE
    address: int = msgspec.field(default=NONE, name="Addr")
    allocation: int = msgspec.field(default=0, name="Bytes")
    allocated: int = msgspec.field(default=NONE, name="Total Allocated")
    reserved: int = msgspec.field(default=NONE, name="Total Reserved")
    device_kind: int = msgspec.field(default=NONE, name="Device Type")
    device_index: int = msgspec.field(default=NONE, name="Device Id")


EMPTY = Arguments()
Place = tuple[int | str, int | str]


class Entry(msgspec.Struct, gc=False):
    """One entry of `traceEvents`."""

    ph: str = ""
    cat: str = ""
    name: str = ""
    pid: int | str = ""
    tid: int | str = ""
    ts: float | str | None = None
    dur: float | str | None = 0.0
    id: int | str = NONE
    args: Arguments = msgspec.field(default_factory=lambda: EMPTY)


class Document(msgspec.Struct):
    """A whole trace file; what is not read is any JSON."""

    entries: list[Entry] = msgspec.field(name="traceEvents")
    devices: msgspec.Raw = msgspec.field(default=_NOTHING, name="deviceProperties")
    distributed: msgspec.Raw = msgspec.field(default=_NOTHING, name="distributedInfo")


def loosely(raw: Any) -> Entry | None:
    """An entry from any JSON: what has not the type it should have counts as missing.

    None for what is no entry at all. Ids that are decimal text, as torch 1.8 wrote them,
    become numbers.
    """
    if not isinstance(raw, dict):
        return None
    found = raw.get("args")
    found = found if isinstance(found, dict) else {}
    arguments: dict[str, Any] = {
        f.name: _number(found.get(f.encode_name), f.default)
        for f in msgspec.structs.fields(Arguments)
        if f.type is int
    }
    for name, key in RAW.items():
        if isinstance(found.get(key), list):
            arguments[name] = raw_json(found[key])
    return Entry(
        ph=_text(raw.get("ph")),
        cat=_text(raw.get("cat")),
        name=_text(raw.get("name")),
        pid=_place(raw.get("pid")),
        tid=_place(raw.get("tid")),
        ts=_time(raw.get("ts")),
        dur=_time(raw.get("dur", 0.0)),
        id=_number(raw.get("id"), NONE),
        args=Arguments(**arguments),
    )


def raw_json(value: Any) -> msgspec.Raw:
    """`value` as JSON; nothing at all where it cannot be written as such."""
    try:
        return msgspec.Raw(msgspec.json.encode(value))
    except (RecursionError, UnicodeError):
        return _NOTHING


def _number(value: Any, missing: Any) -> int:
    if isinstance(value, str) and len(value) < 20 and value.isdecimal():
        return int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and abs(value) < MAX_ID
    return int(value) if good else int(missing)


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else ""


def _place(value: Any) -> int | str:
    return value if isinstance(value, int) and not isinstance(value, bool) else _text(value)


def _time(value: Any) -> float | str | None:
    if isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float("inf") if abs(value) > 1e300 else float(value)  # NaN stays what it is
    return None if value is None else float("nan")


class _Kinds(dict[str, int]):
    """The Kind of a category, however it is spelt; NONE for one that is not read."""

    def __missing__(self, cat: str) -> int:
        kind = KINDS.get(cat.lower(), NONE)
        if kind != NONE or len(self) < MAX_CATEGORIES:
            self[cat] = kind
        return kind


@dataclass(frozen=True)
class Table:
    """Columns side by side: name to values, all of one length."""

    columns: dict[str, Ints]

    def __getitem__(self, name: str) -> Ints:
        """The column of this name."""
        return self.columns[name]


class Columns:
    """The columns of the events, arrows and allocations of a trace, as its pieces come in.

    `exact` says that times which a double cannot hold were left as text.
    """

    def __init__(self, path: Path, exact: bool) -> None:
        self.names = Names()
        self.places = Places(path)
        self.signatures = Signatures()
        self.timeless = 0  # events that were left out because they say no time
        self._path = path
        self._exact = exact
        self._kinds = _Kinds()
        self._parts: dict[str, list[dict[str, Ints]]] = {}
        self._valued: dict[int, bool] = {}  # by name
        self._count = 0

    def add(self, entries: Iterable[Entry]) -> None:
        """Take in entries. Raises TraceError for a time that cannot be, and for too many."""
        flows: dict[str, list[Entry]] = {cat: [] for cat in FLOWS}
        memory, others = [], []
        complete = []
        for entry in entries:
            if entry.ph == "X":
                complete.append(entry)
            else:
                others.append(entry)
        self._count += len(complete) + len(others)
        if self._count > MAX_ENTRIES:
            raise TraceError(
                f"{self._path} holds more than {MAX_ENTRIES:,} events; profile fewer steps"
            )
        self._add_events(complete)
        for entry in others:
            if entry.ph in "sf" and entry.cat in flows and isinstance(entry.id, int):
                flows[entry.cat].append(entry)
            elif entry.name == "[memory]":
                memory.append(entry)
        for cat, found in flows.items():
            self._add_flows(cat, found)
        self._add_memory(memory)

    def table(self, name: str) -> Table | None:
        """All the columns of `events`, `ac2g`, `fwdbwd` or `memory`; None where there is none."""
        parts = self._parts.pop(name, [])
        if not parts:
            return None
        keys = [*parts[0]]
        return Table({key: np.concatenate([part.pop(key) for part in parts]) for key in keys})

    def _put(self, name: str, columns: dict[str, Ints]) -> None:
        if len(next(iter(columns.values()))):
            self._parts.setdefault(name, []).append(columns)

    def _add_events(self, complete: list[Entry]) -> None:
        kinds = self._kinds
        kind = _ints([kinds[e.cat] for e in complete])
        start = _micro([e.ts for e in complete])
        timeless = np.isnan(start) if start.dtype.kind == "f" else start == ""
        wanted = (kind != NONE) & ~timeless
        self.timeless += int(np.count_nonzero((kind != NONE) & timeless))
        if PYTHON in kinds:
            wanted &= (
                _ints([e.cat.lower() != PYTHON or e.name.startswith(MODULE) for e in complete]) > 0
            )
        if not wanted.all():
            complete, kind, start = [*compress(complete, wanted)], kind[wanted], start[wanted]
        args = [e.args for e in complete]
        duration = _micro([e.dur for e in complete])
        name = [self.names[e.name] for e in complete]
        places = self.places
        begin = self._nanoseconds(start)
        # An event that was never closed has no duration, or a negative one.
        lasting = np.maximum(self._nanoseconds(duration), 0)
        self._put(
            "events",
            {
                "kind": kind,
                "name": _ints(name),
                "place": _ints([places[e.pid, e.tid] for e in complete]),
                "start": begin,
                "end": begin + lasting,
                "correlation": _ids([a.correlation for a in args]),
                "external": _ids([max(a.external, a.external_lower) for a in args]),
                "sequence": _ids([a.sequence for a in args]),
                "forward_thread": _ids([a.forward_thread for a in args]),
                "operands": self._operands(complete, kind, name),
                "bytes": _ids([a.bytes for a in args]),
            },
        )

    def _nanoseconds(self, micro: NDArray[Any], missing: int = 0) -> Ints:
        if not self._exact and micro.dtype.kind == "f" and (np.abs(micro) > EXACT_US).any():
            raise InexactTimesError
        return nanoseconds(self._path, micro, missing)

    def _operands(self, events: list[Entry], kind: Ints, name: list[int]) -> Ints:
        found = np.full(len(events), NONE, np.int64)
        signatures = self.signatures
        rows = np.flatnonzero(kind == Kind.OPERATOR).tolist()
        for row in rows:
            args = events[row].args
            if args.dims is _NOTHING:
                continue
            valued = self._valued.get(name[row])
            if valued is None:
                told = TOLD_BY_VALUES.fullmatch(events[row].name)
                valued = self._valued[name[row]] = told is not None
            key = bytes(args.dims), bytes(args.types), bytes(args.concrete) if valued else b""
            found[row] = signatures[key]
        return found

    def _add_flows(self, cat: str, found: list[Entry]) -> None:
        time = _micro([e.ts for e in found])
        self._put(
            cat,
            {
                "identity": _ids([e.id for e in found]),
                "out": _ints([e.ph == "s" for e in found]),
                "place": _ints([self.places[e.pid, e.tid] for e in found]),
                "time": self._nanoseconds(time, missing=NONE),
            },
        )

    def _add_memory(self, found: list[Entry]) -> None:
        found = [e for e in found if e.ts is not None and e.ts == e.ts]
        args = [e.args for e in found]
        self._put(
            "memory",
            {
                "time": self._nanoseconds(_micro([e.ts for e in found])),
                "place": _ints([self.places[e.pid, e.tid] for e in found]),
                "address": _ids([a.address for a in args]),
                "bytes": _clipped([a.allocation for a in args]),
                "allocated": _ids([a.allocated for a in args]),
                "reserved": _ids([a.reserved for a in args]),
                "kind": _ids([a.device_kind for a in args]),
                "index": _ids([a.device_index for a in args]),
            },
        )

    def operands(self) -> tuple[Operands, ...]:
        """The distinct operands, by number."""
        return tuple(
            Operands(*(text.decode("utf-8", "replace") for text in key)) for key in self.signatures
        )


def _ints(values: Sequence[int]) -> Ints:
    return np.array(values, dtype=np.int64)


def _ids(values: Sequence[Any]) -> Ints:
    """Ids; one that is negative or no 62-bit number is NONE."""
    ids = _clipped(values)
    return np.where((ids >= 0) & (ids < MAX_ID), ids, NONE)


def _clipped(values: Sequence[int]) -> Ints:
    try:
        return np.array(values, dtype=np.int64)
    except OverflowError:
        return np.array([max(-MAX_ID, min(MAX_ID, v)) for v in values], dtype=np.int64)


def _micro(values: Sequence[float | str | None]) -> NDArray[Any]:
    """Microseconds as doubles, NaN where missing; as text where any is text, empty there."""
    if str in set(map(type, values)):
        # Objects: one text of a megabyte would make an array of texts that wide.
        return np.array(["" if v is None or v != v else str(v) for v in values], dtype=object)
    return np.array(values, dtype=np.float64)


def nanoseconds(path: Path, micro: NDArray[Any], missing: int = 0) -> Ints:
    """Microseconds, numbers or decimal text, in integer nanoseconds. Raises TraceError."""
    if micro.dtype.kind != "f":
        return _ints([_exact(path, value, missing) for value in micro.tolist()])
    lost = np.isnan(micro)
    if lost.any():
        micro = np.where(lost, 0.0, micro)
    if not (np.abs(micro) < MAX_US).all():
        raise TraceError(f"{path} has an event whose time is out of range")
    whole = np.floor(micro)
    exact = whole.astype(np.int64) * 1000 + np.rint((micro - whole) * 1000).astype(np.int64)
    return np.where(lost, missing, exact) if lost.any() else exact


def _exact(path: Path, value: str, missing: int) -> int:
    if not value:
        return missing
    whole, _, fraction = value.partition(".")
    if not (whole + fraction).isdecimal() or len(whole) > 15 + 1:
        if NUMBER.fullmatch(value):
            return int(nanoseconds(path, np.array([float(value)]), missing)[0])
        raise TraceError(f"{path} has an event whose time is not a number: {value[:40]!r}")
    exact = int(whole) * 1000 + int((fraction + "000")[:3])
    if exact >= MAX_US * 1000:
        raise TraceError(f"{path} has an event whose time is out of range")
    return exact
