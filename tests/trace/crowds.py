"""Hundreds of thousands of whatever there are a few of; endless names; times centuries apart."""

import itertools
import sqlite3
from contextlib import closing

from peftprof.trace import rules
from tests.trace.hostile import MIB, MM, ONE, OPEN, Makers, event, trace
from tests.trace.nsys_files import global_pid, global_tid, small

hostile = Makers()
STEP = event("step:0", 0, 1e6, "user_annotation")


@hostile
def crossing_events() -> bytes:
    return trace([STEP, *(event("aten::mm", 10 * i, 500_000 + i % 7) for i in range(40_000))])


@hostile
def crossing_events_of_all_lengths() -> bytes:
    lengths = (1 + i * 7919 % 100_003 for i in itertools.count())
    return trace([STEP, *(event("aten::mm", 10 * i, next(lengths)) for i in range(40_000))])


@hostile
def events_that_all_begin_and_end_together() -> bytes:
    return trace(event("aten::mm", 5, 5) for _ in range(9_000))


@hostile
def many_more_that_do() -> bytes:
    return trace(event("aten::mm", 5, 5) for _ in range(60_000))


@hostile
def events_without_length() -> bytes:
    return trace([MM, *(event("aten::mm", 5, 0) for _ in range(60_000))])


@hostile
def kernels_that_all_overlap() -> bytes:
    return trace([MM, *(event("gemm", i, 900_000, "kernel", 7) for i in range(20_000))])


@hostile
def a_million_names() -> bytes:
    return trace(event(f"n{i}", i, 1, "kernel") for i in range(MIB))


@hostile
def a_million_operands() -> bytes:
    dims = (
        {"Input Dims": [[i, 8], [8, 8]], "Input type": ["float"] * 2} for i in itertools.count()
    )
    return trace(event("aten::mm", i, 1, **next(dims)) for i in range(200_000))


@hostile
def names_in_every_pair() -> bytes:
    names = ["aten::" + c * 1500 for c in "abcdefghijklmnopqrstuvwxyz"]
    pairs = itertools.product(names, names)
    both = ((event(a, 10 * i, 9), event(b, 10 * i, 8)) for i, (a, b) in enumerate(pairs))
    return trace(itertools.chain.from_iterable(both))


@hostile
def as_many_threads_as_may_be() -> bytes:
    threads = [event("aten::mm", i, 30, tid=i) for i in range(8_000)]
    return trace(threads + [event("gemm", i, 30, "kernel", i) for i in range(8_000)])


@hostile
def more_threads_than_may_be() -> bytes:
    return trace(event("aten::mm", i, 30, tid=f"thread {i}") for i in range(60_000))


@hostile
def fifty_thousand_steps() -> bytes:
    steps = (event(f"step:{i}", 10 * i, 9, "user_annotation") for i in range(50_000))
    return trace([*steps, *(event("aten::mm", 10 * i + 1, 5) for i in range(50_000))])


@hostile
def kernels_across_fifty_thousand_steps() -> bytes:
    steps = [event(f"step:{i}", 10 * i, 9, "user_annotation") for i in range(50_000)]
    calls = [
        event("cudaLaunchKernel", 10 * i, 1, "cuda_runtime", correlation=i) for i in range(50_000)
    ]
    ends = [event("gemm", 10 * i, 5e5, "kernel", i % 40, correlation=i) for i in range(50_000)]
    return trace(steps + calls + ends)


@hostile
def a_million_allocations() -> bytes:
    log = (
        {"ph": "i", "name": "[memory]", "pid": 1, "tid": i % 300, "ts": i}
        | {
            "args": {
                "Addr": i % 5000,
                "Bytes": (-1) ** i << 20,
                "Device Type": i % 3,
                "Device Id": i % 7,
            }
        }
        for i in range(200_000)
    )
    return trace([event("aten::mm", i, 900, tid=i % 300) for i in range(30_000)] + list(log))


