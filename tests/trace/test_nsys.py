"""Exports of nsys: a real one, written ones of both schemas, and pairs with a Kineto trace."""

import sqlite3
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from peftprof.breakdowns import CATEGORIES
from peftprof.trace import kineto, nsys
from peftprof.trace.attribute import Attribution, attribute
from peftprof.trace.breakdown import make_breakdown
from peftprof.trace.events import NONE, Kind
from tests.trace import nsys_files
from tests.trace.build import ENGINE, MAIN, Trace
from tests.trace.nsys_files import (
    KERNEL,
    NEW,
    OLD,
    RUNTIME,
    Nsys,
    global_pid,
    global_tid,
    one,
    rows,
    small,
)

REAL = Path(__file__).parents[3] / "shared" / "traces" / "nsys_saxpy_mpi_nvtx.sqlite"
SCHEMAS = pytest.mark.parametrize("schema", [NEW, OLD], ids=["2024", "2022"])


@pytest.mark.skipif(not REAL.is_file(), reason="the real export, ../shared/traces, is missing")
def test_the_real_export_agrees_with_a_plain_count() -> None:
    with closing(sqlite3.connect(f"{REAL.as_uri()}?mode=ro&immutable=1", uri=True)) as database:

        def spans(table: str, where: str = "1") -> list[tuple[int, int]]:
            query = f'SELECT start, "end" FROM {table} WHERE {where} ORDER BY 1, 2'
            return database.execute(query).fetchall()

        kernels, copies = spans(KERNEL), spans("CUPTI_ACTIVITY_KIND_MEMCPY")
        calls, ranges = spans(RUNTIME), spans("NVTX_EVENTS", "eventType = 59")
        launched = dict(
            database.execute(
                f"SELECT k.start, min(r.start) FROM {KERNEL} k JOIN {RUNTIME} r "
                "USING (correlationId) GROUP BY 1"
            )
        )
        moved = database.execute("SELECT sum(bytes) FROM CUPTI_ACTIVITY_KIND_MEMCPY").fetchone()
    zero = min(span[0] for span in (*kernels, *copies, *calls, *ranges))

    events = one(REAL)
    for kind, expected in (
        (Kind.KERNEL, kernels), (Kind.MEMCPY, copies), (Kind.LAUNCH, calls), (Kind.RANGE, ranges),
    ):  # fmt: skip
        found = [(start + zero, end + zero) for _, start, end in rows(events, kind)]
        assert sorted(found) == expected
    assert (len(kernels), len(copies), len(ranges)) == (5, 15, 22)
    assert len(events) == 5 + 15 + 22 + len(calls)
    assert (events.launch[events.on_device] != NONE).all()
    for row in np.flatnonzero(events.kind == Kind.KERNEL).tolist():
        launch = int(events.launch[row])
        assert int(events.start[launch]) + zero == launched[int(events.start[row]) + zero]
        assert events.named(launch) == "cudaLaunchKernel"
    assert events.bytes[events.kind == Kind.MEMCPY].sum() == moved[0]
    assert Counter(name for name, *_ in rows(events, Kind.RANGE)) == {
        "MPI_Init": 1, "MPI_Finalize": 1, "MPI_Send": 10, "MPI_Recv": 5, "saxpy": 5
    }  # fmt: skip
    assert Counter(name for name, *_ in rows(events, Kind.MEMCPY)) == {
        "Memcpy HtoD": 10, "Memcpy DtoH": 5
    }  # fmt: skip
    assert events.device == "NVIDIA A100-SXM4-40GB"
    assert [t.name for t in events.threads] == ["stream 7", "MPI Rank 0 1230493"]
    assert events.process == ""


# What the tables say.


@SCHEMAS
@pytest.mark.parametrize("registered", [False, True])
def test_columns_hold_what_the_tables_say(
    tmp_path: Path, schema: dict[str, str], registered: bool
) -> None:
    events = one(small(schema, registered).write(tmp_path))
    assert rows(events, Kind.RANGE) == [("step:0", 0, 8000)]
    assert rows(events, Kind.LAUNCH) == [
        ("cudaLaunchKernel", 1000, 1000), ("cudaLaunchKernel", 1500, 1500)
    ]  # fmt: skip
    assert rows(events, Kind.KERNEL) == [("gemm", 2000, 3000)]
    assert rows(events, Kind.MEMCPY) == [("Memcpy HtoD", 4000, 5000)]
    (kernel,) = np.flatnonzero(events.kind == Kind.KERNEL).tolist()
    (copy,) = np.flatnonzero(events.kind == Kind.MEMCPY).tolist()
    assert events.start[events.launch[kernel]] == 1000
    assert events.start[events.launch[copy]] == 1500
    assert events.bytes[copy] == 64
    assert events.bytes[kernel] == NONE
    assert events.threads[int(events.thread[kernel])].name == "stream 7"
    assert events.threads[int(events.thread[copy])].name == "stream 9"
    assert sorted(t.device for t in events.threads) == [NONE, 0, 0]
    assert events.device == "Test GPU"
    assert events.start.dtype == events.end.dtype == np.int64


