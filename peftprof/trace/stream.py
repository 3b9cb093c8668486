"""The JSON of a trace in pieces of whole entries, so that no trace has to fit in memory.

A piece ends where `}`, `,`, `{` stand between two entries. Such a place may also be inside
an entry or a text; then the piece is no JSON by itself, for its brackets or its quotes do
not close. So a piece that can be read has been cut rightly, and none is believed unread.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from peftprof.errors import TraceError

T = TypeVar("T")

# A trace is text and shrinks ten- to thirtyfold; what shrinks tenfold more is no trace.
MAX_BYTES = 32 << 30
MAX_RATIO = 300
RATIO_FROM_BYTES = 64 << 20
BLOCK = 4 << 20
# Of one entry, of all that stands before the entries, and of a trace that only a parser
# of whole documents can read.
MAX_ENTRY = 64 << 20
MAX_WHOLE = 1 << 30

LIST = re.compile(rb'"traceEvents"\s*:\s*\[')
BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
WRONG_CUTS = 8  # so many places are tried before the trace is read as a whole
CORRUPT = "is damaged; record it again"


class UnreadableError(Exception):
    """The trace cannot be read in pieces; a parser of whole documents may know more."""


def blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks, decompressed where it is gzip. Raises TraceError."""
    with _opened(path, BLOCK) as source:
        yield from _ahead(source)


def beginning(path: Path) -> bytes:
    """The first bytes of the file, decompressed. Raises TraceError."""
    with _opened(path, 1 << 12) as source:
        return next(source, b"")


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Iterator[bytes]]:
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            yield _inflated(path, file, size) if packed else iter(lambda: file.read(size), b"")
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror or error}") from error


def _ahead(source: Iterator[bytes]) -> Iterator[bytes]:
    """The same, the next one always being made: inflating runs beside parsing."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, source, b"")
        while block := coming.result():
            coming = pool.submit(next, source, b"")
            yield block


def _inflated(path: Path, file: BinaryIO, size: int) -> Iterator[bytes]:
    """A gzip file's members, one after another (RFC 1952), within the limits above."""
    read = total = 0
    member = zlib.decompressobj(wbits=31)
    pending = b""
    try:
        while True:
            if not pending:
                pending = file.read(max(1, size >> 3))
                read += len(pending)
                if not pending:
                    break
            if member.eof:
                if not pending.strip(b"\0"):  # padding behind the last member
                    pending = b""
                    continue
                member = zlib.decompressobj(wbits=31)
            block = member.decompress(pending, size)
            pending = member.unused_data if member.eof else member.unconsumed_tail
            total += len(block)
            _check_size(path, total, read)
            if block:
                yield block
    except zlib.error as error:
        raise TraceError(f"{path} {CORRUPT} ({error})") from error
    if not member.eof:
        raise TraceError(f"{path} ends in the middle of its gzip; record it again")


def _check_size(path: Path, total: int, compressed: int) -> None:
    if total > MAX_BYTES:
        raise TraceError(f"{path} expands past {MAX_BYTES >> 30} GiB; profile fewer steps")
    if total > RATIO_FROM_BYTES and total > MAX_RATIO * compressed:
        raise TraceError(f"{path} expands more than {MAX_RATIO}-fold; that is no trace")


def whole(path: Path) -> bytes:
    """All of the file, decompressed. Raises TraceError where it is more than MAX_WHOLE."""
    parts, total = [], 0
    for block in blocks(path):
        total += len(block)
        if total > MAX_WHOLE:
            raise TraceError(f"{path} is damaged, or ends in the middle; record it again")
        parts.append(block)
    return b"".join(parts)


def pieces(path: Path, read: Callable[[bytes], T]) -> Iterator[T]:
    """What `read` makes of each piece, a JSON list of entries; last of what remains.

    The last piece is a document like the whole file, with the last entries alone in its
    list. `read` raises ValueError for what is no JSON. Raises UnreadableError, or TraceError
    for a file that cannot be opened or decompressed.
    """
    source = blocks(path)
    head, rest = _head(source)
    size = len(rest)
    for block in source:
        rest += block
        size += len(block)
        if len(rest) > MAX_ENTRY:
            raise UnreadableError
        cut = _cut(rest, read)
        if cut is not None:
            found, end = cut
            yield found
            rest = rest[end:]
    try:
        yield read(head + rest)
    except ValueError as error:
        raise UnreadableError from error


def _head(source: Iterator[bytes]) -> tuple[bytes, bytes]:
    """The document up to its list of entries, bracket included; and what has been read of it."""
    start = b""
    for block in source:
        start += block
        found = re.match(rb"[\xef\xbb\xbf\s]*\[", start) or LIST.search(start)
        if found:
            return start[: found.end()], start[found.end() :]
        if len(start) > MAX_ENTRY:
            break
    raise UnreadableError


def _cut(rest: bytes, read: Callable[[bytes], T]) -> tuple[T, int] | None:
    """What is in `rest` up to its last whole entry, and where the next entry begins."""
    end = len(rest)
    for _ in range(WRONG_CUTS):
        between = None
        while between is None:
            end = rest.rfind(b"}", 0, end)
            if end < 0:
                return None
            between = BETWEEN.match(rest, end)
        try:
            return read(b"[" + rest[: end + 1] + b"]"), between.end()
        except ValueError:
            continue
    return None
