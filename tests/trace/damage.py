"""Damaged traces, the same for the same seed: small healthy files broken in every way.

`damaged(number, seeds)` is one file of the corpus, by itself. Files that are hostile rather
than broken are in hostile.py.
"""

import gzip
import json
import random
import sqlite3
import zlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.trace import damage_exports
from tests.trace.build import ENGINE, MAIN
from tests.trace.seeds import Document, Seeds

SEED = 20_260_117

Random = random.Random


@dataclass(frozen=True)
class Damaged:
    """A file by its name, or the files of a run's folder; `what` says what was done to it."""

    what: str
    files: dict[str, bytes]

    def write(self, folder: Path) -> Path:
        """Write it into `folder`; the path to name."""
        for name, data in self.files.items():
            (folder / name).write_bytes(data)
        return folder if "run.json" in self.files else folder / next(iter(self.files))


# Values that are no value for most keys. Those in RAW are not even JSON, or not strictly.
RAW: tuple[bytes, ...] = (
    b"NaN", b"Infinity", b"-Infinity", b"1e308", b"-1e308", b"1e999", b"-0", b"1e-400",
    b"9" * 30, b"-" + b"9" * 30, b"9" * 400, b"01", b"+1", b"1.", b"tru", b"'x'", b"", b"}", b"]",
    b'"\\ud800"', b'"\\ud83d\\ude00\\udc00"', b'"\\u0000"', b'"\\x"', b'"\x01\x1b[31mred\n\t"',
    b'"\xff\xfe\xed\xa0\x80"', b'"' + b"x" * 70_000 + b'"', b"[" * 300 + b"]" * 300,
    b"[" * 1100 + b"]" * 1100, b'{"a":' * 300 + b"1" + b"}" * 300, b"1,", b'1,"ts":5',
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [1, "2", None], {"a": {"b": []}}, 0, 1, -1, 1 << 31,
    -(1 << 31), (1 << 53) + 1, (1 << 62), (1 << 63) - 1, 1 << 63, 1 << 64, -(1 << 63), 10**25,
    0.5, -0.5, 1e15, 4.4e15, -4.4e15, 9e15, 1e18, 1e300, -1e300, 5e-324, 1.7e15, "", "7",
    "0x1f", "soon", "nan", "inf", "-inf", "1e5", "-3.5", "1e400", "1_0", "٣", "1." + "0" * 300,
    "9" * 40, "X", "stream 7",
)  # fmt: skip
NAMES = (
    "", " ", "\n", "a\r\nb\x00c", "\x1b[31mred\x1b[0m\x07", "\u202eevil\u2066", "\u2028\u2029",
    "\ud800", "<script>evil()</script>", "</script><!--", "[red]x[/red]", "|`*_#~", "=1+1", "@cmd",
    "é" * 50, "漢字" * 40, "\U0001f600" * 9, "e" + "\u0301" * 99, "x" * 5000, "step:1",
    "step:" + "9" * 99, "ProfilerStep#1", "phase:backward", "phase:none", "op:dequant", "layer:",
    "layer:head", "op:", "nn.Module: ", "nn.Module: Layer_0", "aten::mm", "ncclKernel_AllReduce",
    "Memcpy DtoD", "autograd::engine::evaluate_function: ", "cudaLaunchKernel",
    "cudaDeviceSynchronize",
)  # fmt: skip
KEYS = ("ph", "cat", "name", "pid", "tid", "ts", "dur", "id", "args")
ARGUMENTS = (
    "correlation", "External id", "external id", "Sequence number", "Fwd thread id", "Input Dims",
    "Input type", "Concrete Inputs", "bytes", "Addr", "Bytes", "Total Allocated", "Total Reserved",
    "Device Type", "Device Id",
)  # fmt: skip
CATEGORIES = (
    "cpu_op", "user_annotation", "python_function", "cuda_runtime", "kernel", "gpu_memcpy",
    "gpu_memset", "ac2g", "fwdbwd", "Trace", "KERNEL", "",
)  # fmt: skip
DIMS: tuple[Any, ...] = (
    [[0]], [[-1]], [[1 << 63]], [[1 << 62, 4]], [[1] * 70], [[1, "2"]], [[[1]]], [7], [None],
    [[1e300]], [[8, 64], [64, 8]], [[], []], [[2, 2]] * 3000, "x", [[[[[[]]]]]],
)  # fmt: skip


