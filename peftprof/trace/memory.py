"""Where the memory of a step went at its peak, from a trace recorded with `profile_memory`.

docs/memory.md tells in words how each part is told apart.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np

from peftprof.breakdowns import CATEGORIES, MEMORY_PARTS, PHASES, MemoryPart, MemoryPeak
from peftprof.errors import TraceError
from peftprof.records import RunRecord
from peftprof.trace import rules, steps
from peftprof.trace.attribute import describe
from peftprof.trace.events import NONE, Bools, Events, Ints, MemoryLog, one_key
from peftprof.trace.nesting import Segments
from peftprof.trace.rules import Rules
from peftprof.trace.steps import Steps

FORWARD, BACKWARD, OPTIMIZER, NO_PHASE = map(
    PHASES.index, ("forward", "backward", "optimizer", "other")
)
DEQUANT = CATEGORIES.index("dequant")
GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, WORKSPACE, OTHER = map(
    MEMORY_PARTS.index,
    ("gradients", "optimizer_state", "activations", "dequant_workspace", "other"),
)

CPU = 0  # of c10's DeviceType, as the trace numbers kinds of device
KINDS = {1: "cuda", 6: "hip", 12: "xpu", 13: "mps", 15: "hpu", 19: "mtia", 20: "privateuse1"}
NEVER = np.iinfo(np.int64).max  # when a block is freed that outlives the trace
MAX_BYTES = 1 << 60


@dataclass(frozen=True)
class _Blocks:
    """Blocks of memory, a row each; first those held before the trace.

    A block is there in the states `begin` <= s < `end`; state s is that after s rows of the
    log, so 0 is before the trace. `part` is what the inventory says, else NONE for a block
    allocated in the trace, and OTHER for one of before it.
    """

    begin: Ints
    end: Ints
    bytes: Ints
    part: Ints

    def held(self, states: int) -> Ints:
        """Bytes of all blocks in each state."""
        change = np.zeros(states + 1, np.int64)
        np.add.at(change, self.begin, self.bytes)
        np.subtract.at(change, self.end, self.bytes)
        return np.cumsum(change)[:states]

    def __getitem__(self, chosen: Bools) -> "_Blocks":
        return _Blocks(*(getattr(self, f.name)[chosen] for f in fields(self)))


@dataclass(frozen=True)
class _Moments:
    """Of each row of a log: when it was, and what it was done for. Of the trace: when what began.

    `row` is the innermost event round it, or NONE. `backward` and `optimizer` are the times at
    which events of these phases begin, in order; `backward_end` is when the last of them ends.
    """

    time: Ints
    row: Ints
    phase: Ints
    category: Ints
    layer: Ints
    backward: Ints
    optimizer: Ints
    backward_end: int
    has_forward: bool


def peak(
    events: Events, record: RunRecord | None = None, ruleset: Rules | None = None
) -> MemoryPeak | None:
    """The peak of memory within the steps of `events`, split; None where it logs no allocation.

    `record` is of the run whose memory step `events` is: its inventory says whose the memory
    is that was held before. Of several devices the accelerator that logged most is read.
    Raises TraceError for sizes or an inventory that cannot be.
    """
    if events.memory is None or not len(events.memory.bytes):
        return None
    log = _one_device(events.memory)
    kind = int(log.kind[0])
    inventory = list(_inventory(record, kind)) if record else []
    _check(log, inventory)
    ruleset = ruleset or rules.load()
    found = next(steps.candidates(events, ruleset))
    moments = _moments(events, log, found, ruleset)
    blocks = _walk(log, inventory)
    part = _parts(blocks, moments, found)

    counted = blocks.held(len(log.bytes) + 1)
    total = _totals(log)
    inside = _inside(log, found)
    at = int(np.argmax(np.where(inside, counted if total is None else total, -1)))
    live = (blocks.begin <= at) & (at < blocks.end)
    sums, numbers = np.zeros((2, len(MEMORY_PARTS)), np.int64)
    np.add.at(sums, part[live], blocks.bytes[live])
    np.add.at(numbers, part[live], 1)
    unnamed = 0 if total is None else int(total[at] - counted[at])
    sums[OTHER] += max(unnamed, 0)

    workspace = blocks[part == WORKSPACE].held(len(log.bytes) + 1)[inside].max()
    notes = [
        *_about_total(total, unnamed, bool(inventory)),
        *_about_other(blocks[live & (part == OTHER)], moments, unnamed),
        *_about_trace(events.memory, log, found, moments),
    ]
    if workspace > sums[WORKSPACE]:
        notes.append(
            f"The dequantise workspace was largest at another moment: {workspace:,} bytes."
        )
    phase, layer = _where(events, moments, found, at)
    allocated, reserved, process = _timed(record, kind)
    return MemoryPeak(
        source="profile_memory",
        device=_name(kind, int(log.index[0])),
        peak_bytes=int(sums.sum()),
        parts=tuple(
            MemoryPart(name, int(size), int(number))
            for name, size, number in zip(MEMORY_PARTS, sums, numbers, strict=True)
        ),
        phase=phase,
        layer=layer,
        allocated_bytes=allocated,
        reserved_bytes=reserved,
        process_bytes=process,
        notes=tuple(notes),
    )


def _one_device(log: MemoryLog) -> MemoryLog:
    """The rows of the accelerator that has most of them, else those of the CPU."""
    accelerator = np.flatnonzero(log.kind > CPU)
    if not len(accelerator):
        return log
    pairs = np.stack([log.kind[accelerator], log.index[accelerator]], axis=1)
    devices, count = np.unique(pairs, axis=0, return_counts=True)
    kind, index = devices[np.argmax(count)]
    chosen = (log.kind == kind) & (log.index == index)
    return MemoryLog(*(getattr(log, f.name)[chosen] for f in fields(log)))


def _name(kind: int, index: int) -> str:
    return "cpu" if kind <= CPU else f"{KINDS.get(kind, f'device kind {kind}')}:{max(index, 0)}"


def _inventory(record: RunRecord, kind: int) -> Iterator[tuple[int, int, int]]:
    """Address, bytes and part of every storage that the run held when the step began."""
    step = record.memory_step
    if step is None or (step.device == "cpu") != (kind <= CPU):
        return
    try:
        for held in step.inventory:
            part = MEMORY_PARTS.index(held.part)
            yield from ((int(at, 16), size, part) for at, size in held.storages.items())
    except ValueError as error:
        raise TraceError(
            f"the memory inventory in run.json is damaged ({str(error)[:80]}); run it again"
        ) from error


def _check(log: MemoryLog, inventory: list[tuple[int, int, int]]) -> None:
    """Refuse sizes that no machine has: their sums would not fit, and mean nothing."""
    sizes = [size for _, size, _ in inventory]
    if min(sizes, default=0) < 0 or sum(sizes) > MAX_BYTES:
        raise TraceError("the memory inventory in run.json has sizes that cannot be; run it again")
    if np.abs(log.bytes.astype(np.float64)).sum() > MAX_BYTES:
        raise TraceError("the trace allocates more memory than there can be; record it again")


def _timed(record: RunRecord | None, kind: int) -> tuple[int | None, ...]:
    """Allocated, reserved and process bytes of the run's timed pass, as far as they are known."""
    memory = record.memory if record else None
    if memory is None:
        return None, None, None
    process = memory.rss_bytes if kind <= CPU else memory.nvml_bytes
    sizes = memory.allocated_bytes, memory.reserved_bytes, process
    if not all(size is None or 0 <= size <= MAX_BYTES for size in sizes):
        raise TraceError("the memory figures in run.json cannot be; run it again")
    return sizes


