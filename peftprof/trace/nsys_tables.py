"""Columns out of an SQLite export of Nsight Systems, which is a file from a stranger.

The file is opened read-only and as immutable: no lock, log or journal beside it is made or
touched. Only real tables are read, whole columns of them: no view, trigger, generated
column, index or virtual table of the file is ever evaluated.
"""

import sqlite3
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from peftprof.errors import TraceError
from peftprof.trace.events import NONE, Ints, distinct
from peftprof.trace.numbering import MAX_NAME

MAGIC = b"SQLite format 3\0"
MAX_SECONDS = 600  # for one file; a million events take about two
MAX_ROWS = 50_000_000  # of one file; an hour of training has fewer
MAX_VALUE = 64 << 20  # bytes of one row; nsys keeps no more than names in one
MAX_SQL = 1 << 20  # characters of one statement, those of the file's schema included
CHUNK = 1 << 13  # rows; more of them leave the processor's cache
INSTRUCTIONS = 100_000  # of SQLite's machine between two looks at the clock

AGAIN = "export it again with: nsys export --type sqlite"


class Export:
    """The tables of one export, by name; made by `opened`."""

    def __init__(self, path: Path, database: sqlite3.Connection) -> None:
        self.path = path
        self.rows = 0  # read so far
        self._database = database
        self._columns: dict[str, frozenset[str]] = {}
        found = database.execute(
            "SELECT name, sql FROM sqlite_master WHERE type = 'table' AND rootpage > 0"
        )
        self.tables = frozenset(
            _text(name) for name, sql in found if _text(sql).upper().startswith("CREATE TABLE")
        )

    def columns(self, table: str) -> frozenset[str]:
        """The stored columns of `table`; generated ones are not among them."""
        if table not in self._columns:
            found = self._database.execute(f'PRAGMA table_info("{table}")')
            self._columns[table] = frozenset(_text(row[1]) for row in found)
        return self._columns[table]

    def read(
        self, table: str, needed: Sequence[str], wanted: Sequence[str] = ()
    ) -> dict[str, Ints]:
        """Integer columns of `table`, by name.

        A value that is no integer, and a `wanted` column that this version lacks, is NONE.
        Raises TraceError for a table without a `needed` column.
        """
        parts = [ints for ints, _ in self.chunks(table, needed, wanted)]
        names = (*needed, *wanted)
        if not parts:
            return {name: np.empty(0, np.int64) for name in names}
        return {name: np.concatenate([part.pop(name) for part in parts]) for name in names}

    def chunks(
        self,
        table: str,
        needed: Sequence[str],
        wanted: Sequence[str] = (),
        text: str | None = None,
    ) -> Iterator[tuple[dict[str, Ints], Sequence[bytes | None]]]:
        """What `read` gives, some rows at a time, and beside it the text column `text`.

        Texts are as they are stored, cut to MAX_NAME characters; None for no text, and for
        a column that this version lacks.
        """
        there = self.columns(table)
        if missing := [name for name in needed if name not in there]:
            raise TraceError(
                f"{self.path}: its table {table} has no {' and no '.join(missing)}, so it cannot "
                f"be read; {AGAIN} of a newer version"
            )
        ints = [name for name in (*needed, *wanted) if name in there]
        selected = [f'"{name}"' for name in ints]
        if text in there:
            selected.append(f'substr("{text}", 1, {MAX_NAME})')
        # An index is data of the file too, and may say other than its table.
        cursor = self._database.execute(
            f'SELECT {", ".join(selected) or "NULL"} FROM "{table}" NOT INDEXED'
        )
        while rows := cursor.fetchmany(CHUNK):
            self.rows += len(rows)
            if self.rows > MAX_ROWS:
                raise TraceError(
                    f"{self.path} holds more than {MAX_ROWS:,} rows of events; profile fewer steps"
                )
            values = list(zip(*rows, strict=True))
            nothing = np.full(len(rows), NONE, np.int64)
            found = {name: nothing for name in wanted if name not in there}
            found |= {name: _ints(values[i]) for i, name in enumerate(ints)}
            if text in there:
                texts = [v if v is None or isinstance(v, bytes) else None for v in values[-1]]
            else:
                texts = [None] * len(rows)
            yield found, texts

    def strings(self, ids: Ints) -> dict[int, str]:
        """The texts of these ids in StringIds; ids that are not there are left out."""
        wanted = set(distinct(ids)[0].tolist()) - {NONE}
        found: dict[int, str] = {}
        if not wanted:
            return found
        if "StringIds" not in self.tables:
            raise TraceError(f"{self.path} has lost its table StringIds, all names; {AGAIN}")
        for ints, texts in self.chunks("StringIds", ["id"], text="value"):
            for identity, value in zip(ints["id"].tolist(), texts, strict=True):
                if identity in wanted and value is not None:
                    found.setdefault(identity, _text(value))
        return found


@contextmanager
def opened(path: Path) -> Iterator[Export]:
    """The export at `path`.

    Raises TraceError, in one line, when it cannot be opened, is empty, no database,
    damaged, or takes more time, rows or space than the limits of this module allow; also
    for what goes wrong while it is being read.
    """
    _check(path)
    deadline = time.monotonic() + MAX_SECONDS
    database = None
    try:
        database = sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None
        )
        _restrict(database, deadline)
        yield Export(path, database)
    except (sqlite3.Error, UnicodeDecodeError) as error:  # the latter from SQLite's own message
        raise TraceError(_complaint(path, error, deadline)) from error
    finally:
        if database is not None:
            database.close()


def _check(path: Path) -> None:
    try:
        if not path.is_file():
            raise TraceError(f"{path} is no file; name an export of nsys, a .sqlite")
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
        beside = [path.with_name(path.name + end) for end in ("-wal", "-journal")]
        unfinished = [other for other in beside if other.is_file() and other.stat().st_size]
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error
    if not start:
        raise TraceError(f"{path} is empty; {AGAIN}")
    if start != MAGIC:
        raise TraceError(f"{path} is no SQLite database; {AGAIN}")
    if unfinished:
        raise TraceError(
            f"{path} is not finished: {unfinished[0].name} beside it holds a part of it; close "
            "the program that writes it, or export it again"
        )


def _restrict(database: sqlite3.Connection, deadline: float) -> None:
    """Let the file do nothing but be read, for a limited time."""
    database.text_factory = bytes
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_VALUE)
    database.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, MAX_SQL)
    database.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    database.setlimit(sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH, 1)
    database.set_progress_handler(lambda: int(time.monotonic() > deadline), INSTRUCTIONS)
    # Mapped memory would kill the process where the file is cut off meanwhile.
    for setting in (
        "trusted_schema=OFF",
        "query_only=ON",
        "cell_size_check=ON",
        "mmap_size=0",
        "temp_store=MEMORY",
    ):
        database.execute(f"PRAGMA {setting}")


def _complaint(path: Path, error: Exception, deadline: float) -> str:
    if time.monotonic() > deadline:
        return f"{path} takes more than {MAX_SECONDS} s to read; profile fewer steps"
    if isinstance(error, sqlite3.DataError):
        return f"{path} holds a value of more than {MAX_VALUE >> 20} MiB; that is no trace"
    return f"{path} is damaged or cut off ({str(error)[:120]}); {AGAIN}"


def _ints(values: Sequence[Any]) -> Ints:
    try:
        return np.frombuffer(array("q", values), np.int64)  # takes integers only
    except TypeError:
        whole = [value if type(value) is int else NONE for value in values]
        return np.array(whole, dtype=np.int64)


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
