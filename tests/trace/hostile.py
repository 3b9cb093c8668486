"""What hostile traces are made of; bombs.py and crowds.py make them."""

import json
from collections.abc import Callable, Iterable
from typing import Any

from tests.trace.damage import Damaged

Event = dict[str, Any]
Make = Callable[[], bytes]


class Makers(dict[str, Make]):
    """Makers of traces by their names, which say what the traces are; a decorator."""

    def __call__(self, make: Make) -> Make:
        self[make.__name__] = make
        return make

    def made(self, what: str) -> Damaged:
        """The trace of this name, as a file."""
        data = self[what]()
        packed = data.startswith(b"\x1f\x8b")
        ending = "sqlite" if data.startswith(b"SQLite") else "json.gz" if packed else "json"
        return Damaged(what, {f"trace.{ending}": data})


def event(
    name: str, start: float, length: float, cat: str = "cpu_op", tid: Any = 1, **args: Any
) -> Event:
    pid = 0 if cat == "kernel" else 1
    entry = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid}
    entry |= {"ts": start, "dur": length}
    return entry | {"args": args} if args else entry


def trace(events: Iterable[Event], **more: Any) -> bytes:
    return json.dumps({**more, "traceEvents": list(events)}).encode()


MM = event("aten::mm", 0, 10)
ONE = json.dumps(MM).encode()
OPEN = b'{"traceEvents": ['
MIB = 1 << 20