def test_rows_stand_after_what_encloses_them(tmp_path: Path) -> None:
    file = Nsys()
    file.range("op:inner", 100, 900)
    file.range("phase:forward", 100, 1000)
    file.range("step:0", 0, 2000)
    file.range("elsewhere", 50, 60, tid=77)
    events = one(file.write(tmp_path))
    keys = list(
        zip(events.thread.tolist(), events.start.tolist(), (-events.end).tolist(), strict=True)
    )
    assert keys == sorted(keys)
    assert events.device == "cpu"
    assert len(set(events.thread.tolist())) == 2


def test_threads_are_named_and_streams_of_other_contexts_are_other_streams(tmp_path: Path) -> None:
    file = small()
    file.add("ThreadNames", nameId=file.string("python"), priority=0, globalTid=global_tid(MAIN))
    file.add("TARGET_INFO_GPU", vmId=0, id=1, name="Other GPU", cuDevice=0)
    file.add("TARGET_INFO_CUDA_DEVICE", gpuId=1, cudaId=1, pid=nsys_files.PID)
    name = file.string("k")
    for device, context in ((0, 2), (1, 1)):
        where = {"device": device, "context": context, "demangledName": name, "shortName": name}
        file.work("KERNEL", 7000, 8000, 0, stream=7, **where)
    events = one(file.write(tmp_path))
    assert Counter((t.name, t.device) for t in events.threads) == {
        (f"python {MAIN}", NONE): 1, ("stream 7", 0): 2, ("stream 9", 0): 1, ("stream 7", 1): 1
    }  # fmt: skip
    assert events.device == "Other GPU, Test GPU"


def test_a_device_that_nobody_names(tmp_path: Path) -> None:
    file = small()
    del file.rows["TARGET_INFO_GPU"]
    assert one(file.write(tmp_path)).device == "unknown device"


@SCHEMAS
def test_the_driver_launches_too_and_versions_are_no_names(
    tmp_path: Path, schema: dict[str, str]
) -> None:
    file = Nsys({**schema, "CUPTI_ACTIVITY_KIND_DRIVER": OLD["CUPTI_ACTIVITY_KIND_DRIVER"]})
    name = file.string("triton_poi_fused_0")
    file.call("cuLaunchKernelEx_ptsz", 100, 200, 5, table="DRIVER")
    file.call("cudaMemsetAsync_ptsz_v7000", 300, 310, 6)
    file.call("cudaStreamSynchronize_v3020", 400, 900, 7)
    file.work("KERNEL", 500, 600, 5, demangledName=name, shortName=name)
    file.work("MEMSET", 620, 640, 6, value=0, bytes=32)
    events = one(file.write(tmp_path))
    assert [name for name, *_ in rows(events, Kind.LAUNCH)] == [
        "cuLaunchKernelEx", "cudaMemsetAsync", "cudaStreamSynchronize"
    ]  # fmt: skip
    assert rows(events, Kind.MEMSET) == [("Memset", 520, 540)]
    assert [events.named(i) for i in events.launch[events.on_device].tolist()] == [
        "cuLaunchKernelEx", "cudaMemsetAsync"
    ]  # fmt: skip


def test_kernels_of_a_graph_share_its_launch(tmp_path: Path) -> None:
    file = Nsys()
    file.call("cudaGraphLaunch_v10000", 100, 200, 42)
    for node in range(3):
        name = file.string(f"kernel_{node}")
        start = 300 + 100 * node
        named = {"demangledName": name, "shortName": name, "graphNodeId": node + 1}
        file.work("KERNEL", start, start + 50, 42, **named)
    events = one(file.write(tmp_path))
    assert [events.named(i) for i in events.launch[events.on_device].tolist()] == (
        ["cudaGraphLaunch"] * 3
    )


def test_a_graph_traced_as_a_whole_is_one_kernel(tmp_path: Path) -> None:
    file = Nsys()
    file.call("cudaGraphLaunch_v10000", 100, 200, 42)
    file.work("GRAPH_TRACE", 300, 900, 42, graphId=3, graphExecId=1)
    events = one(file.write(tmp_path))
    assert rows(events, Kind.KERNEL) == [("CUDA graph 3", 200, 800)]
    assert events.named(int(events.launch[events.on_device][0])) == "cudaGraphLaunch"


@pytest.mark.parametrize("enum", [True, False])
def test_directions_of_copies(tmp_path: Path, enum: bool) -> None:
    file = Nsys(NEW if enum else OLD)
    for at, kind in enumerate((1, 2, 8, 10, 12, 99)):
        file.work("MEMCPY", 100 * at, 100 * at + 50, 0, bytes=1, copyKind=kind)
    if enum:  # the export's own word goes first
        file.add("ENUM_CUDA_MEMCPY_OPER", id=99, name="CUDA_MEMCPY_KIND_DTOA", label="x")
    names = [name for name, *_ in rows(one(file.write(tmp_path)), Kind.MEMCPY)]
    ending = " DtoA" if enum else ""
    assert names == [
        "Memcpy HtoD", "Memcpy DtoH", "Memcpy DtoD", "Memcpy PtoP", "Memcpy DtoH", "Memcpy" + ending
    ]  # fmt: skip


