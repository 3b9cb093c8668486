"""One wrong statement in the database of an export of nsys."""

import random
import sqlite3

VALUES = (
    None, -1, 0, 1, (1 << 62) - 1, (1 << 63) - 1, -(1 << 63), 1.5, 1e300, "soon", "", b"\xff\0",
    "7", "\x1b[31m\n", "x" * 5000, "<script>evil()</script>", "aten::mm, seq = 5, sizes = [[1", 59,
    60,
)  # fmt: skip


def change(rng: random.Random, database: sqlite3.Connection) -> str:
    """Do one thing to the database; the statement, whether or not it could be done."""
    tables = [
        row[0] for row in database.execute("SELECT name FROM sqlite_master WHERE type='table'")
    ]
    table = rng.choice(tables or ["none"])
    columns = [row[1] for row in database.execute(f'PRAGMA table_info("{table}")')] or ["none"]
    column, value = rng.choice(columns), rng.choice(VALUES)
    where = rng.choice(["", "", "WHERE rowid % 3 = 1", "WHERE rowid = 1"])
    statement, values = rng.choice(
        [
            (f'DROP TABLE "{table}"', []),
            (f'DELETE FROM "{table}" {where}', []),
            (f'ALTER TABLE "{table}" DROP COLUMN "{column}"', []),
            (f'ALTER TABLE "{table}" RENAME COLUMN "{column}" TO other', []),
            (f'ALTER TABLE "{table}" RENAME TO "{rng.choice([*tables, "other"])}_"', []),
            *[(f'UPDATE OR IGNORE "{table}" SET "{column}" = ? {where}', [value])] * 6,
            (f'UPDATE OR IGNORE "{table}" SET "{column}" = "{rng.choice(columns)}"', []),
            (f'UPDATE OR IGNORE "{table}" SET "{column}" = rowid % 5 + 1', []),
            (f'CREATE TABLE made AS SELECT * FROM "{table}"', []),
            (f'CREATE VIEW "{table}_view" AS SELECT * FROM "{table}"', []),
        ]
    )
    try:
        with database:
            database.execute(statement, values)
    except sqlite3.Error as error:  # such as a column that must not be empty
        return f"{statement} ({error})"
    return statement
