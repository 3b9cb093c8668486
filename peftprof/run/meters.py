"""What a pass costs: peak memory, energy, and the time of each step.

A figure that this machine cannot give raises `Absent` where it is read, and its message
ends up as the figure's reason in `records.Memory.absent` or `records.Energy.absent`.
"""

import ctypes
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from peftprof.records import Energy, Memory

POWERCAP = Path("/sys/class/powercap")
PROC = Path("/proc/self")


class Absent(Exception):  # noqa: N818  # an answer rather than an error
    """A figure that cannot be had here; the message is a self-contained reason."""


def give_back() -> None:
    """Return what glibc's heap has free to the system; nothing with another C library.

    Batches of ever other sizes leave holes between blocks in use, which glibc keeps: without
    this the resident memory of a run grows by megabytes a step.
    """
    if sys.platform == "linux" and hasattr(library := ctypes.CDLL(None), "malloc_trim"):
        library.malloc_trim(0)


class PeakMemory:
    """Peaks of device and host memory between `start` and `result`.

    The allocator's peaks and the host's are kept by torch and the kernel; what NVML shows
    (context and libraries included) is the largest seen by `sample`.
    """

    def __init__(
        self, device: torch.device, *, nvml: Any = None, proc: Path = PROC, pid: int | None = None
    ) -> None:
        self._device = device
        self._nvml = nvml
        self._proc = proc
        self._pid = os.getpid() if pid is None else pid
        self._nvml_peak: int | None = None
        self._absent: dict[str, str] = {}
        self._peak_is_ours = False
        self._loading: int | None = None

    def start(self) -> None:
        """Forget earlier peaks, and what loading a model has left in the heap of a CPU's run."""
        self._nvml_peak, self._absent = None, {}
        self._loading = _status_bytes(self._proc, "VmHWM")
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            give_back()
        try:
            # 5 resets VmHWM to the resident size of now (Linux, proc_pid_clear_refs(5)).
            (self._proc / "clear_refs").write_text("5")
            self._peak_is_ours = True
        except OSError as error:
            self._peak_is_ours = False
            self._absent["rss_reset"] = (
                f"the peak of the host could not be reset ({error.strerror}), so it is that of "
                "the whole process"
            )
        self.sample()

    def sample(self) -> None:
        """Look at the memory that NVML shows for this process."""
        try:
            seen = process_memory(self._device, self._pid, self._nvml)
        except Absent as reason:
            self._absent["nvml_bytes"] = str(reason)
            return
        self._absent.pop("nvml_bytes", None)
        self._nvml_peak = max(seen, self._nvml_peak or 0)

    def current_bytes(self) -> int | None:
        """Memory in use: the allocator's on CUDA, else resident on the host."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return _status_bytes(self._proc, "VmRSS")

    def result(self) -> Memory:
        """The peaks since `start`."""
        self.sample()
        absent = dict(self._absent)
        allocated = reserved = None
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            reserved = torch.cuda.max_memory_reserved(self._device)
        else:
            absent["allocated_bytes"] = absent["reserved_bytes"] = _not_cuda(self._device)
        if self._nvml_peak is not None:
            absent.pop("nvml_bytes", None)
        host = self._host_peak()
        return Memory(allocated, reserved, self._nvml_peak, host, absent, self._loading)

    def _host_peak(self) -> int:
        peak = _status_bytes(self._proc, "VmHWM") if self._peak_is_ours else None
        if peak is not None:
            return peak
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024


class EnergyMeter:
    """Energy of the stretches between `resume` and `pause`, by counter.

    The counters are the whole GPU's and the whole CPU package's: whatever else runs there
    is in them. A stretch should be under a minute, since a RAPL counter starts again from
    zero every few minutes at full load and one such restart is all that can be seen.
    """

    def __init__(
        self, device: torch.device, *, nvml: Any = None, powercap: Path = POWERCAP
    ) -> None:
        self._joules: dict[str, float] = {}
        self._absent: dict[str, str] = {}
        self._counters: dict[str, Callable[[], int]] = {}  # in microjoules
        self._wraps: dict[str, int] = {}
        self._from: dict[str, int] | None = None
        self._counted = False
        try:
            handle, library = _handle(device, nvml)
            self._add("GPU", lambda: _gpu_energy_uj(handle, library), wrap=0)
        except Absent as reason:
            self._absent["GPU"] = str(reason)
        try:
            for zone in rapl_zones(powercap):
                self._add(f"CPU {zone.name}", zone.energy_uj, zone.max_uj)
        except Absent as reason:
            self._absent["CPU"] = str(reason)

    def _add(self, name: str, read: Callable[[], int], wrap: int) -> None:
        read()
        self._counters[name], self._wraps[name], self._joules[name] = read, wrap, 0.0

    def resume(self) -> None:
        """Count from here; nothing changes when it is counting already."""
        if self._from is None:
            self._from = self._read()
            self._counted = True

    def pause(self) -> None:
        """Count no further; nothing changes when it is not counting."""
        if self._from is None:
            return
        for name, now in self._read().items():
            used = now - self._from.get(name, now)
            if used < 0:
                used += self._wraps[name]
            self._joules[name] += used / 1e6
        self._from = None

    def result(self) -> Energy:
        """The joules of all stretches so far; none where there was no stretch."""
        self.pause()
        if not self._counted:
            unused = dict.fromkeys(self._joules, "no step was timed")
            return Energy({}, self._absent | unused)
        return Energy(dict(self._joules), dict(self._absent))

    def _read(self) -> dict[str, int]:
        seen = {}
        for name, read in list(self._counters.items()):
            try:
                seen[name] = read()
            except Absent as reason:  # one that fails on the way has no total any more
                del self._counters[name], self._joules[name]
                self._absent[name] = str(reason)
        return seen


@dataclass(frozen=True)
class Zone:
    """One RAPL package zone: its energy counter runs from 0 to `max_uj` and starts again."""

    name: str
    path: Path
    max_uj: int

    def energy_uj(self) -> int:
        """The counter, in microjoules. Raises Absent when it cannot be read."""
        return _counter(self.path / "energy_uj")


def rapl_zones(powercap: Path = POWERCAP) -> list[Zone]:
    """The CPU packages' energy counters. Raises Absent when there is none to be read."""
    zones = []
    # AMD's are called intel-rapl too. intel-rapl-mmio:0 is package 0 a second time, and
    # intel-rapl:0:1 a part of it.
    for folder in sorted(powercap.glob("intel-rapl:*")):
        if folder.name.count(":") == 1 and (folder / "name").exists():
            name = (folder / "name").read_text().strip()
            if name.startswith("package"):
                zones.append(Zone(name, folder, _counter(folder / "max_energy_range_uj")))
    if not zones:
        raise Absent("the kernel shows no RAPL energy counter (virtual machines rarely have one)")
    for zone in zones:
        zone.energy_uj()
    return zones