@hostile
def arrows_without_number() -> bytes:
    ends = (
        {
            "ph": "sf"[i % 2],
            "cat": ("ac2g", "fwdbwd")[i % 3 % 2],
            "id": i % 9,
            "pid": 1,
            "tid": 1,
            "ts": i % 50,
        }
        for i in range(100_000)
    )
    return trace([event("aten::mm", i, 60 - i) for i in range(50)] + list(ends))


@hostile
def names_of_megabytes() -> bytes:
    names = ("n" * MIB, "é" * (4 * MIB), "\x1b" * MIB, "[" * MIB)
    return trace(event(name, 10 * i, 10) for i, name in enumerate(names))


@hostile
def everything_else_of_megabytes() -> bytes:
    odd = dict.fromkeys(("ph", "cat", "pid", "tid", "id"), "x" * MIB)
    return trace(
        [odd, MM | {"tid": "y" * MIB}, MM | {"pid": "z" * MIB}, MM | {"args": {"x" * MIB: 1}}]
    )


@hostile
def a_time_of_megabytes() -> bytes:
    return trace([*(event("aten::mm", i, 1) for i in range(20_000)), MM | {"ts": "1." + "0" * MIB}])


@hostile
def an_event_of_forty_megabytes() -> bytes:
    return OPEN + ONE + b',{"name": "' + b"x" * (40 * MIB) + b'"}]}'


@hostile
def a_head_of_forty_megabytes() -> bytes:
    return b'{"more": "' + b"x" * (40 * MIB) + b'", ' + OPEN[1:] + ONE + b"]}"


def _parts_of_patterns() -> list[str]:
    """The words that the rules look for, and the parts that are repeated in them."""
    known = rules.load()
    patterns = [rule.match for rule in (*known.ranges, *known.operators, *known.kernels)]
    patterns += [*known.steps, known.layer, known.head, known.waits]
    words = {"a", "_", "1", ":", "::", " ", "Backward0", "\\", "\n"}
    for pattern in patterns:
        text = "".join(c if c.isalnum() or c in "_:# " else "\0" for c in pattern.pattern)
        words |= {word for word in text.split("\0") if word}
    return sorted(words)


