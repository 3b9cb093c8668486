"""Exports of Nsight Systems written by hand, with the columns that nsys itself writes.

`Nsys` has the methods of `build.Trace`, so that one list of events can be written as a Kineto
trace and as an export. Times are nanoseconds.
"""

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from peftprof.trace import nsys
from peftprof.trace.events import Events, Kind
from tests.trace.build import ENGINE, MAIN, Trace

PID = 4242
MACHINE = 1 << 48  # the bits above the process, which are not 0 in real exports

KERNEL = "CUPTI_ACTIVITY_KIND_KERNEL"
RUNTIME = "CUPTI_ACTIVITY_KIND_RUNTIME"

_SPAN = 'start INTEGER NOT NULL, "end" INTEGER NOT NULL'
_WHERE = (
    "deviceId INTEGER NOT NULL, contextId INTEGER NOT NULL{green}, streamId INTEGER NOT NULL, "
    "correlationId INTEGER, globalPid INTEGER"
)
_NVTX = (
    'start INTEGER NOT NULL, "end" INTEGER, '
    "eventType INTEGER NOT NULL, rangeId INTEGER, "
    "category INTEGER, color INTEGER, text TEXT, globalTid INTEGER, endGlobalTid INTEGER, "
    "textId INTEGER, domainId INTEGER, uint64Value INTEGER, int64Value INTEGER, "
    "doubleValue REAL, uint32Value INTEGER, int32Value INTEGER, floatValue REAL, "
    "jsonTextId INTEGER, jsonText TEXT"
)
_KERNEL = (
    "demangledName INTEGER NOT NULL, shortName INTEGER NOT NULL, mangledName INTEGER, "
    "launchType INTEGER, cacheConfig INTEGER, registersPerThread INTEGER, gridX INTEGER, "
    "gridY INTEGER, gridZ INTEGER, blockX INTEGER, blockY INTEGER, blockZ INTEGER, "
    "staticSharedMemory INTEGER, dynamicSharedMemory INTEGER, localMemoryPerThread INTEGER, "
    "localMemoryTotal INTEGER, gridId INTEGER, sharedMemoryExecuted INTEGER, graphNodeId INTEGER"
)
_COPY = (
    "bytes INTEGER NOT NULL, copyKind INTEGER NOT NULL, deprecatedSrcId INTEGER, "
    "srcKind INTEGER, dstKind INTEGER, srcDeviceId INTEGER, srcContextId INTEGER, "
    "dstDeviceId INTEGER, dstContextId INTEGER, migrationCause INTEGER, graphNodeId INTEGER"
)
_CALL = (
    f"{_SPAN}, eventClass INTEGER NOT NULL, globalTid INTEGER, correlationId INTEGER, "
    "nameId INTEGER NOT NULL, returnValue INTEGER NOT NULL, callchainId INTEGER"
)


def _schema(green: str) -> dict[str, str]:
    where = f"{_SPAN}, {_WHERE.format(green=green)}"
    return {
        "StringIds": "id INTEGER NOT NULL PRIMARY KEY, value TEXT NOT NULL",
        "ThreadNames": "nameId INTEGER NOT NULL, priority INTEGER, globalTid INTEGER",
        "PROCESSES": "globalPid INTEGER, pid INTEGER, name TEXT",
        "CUPTI_ACTIVITY_KIND_KERNEL": f"{where}, {_KERNEL}",
        "CUPTI_ACTIVITY_KIND_MEMCPY": f"{where}, {_COPY}",
        "CUPTI_ACTIVITY_KIND_MEMSET": f"{where}, value INTEGER NOT NULL, bytes INTEGER NOT NULL, "
        "graphNodeId INTEGER, memKind INTEGER",
        "CUPTI_ACTIVITY_KIND_RUNTIME": _CALL,
        "NVTX_EVENTS": _NVTX,
    }


_GPU = "vmId INTEGER NOT NULL, id INTEGER NOT NULL, name TEXT, busLocation TEXT, cuDevice INTEGER"
# 2022.2: no green contexts, no enumerations; the GPU itself says which device it is.
OLD = _schema("") | {"TARGET_INFO_GPU": _GPU, "CUPTI_ACTIVITY_KIND_DRIVER": _CALL}
# 2024.6: also whole graphs, the devices of each process, and tables that name the numbers.
_GREEN = ", greenContextId INTEGER"
NEW = _schema(_GREEN) | {
    "CUPTI_ACTIVITY_KIND_GRAPH_TRACE": f"{_SPAN}, {_WHERE.format(green=_GREEN)}, "
    "graphId INTEGER NOT NULL, graphExecId INTEGER NOT NULL",
    "TARGET_INFO_GPU": _GPU,
    "TARGET_INFO_CUDA_DEVICE": "gpuId INTEGER, cudaId INTEGER, pid INTEGER, uuid TEXT, "
    "numMultiprocessors INTEGER",
    "ENUM_CUDA_MEMCPY_OPER": "id INTEGER NOT NULL PRIMARY KEY, name TEXT, label TEXT",
}
_COPY_KINDS = {"HtoD": 1, "DtoH": 2, "DtoD": 8, "PtoP": 10}