def _totals(log: MemoryLog) -> Ints | None:
    """The allocator's total in each state; None where it keeps none.

    A CPU's total counts from the first time that memory was profiled in the process, and
    misses what was freed while it was not, so it is no total of anything.
    """
    known = (log.allocated >= 0).all() and log.allocated.any()
    if int(log.kind[0]) <= CPU or not known:
        return None
    return np.append(max(int(log.allocated[0] - log.bytes[0]), 0), log.allocated)


def _walk(log: MemoryLog, inventory: list[tuple[int, int, int]]) -> _Blocks:
    """Every block, from its allocation to its free."""
    forever = len(log.bytes) + 1
    begin, end = [0] * len(inventory), [forever] * len(inventory)
    size, part = [s for _, s, _ in inventory], [p for _, _, p in inventory]
    at: dict[int, int] = {address: i for i, (address, _, _) in enumerate(inventory)}
    rows = zip(log.address.tolist(), log.bytes.tolist(), strict=True)
    for state, (address, change) in enumerate(rows, 1):
        if address == NONE or not change:
            continue
        block = at.get(address)
        if block is not None and block != NONE:
            # Also when it is allocated anew: then its free was not heard.
            end[block] = state
        at[address] = NONE
        if change > 0:
            at[address] = len(begin)
            begin.append(state)
            end.append(forever)
            size.append(change)
            part.append(NONE)
        elif block is None:  # what is freed and was never allocated was there before
            begin.append(0)
            end.append(state)
            size.append(-change)
            part.append(OTHER)
    return _Blocks(*(np.array(column, np.int64) for column in (begin, end, size, part)))


