"""What an nsys export says of processes, threads, GPUs and kinds of copies: its small tables."""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from peftprof.trace.events import NONE, Ints
from peftprof.trace.nsys_tables import Export

ID_BITS = 24  # of a global thread id, the thread's own; then as many of the process
ID_MASK = (1 << ID_BITS) - 1


@dataclass(frozen=True)
class About:
    """Names of processes and threads by global id, and which GPU is a process's device N.

    `gpus` is by (pid, device), `default_gpus` by device alone; pid is the system's.
    """

    processes: dict[int, str]
    threads: dict[int, str]
    gpus: dict[tuple[int, int], str]
    default_gpus: dict[int, str]

    def process(self, global_pid: int) -> str:
        """A process by name and pid, on one line."""
        if global_pid == NONE:
            return "unknown process"
        name = " ".join(self.processes.get(global_pid, "").split())
        return f"{name} pid {own_id(global_pid >> ID_BITS)}".strip()

    def thread(self, global_tid: int) -> str:
        """A thread by name and tid."""
        return f"{self.threads.get(global_tid, '')} {own_id(global_tid)}".strip()

    def device(self, global_pid: int, devices: Iterable[int]) -> str:
        """The distinct names of a process's GPUs; `unknown device` where none is known."""
        pid = own_id(global_pid >> ID_BITS)
        names = {self.gpus.get((pid, n)) or self.default_gpus.get(n, "") for n in devices}
        return ", ".join(sorted(names - {""})) or "unknown device"


def read(export: Export) -> About:
    """What the export's small tables say. Raises TraceError for one that cannot be read."""
    gpus, default_gpus = _gpus(export)
    return About(_processes(export), _threads(export), gpus, default_gpus)


def process_of(global_ids: Ints) -> Ints:
    """The global process id in global thread or process ids; NONE stays NONE."""
    return np.where(global_ids == NONE, NONE, global_ids & ~ID_MASK)


def own_id(global_id: int) -> int:
    """The system's id in the lowest bits of a global one."""
    return global_id & ID_MASK


def copy_kinds(export: Export) -> dict[int, str]:
    """The export's own words for the kinds of copies."""
    return {row[0]: name for row, name in _rows(export, "ENUM_CUDA_MEMCPY_OPER", ["id"])}


def _processes(export: Export) -> dict[int, str]:
    return {row[0]: name for row, name in _rows(export, "PROCESSES", ["globalPid"])}


def _threads(export: Export) -> dict[int, str]:
    if "ThreadNames" not in export.tables:
        return {}
    found = export.read("ThreadNames", ["nameId", "globalTid"])
    texts = export.strings(found["nameId"])
    names: dict[int, str] = {}
    for thread, text in zip(found["globalTid"].tolist(), found["nameId"].tolist(), strict=True):
        names.setdefault(thread, texts.get(text, ""))
    return names


def _gpus(export: Export) -> tuple[dict[tuple[int, int], str], dict[int, str]]:
    names: dict[int, str] = {}
    default: dict[int, str] = {}
    for (gpu, device), name in _rows(export, "TARGET_INFO_GPU", ["id"], ["cuDevice"]):
        names.setdefault(gpu, name)
        default.setdefault(device if device != NONE else gpu, name)
    gpus: dict[tuple[int, int], str] = {}
    needed = ["gpuId", "cudaId", "pid"]
    for (gpu, device, pid), _ in _rows(export, "TARGET_INFO_CUDA_DEVICE", needed):
        gpus.setdefault((pid, device), names.get(gpu, ""))
    return gpus, default


def _rows(
    export: Export, table: str, needed: list[str], wanted: list[str] | None = None
) -> Iterable[tuple[list[int], str]]:
    """The rows of a small table, integers and name; none where the export has no such table."""
    if table not in export.tables:
        return
    wanted = wanted or []
    for found, texts in export.chunks(table, needed, wanted, text="name"):
        columns = [found[name].tolist() for name in (*needed, *wanted)]
        for row, text in zip(zip(*columns, strict=True), texts, strict=True):
            yield list(row), (text or b"").decode("utf-8", "replace")
