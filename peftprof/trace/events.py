"""A trace as columns: one numpy array a field, one row an event; no object per event.

Times are integer nanoseconds since the trace's own zero. Rows are ordered by thread, then
start, then longest first, so that an event stands after everything that encloses it.
"""

from dataclasses import dataclass, replace
from enum import IntEnum

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
class Thread:
    """A CPU thread (`device` is NONE) or a stream of device number `device`."""

    name: str
    device: int


@dataclass(frozen=True)
class Operands:
    """What an operator was called with: JSON text of the trace, not yet parsed.

    `dims` such as `[[8, 768], [768, 768]]`, `types` such as `["float", "float"]`, `concrete`
    the values of scalars where they are needed, else empty.
    """

    dims: str
    types: str
    concrete: str = ""


@dataclass(frozen=True)
class MemoryLog:
    """Allocations and frees as the profiler heard them, in order of time; a row each.

    `bytes` is negative for a free. `allocated` and `reserved` are the allocator's totals
    after it, on device kind `kind` (c10's DeviceType: 0 CPU, 1 CUDA) number `index`.
    `thread` numbers the threads of `Events`.
    """

    time: Ints
    thread: Ints
    address: Ints
    bytes: Ints
    allocated: Ints
    reserved: Ints
    kind: Ints
    index: Ints


@dataclass(frozen=True)
class Events:
    """The events of one process in one trace.

    `names[name[i]]` is event i's name; `thread[i]` numbers `threads`, CPU threads and device
    streams alike. `launch` is the CPU event that launched a device event, `forward` the
    operator whose gradient a backward operator computes: row numbers, or NONE. `operands`
    numbers `signatures`, or is NONE where an operator's shapes were not recorded. `bytes`
    is what a copy or fill moved, or NONE.

    `device` is the device's name, or `cpu`; `process` tells several processes of one file
    apart and is empty where there is one; `rank` is the trace's own word for it; `timeless`
    events were left out because they say no time.
    """

    names: tuple[str, ...]
    kind: Ints
    name: Ints
    start: Ints
    end: Ints
    thread: Ints
    launch: Ints
    forward: Ints
    operands: Ints
    bytes: Ints
    threads: tuple[Thread, ...]
    signatures: tuple[Operands, ...]
    device: str
    process: str = ""
    rank: int | None = None
    memory: MemoryLog | None = None
    timeless: int = 0

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

    def take(self, rows: Ints) -> "Events":
        """The events in `rows`, ascending; links to others are cut."""
        place = np.full(len(self) + 1, NONE, np.int64)  # the last entry is NONE's own
        place[rows] = np.arange(len(rows))
        columns = {
            name: getattr(self, name)[rows]
            for name in ("kind", "name", "start", "end", "thread", "operands", "bytes")
        }
        links = {name: place[getattr(self, name)[rows]] for name in ("launch", "forward")}
        return replace(self, **columns, **links)


def nesting_order(thread: Ints, start: Ints, end: Ints, kind: Ints) -> Ints:
    """The row order of `Events`."""
    key = one_key(thread, start)
    order = np.argsort(key, kind="stable")
    # Few events start together on one thread: only those are sorted by the rest.
    same = key[order][1:] == key[order][:-1]
    tied = np.flatnonzero(np.append(same, False) | np.append(False, same))
    rows = order[tied]
    order[tied] = rows[np.lexsort((kind[rows], -end[rows], key[rows]))]
    return order


def rows_of(values: Ints) -> list[tuple[int, Ints]]:
    """Each distinct value, in order, and the rows that have it."""
    order = np.argsort(values, kind="stable")
    found, first = np.unique(values[order], return_index=True)
    return list(zip(found.tolist(), np.split(order, first[1:]), strict=True)) if len(found) else []


def one_key(thread: Ints, time: Ints) -> Ints:
    """Thread and time as one number, which is ordered and equal as they are together."""
    if not len(time):
        return np.zeros(0, np.int64)
    low, high = int(time.min()), int(time.max())
    # Times too far apart for one number are as good by rank.
    if (int(thread.max()) + 2) * (high - low + 1) >= 1 << 62:
        time = np.unique(time, return_inverse=True)[1].reshape(-1).astype(np.int64)
        low, high = 0, len(time)
    return thread * (high - low + 1) + (time - low)


def distinct(values: Ints) -> tuple[Ints, Ints]:
    """The distinct values in order, and each value's number among them."""
    if not len(values):
        return values, values
    low, high = int(values.min()), int(values.max())
    if high - low > 4 * len(values) + 1000:
        found, which = np.unique(values, return_inverse=True)
        return found, which.reshape(-1)
    # Ids are small and dense: a table of what is there spares the sorting.
    there = np.zeros(high - low + 1, np.bool_)
    there[values - low] = True
    return np.flatnonzero(there) + low, (np.cumsum(there) - 1)[values - low]