def _parts(blocks: _Blocks, moments: _Moments, found: Steps) -> Ints:
    """The part of each block: by the inventory, else by when it came and how long it stayed."""
    part = blocks.part.copy()
    new = np.flatnonzero(part == NONE)
    begin = blocks.begin[new] - 1  # the row that allocated it
    time, phase = moments.time[begin], moments.phase[begin]
    freed = np.append(moments.time, NEVER)[blocks.end[new] - 1]

    forward = phase == (FORWARD if moments.has_forward else NO_PHASE)
    step = found.windows.holding(time)
    step_end = np.where(step != NONE, found.windows.end[step], NEVER - 1)
    next_backward = _next(moments.backward, time, NEVER)
    next_optimizer = _next(moments.optimizer, time, moments.backward_end)
    part[new] = np.select(
        [
            moments.category[begin] == DEQUANT,
            forward & (freed > next_backward),
            (phase == BACKWARD) & (freed > next_optimizer),
            (phase == OPTIMIZER) & (freed > step_end),
        ],
        [WORKSPACE, ACTIVATIONS, GRADIENTS, OPTIMIZER_STATE],
        OTHER,
    )
    return part


def _next(times: Ints, after: Ints, missing: int) -> Ints:
    """For each of `after` the first of `times` that is later, else `missing`."""
    return np.append(times, missing)[np.searchsorted(times, after, side="right")]


def _moments(events: Events, log: MemoryLog, found: Steps, ruleset: Rules) -> _Moments:
    described = describe(events, ruleset)
    meaning, segments = described.meaning, described.tree.innermost
    row = _innermost(segments, events.thread, log.thread, log.time)
    phase = np.where(row != NONE, meaning.phase[row], NONE)
    # Between the events of its thread: what the stepping thread is about.
    stepping = np.full(len(log.time), found.thread, np.int64)
    around = _innermost(segments, events.thread, stepping, log.time)
    phase = np.where(phase != NONE, phase, np.where(around != NONE, meaning.phase[around], NONE))

    cpu = ~events.on_device
    backward = cpu & (meaning.phase == BACKWARD)
    return _Moments(
        time=log.time,
        row=row,
        phase=np.where(phase != NONE, phase, NO_PHASE),
        category=np.where(row != NONE, meaning.category[row], NONE),
        layer=np.where(row != NONE, meaning.layer[row], NONE),
        backward=np.sort(events.start[backward]),
        optimizer=np.sort(events.start[cpu & (meaning.phase == OPTIMIZER)]),
        backward_end=int(events.end[backward].max(initial=0)),
        has_forward=bool((meaning.phase[cpu] == FORWARD).any()),
    )


