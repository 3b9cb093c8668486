"""A trace as columns: one numpy array a field, one row an event; no object per event.

Times are integer nanoseconds since the trace's own zero. Rows are ordered by thread, then
start, then longest first, so that an event stands after everything that encloses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

NONE = -1  # no such event, no such id


class Kind(IntEnum):
    """What an event is. The order is the order of nesting of events with equal times."""

    RANGE = 0
    OPERATOR = 1
    LAUNCH = 2
    KERNEL = 3
    MEMCPY = 4
    MEMSET = 5


@dataclass(frozen=True)
class Events:
    """The events of one trace.

    `names[name[i]]` is event i's name; `thread` numbers CPU threads and device streams
    alike. `launch` is the CPU event that launched a device event, `forward` the operator
    whose gradient a backward operator computes: row numbers, or NONE.
    """

    names: tuple[str, ...]
    kind: Ints
    name: Ints
    start: Ints
    end: Ints
    thread: Ints
    launch: Ints
    forward: Ints
    device: str

    def __len__(self) -> int:
        """Number of events."""
        return len(self.kind)

    @property
    def on_device(self) -> Bools:
        """Which events ran on an accelerator rather than on the CPU."""
        return self.kind >= Kind.KERNEL

    def named(self, row: int) -> str:
        """The name of event `row`."""
        return self.names[int(self.name[row])]


def nesting_order(thread: Ints, start: Ints, end: Ints, kind: Ints) -> Ints:
    """The row order of `Events`."""
    return np.lexsort((kind, -end, start, thread)).astype(np.int64)


def number(values: Sequence[Any]) -> tuple[tuple[Any, ...], Ints]:
    """The distinct values in order of appearance, and each value's number among them."""
    numbers: dict[Any, int] = {}
    column = np.fromiter(
        (numbers.setdefault(value, len(numbers)) for value in values), np.int64, len(values)
    )
    return tuple(numbers), column
