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
BEGINNING = 1 << 16  # a trace has said by then what it is
# Of one entry, and of all that stands before or behind the entries.
MAX_ENTRY = 32 << 20

LIST = re.compile(rb'"traceEvents"\s*:\s*\[')
BETWEEN = re.compile(rb"\}\s*,\s*(?=\{)")
WRONG_CUTS = 8  # so many places are tried before more of the trace is waited for
BRACES = 10_000  # so many that close are looked at for such a place
CORRUPT = "is damaged; record it again"


class UnreadableError(Exception):
    """What cannot be cut any more is no JSON; `why` is what the parser said."""

    def __init__(self, why: ValueError) -> None:
        super().__init__(str(why))
        self.why = why


def blocks(path: Path) -> Iterator[bytes]:
    """The file's bytes in blocks, decompressed where it is gzip. Raises TraceError."""
    with _opened(path, BLOCK) as source:
        yield from _ahead(source)


def beginning(path: Path) -> bytes:
    """The first bytes of the file, decompressed. Raises TraceError."""
    start = b""
    with _opened(path, 1 << 12) as source:
        for block in source:
            start += block
            if start.strip() or len(start) > BEGINNING:
                break
    return start


@contextmanager
def _opened(path: Path, size: int) -> Iterator[Iterator[bytes]]:
    if path.exists() and not path.is_file():  # a pipe or a device may never end, or never begin
        raise TraceError(f"cannot read {path}: it is no regular file; name a trace.json(.gz)")
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


def pieces(path: Path, read: Callable[[bytes], T]) -> Iterator[T]:
    """What `read` makes of each piece, a JSON list of entries; last of what remains.

    The last piece is a document like the whole file, with the last entries alone in its
    list. `read` raises ValueError for what is no JSON. Raises UnreadableError where it does so
    for the last piece, and TraceError for a file that cannot be opened or decompressed, or is
    past the limits.
    """
    source = blocks(path)
    head, rest = _head(path, source)
    uncut = 0  # bytes without a place to cut: not searched again before they are twice as many
    for block in source:
        rest += block
        if len(rest) < min(2 * uncut, MAX_ENTRY):
            continue
        cut = _cut(rest, read)
        if cut is None:
            uncut = len(rest)
            _check_entry(path, rest)
        else:
            found, end = cut
            yield found
            rest, uncut = rest[end:], 0
    try:
        last = read(head + rest)
    except ValueError as error:
        raise UnreadableError(error) from error
    yield last


def _head(path: Path, source: Iterator[bytes]) -> tuple[bytes, bytes]:
    """The document up to its list of entries, bracket included; and what has been read of it.

    Where it has no such list, all of it.
    """
    start = b""
    for block in source:
        start += block
        found = re.match(rb"[\xef\xbb\xbf\s]*\[", start) or LIST.search(start)
        if found:
            return start[: found.end()], start[found.end() :]
        _check_entry(path, start)
    return start, b""


def _check_entry(path: Path, text: bytes) -> None:
    if len(text) > MAX_ENTRY:
        limit = f"{MAX_ENTRY >> 20} MiB"
        raise TraceError(f"{path} holds {limit} without one whole event; that is no trace")


def _cut(rest: bytes, read: Callable[[bytes], T]) -> tuple[T, int] | None:
    """What is in `rest` up to its last whole entry, and where the next entry begins."""
    end, wrong = len(rest), 0
    for _ in range(BRACES):
        end = rest.rfind(b"}", 0, end)
        if end < 0 or wrong == WRONG_CUTS:
            return None
        between = BETWEEN.match(rest, end)
        if between is None:
            continue
        try:
            return read(b"[" + rest[: end + 1] + b"]"), between.end()
        except ValueError:
            wrong += 1
    return None