def global_tid(tid: int, pid: int = PID) -> int:
    return MACHINE | pid << 24 | tid


def global_pid(pid: int = PID) -> int:
    return global_tid(0, pid)


class Nsys:
    """An export in the making: rows by table, written at once; `pid` is of the rows to come."""

    def __init__(self, schema: dict[str, str] = NEW, registered: bool = False) -> None:
        self.schema = dict(schema)
        self.registered = registered  # ranges of registered strings, as the package nvtx opens
        self.rows: dict[str, list[dict[str, Any]]] = {}
        self.pid = PID
        self._strings: dict[str, int] = {}
        self._correlation = 0
        self.add("TARGET_INFO_GPU", vmId=MACHINE, id=0, name="Test GPU", cuDevice=0)
        if "TARGET_INFO_CUDA_DEVICE" in schema:
            self.add("TARGET_INFO_CUDA_DEVICE", gpuId=0, cudaId=0, pid=PID)
        if "ENUM_CUDA_MEMCPY_OPER" in schema:
            for name, number in _COPY_KINDS.items():
                enum = f"CUDA_MEMCPY_KIND_{name.upper()}"
                self.add("ENUM_CUDA_MEMCPY_OPER", id=number, name=enum, label=name)

    def add(self, table: str, **values: Any) -> None:
        self.rows.setdefault(table, []).append(values)

    def string(self, text: str) -> int:
        return self._strings.setdefault(text, len(self._strings) + 1)

    def range(self, name: str, start: int, end: int | None, tid: int = MAIN, **more: Any) -> None:
        text = {"textId": self.string(name)} if self.registered else {"text": name}
        row = {"start": start, "end": end, "eventType": 59, "domainId": 1} | text
        self.add("NVTX_EVENTS", **{**row, "globalTid": global_tid(tid, self.pid), **more})

    def call(
        self, name: str, start: int, end: int, correlation: int, tid: int = MAIN,
        table: str = "RUNTIME",
    ) -> None:  # fmt: skip
        self.add(
            f"CUPTI_ACTIVITY_KIND_{table}",
            start=start,
            end=end,
            eventClass=0,
            globalTid=global_tid(tid, self.pid),
            correlationId=correlation,
            nameId=self.string(name),
            returnValue=0,
        )

    def work(
        self, table: str, start: Any, end: Any, correlation: int, stream: int = 7,
        device: int = 0, context: int = 1, **more: Any,
    ) -> None:  # fmt: skip
        """A row of device work in table `table`."""
        self.add(
            f"CUPTI_ACTIVITY_KIND_{table}",
            start=start,
            end=end,
            deviceId=device,
            contextId=context,
            streamId=stream,
            correlationId=correlation,
            globalPid=global_pid(self.pid),
            **more,
        )

    def kernel(
        self, name: str, start: int, end: int, launched: int | None, tid: int = MAIN,
        stream: int = 7, cat: str = "kernel",
    ) -> None:  # fmt: skip
        """Device work, launched at CPU time `launched` on thread `tid` (None: not recorded)."""
        self._correlation += 1
        if launched is not None:
            self.call("cudaLaunchKernel_v7000", launched, launched, self._correlation, tid)
        where = (start, end, self._correlation, stream)
        if cat == "gpu_memcpy":
            kind = _COPY_KINDS[name.removeprefix("Memcpy ")]
            self.work("MEMCPY", *where, bytes=64, copyKind=kind)
        elif cat == "gpu_memset":
            self.work("MEMSET", *where, value=0, bytes=32)
        else:
            named = {"demangledName": self.string(name), "shortName": self.string("short")}
            self.work("KERNEL", *where, **named)

    def write(self, folder: Path, name: str = "report.sqlite") -> Path:
        path = folder / name
        rows = dict(self.rows)
        rows["StringIds"] = [
            {"id": number, "value": text} for text, number in self._strings.items()
        ]
        with closing(sqlite3.connect(path)) as database, database:
            for table, columns in self.schema.items():
                database.execute(f'CREATE TABLE "{table}" ({columns})')
            for table, found in rows.items():
                if table in self.schema:
                    for values in found:
                        marks = ", ".join("?" * len(values))
                        columns = ", ".join(f'"{column}"' for column in values)
                        database.execute(
                            f'INSERT INTO "{table}" ({columns}) VALUES ({marks})',
                            [*values.values()],
                        )
        return path