def _mark(number: int) -> str:
    return f"@@raw{number}@@"


def _value(rng: Random) -> Any:
    kind = rng.random()
    if kind < 0.35:
        return _mark(rng.randrange(len(RAW)))
    return rng.choice(VALUES if kind < 0.85 else NAMES)


def _some(rng: Random, entries: list[Any]) -> list[Document]:
    """One, some or all of the entries."""
    found = [entry for entry in entries if isinstance(entry, dict)]
    share = rng.choice([0.0, 0.1, 0.5, 1.0])
    return [e for e in found if rng.random() < share] or found[: rng.randrange(1, 4)]


def wrong_type(rng: Random, document: Document) -> None:
    inner = rng.random() < 0.4
    key, value = rng.choice(ARGUMENTS if inner else KEYS), _value(rng)
    for entry in _some(rng, document["traceEvents"]):
        target = entry.setdefault("args", {}) if inner else entry
        if isinstance(target, dict):
            target[key] = value if rng.random() < 0.9 else _value(rng)


def missing(rng: Random, document: Document) -> None:
    key = rng.choice(KEYS)
    for entry in _some(rng, document["traceEvents"]):
        entry.pop(key, None)


def renamed(rng: Random, document: Document) -> None:
    for entry in _some(rng, document["traceEvents"]):
        entry["name"] = rng.choice(NAMES) * rng.choice([1, 1, 1, 40])


def recategorised(rng: Random, document: Document) -> None:
    for entry in _some(rng, document["traceEvents"]):
        entry["cat"] = rng.choice(CATEGORIES)


TIMES: tuple[Callable[[Random, float], Any], ...] = (
    lambda rng, t: -t,
    lambda rng, t: 0,
    lambda rng, t: t * 1e6,
    lambda rng, t: t * 1e12,
    lambda rng, t: t + 1.6e15,  # of this century, where others are of 1970
    lambda rng, t: t + rng.choice([-1, 1]) * 2.2e15,
    lambda rng, t: rng.uniform(-4.4e15, 4.4e15),
    lambda rng, t: rng.uniform(0, 200),
    lambda rng, t: 5,
    lambda rng, t: round(t),
    lambda rng, t: f"{t:.3f}",
    lambda rng, t: t + rng.uniform(-2, 2),
)


def other_times(rng: Random, document: Document) -> None:
    change, key = rng.choice(TIMES), rng.choice(["ts", "ts", "dur"])
    device_only = rng.random() < 0.3
    for entry in _some(rng, document["traceEvents"]):
        known = isinstance(entry.get(key), int | float)
        if known and (not device_only or str(entry.get("cat")).lower() in ("kernel", "gpu_memcpy")):
            entry[key] = change(rng, entry[key])


def reordered(rng: Random, document: Document) -> None:
    entries = document["traceEvents"]
    how = rng.randrange(4)
    if how == 0:
        rng.shuffle(entries)
    elif how == 1:
        entries *= rng.randrange(2, 5)
    elif how == 2:
        del entries[rng.randrange(len(entries)) :]
    else:
        document["traceEvents"] = [e for e in entries if rng.random() < 0.5]


def other_ids(rng: Random, document: Document) -> None:
    """Launches and forwards that point at themselves, ahead, at each other, across threads."""
    key = rng.choice(["correlation", "External id", "Sequence number", "Fwd thread id", "id"])
    few = rng.choice([[1], [1, 2], [0], [-1, 1], range(50)])
    for entry in _some(rng, document["traceEvents"]):
        target = entry if key == "id" else entry.setdefault("args", {})
        if isinstance(target, dict):
            target[key] = rng.choice(few)
        if rng.random() < 0.2:
            entry["tid"] = rng.choice([MAIN, ENGINE, 7])


def other_entries(rng: Random, document: Document) -> None:
    entries = document["traceEvents"]
    for _ in range(rng.choice([1, 5, len(entries)])):
        entries[rng.randrange(len(entries))] = _value(rng)