def _counter(path: Path) -> int:
    try:
        return int(path.read_text())
    except PermissionError:
        raise Absent("the RAPL energy counter may be read by root only") from None
    except (OSError, ValueError) as error:
        raise Absent(f"the RAPL energy counter cannot be read ({error})") from None


def together(before: Memory | None, after: Memory) -> Memory:
    """The peaks of two parts of a pass, the second after a resume."""
    if before is None:
        return after
    sizes = {
        name: max((size for size in (a, b) if size is not None), default=None)
        for name, a, b in (
            ("allocated_bytes", before.allocated_bytes, after.allocated_bytes),
            ("reserved_bytes", before.reserved_bytes, after.reserved_bytes),
            ("nvml_bytes", before.nvml_bytes, after.nvml_bytes),
            ("rss_bytes", before.rss_bytes, after.rss_bytes),
            ("loading_bytes", before.loading_bytes, after.loading_bytes),
        )
    }
    return Memory(**sizes, absent=before.absent | after.absent)


def added(before: Energy | None, after: Energy) -> Energy:
    """The joules of two parts of a pass; a counter missing in one is missing in both."""
    if before is None:
        return after
    both = before.joules.keys() & after.joules.keys()
    lost = dict.fromkeys(before.joules.keys() ^ after.joules.keys(), "not counted in all parts")
    return Energy(
        {name: before.joules[name] + after.joules[name] for name in both},
        lost | before.absent | after.absent,
    )


def energy_of_all(measured: Sequence[tuple[Energy, bool]]) -> Energy:
    """The joules of all processes of a run, each with whether it is the first of its machine.

    GPUs add up. A CPU package is its machine's, and the first there counts it for all. A
    counter that one process lacks has no sum.
    """
    if len(measured) == 1:
        return measured[0][0]
    joules: dict[str, float] = {}
    absent: dict[str, str] = {}
    for energy, counts_host in measured:
        for name in energy.joules.keys() | energy.absent.keys():
            if name.startswith("CPU") and not counts_host:
                continue
            if name in energy.joules:
                joules[name] = joules.get(name, 0.0) + energy.joules[name]
            else:
                absent[name] = energy.absent[name]
    lost = [name for name in joules for other in absent if f"{name} ".startswith(f"{other} ")]
    return Energy({name: j for name, j in joules.items() if name not in lost}, absent)