def small(schema: dict[str, str] = NEW, registered: bool = False) -> Nsys:
    """One range, a kernel and a copy launched in it."""
    file = Nsys(schema, registered)
    file.range("step:0", 1000, 9000)
    file.kernel("gemm", 3000, 4000, launched=2000)
    file.kernel("Memcpy HtoD", 5000, 6000, launched=2500, stream=9, cat="gpu_memcpy")
    return file


def one(path: Path) -> Events:
    """The events of the only process in an export."""
    (events,) = nsys.read(path)
    return events


def rows(events: Events, kind: Kind) -> list[tuple[str, int, int]]:
    """Name, start and end of each event of a kind."""
    return [
        (events.named(i), int(events.start[i]), int(events.end[i]))
        for i in np.flatnonzero(events.kind == kind).tolist()
    ]


class Writer(Protocol):
    """What `build.Trace` and `Nsys` have in common."""

    def range(self, name: str, start: int, end: int, tid: int = MAIN) -> None: ...

    def kernel(
        self, name: str, start: int, end: int, launched: int | None, tid: int = MAIN,
        stream: int = 7, cat: str = "kernel",
    ) -> None: ...  # fmt: skip


GEMM = "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x3_tn"
GELU = (
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl"
    "(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#1}, at::detail::Array<char*, 2> >"
)
FLASH = "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4> >"
DEQUANT = "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*)"
ADAM = "void at::native::multi_tensor_apply_kernel<FusedOptimizerTensorListMetadata<4> >"
STEP = 100_000


def train(writer: Writer, steps: int = 3, engine: int = ENGINE) -> None:
    """Annotated training steps of a QLoRA model, on two streams; backward on thread `engine`."""
    for n in range(steps):
        t = n * STEP
        slow = 100 * n  # no two steps are alike
        writer.range(f"step:{n}", t, t + 90_000)
        writer.range("phase:data", t, t + 9_000)
        writer.kernel("Memcpy HtoD", t + 2_000, t + 5_500, t + 1_000, stream=20, cat="gpu_memcpy")
        writer.range("phase:forward", t + 10_000, t + 40_000)
        writer.range("layer:model.layers.0", t + 10_500, t + 35_000)
        writer.range("op:dequant", t + 11_000, t + 13_000)
        writer.kernel(DEQUANT, t + 12_000, t + 15_000 + slow, t + 11_500)
        writer.range("op:base_gemm", t + 14_000, t + 16_000)
        writer.kernel(GEMM, t + 16_000, t + 22_000, t + 15_000)
        writer.range("op:lora_A", t + 17_000, t + 18_000)
        writer.kernel(GEMM, t + 20_000, t + 21_000 + slow, t + 17_500, stream=13)
        writer.kernel(FLASH, t + 23_000, t + 27_000, t + 20_000)
        writer.kernel(GELU, t + 27_000, t + 28_000, t + 24_000)
        writer.range("phase:backward", t + 41_000, t + 70_000)
        writer.range("op:lora_dB", t + 42_000, t + 44_000, engine)
        writer.kernel(GEMM, t + 45_000, t + 47_000 + slow, t + 43_000, engine)
        writer.range("op:dequant", t + 46_000, t + 47_000, engine)
        writer.kernel(DEQUANT, t + 48_000, t + 51_000, t + 46_500, engine)
        writer.kernel(GEMM, t + 52_000, t + 58_000, t + 50_000, engine)
        writer.range("phase:optimizer", t + 71_000, t + 88_000)
        writer.kernel("Memset", t + 72_500, t + 73_000, t + 72_000, cat="gpu_memset")
        writer.kernel(ADAM, t + 74_000, t + 79_000 - slow, t + 73_000)


def operators(trace: Trace, steps: int = 3, engine: int = ENGINE) -> None:
    """The operators of the same steps, which a Kineto trace has and an export has not."""
    for n in range(steps):
        t = n * STEP
        trace.op("aten::copy_", t + 500, t + 1_500)
        trace.op("aten::mm", t + 14_500, t + 15_500, seq=3 * n)
        trace.op("aten::scaled_dot_product_attention", t + 19_500, t + 20_500, seq=3 * n + 1)
        trace.op("aten::gelu", t + 23_500, t + 24_500, seq=3 * n + 2)
        trace.backward("MmBackward0", t + 49_000, t + 51_000, seq=3 * n, tid=engine)
        trace.op("aten::mm", t + 49_500, t + 50_500, engine)
