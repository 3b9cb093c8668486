"""Memory, energy and step time: counted where they should be, absent with a reason elsewhere."""

import gc
import itertools
import math
import mmap
import platform
import resource
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftprof import records
from peftprof.run import meters
from peftprof.run.meters import (
    EnergyMeter,
    PeakMemory,
    StepClock,
    give_back,
    percentiles,
    rapl_zones,
)
from peftprof.run.statistics import wilson

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)


class FakeNvml:
    """As much of pynvml as is used: one GPU, its energy counter and its processes."""

    class NVMLError(Exception):
        pass

    def __init__(self, processes=(), millijoules=0):
        self.processes = list(processes)
        self.millijoules = millijoules

    def nvmlDeviceGetHandleByUUID(self, uuid):  # noqa: N802
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):  # noqa: N802
        assert handle == "handle"
        if self.millijoules is None:
            raise self.NVMLError("Not Supported")
        return self.millijoules

    def nvmlDeviceGetComputeRunningProcesses(self, handle):  # noqa: N802
        assert handle == "handle"
        return [SimpleNamespace(pid=p, usedGpuMemory=used) for p, used in self.processes]


@pytest.fixture
def gpu(monkeypatch):
    """torch's answers for one GPU, where there may be none."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="1234"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 200)


def make_zone(powercap: Path, folder: str, name: str, energy: int = 0, largest: int = 1000) -> Path:
    zone = powercap / folder
    zone.mkdir(parents=True)
    (zone / "name").write_text(f"{name}\n")
    (zone / "energy_uj").write_text(f"{energy}\n")
    (zone / "max_energy_range_uj").write_text(f"{largest}\n")
    return zone


def test_rapl_energy_of_the_counted_stretches_only(tmp_path):
    zones = [
        make_zone(tmp_path, f"intel-rapl:{i}", f"package-{i}", energy=100, largest=10**9)
        for i in range(2)
    ]
    make_zone(tmp_path, "intel-rapl:0:0", "core")
    make_zone(tmp_path, "intel-rapl:2", "psys")
    make_zone(tmp_path, "intel-rapl-mmio:0", "package-0")
    meter = EnergyMeter(CPU, powercap=tmp_path)

    def read(first: int, second: int) -> None:
        for zone, value in zip(zones, (first, second), strict=True):
            (zone / "energy_uj").write_text(str(value))

    read(1_000_000, 0)
    meter.resume()
    read(3_500_000, 1_000_000)
    meter.resume()  # counting already
    meter.pause()
    read(900_000_000, 900_000_000)
    meter.pause()
    meter.resume()
    read(901_000_000, 900_500_000)
    energy = meter.result()
    assert energy.joules == {"CPU package-0": 3.5, "CPU package-1": 1.5}
    assert energy.absent == {"GPU": "the run is on cpu, not on CUDA"}
    assert meter.result() == energy
    assert records.decode(records.Energy, records.encode(energy)) == energy


def test_rapl_counter_that_starts_again_from_zero(tmp_path):
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0", 262_000_000, 262_143_000)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    meter.resume()
    (zone / "energy_uj").write_text("1000000")
    assert meter.result().joules["CPU package-0"] == pytest.approx(1.143)


def test_rapl_absences_have_reasons(tmp_path):
    assert "no RAPL" in EnergyMeter(CPU, powercap=tmp_path).result().absent["CPU"]
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0")
    (zone / "energy_uj").write_text("nonsense")
    assert "cannot be read" in EnergyMeter(CPU, powercap=tmp_path).result().absent["CPU"]


def test_rapl_for_root_only(tmp_path, monkeypatch):
    make_zone(tmp_path, "intel-rapl:0", "package-0")
    read_text = Path.read_text

    def refuse(path: Path) -> str:  # as the kernel does; a mode of 0 would not stop root
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(meters.Absent, match="by root only"):
        rapl_zones(tmp_path)
    assert "by root only" in EnergyMeter(CPU, powercap=tmp_path).result().absent["CPU"]


def test_a_counter_that_fails_on_the_way_has_no_total(tmp_path):
    zone = make_zone(tmp_path, "intel-rapl:0", "package-0")
    meter = EnergyMeter(CPU, powercap=tmp_path)
    meter.resume()
    (zone / "energy_uj").unlink()
    energy = meter.result()
    assert energy.joules == {}
    assert "cannot be read" in energy.absent["CPU package-0"]


def test_gpu_energy(gpu, tmp_path):
    nvml = FakeNvml(millijoules=5_000)
    meter = EnergyMeter(CUDA, nvml=nvml, powercap=tmp_path)
    meter.resume()
    nvml.millijoules = 7_500
    assert meter.result().joules == {"GPU": 2.5}
    meter = EnergyMeter(CUDA, nvml=FakeNvml(millijoules=None), powercap=tmp_path)
    assert meter.result().absent["GPU"] == "NVML has no energy counter for this GPU (Not Supported)"


def test_peak_memory_on_cuda(gpu):
    nvml = FakeNvml([(1, 7), (42, 500)])
    memory = PeakMemory(CUDA, nvml=nvml, pid=42)
    memory.start()
    nvml.processes = [(42, 900)]
    memory.sample()
    nvml.processes = [(42, 300)]
    result = memory.result()
    assert (result.allocated_bytes, result.reserved_bytes, result.nvml_bytes) == (100, 200, 900)
    assert result.rss_bytes
    assert not {"allocated_bytes", "reserved_bytes", "nvml_bytes"} & result.absent.keys()
    # A new pass knows nothing of the one before.
    memory.start()
    assert memory.result().nvml_bytes == 300


@pytest.mark.parametrize(
    ("processes", "reason"), [([(1, 7)], "no process 42"), ([(42, None)], "does not tell")]
)
def test_nvml_memory_is_absent_with_a_reason(gpu, processes, reason):
    memory = PeakMemory(CUDA, nvml=FakeNvml(processes), pid=42)
    memory.start()
    result = memory.result()
    assert result.nvml_bytes is None
    assert reason in result.absent["nvml_bytes"]


def test_peak_memory_on_cpu_says_what_is_absent():
    memory = PeakMemory(CPU)
    memory.start()
    result = memory.result()
    assert (result.allocated_bytes, result.reserved_bytes, result.nvml_bytes) == (None, None, None)
    assert {"allocated_bytes", "reserved_bytes", "nvml_bytes"} <= result.absent.keys()
    assert records.decode(records.Memory, records.encode(result)) == result


@needs_proc
def test_host_peak_is_that_of_the_pass_and_grows_when_memory_is_touched():
    size = 256 * 2**20
    memory = PeakMemory(CPU)
    memory.start()
    base = memory.result().rss_bytes
    # Pages of its own: the allocator would give a tensor what other tests have left resident.
    with mmap.mmap(-1, size) as pages:
        torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
        assert memory.current_bytes() >= base + size // 2
    peak = memory.result()
    assert peak.rss_bytes >= base + size // 2  # the peak stays when the memory is gone
    assert "rss_reset" not in peak.absent
    memory.start()
    later = memory.result()
    assert later.rss_bytes < base + size // 2  # and is forgotten by the next pass,
    assert later.loading_bytes == peak.rss_bytes  # for which it was before


def test_host_peak_that_cannot_be_reset_is_the_whole_process_and_says_so(tmp_path):
    memory = PeakMemory(CPU, proc=tmp_path / "nowhere")
    memory.start()
    result = memory.result()
    assert result.rss_bytes > 2**20
    assert "whole process" in result.absent["rss_reset"]
    assert memory.current_bytes() is None


def test_step_clock_counts_steps_and_nothing_else():
    # Each look at the clock is at the next of these.
    times = iter([0, 10, 100, 107, 1000, 1001])
    clock = StepClock(CPU, clock=lambda: next(times))
    for _ in range(2):
        clock.start()
        clock.stop()
    assert clock.durations_ns() == [10, 7]
    assert clock.durations_ns() == []
    clock.start()
    clock.stop()
    assert clock.durations_ns() == [1]


def test_step_clock_refuses_what_makes_no_sense():
    clock = StepClock(CPU, clock=itertools.count().__next__)
    with pytest.raises(RuntimeError, match="no step"):
        clock.stop()
    clock.start()
    with pytest.raises(RuntimeError, match="inside a step"):
        clock.start()


def test_step_clock_holds_no_step_that_has_not_ended():
    clock = StepClock(CPU)
    clock.start()
    assert clock.durations_ns() == []
    clock.stop()
    (duration,) = clock.durations_ns()
    assert duration > 0


@needs_gpu
def test_step_clock_times_the_device_and_not_the_launch():
    clock = StepClock(CUDA)
    for cycles in (0, 10_000_000):
        clock.start()
        torch.cuda._sleep(cycles)
        clock.stop()
    nothing, asleep = clock.durations_ns()
    assert asleep > 10 * nothing


@needs_gpu
def test_peak_memory_of_a_real_gpu():
    memory = PeakMemory(CUDA)
    memory.start()
    torch.empty(2**20, dtype=torch.uint8, device=CUDA)
    result = memory.result()
    assert result.allocated_bytes >= 2**20
    assert result.reserved_bytes >= result.allocated_bytes
    assert (result.nvml_bytes is None) == ("nvml_bytes" in result.absent)


def test_percentiles():
    assert percentiles(list(range(101))) == (50.0, 95.0, 99.0)
    assert percentiles([7]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="no durations"):
        percentiles([])


@pytest.mark.parametrize(
    ("correct", "n", "low", "high"),
    [
        # Newcombe 1998, Statistics in Medicine 17:857, table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (29, 29, 0.8830, 1.0),  # by symmetry with 0 of 29: 0.0000 to 0.1170
    ],
)
def test_wilson_is_the_published_interval(correct, n, low, high):
    assert wilson(correct, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 10**7).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_proportion_and_is_symmetric(counts):
    correct, n = counts
    low, high = wilson(correct, n)
    assert 0 <= low <= correct / n <= high <= 1
    other_low, other_high = wilson(n - correct, n)
    assert math.isclose(low, 1 - other_high, abs_tol=1e-9)
    assert math.isclose(high, 1 - other_low, abs_tol=1e-9)


def test_wilson_of_nothing_and_of_nonsense():
    assert wilson(0, 0) == (0.0, 1.0)
    for correct, n in ((2, 1), (-1, 5)):
        with pytest.raises(ValueError, match="no proportion"):
            wilson(correct, n)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_holes_in_the_heap_go_back_to_the_system():
    # Each below what glibc maps by itself; what stays stands between what is freed.
    blocks = [torch.ones(12_500, dtype=torch.float64) for _ in range(3000)]
    kept = blocks[::10]
    del blocks
    gc.collect()
    before = resident_bytes()
    give_back()
    assert before - resident_bytes() > 100e6
    assert all(bool((block == 1).all()) for block in kept)


def resident_bytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
