"""Who launched a device event, and whose gradient a backward operator computes.

Both are answered from ids in the trace, never from the time at which something ran.
"""

from dataclasses import dataclass

import numpy as np

from peftprof.trace.events import NONE, Bools, Ints, Kind, one_key


@dataclass(frozen=True)
class Ids:
    """The ids an event carries, one column each; NONE where it has none."""

    correlation: Ints
    external: Ints
    sequence: Ints
    forward_thread: Ints


@dataclass(frozen=True)
class Flows:
    """The two ends of the trace's arrows; `out` marks the end an arrow leaves from."""

    identity: Ints
    out: Bools
    thread: Ints
    time: Ints


def launches(kind: Ints, thread: Ints, start: Ints, ids: Ids, flows: Flows) -> Ints:
    """For each device event the CPU event that launched it, else NONE.

    By correlation id; where the trace has none, by the arrow that leads to the event; where
    the launch itself was not recorded, by the operator with the same external id.
    """
    found = np.full(len(kind), NONE, np.int64)
    device = np.flatnonzero(kind >= Kind.KERNEL)
    calls = np.flatnonzero(kind == Kind.LAUNCH)
    found[device] = _lookup(ids.correlation[device], ids.correlation[calls], calls)
    pairs = _arrows(thread, start, flows, from_rows=calls, to_rows=device)
    _fill(found, *pairs)
    left = device[found[device] == NONE]
    operators = np.flatnonzero(kind <= Kind.OPERATOR)
    found[left] = _lookup(ids.external[left], ids.external[operators], operators)
    return found


def forwards(kind: Ints, thread: Ints, start: Ints, ids: Ids, flows: Flows) -> Ints:
    """For each backward operator the forward operator that made its graph node, else NONE.

    By the trace's own arrows; without them by sequence number. An operator carries the
    number that the next node will get, so several carry the same one: the node is made by
    the last of them.
    """
    found = np.full(len(kind), NONE, np.int64)
    operators = np.flatnonzero(kind == Kind.OPERATOR)
    _fill(found, *_arrows(thread, start, flows, from_rows=operators, to_rows=operators))
    numbered = operators[ids.sequence[operators] >= 0]
    backward = numbered[ids.forward_thread[numbered] > 0]
    forward = numbered[ids.forward_thread[numbered] <= 0]
    forward = forward[np.argsort(start[forward], kind="stable")[::-1]]  # latest first
    left = backward[found[backward] == NONE]
    match = _lookup(ids.sequence[left], ids.sequence[forward], forward)
    late = (match != NONE) & (start[match] >= start[left])
    found[left] = np.where(late, NONE, match)
    return found


def _lookup(wanted: Ints, keys: Ints, rows: Ints) -> Ints:
    """For each wanted key the first row that has it; NONE for no such row or no key."""
    unique, first = np.unique(keys, return_index=True)
    if not len(unique):
        return np.full(len(wanted), NONE, np.int64)
    at = np.minimum(np.searchsorted(unique, wanted), len(unique) - 1)
    hit = (unique[at] == wanted) & (wanted != NONE)
    return np.where(hit, rows[first[at]], NONE)


def _arrows(
    thread: Ints, start: Ints, flows: Flows, from_rows: Ints, to_rows: Ints
) -> tuple[Ints, Ints]:
    """Rows at the two ends of each arrow: an end touches the event that starts there."""
    leaving = _touched(thread, start, from_rows, flows, flows.out)
    arriving = _touched(thread, start, to_rows, flows, ~flows.out)
    source = _lookup(flows.identity[~flows.out], flows.identity[flows.out], leaving)
    both = (arriving != NONE) & (source != NONE)
    return arriving[both], source[both]


def _touched(thread: Ints, start: Ints, rows: Ints, flows: Flows, which: Bools) -> Ints:
    """The row that starts on the thread and at the time of each end, else NONE."""
    if not len(rows) or not which.any():
        return np.full(int(which.sum()), NONE, np.int64)
    key = one_key(
        np.append(thread[rows], flows.thread[which]), np.append(start[rows], flows.time[which])
    )
    events, ends = key[: len(rows)], key[len(rows) :]
    # The innermost of several events that start together comes last in row order.
    at = np.maximum(np.searchsorted(events, ends, side="right") - 1, 0)
    return np.where(events[at] == ends, rows[at], NONE)


def _fill(found: Ints, rows: Ints, values: Ints) -> None:
    free = found[rows] == NONE
    found[rows[free]] = values[free]