def _hostile_names() -> list[str]:
    """As long as a name may be: each word over and over, nearly what a rule looks for, and not."""
    words = _parts_of_patterns()
    repeated = [word * (4090 // len(word)) + "!" for word in words]
    return repeated + ["_".join(words[i::5])[:4090] + "!" for i in range(5)]


@hostile
def operators_that_take_long_to_match() -> bytes:
    return trace(event(name, 10 * i, 10) for i, name in enumerate(_hostile_names()))


@hostile
def kernels_that_take_long_to_match() -> bytes:
    return trace(event(name, 10 * i, 10, "kernel") for i, name in enumerate(_hostile_names()))


@hostile
def ranges_that_take_long_to_match() -> bytes:
    found = [event(n, 10 * i, 10, "user_annotation") for i, n in enumerate(_hostile_names())]
    return trace(
        [*found, event("aten::mm", 0, 5), event("cudaDeviceSynchronize", 6, 1, "cuda_runtime")]
    )


@hostile
def long_names_without_end() -> bytes:
    return trace(event(f"{i}" + "a" * 4000, i, 1, "kernel") for i in range(9_000))


@hostile
def times_at_all_ends() -> bytes:
    times = (0, -4.4e15, 4.4e15, 2.2e15, 1e-300)
    return trace(event("aten::mm", start, length) for start in times for length in times)


@hostile
def a_century_and_a_half() -> bytes:
    far = [event("aten::mm", start, 2.3e15) for start in (0, 2.2e15)]
    return trace(
        far + [event("gemm", start, 4.4e15, "kernel", i) for i, start in enumerate((0, 1, 2))]
    )


@hostile
def ten_streams_for_a_century() -> bytes:
    long = [event("gemm", i, 3e15, "kernel", i % 10) for i in range(40)]
    return trace([event("cudaLaunchKernel", 0, 1, "cuda_runtime"), *long])


@hostile
def a_device_that_lives_in_another_decade() -> bytes:
    calls = [
        event("cudaLaunchKernel", 1.7e15 + i, 1, "cuda_runtime", correlation=i) for i in range(9)
    ]
    ran = [event("gemm", 10 * i, 9, "kernel", 7, correlation=i) for i in range(9)]
    return trace([event("step:1", 1.7e15, 50, "user_annotation"), *calls, *ran])


@hostile
def ids_that_lead_in_circles() -> bytes:
    numbered = {"Sequence number": 1, "Fwd thread id": 1, "correlation": 1, "External id": 1}
    loop = [event("aten::mm", i % 3, 4, tid=i % 4, **numbered) for i in range(400)]
    loop += [event("cudaLaunchKernel", 1, 1, "cuda_runtime", tid=i, **numbered) for i in range(9)]
    return trace(loop + [event("gemm", i, 2, "kernel", i % 3, **numbered) for i in range(99)])


def _export(*statements: str) -> bytes:
    file = small()
    file.string("gemm")
    with closing(sqlite3.connect(":memory:")) as database:
        for table, columns in file.schema.items():
            database.execute(f'CREATE TABLE "{table}" ({columns})')
        database.execute("INSERT INTO StringIds VALUES (1, 'gemm')")
        with database:
            for statement in statements:
                database.execute(statement)
        return database.serialize()


_COUNT = "WITH RECURSIVE n(i) AS (SELECT 0 UNION ALL SELECT i + 1 FROM n WHERE i < {}) "
_RANGE = 'INSERT INTO NVTX_EVENTS (start, "end", eventType, text, globalTid) ' + _COUNT


@hostile
def an_export_of_many_processes() -> bytes:
    return _export(f"{_RANGE.format(300)} SELECT i, i + 9, 59, 'aten::mm', i << 24 | 1 FROM n")


@hostile
def an_export_of_as_many_processes_as_may_be() -> bytes:
    return _export(f"{_RANGE.format(1000)} SELECT i, i + 9, 59, 'aten::mm', i << 24 | 1 FROM n")


@hostile
def an_export_of_too_many_processes() -> bytes:
    return _export(f"{_RANGE.format(9000)} SELECT i, i + 9, 59, 'aten::mm', i << 24 | 1 FROM n")


@hostile
def an_export_of_many_threads() -> bytes:
    return _export(
        f"{_RANGE.format(50_000)} SELECT i, i + 9, 59, 'aten::mm', {global_tid(0)} | i FROM n"
    )


@hostile
def an_export_of_many_names() -> bytes:
    name = "'aten::' || hex(zeroblob(2000)) || i"
    return _export(f"{_RANGE.format(9000)} SELECT i, i + 9, 59, {name}, {global_tid(1)} FROM n")


@hostile
def an_export_of_crossing_ranges() -> bytes:
    return _export(
        f"{_RANGE.format(40_000)} "
        f"SELECT i * 10, i * 10 + 90000 + i % 7, 59, 'aten::mm', {global_tid(1)} FROM n"
    )


@hostile
def an_export_of_huge_rows() -> bytes:
    table = "CUPTI_ACTIVITY_KIND_MEMCPY"
    columns = (
        'start, "end", deviceId, contextId, streamId, correlationId, globalPid, bytes, copyKind'
    )
    huge = f"i, 4611686018427387000 - i, 0, 1, i % 90, i, {global_pid()}, 9223372036854775807, 1"
    return _export(
        f"INSERT INTO {table} ({columns}) {_COUNT.format(500)} SELECT {huge} FROM n",
        f"INSERT INTO PROCESSES VALUES ({global_pid()}, 1, hex(zeroblob(20000000)))",
    )