def test_synchronisation_on_the_device_is_no_work(tmp_path: Path) -> None:
    where = 'start INTEGER, "end" INTEGER, streamId INTEGER, correlationId INTEGER'
    file = small({**NEW, "CUPTI_ACTIVITY_KIND_SYNCHRONIZATION": where})
    values = {"start": 1, "end": 99_000, "streamId": 7, "correlationId": 1}
    file.add("CUPTI_ACTIVITY_KIND_SYNCHRONIZATION", **values)
    events = one(file.write(tmp_path))
    assert int(events.on_device.sum()) == 2
    assert events.end.max() == 8000


def test_processes_are_apart_and_so_are_their_correlation_ids(tmp_path: Path) -> None:
    file = Nsys()
    file.add("PROCESSES", globalPid=global_pid(7), pid=7, name="python\n3")
    for pid, tid, launched in ((8, 80, 5000), (7, 70, 1000)):
        file.pid = pid
        name = file.string(f"kernel of {pid}")
        file.call(f"cudaLaunchKernel_{pid}", launched, launched + 10, 1, tid)
        file.work("KERNEL", launched + 500, launched + 600, 1, demangledName=name, shortName=name)
    file.pid = 9  # calls alone are no process to speak of
    file.call("cudaFree_v3020", 1, 2, 1, 90)
    first, second = nsys.read(file.write(tmp_path))
    assert [first.process, second.process] == ["python 3 pid 7", "pid 8"]
    for events, pid in ((first, 7), (second, 8)):
        assert rows(events, Kind.KERNEL) == [(f"kernel of {pid}", 500, 600)]
        assert rows(events, Kind.LAUNCH) == [(f"cudaLaunchKernel_{pid}", 0, 10)]
        assert (
            events.launch[events.on_device].tolist()
            == np.flatnonzero(events.kind == Kind.LAUNCH).tolist()
        )
        assert all(str(pid) in name for name in events.names)


# The same run in both forms.


def both(folder: Path, engine: int, schema: dict[str, str]) -> tuple[Attribution, Attribution]:
    trace, file = Trace(), Nsys(schema, registered=schema is NEW)
    nsys_files.train(trace, engine=engine)
    nsys_files.operators(trace, engine=engine)
    nsys_files.train(file, engine=engine)
    return attribute(kineto.read(trace.write(folder))), attribute(one(file.write(folder)))


def by_category(found: Attribution) -> dict[tuple[int, str], int]:
    names = (*CATEGORIES, "unattributed")
    category = found.meaning.category[found.pieces.row].tolist()
    total: Counter[tuple[int, str]] = Counter()
    for step, number, ns in zip(
        found.pieces.step.tolist(), category, found.pieces.ns.tolist(), strict=True
    ):
        total[step, names[number]] += ns
    return dict(total)


@SCHEMAS
@pytest.mark.parametrize("engine", [ENGINE, MAIN])
def test_the_same_run_has_the_same_categories_in_both_forms(
    tmp_path: Path, schema: dict[str, str], engine: int
) -> None:
    """To the nanosecond, in each step."""
    from_kineto, from_nsys = both(tmp_path, engine, schema)
    found = by_category(from_nsys)
    assert found == by_category(from_kineto)
    assert {category for _, category in found} == {
        "dequant", "base_gemm", "adapter_gemm", "attention", "elementwise", "optimizer", "memcpy"
    }  # fmt: skip
    assert from_nsys.windows.length.tolist() == from_kineto.windows.length.tolist()
    assert from_nsys.overlap_ns.tolist() == from_kineto.overlap_ns.tolist()
    assert from_nsys.idle_ns.sum(axis=1).tolist() == from_kineto.idle_ns.sum(axis=1).tolist()


@SCHEMAS
@pytest.mark.parametrize("engine", [ENGINE, MAIN])
def test_the_same_run_has_the_same_breakdown_in_both_forms(
    tmp_path: Path, engine: int, schema: dict[str, str]
) -> None:
    a, b = (make_breakdown(found, "run", "x") for found in both(tmp_path, engine, schema))
    assert [(r.phase, r.category, r.count) for r in a.rows] == [
        (r.phase, r.category, r.count) for r in b.rows
    ]
    assert [r.ns for r in b.rows] == pytest.approx([r.ns for r in a.rows], rel=1e-9)
    assert [r.share for r in b.rows] == pytest.approx([r.share for r in a.rows], rel=1e-9)
    assert b.idle_ns == pytest.approx(a.idle_ns, rel=1e-9)
    assert b.idle_by_cause_ns == pytest.approx(a.idle_by_cause_ns, rel=1e-9)
    assert a.unattributed_ns == b.unattributed_ns == 0
    assert b.idle_ns > 0