def other_operands(rng: Random, document: Document) -> None:
    for entry in _some(rng, document["traceEvents"]):
        args = entry.setdefault("args", {})
        if isinstance(args, dict):
            types = rng.choice([["float"], ["float", "float"], ["TensorList"], "x", [7]])
            args |= {"Input Dims": rng.choice(DIMS), "Input type": types}
            args |= {"Concrete Inputs": rng.choice([[], ["", ""], ["[1, 2"], "x", [["x"]]])}


def other_memory(rng: Random, document: Document) -> None:
    rows = [
        e for e in document["traceEvents"] if isinstance(e, dict) and e.get("name") == "[memory]"
    ]
    for entry in rows or _some(rng, document["traceEvents"]):
        entry["name"], entry["ph"] = "[memory]", "i"
        if isinstance(entry.get("args"), dict):
            entry["args"][rng.choice(ARGUMENTS[-6:])] = _value(rng)


def other_document(rng: Random, document: Document) -> None:
    keys = ("schemaVersion", "deviceProperties", "distributedInfo", "traceEvents", "more", "")
    how = rng.randrange(5)
    if how == 0:
        document[rng.choice(keys)] = _value(rng)
    elif how == 1:
        document["deviceProperties"] = [{"id": _value(rng), "name": _value(rng)}, _value(rng)]
    elif how == 2:
        document["distributedInfo"] = {"rank": _value(rng)}
    elif how == 3:  # another list of this name, before or behind the real one
        other = {"meta": {"traceEvents": document["traceEvents"][:3]}, '"traceEvents": [': "["}
        first, then = (other, dict(document)) if rng.random() < 0.5 else (dict(document), other)
        document.clear()
        document |= first | then
    else:
        document[rng.choice(keys)] = {"traceEvents": [{"ph": "X"}]}


CHANGES = (
    wrong_type, wrong_type, wrong_type, missing, renamed, recategorised, other_times, other_times,
    other_times, reordered, other_ids, other_ids, other_entries, other_operands, other_memory,
    other_document,
)  # fmt: skip


def text(rng: Random, document: Document) -> bytes:
    """The document as one of the many ways there are to write it."""
    indent = rng.choice([None, None, None, 1])
    separators = rng.choice([None, (",", ":")])
    if rng.random() < 0.15:
        document["traceEvents"] = document.pop("traceEvents", None)  # last
    written = json.dumps(document, indent=indent, separators=separators).encode()
    for number, raw in enumerate(RAW):
        written = written.replace(f'"{_mark(number)}"'.encode(), raw)
    return written


def _truncated(rng: Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data))]


def _cut_in_text(rng: Random, data: bytes) -> bytes:
    """Behind a quote, a backslash, a comma or a brace."""
    at = data.find(rng.choice([b'"', b"\\", b",", b"{", b"}", b":"]), rng.randrange(len(data)))
    return data[: at + 1] if at > 0 else data[:-1]


def _flipped(rng: Random, data: bytes) -> bytes:
    found = bytearray(data)
    for _ in range(rng.choice([1, 3, 30])):
        found[rng.randrange(len(found))] ^= 1 << rng.randrange(8)
    return bytes(found)


def _inserted(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    junk = rng.choice(
        [b"\0", b"\xff", b'"', b"\\", b"{", b"}", b"[", b"]", b",", b"1", rng.randbytes(9)]
    )
    return data[:at] + junk + data[at:]


def _deleted(rng: Random, data: bytes) -> bytes:
    at = rng.randrange(len(data))
    return data[:at] + data[at + rng.choice([1, 1, 2, 50, 999]) :]


def _doubled(rng: Random, data: bytes) -> bytes:
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data))))
    return data[:end] + data[start:end] + data[end:]


def _blanked(rng: Random, data: bytes) -> bytes:
    at, size = rng.randrange(len(data)), rng.choice([1, 16, 512])
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


BREAKS = (
    _truncated, _truncated, _cut_in_text, _flipped, _flipped, _inserted, _deleted, _doubled,
    _blanked,
)  # fmt: skip


def _members(data: bytes) -> bytes:
    half = len(data) // 2
    return gzip.compress(data[:half]) + gzip.compress(b"") + gzip.compress(data[half:])


def _raw_deflate(data: bytes) -> bytes:
    return zlib.compress(data)