class StepClock:
    """Durations of steps without a wait inside the pass.

    On CUDA an event is recorded at each edge and read when the durations are asked for, so
    a step lasts as long as the device worked or waited on it; elsewhere a clock is read.
    """

    def __init__(
        self, device: torch.device, clock: Callable[[], int] = time.perf_counter_ns
    ) -> None:
        self._cuda = device if device.type == "cuda" else None
        self._clock = clock
        self._begun: Any = None
        self._steps: list[tuple[Any, Any]] = []

    def start(self) -> None:
        """A step begins."""
        if self._begun is not None:
            raise RuntimeError("a step is begun inside a step")
        self._begun = self._now()

    def stop(self) -> None:
        """The step is over; what follows up to the next `start` is nobody's."""
        if self._begun is None:
            raise RuntimeError("no step to end")
        self._steps.append((self._begun, self._now()))
        self._begun = None

    def durations_ns(self) -> list[int]:
        """Durations of the steps ended since the last call; waits for the device."""
        steps, self._steps = self._steps, []
        if self._cuda is not None and steps:
            steps[-1][1].synchronize()
        return [self._between(begun, ended) for begun, ended in steps]

    def _now(self) -> Any:
        if self._cuda is None:
            return self._clock()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._cuda))
        return event

    def _between(self, begin: Any, end: Any) -> int:
        if self._cuda is None:
            return int(end - begin)
        milliseconds: float = begin.elapsed_time(end)
        return round(milliseconds * 1e6)


def percentiles(durations_ns: Sequence[float]) -> tuple[float, float, float]:
    """p50, p95 and p99, linear between neighbours. Raises ValueError when there is none."""
    if not durations_ns:
        raise ValueError("percentiles of no durations")
    p50, p95, p99 = np.percentile(np.asarray(durations_ns, dtype=np.float64), (50, 95, 99))
    return float(p50), float(p95), float(p99)


@cache
def open_nvml() -> Any:
    """The module pynvml, initialised. Raises Absent where there is no NVML."""
    try:
        import pynvml
    except ModuleNotFoundError:
        raise Absent("the package nvidia-ml-py is not installed") from None
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        raise Absent(f"NVML cannot be opened ({error})") from None
    return pynvml


def process_memory(device: torch.device, pid: int, nvml: Any = None) -> int:
    """Bytes of the GPU's memory that NVML counts to process `pid`, or raises Absent."""
    handle, library = _handle(device, nvml)
    try:
        processes = library.nvmlDeviceGetComputeRunningProcesses(handle)
    except library.NVMLError as error:
        raise Absent(f"NVML lists no processes ({error})") from None
    for process in processes:
        if process.pid == pid:
            if process.usedGpuMemory is None:
                raise Absent("NVML does not tell the memory of a process on this driver")
            return int(process.usedGpuMemory)
    # In a container NVML lists the process under the pid that it has outside.
    raise Absent(f"NVML lists no process {pid} (in a container it knows other process numbers)")


def _handle(device: torch.device, nvml: Any) -> tuple[Any, Any]:
    if device.type != "cuda":
        raise Absent(_not_cuda(device))
    library = open_nvml() if nvml is None else nvml
    # By UUID: CUDA_VISIBLE_DEVICES renumbers devices for torch and not for NVML.
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    try:
        return library.nvmlDeviceGetHandleByUUID(uuid), library
    except library.NVMLError as error:
        raise Absent(f"NVML does not know {device} ({error})") from None


def _gpu_energy_uj(handle: Any, library: Any) -> int:
    try:
        return int(library.nvmlDeviceGetTotalEnergyConsumption(handle)) * 1000  # from mJ
    except library.NVMLError as error:
        raise Absent(f"NVML has no energy counter for this GPU ({error})") from None


def _not_cuda(device: torch.device) -> str:
    return f"the run is on {device.type}, not on CUDA"


def _status_bytes(proc: Path, key: str) -> int | None:
    try:
        lines = (proc / "status").read_text().splitlines()
    except FileNotFoundError:  # not Linux
        return None
    for line in lines:
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    return None
