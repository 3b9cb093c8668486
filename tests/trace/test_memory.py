"""Peaks of memory with known answers, and against a walk that is slow and obvious."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import MEMORY_PARTS
from peftprof.errors import TraceError
from peftprof.records import Held, Memory, MemoryStep
from peftprof.trace import kineto, memory
from peftprof.trace.events import MemoryLog
from tests.test_records import RECORD
from tests.trace.build import CPU, ENGINE, MAIN, Trace

STEP = 1000
# Of each step, from its beginning: the two dequantisations, then what ends where.
DEQUANT = [(MAIN, 150, 200), (ENGINE, 450, 500)]
BACKWARD, OPTIMIZER, END = 400, 700, 950
PHASES = {"data": (0, 100), "forward": (100, 400), "backward": (400, 700), "optimizer": (700, 950)}


def two_steps(ranges: bool = True) -> Trace:
    """Two steps of 950 ns and a pause; backward on the engine's thread, with gaps between."""
    trace = Trace()
    for number in range(2):
        zero = number * STEP
        trace.range(f"step:{number}" if ranges else f"ProfilerStep#{number}", zero, zero + END)
        if ranges:
            for name, (start, end) in PHASES.items():
                trace.range(f"phase:{name}", zero + start, zero + end)
            trace.range("layer:encoder.0", zero + 120, zero + 300)
            for tid, start, end in DEQUANT:
                trace.range("op:dequant", zero + start, zero + end, tid)
        else:
            trace.range("Optimizer.step#AdamW.step", zero + 700, zero + 950)
        trace.op("aten::linear", zero + 130, zero + 250, seq=number)
        trace.backward("AddmmBackward0", zero + 420, zero + 520, seq=number)
        trace.backward("AccumulateGrad", zero + 560, zero + 650, seq=number)
    return trace