def _with_header(data: bytes) -> bytes:
    """A gzip file that names itself, with a comment and more that nobody reads."""
    flags = 4 | 8 | 16
    return (
        b"\x1f\x8b\x08"
        + bytes([flags])
        + bytes(6)
        + b"\x04\0abcd"
        + b"n\0c\0"
        + gzip.compress(data)[10:]
    )


WRAPS: tuple[tuple[str, Callable[[bytes], bytes]], ...] = (
    ("trace.json", bytes),
    ("trace.json", bytes),
    ("trace.json.gz", gzip.compress),
    ("trace.json.gz", bytes),
    ("trace.json", gzip.compress),
    ("trace.json.gz", _members),
    ("trace.json.gz", _with_header),
    ("trace.json.gz", lambda data: gzip.compress(data) + bytes(99)),
    ("trace.json.gz", lambda data: gzip.compress(data) + b"junk"),
    ("trace.json.gz", lambda data: gzip.compress(gzip.compress(data))),
    ("trace.json.gz", _raw_deflate),
    ("trace.json", lambda data: b"\xef\xbb\xbf" + data),
    ("trace.json", lambda data: data.decode("utf-8", "replace").encode("utf-16")),
    ("trace.json", lambda data: data.replace(b"\n", b"\r\n")),
    ("trace.json", lambda data: b" \r\n\t" * 2000 + data),
    ("trace.json", lambda data: data + b"\n\0"),
    ("trace.sqlite", bytes),
    ("trace.pt.trace.json", bytes),
)


def damaged(number: int, seeds: Seeds) -> Damaged:
    """File `number` of the corpus."""
    rng = random.Random(f"{SEED} {number}")
    kind = rng.random()
    if kind < 0.2:
        return _damaged_export(rng, seeds)
    if kind < 0.28:
        return _damaged_run(rng, seeds)
    what, data = _damaged_trace(rng, seeds)
    name, wrap = rng.choice(WRAPS)
    data = wrap(data)
    if rng.random() < 0.35:
        change = rng.choice(BREAKS)
        what, data = f"{what} {change.__name__}", change(rng, data or b" ")
    return Damaged(f"{what} as {name}", {name: data})


def _damaged_trace(rng: Random, seeds: Seeds) -> tuple[str, bytes]:
    name = rng.choice(sorted(seeds.traces))
    document = json.loads(json.dumps(seeds.traces[name]))
    said = [name]
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        change = rng.choice(CHANGES)
        if isinstance(document.get("traceEvents"), list) and document["traceEvents"]:
            said.append(change.__name__)
            change(rng, document)
    return " ".join(said), text(rng, document)


def _damaged_run(rng: Random, seeds: Seeds) -> Damaged:
    """A run's folder, its record with a wrong value or two, or a damaged file."""
    record = json.loads(json.dumps(seeds.record))
    said = ["run"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        table = record
        key = rng.choice(sorted(table))
        while isinstance(table[key], dict) and table[key] and rng.random() < 0.8:
            table = table[key]
            key = rng.choice(sorted(table))
        table[key] = _value(rng)
        said.append(key)
    files = {"run.json": text(rng, record)}
    for name in ("trace.json.gz", "memory.json.gz"):
        what, data = _damaged_trace(rng, seeds) if rng.random() < 0.4 else ("", b"")
        files[name] = gzip.compress(data or json.dumps(seeds.traces["cpu"]).encode())
        said.append(what)
    return Damaged(" ".join(said), files)


def _damaged_export(rng: Random, seeds: Seeds) -> Damaged:
    name = rng.choice(sorted(seeds.exports))
    data = seeds.exports[name]
    said = [name]
    if rng.random() < 0.7:
        with closing(sqlite3.connect(":memory:")) as database:
            database.deserialize(data)
            for _ in range(rng.choice([1, 1, 2, 3])):
                said.append(damage_exports.change(rng, database))
            data = database.serialize()
    if rng.random() < 0.4 or len(said) == 1:
        change = rng.choice(
            [_truncated, _flipped, _flipped, _blanked, _deleted, _doubled, _inserted]
        )
        said.append(change.__name__)
        data = change(rng, data)
    return Damaged(" ".join(said), {rng.choice(["report.sqlite", "report.db", "x.json"]): data})
