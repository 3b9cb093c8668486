"""Exports of nsys that are damaged, incomplete or hostile: events, or one line that says why."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.errors import TraceError
from peftprof.trace import nsys, nsys_tables
from peftprof.trace.events import NONE, Kind
from tests.trace.build import MAIN
from tests.trace.nsys_files import (
    KERNEL,
    NEW,
    RUNTIME,
    Nsys,
    global_pid,
    global_tid,
    one,
    rows,
    small,
)


def complaint(path: Path) -> str:
    """The one line that reading `path` ends in."""
    with pytest.raises(TraceError) as caught:
        nsys.read(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


def test_no_file_no_database_no_export(tmp_path: Path) -> None:
    assert "no file" in complaint(tmp_path / "missing.sqlite")
    assert "no file" in complaint(tmp_path)
    empty = tmp_path / "empty.sqlite"
    empty.touch()
    assert "is empty" in complaint(empty)
    text = tmp_path / "text.sqlite"
    text.write_text('{"traceEvents": []}' * 10)
    assert "no SQLite database" in complaint(text)
    other = tmp_path / "other.sqlite"
    with closing(sqlite3.connect(other)) as database, database:
        database.execute("CREATE TABLE people (name TEXT)")
    assert "is a database but no Nsight Systems export" in complaint(other)


def test_an_export_without_device_work_or_ranges(tmp_path: Path) -> None:
    assert "nsys profile -t cuda,nvtx" in complaint(Nsys().write(tmp_path))
    bare = tmp_path / "bare.sqlite"
    with closing(sqlite3.connect(bare)) as database, database:
        database.execute("CREATE TABLE StringIds (id INTEGER, value TEXT)")
    assert "no kernels" in complaint(bare)


@pytest.mark.parametrize("table", sorted(set(NEW) - {"StringIds", KERNEL, RUNTIME}))
def test_any_other_table_may_be_missing(tmp_path: Path, table: str) -> None:
    file = small({name: columns for name, columns in NEW.items() if name != table})
    assert [name for name, *_ in rows(one(file.write(tmp_path)), Kind.KERNEL)] == ["gemm"]


def test_tables_that_are_missed(tmp_path: Path) -> None:
    without = {name: columns for name, columns in NEW.items() if name != "StringIds"}
    assert "StringIds" in complaint(small(without).write(tmp_path, "a.sqlite"))
    without = {name: columns for name, columns in NEW.items() if name != RUNTIME}
    events = one(small(without).write(tmp_path, "b.sqlite"))
    assert (events.launch == NONE).all()


def dropped(file: Nsys, folder: Path, table: str, column: str) -> Path:
    path = file.write(folder)
    with closing(sqlite3.connect(path)) as database, database:
        database.execute(f'ALTER TABLE {table} DROP COLUMN "{column}"')
    return path


@pytest.mark.parametrize(
    ("table", "column"),
    [
        (KERNEL, "start"), (KERNEL, "end"), (KERNEL, "streamId"), (KERNEL, "correlationId"),
        (RUNTIME, "globalTid"), (RUNTIME, "nameId"), ("NVTX_EVENTS", "eventType"),
    ],
)  # fmt: skip
def test_a_needed_column_is_missing(tmp_path: Path, table: str, column: str) -> None:
    message = complaint(dropped(small(), tmp_path, table, column))
    assert f"{table} has no {column}" in message


@pytest.mark.parametrize(
    ("table", "column"),
    [
        (KERNEL, "greenContextId"), (KERNEL, "contextId"), (KERNEL, "deviceId"),
        (KERNEL, "globalPid"), (KERNEL, "demangledName"), (KERNEL, "shortName"),
        ("NVTX_EVENTS", "textId"), ("NVTX_EVENTS", "endGlobalTid"), ("NVTX_EVENTS", "domainId"),
        ("CUPTI_ACTIVITY_KIND_MEMCPY", "bytes"), ("CUPTI_ACTIVITY_KIND_MEMCPY", "copyKind"),
        ("TARGET_INFO_GPU", "cuDevice"),
    ],
)  # fmt: skip
def test_another_column_is_missing(tmp_path: Path, table: str, column: str) -> None:
    events = one(dropped(small(), tmp_path, table, column))
    assert len(events) == 5
    assert (events.launch[events.on_device] != NONE).all()
    assert events.device == "Test GPU"
    kernel = "short" if column == "demangledName" else "gemm"
    assert [name for name, *_ in rows(events, Kind.KERNEL)] == [kernel]


def test_rows_without_a_time_are_left_out(tmp_path: Path) -> None:
    schema = {name: columns.replace(" NOT NULL", "") for name, columns in NEW.items()}
    file = small(schema)
    name = file.string("odd")
    for start, end in (
        (None, 5), ("soon", 5), (-4, 5), (1.5, 5), (b"\0", 5),
        ((1 << 63) - 1, 5), (5, (1 << 63) - 1),
    ):  # fmt: skip
        file.work("KERNEL", start, end, 1, demangledName=name, shortName=name)
    for cut in (None, 3500, "later"):  # cut off while it ran: it began, and lasts no time
        file.work("KERNEL", 3600, cut, 1, demangledName=name, shortName=name)
    events = one(file.write(tmp_path))
    assert rows(events, Kind.KERNEL) == [("gemm", 2000, 3000), *[("odd", 2600, 2600)] * 3]


def test_a_table_in_which_nothing_has_a_time(tmp_path: Path) -> None:
    file = small()
    for row in file.rows[KERNEL]:
        row["start"] = "noon"
    assert f"no row of its table {KERNEL}" in complaint(file.write(tmp_path))


def test_ids_that_lead_nowhere(tmp_path: Path) -> None:
    file = small()
    file.rows[KERNEL][0] |= {"demangledName": 12345, "correlationId": 999}
    events = one(file.write(tmp_path))
    assert rows(events, Kind.KERNEL) == [("unknown name", 2000, 3000)]
    (kernel,) = np.flatnonzero(events.kind == Kind.KERNEL).tolist()
    assert events.launch[kernel] == NONE


def test_no_correlation_is_not_the_correlation_0(tmp_path: Path) -> None:
    file = Nsys()
    name = file.string("k")
    file.call("cudaFree_v3020", 1, 2, 0)
    file.work("KERNEL", 3, 4, 0, demangledName=name, shortName=name)
    assert (one(file.write(tmp_path)).launch == NONE).all()


@pytest.mark.parametrize("keep", [0.02, 0.3, 0.6, 0.95])
def test_a_file_cut_off(tmp_path: Path, keep: float) -> None:
    file = small()
    for n in range(2000):
        file.kernel(f"kernel_{n}", 10_000 + 10 * n, 10_005 + 10 * n, launched=9000)
    path = file.write(tmp_path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    assert "damaged" in complaint(path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return small().write(tmp_path_factory.mktemp("whole")).read_bytes()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(16, 90_000), st.integers(0, 255)), min_size=1, max_size=12))
def test_damage_ends_in_events_or_in_one_line(
    whole: bytes, tmp_path_factory: pytest.TempPathFactory, damage: list[tuple[int, int]]
) -> None:
    data = bytearray(whole)
    for at, byte in damage:
        data[at % len(data)] = byte
    path = tmp_path_factory.mktemp("damage") / "damaged.sqlite"
    path.write_bytes(nsys_tables.MAGIC + data[16:])
    try:
        found = nsys.read(path)
    except TraceError as error:
        found, said = [], str(error)
    else:
        said = ""
    assert bool(found) != bool(said)
    assert "\n" not in said
    for events in found:
        assert (events.start >= 0).all()
        assert (events.end >= events.start).all()


@pytest.fixture
def evil(tmp_path: Path) -> Iterator[tuple[Path, sqlite3.Connection]]:
    path = small().write(tmp_path, "evil ?#%41.sqlite")
    with closing(sqlite3.connect(path)) as database:
        yield path, database


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT "
COLUMNS = 'i AS start, i AS "end", 7 AS streamId, i AS correlationId, 1 AS demangledName FROM n'


def test_a_view_is_not_read(evil: tuple[Path, sqlite3.Connection]) -> None:
    path, database = evil
    with database:
        database.execute(f"DROP TABLE {KERNEL}")
        database.execute(f"CREATE VIEW {KERNEL} AS {ENDLESS} {COLUMNS}")
        database.execute("CREATE VIEW CUPTI_ACTIVITY_KIND_DRIVER AS SELECT * FROM StringIds")
    started = time.monotonic()
    events = one(path)
    assert time.monotonic() - started < 5
    assert not (events.kind == Kind.KERNEL).any()
    assert (events.kind == Kind.MEMCPY).sum() == 1


def test_a_virtual_table_is_not_read(evil: tuple[Path, sqlite3.Connection]) -> None:
    path, database = evil
    with database:
        database.execute("DROP TABLE NVTX_EVENTS")
        database.execute(
            'CREATE VIRTUAL TABLE NVTX_EVENTS USING fts5(start, "end", eventType, globalTid, text)'
        )
        values = (1, 2, 59, global_tid(MAIN), "virtual")
        database.execute("INSERT INTO NVTX_EVENTS VALUES (?, ?, ?, ?, ?)", values)
    assert not (one(path).kind == Kind.RANGE).any()


def test_triggers_generated_columns_and_indexes_do_nothing(
    evil: tuple[Path, sqlite3.Connection],
) -> None:
    path, database = evil
    with database:
        database.execute(
            f"CREATE TRIGGER t AFTER INSERT ON {KERNEL} BEGIN DELETE FROM StringIds; END"
        )
        database.execute(f'CREATE INDEX ahead ON {KERNEL} (start, "end", streamId)')
        database.execute("ALTER TABLE NVTX_EVENTS DROP COLUMN text")
        database.execute(
            "ALTER TABLE NVTX_EVENTS ADD COLUMN text TEXT AS (hex(zeroblob(20000000))) VIRTUAL"
        )
    assert rows(one(path), Kind.KERNEL) == [("gemm", 2000, 3000)]
    assert rows(one(path), Kind.RANGE) == [("", 0, 8000)]


def test_names_of_megabytes_and_of_no_encoding(evil: tuple[Path, sqlite3.Connection]) -> None:
    path, database = evil
    with database:
        database.execute("UPDATE StringIds SET value = ? WHERE value = 'gemm'", ["x" * 3_000_000])
        database.execute("UPDATE NVTX_EVENTS SET text = CAST(x'41ff42fe' AS TEXT)")
        database.execute("INSERT INTO PROCESSES VALUES (?, 1, x'ff00ff')", [global_pid()])
    events = one(path)
    ((name, *_),) = rows(events, Kind.KERNEL)
    assert name == "x" * nsys_tables.MAX_NAME
    assert rows(events, Kind.RANGE)[0][0] == "A\ufffdB\ufffd"


def test_a_value_past_all_measure(
    evil: tuple[Path, sqlite3.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, database = evil
    monkeypatch.setattr(nsys_tables, "MAX_VALUE", 1 << 20)
    with database:
        database.execute("UPDATE StringIds SET value = ?", ["x" * 3_000_000])
    assert "more than 1 MiB" in complaint(path)


def test_limits_of_rows_and_of_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = small().write(tmp_path)
    monkeypatch.setattr(nsys_tables, "MAX_ROWS", 3)
    assert "more than 3 rows" in complaint(path)
    monkeypatch.undo()
    monkeypatch.setattr(nsys_tables, "MAX_SECONDS", -1)
    monkeypatch.setattr(nsys_tables, "INSTRUCTIONS", 1)
    assert "takes more than" in complaint(path)


def test_too_many_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = Nsys()
    for pid in (1, 2, 3):
        file.pid = pid
        file.range("r", 1, 2)
    path = file.write(tmp_path)
    assert [events.process for events in nsys.read(path)] == ["pid 1", "pid 2", "pid 3"]
    monkeypatch.setattr(nsys, "MAX_PROCESSES", 2)
    assert "more than 2 processes" in complaint(path)


def test_a_file_in_wal_mode_is_read_and_nothing_is_made_beside_it(tmp_path: Path) -> None:
    path = small().write(tmp_path)
    with closing(sqlite3.connect(path)) as database:
        assert database.execute("PRAGMA journal_mode=WAL").fetchone() == ("wal",)
        database.execute("INSERT INTO PROCESSES VALUES (1, 1, 'x')")
        database.commit()
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    before = path.read_bytes(), path.stat().st_mtime_ns
    tmp_path.chmod(0o555)
    try:
        assert len(one(path)) == 5
    finally:
        tmp_path.chmod(0o755)
    assert [child.name for child in tmp_path.iterdir()] == [path.name]
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize("ending", ["-wal", "-journal"])
def test_a_file_that_is_not_finished(tmp_path: Path, ending: str) -> None:
    path = small().write(tmp_path)
    beside = tmp_path / (path.name + ending)
    beside.write_bytes(b"the rest")
    assert beside.name in complaint(path)
    assert beside.read_bytes() == b"the rest"