def _innermost(segments: Segments, thread_of: Ints, thread: Ints, time: Ints) -> Ints:
    """The event innermost on `thread` at `time`, row by row, or NONE."""
    if not len(segments):
        return np.full(len(time), NONE, np.int64)
    of_segment = thread_of[segments.row]
    key = one_key(np.append(of_segment, thread), np.append(segments.start, time))
    begins, wanted = key[: len(segments)], key[len(segments) :]
    order = np.argsort(begins, kind="stable")
    at = order[np.maximum(np.searchsorted(begins[order], wanted, side="right") - 1, 0)]
    hit = (of_segment[at] == thread) & (segments.start[at] <= time) & (time < segments.end[at])
    return np.where(hit, segments.row[at], NONE)


def _inside(log: MemoryLog, found: Steps) -> Bools:
    """Which states are of a step: that at its start, and after each row in it."""
    if found.by == steps.WHOLE:
        return np.ones(len(log.time) + 1, np.bool_)
    first = np.searchsorted(log.time, found.windows.start, side="left")
    last = np.searchsorted(log.time, found.windows.end, side="left")
    change = np.zeros(len(log.time) + 2, np.int64)
    np.add.at(change, first, 1)
    np.subtract.at(change, last + 1, 1)
    inside: Bools = np.cumsum(change)[:-1] > 0
    return inside


def _where(events: Events, moments: _Moments, found: Steps, at: int) -> tuple[str, str]:
    """Phase and layer of the row that made the peak; empty where it is not known."""
    row = at - 1
    outside = found.by != steps.WHOLE and found.windows.holding(moments.time[[row]])[0] == NONE
    if not at or outside:  # nothing in a step was more than what it began with
        return "", ""
    phase, layer = int(moments.phase[row]), int(moments.layer[row])
    path = events.names[layer].removeprefix("layer:").removeprefix("nn.Module: ")
    return "" if phase == NO_PHASE else PHASES[phase], "" if layer == NONE else path


def _about_total(total: Ints | None, unnamed: int, has_inventory: bool) -> Iterator[str]:
    if total is None:
        before = "the run's own tensors and " if has_inventory else ""
        yield (
            f"The allocator keeps no total, so the peak counts {before}what the trace allocates; "
            "not data, libraries and Python, which the process holds too."
        )
    elif not has_inventory and total[0]:
        yield (
            f"{total[0]:,} bytes were held before the trace began, and nothing says whose they "
            "are: what was not freed by the peak is in other."
        )
    if unnamed < 0:
        yield (
            f"The allocator's total is {-unnamed:,} bytes less than the blocks that were not "
            "freed; the peak is the sum of these."
        )


def _about_other(other: _Blocks, moments: _Moments, unnamed: int) -> Iterator[str]:
    """What the part `other` is made of, the most first."""
    sizes = np.zeros(len(PHASES), np.int64)
    new = other.begin > 0
    np.add.at(sizes, moments.phase[other.begin[new] - 1], other.bytes[new])
    labels = [f"allocated in {phase}" for phase in PHASES]
    labels[NO_PHASE] = "allocated outside every phase"
    found = [
        *zip(sizes.tolist(), labels, strict=True),
        (int(other.bytes[~new].sum()), "held before the trace"),
        (unnamed, "in no known tensor or block (rounding, libraries' workspaces)"),
    ]
    said = [f"{size:,} bytes {label}" for size, label in sorted(found, reverse=True) if size > 0]
    if said:
        yield f"Other is {', '.join(said)}."


def _about_trace(
    whole: MemoryLog, log: MemoryLog, found: Steps, moments: _Moments
) -> Iterator[str]:
    if found.by == steps.WHOLE:
        yield "The trace has no steps: this is the peak of all of it."
    if not moments.has_forward:
        yield (
            "The trace has no forward ranges: what was allocated before a backward and is there "
            "when it begins counts as activations."
        )
    others = len(np.unique((whole.kind * 4096 + whole.index)[whole.kind > CPU])) - 1
    if others > 0:
        yield f"{others} more devices allocated; the one that did so most often is shown."