def instant(trace: Trace, time: int, address: int, size: int, tid: int = MAIN, **more) -> None:
    """An allocation as Kineto writes it. `more` are its totals and device: see the defaults."""
    args = {"Addr": address, "Bytes": size, "Device Type": 0, "Device Id": -1}
    args |= {"Total Allocated": 0, "Total Reserved": 0} | more
    trace.events.append(
        {"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "pid": CPU}
        | {"tid": tid, "ts": time / 1000, "args": args}
    )


def gpu(total: int, index: int = 0, kind: int = 1) -> dict[str, int]:
    return {"Total Allocated": total, "Device Type": kind, "Device Id": index}


def read(trace: Trace, folder):
    return kineto.read(trace.write(folder))


def sizes(found) -> dict[str, int]:
    assert [part.part for part in found.parts] == [*MEMORY_PARTS]
    assert sum(part.bytes for part in found.parts) == found.peak_bytes
    return {part.part: part.bytes for part in found.parts if part.bytes}


def run(device: str, **held: dict[int, int]):
    """The record of a run whose memory step began with `held`: bytes by address, by part."""
    inventory = tuple(
        Held(part, {hex(address): size for address, size in blocks.items()})
        for part, blocks in held.items()
    )
    step = MemoryStep("memory.json.gz", 0, device, inventory)
    return dataclasses.replace(RECORD, memory_step=step)


def test_a_step_part_by_part(tmp_path):
    trace = two_steps()
    instant(trace, 50, 1, 3)  # the batch
    instant(trace, 140, 2, 10)  # saved for backward
    instant(trace, 145, 3, 20)  # forward alone
    instant(trace, 160, 4, 40)  # dequantised
    instant(trace, 190, 4, -40)
    instant(trace, 260, 3, -20)
    instant(trace, 430, 5, 100, ENGINE)  # a gradient
    instant(trace, 440, 6, 200, ENGINE)  # backward alone
    instant(trace, 460, 7, 400, ENGINE)  # dequantised once more
    instant(trace, 490, 7, -400, ENGINE)
    instant(trace, 570, 6, -200, ENGINE)
    instant(trace, 640, 2, -10, ENGINE)
    instant(trace, 710, 8, 1000)  # a moment of Adam
    instant(trace, 900, 9, 7)  # what it computes with
    instant(trace, 910, 9, -7)
    instant(trace, 960, 5, -100)  # zero_grad, between the steps
    found = memory.peak(read(trace, tmp_path))
    # In the second step nothing is more than that.
    assert sizes(found) == {"gradients": 100, "optimizer_state": 1000, "other": 10}
    assert (found.phase, found.layer, found.device) == ("optimizer", "", "cpu")
    assert "Other is 7 bytes allocated in optimizer, 3 bytes allocated in data." in found.notes
    assert "The dequantise workspace was largest at another moment: 400 bytes." in found.notes

    without_adam = [e for e in trace.events if e.get("args", {}).get("Addr") not in (8, 9)]
    trace.events = without_adam
    found = memory.peak(read(trace, tmp_path))
    expected = {"gradients": 100, "activations": 10, "dequant_workspace": 400, "other": 203}
    assert sizes(found) == expected
    assert (found.phase, found.layer) == ("backward", "encoder.0")
    assert {p.part: p.blocks for p in found.parts if p.blocks} == {
        "gradients": 1,
        "activations": 1,
        "dequant_workspace": 1,
        "other": 2,
    }


def test_a_gpus_total_is_the_peak_and_the_inventory_says_whose_it_is(tmp_path):
    trace = two_steps()
    instant(trace, 140, 10, 512, **gpu(5512))
    instant(trace, 145, 99, 1 << 40)  # the host's, beside it
    instant(trace, 150, 11, 64, **gpu(64, index=1))
    instant(trace, 430, 3, -600, ENGINE, **gpu(4912))  # a gradient of before
    instant(trace, 440, 3, 1024, ENGINE, **gpu(5936))  # and a new one in its place
    events = read(trace, tmp_path)
    held = {"base_weights": {1: 3000}, "adapters": {2: 900}, "gradients": {3: 500}}
    found = memory.peak(events, run("cuda:0", **held))
    expected = {"base_weights": 3000, "adapters": 900, "gradients": 1024, "activations": 512}
    # 5000 were held, of which 600 were that gradient's block.
    assert sizes(found) == expected | {"other": 5936 - sum(expected.values())}
    assert (found.device, found.peak_bytes, found.phase) == ("cuda:0", 5936, "backward")
    assert any("1 more device" in note for note in found.notes)
    assert any("500 bytes in no known tensor or block" in note for note in found.notes)

    found = memory.peak(events)
    assert sizes(found) == {"gradients": 1024, "activations": 512, "other": 4400}
    assert any("5,000 bytes were held before" in note for note in found.notes)
    # The addresses of a host mean nothing on a device.
    assert sizes(memory.peak(events, run("cpu", base_weights={1: 3000}))) == sizes(found)


def test_where_the_total_is_less_than_the_blocks_these_are_the_peak(tmp_path):
    trace = two_steps()
    instant(trace, 140, 10, 512, **gpu(600))
    found = memory.peak(read(trace, tmp_path), run("cuda:0", base_weights={1: 3000}))
    assert sizes(found) == {"base_weights": 3000, "activations": 512}
    assert any("2,912 bytes less" in note for note in found.notes)


def test_the_totals_of_a_cpu_are_no_totals(tmp_path):
    """They count from the first profile in the process: torch's ProfiledCPUMemoryReporter."""
    trace = two_steps()
    instant(trace, 140, 10, 512, **{"Total Allocated": 10**9})
    instant(trace, 720, 10, -512, **{"Total Allocated": 10**9 - 512})
    found = memory.peak(read(trace, tmp_path), run("cpu", adapters={5: 100}))
    assert sizes(found) == {"adapters": 100, "activations": 512}
    assert any("keeps no total" in note for note in found.notes)


def test_an_address_used_again_ends_what_was_there(tmp_path):
    trace = two_steps()
    instant(trace, 140, 5, 30)  # where a weight was, whose free no one heard
    instant(trace, 430, 5, 40, ENGINE)
    found = memory.peak(read(trace, tmp_path), run("cpu", base_weights={5: 10, 6: 1}))
    assert sizes(found) == {"base_weights": 1, "gradients": 40}


def test_a_peak_that_a_step_begins_with(tmp_path):
    trace = two_steps()
    instant(trace, 960, 7, 50)  # between the steps
    instant(trace, 1110, 7, -50)
    instant(trace, 1500, 8, -9)
    found = memory.peak(read(trace, tmp_path))
    assert sizes(found) == {"other": 59}
    assert (found.phase, found.layer) == ("", "")


def test_a_foreign_trace_without_forward_ranges(tmp_path):
    trace = two_steps(ranges=False)
    instant(trace, 140, 1, 10)
    instant(trace, 145, 2, 20)
    instant(trace, 240, 2, -20)
    instant(trace, 430, 3, 100, ENGINE)
    instant(trace, 700, 4, 1000)
    found = memory.peak(read(trace, tmp_path))
    assert sizes(found) == {"activations": 10, "gradients": 100, "optimizer_state": 1000}
    assert any("no forward ranges" in note for note in found.notes)


def test_a_trace_without_steps_is_read_whole(tmp_path):
    trace = two_steps()
    trace.events = [e for e in trace.events if not e["name"].startswith("step:")]
    instant(trace, 140, 1, 10)
    instant(trace, 5000, 2, 20)
    found = memory.peak(read(trace, tmp_path))
    assert sizes(found) == {"activations": 10, "other": 20}
    assert any("no steps" in note for note in found.notes)


def test_a_trace_without_memory_has_no_peak(tmp_path):
    events = read(two_steps(), tmp_path)
    assert memory.peak(events, run("cpu")) is None
    nothing = np.zeros(0, np.int64)
    empty = MemoryLog(*[nothing] * len(dataclasses.fields(MemoryLog)))
    assert memory.peak(dataclasses.replace(events, memory=empty)) is None


def test_figures_of_the_timed_pass(tmp_path):
    trace = two_steps()
    instant(trace, 140, 1, 10)
    figures = Memory(allocated_bytes=1, reserved_bytes=2, nvml_bytes=3, rss_bytes=4)
    record = dataclasses.replace(RECORD, memory=figures)
    found = memory.peak(read(trace, tmp_path), record)
    assert (found.allocated_bytes, found.reserved_bytes, found.process_bytes) == (1, 2, 4)
    trace.events[-1]["args"] |= gpu(10)
    assert memory.peak(read(trace, tmp_path), record).process_bytes == 3
    assert memory.peak(read(trace, tmp_path)).process_bytes is None


@pytest.mark.parametrize(
    ("part", "blocks"),
    [
        ("weather", {"0x1": 1}),
        ("adapters", {"here": 1}),
        ("adapters", {"0x1": -1}),
        ("adapters", {"0x1": 1 << 62}),
    ],
)
def test_an_inventory_that_cannot_be_is_one_line(tmp_path, part, blocks):
    trace = two_steps()
    instant(trace, 140, 1, 10)
    step = MemoryStep("memory.json.gz", 0, "cpu", (Held(part, blocks),))
    record = dataclasses.replace(RECORD, memory_step=step)
    with pytest.raises(TraceError, match=r"run\.json") as raised:
        memory.peak(read(trace, tmp_path), record)
    assert "\n" not in str(raised.value)


def test_sizes_that_no_machine_has_are_one_line(tmp_path):
    trace = two_steps()
    for address in range(4):
        instant(trace, 140, address, (1 << 61) - 1)
    with pytest.raises(TraceError, match="more memory than there can be"):
        memory.peak(read(trace, tmp_path))


@pytest.fixture(scope="module")
def events(tmp_path_factory):
    return read(two_steps(), tmp_path_factory.mktemp("steps"))


ADDRESSES = st.integers(0, 5)
SIZES = st.integers(-300, 300)
ROWS = st.lists(st.tuples(st.integers(0, 2200), st.booleans(), ADDRESSES, SIZES, SIZES), min_size=1)
INVENTORY = st.dictionaries(ADDRESSES, st.tuples(st.sampled_from(MEMORY_PARTS), st.integers(0, 99)))


def log_of(events, rows, kind: int) -> MemoryLog:
    rows = sorted(rows, key=lambda row: row[0])
    threads = {thread.name: i for i, thread in enumerate(events.threads)}
    main, engine = threads[f"thread {MAIN}"], threads[f"thread {ENGINE}"]
    columns = {
        "time": [time for time, *_ in rows],
        "thread": [engine if on_engine else main for _, on_engine, *_ in rows],
        "address": [address for _, _, address, *_ in rows],
        "bytes": [size for *_, size, _ in rows],
        "allocated": [max(0, 1000 + total) for *_, total in rows],
        "reserved": [0] * len(rows),
        "kind": [kind] * len(rows),
        "index": [0] * len(rows),
    }
    return MemoryLog(**{name: np.array(values, np.int64) for name, values in columns.items()})


def obvious(log: MemoryLog, inventory, main: int) -> tuple[int, dict[str, int]]:
    """The peak and its parts, each state replayed from the beginning."""
    rows = [*zip(log.time.tolist(), log.thread.tolist(), log.address.tolist(), strict=True)]
    changes = log.bytes.tolist()

    def blocks(after: int):
        """address: (bytes, part or the row it came with), after so many rows."""
        there = {address: (size, part) for address, (part, size) in inventory.items()}
        seen = set(there)
        for (_, _, address), change in zip(rows, changes, strict=True):
            if change < 0 and address not in seen:
                there[address] = (-change, "other")  # freed, so it was there before
            if change:
                seen.add(address)
        for row, ((_, _, address), change) in enumerate(
            zip(rows[:after], changes[:after], strict=True)
        ):
            if change:
                there.pop(address, None)
            if change > 0:
                there[address] = (change, row)
        return there

    def is_in_a_step(time: int) -> bool:
        return time // STEP in (0, 1) and time % STEP < END

    def freed_at(row: int) -> float:
        later = range(row + 1, len(rows))
        return next((rows[i][0] for i in later if changes[i] and rows[i][2] == rows[row][2]), 1e18)

    def part_of(row: int) -> str:
        time, thread, _ = rows[row]
        within, zero = time % STEP, time - time % STEP
        if time >= 2 * STEP:
            return "other"
        on_main = thread == main
        for tid, start, end in DEQUANT:
            if (tid == MAIN) == on_main and start <= within < end:
                return "dequant_workspace"
        phase = next((n for n, (a, b) in PHASES.items() if a <= within < b), None)
        if not on_main and any(a <= within < b for a, b in ((420, 520), (560, 650))):
            phase = "backward"
        if phase == "forward" and freed_at(row) > zero + BACKWARD:
            return "activations"
        if phase == "backward" and freed_at(row) > zero + OPTIMIZER:
            return "gradients"
        if phase == "optimizer" and freed_at(row) > zero + END:
            return "optimizer_state"
        return "other"

    best, parts = -1, {}
    for state in range(len(rows) + 1):
        begins = any(
            (rows[state - 1][0] < zero if state else True)
            and (state == len(rows) or rows[state][0] >= zero)
            for zero in (0, STEP)
        )
        if not begins and not (state and is_in_a_step(rows[state - 1][0])):
            continue
        there = blocks(state)
        held = sum(size for size, _ in there.values())
        total = held
        if log.kind[0] and log.allocated.any():
            before = max(int(log.allocated[0]) - changes[0], 0)
            total = int(log.allocated[state - 1]) if state else before
        if total > best:
            best, parts = total, dict.fromkeys(MEMORY_PARTS, 0)
            for size, part in there.values():
                parts[part if isinstance(part, str) else part_of(part)] += size
            parts["other"] += max(0, total - held)
    return sum(parts.values()), parts


@settings(max_examples=300, deadline=None)
@given(rows=ROWS, inventory=INVENTORY, kind=st.sampled_from([0, 1]))
def test_the_same_as_a_slow_walk(events, rows, inventory, kind):
    log = log_of(events, rows, kind)
    held = {part: {} for part, _ in inventory.values()}
    for address, (part, size) in inventory.items():
        held[part][address] = size
    record = run("cuda:0" if kind else "cpu", **held)
    found = memory.peak(dataclasses.replace(events, memory=log), record)
    main = [thread.name for thread in events.threads].index(f"thread {MAIN}")
    peak, parts = obvious(log, inventory, main)
    assert {part.part: part.bytes for part in found.parts} == parts
    assert found.peak_bytes == peak == sum(part.bytes for part in found.parts)
    assert all(part.bytes >= 0 and part.blocks >= 0 for part in found.parts)


ANY = st.integers(-(1 << 40), 1 << 40)


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(st.tuples(*[ANY] * 8), min_size=1))
def test_any_log_gives_parts_that_add_up(events, rows):
    """Times before the trace, unknown threads and devices, negative totals and addresses."""
    columns = np.array(sorted(rows), np.int64).T.copy()
    log = MemoryLog(*columns)
    log = dataclasses.replace(log, kind=log.kind % 8 - 1, index=log.index % 3 - 1)
    threads = log.thread % (len(events.threads) + 1) - 1
    found = memory.peak(
        dataclasses.replace(events, memory=dataclasses.replace(log, thread=threads))
    )
    assert sum(part.bytes for part in found.parts) == found.peak_bytes
    assert all(part.bytes >= 0 for part in found.parts)
