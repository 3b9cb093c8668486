"""`python -m peftprof calibrate`: what this device needs for the operators of a step.

About a minute: curves of `probes.py`, timed in turn with held-out calls, which say how far
off the curves are; constants of Python, dispatch and autograd; memory of a process.
"""

import dataclasses
import datetime
import gc
import importlib.metadata
import math
import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from peftprof import devices
from peftprof.breakdowns import Ceilings
from peftprof.calibrations import (
    BYTES,
    FLOPS,
    NARROW,
    VERSION,
    Calibration,
    Checked,
    Curve,
    key_of,
)
from peftprof.errors import DeviceError, InputError
from peftprof.run import ceilings, environment, probes
from peftprof.run.footprint import process_bytes
from peftprof.run.overheads import overheads
from peftprof.run.probes import Probe
from peftprof.run.timing import Times, time_in_turn, warm_seconds

Floats = np.ndarray[Any, np.dtype[np.float64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]
Tell = Callable[[str, float], None]

# All timed calls together, the held-out ones included; on a quiet machine less is enough.
SECONDS: Final = 30.0
MOST: Final = 1.0  # of the largest sizes that are measured
# Longer calls than this cannot be had undisturbed, and rates are reached long before.
_LONGEST_S: Final = {"cpu": 0.003, "cuda": 0.05}
_LARGER: Final = 4
_PACKAGES: Final = ("peftprof", "torch", "transformers", "peft", "bitsandbytes", "datasets")
# The error that is promised is never less: a step is more than its operators.
_LEAST_INTERVAL, _MOST_INTERVAL = 0.1, 2.0


@dataclass(frozen=True)
class Outcome:
    """A calibration, and the held-out calls that were timed undisturbed, of `held` in all."""

    calibration: Calibration
    checked: tuple[Checked, ...]
    held: int


def device_of(name: str) -> torch.device:
    """The device that --device means. Raises DeviceError where it is not here."""
    return environment.check_device(environment.default_device() if name == "auto" else name)


def key(device: torch.device) -> str:
    """What a calibration of `device` is kept under, as it is set up now."""
    return key_of(device_name(device), torch.get_num_threads(), str(torch.__version__))


def stored(device: torch.device) -> Calibration | None:
    """The calibration of `device`, if it was measured. Raises InputError when damaged."""
    return devices.load(key(device))


def measure(
    device: torch.device,
    tell: Tell = lambda what, done: None,
    seconds: float | None = None,
    most: float | None = None,
) -> Outcome:
    """Calibrate `device`. `seconds` and `most` (of the largest sizes) make it shorter."""
    seconds, most = SECONDS if seconds is None else seconds, MOST if most is None else most
    context = _context_bytes(device)
    tell("memory of a process", 0.0)
    resident = process_bytes()
    tell("ceilings", 0.0)
    peaks = ceilings.measure(device)
    tell("operators", 0.0)
    with torch.no_grad():
        pool = probes.Pool(device)
        ladders = [_climbed(probe, device) for probe in probes.ladders(device, pool, most)]
        products = [some[-1] for some in ladders if (some[0].kind, some[0].per) == ("gemm", FLOPS)]
        largest = {probe.dtype: probe.flops for probe in products}
        held = _within(probes.held_out(device, pool), largest)
        timed = [probe for ladder in ladders for probe in ladder] + held
        times = _timed(timed, device, seconds, lambda done: tell("operators", done))
    tell("overheads", 1.0)
    curves, at = [], 0
    for ladder in ladders:
        curves.append(_curve(ladder, times[at : at + len(ladder)], peaks.bytes_per_s))
        at += len(ladder)
    made = Calibration(
        version=VERSION,
        basis="measured",
        source=peaks.source,
        device=device_name(device),
        kind=device.type,
        memory_bytes=_memory_bytes(device),
        threads=torch.get_num_threads(),
        created=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        versions={name: importlib.metadata.version(name) for name in _PACKAGES}
        | {"torch": str(torch.__version__)},
        ceilings=_reached(peaks, curves),
        curves=tuple(curves),
        overheads=overheads(device),
        process_bytes=resident,
        context_bytes=context,
        interval=1.0,
        disturbed=_disturbed(times),
    )
    checked = _checked(made, held, times[at:])
    return Outcome(_with_interval(made, checked), checked, _count(held))


def keep(made: Calibration) -> tuple[Path, bool]:
    """Store `made`; its file, and whether it was. One of a busy machine replaces no better one.

    Raises FolderError where it cannot be written.
    """
    try:
        before = devices.load(made.key)
    except InputError:
        before = None
    if made.busy and before is not None and before.disturbed < made.disturbed / 2:
        return devices.path_for(made.key), False
    return devices.store(made), True


def check(device: torch.device, tell: Tell = lambda what, done: None) -> Outcome:
    """Time the held-out calls again, against what is stored. Raises InputError without that."""
    calibration = stored(device)
    if calibration is None:
        raise InputError(
            f"{device_name(device)} has no calibration; `python -m peftprof calibrate` makes one"
        )
    with torch.no_grad():
        curves = [c for c in calibration.curves if (c.kind, c.per) == ("gemm", FLOPS)]
        largest = {curve.dtype: curve.sizes[-1] for curve in curves}
        held = _within(probes.held_out(device, probes.Pool(device)), largest)
        times = _timed(held, device, SECONDS, lambda done: tell("held-out calls", done))
    return Outcome(calibration, _checked(calibration, held, times), _count(held))


def _timed(
    timed: list[Probe], device: torch.device, seconds: float, tell: Callable[[float], None]
) -> list[Times]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        return time_in_turn([probe.call for probe in timed], device, seconds, tell)
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{device} has too little free memory to be calibrated; end what else uses it"
        ) from error
    finally:
        if collecting:
            gc.enable()


def _climbed(ladder: list[Probe], device: torch.device) -> list[Probe]:
    """The points up to the first that takes too long, that one included; two sizes at least.

    On a busy machine one call may take any time, so it is also taken from those before.
    """
    rate = 0.0
    for probe in ladder:
        taken = warm_seconds(probe.call, device)
        rate = max(rate, probe.size / taken)
        if probe.size / rate > _LONGEST_S[device.type] and probe.size > ladder[0].size:
            return [p for p in ladder if p.size <= probe.size]
    return ladder


def _within(held: list[Probe], largest: dict[str, float]) -> list[Probe]:
    """Those that this device does in little more than the longest product of its curve."""
    return [p for p in held if p.flops <= _LARGER * largest.get(p.dtype, 0.0) or not p.flops]


def _curve(ladder: list[Probe], times: list[Times], bytes_per_s: float = math.inf) -> Curve:
    """One point a size; several calls of one size are taken together, by their mean."""
    first = ladder[0]
    sizes = np.unique([probe.size for probe in ladder])
    at = [[t for p, t in zip(ladder, times, strict=True) if p.size == size] for size in sizes]
    clean = np.array([all(t.clean for t in some) for some in at])
    best = np.array([statistics.mean(t.best_s for t in some) for some in at])
    if first.per == BYTES:
        best = _bounded(sizes, best, clean, bytes_per_s)
    kept = _kept(clean)
    sizes, best = sizes[kept], best[kept]
    at = [some for some, keep in zip(at, kept, strict=True) if keep]
    # Whatever else a machine does makes calls longer: what a larger one did not need, a
    # smaller one does not, and a larger product comes at least as near to the peak.
    best = np.minimum.accumulate(best[::-1])[::-1]
    if first.per != BYTES:
        best = np.maximum.accumulate(sizes * np.minimum.accumulate(best / sizes))
    return Curve(
        first.kind,
        first.dtype,
        first.per,
        tuple(float(size) for size in sizes),
        tuple(float(s) for s in best),
        tuple(statistics.mean(t.median_s for t in some) for some in at),
        tuple(max(t.spread for t in some) for some in at),
    )


def _bounded(sizes: Floats, best: Floats, clean: Bools, bytes_per_s: float) -> Floats:
    """`best`, where nothing from a size on was had undisturbed at most what is plausible.

    That is the rate of the size before, or that of memory where that is less.
    """
    bounded = best.copy()
    last = int(np.flatnonzero(clean)[-1]) if clean.any() else 0
    for i in range(last + 1, len(sizes)):
        onward = bounded[i - 1] * sizes[i] / sizes[i - 1]
        bounded[i] = min(best[i], max(onward, sizes[i] / bytes_per_s))
    return bounded


def _kept(clean: Bools) -> Bools:
    """Points that a curve is made of: the undisturbed ones, and those at its ends."""
    before = np.maximum.accumulate(clean)
    behind = np.maximum.accumulate(clean[::-1])[::-1]
    kept: Bools = clean | ~(before & behind)
    return kept


def _disturbed(times: list[Times]) -> float:
    """The share of the calls that something disturbed; by their medians where none is told."""
    if any(t.clean < t.repeats for t in times):
        return 1 - sum(t.clean for t in times) / sum(t.repeats for t in times)
    return statistics.mean(t.median_s > 1.3 * t.best_s for t in times)


def _reached(peaks: Ceilings, curves: list[Curve]) -> Ceilings:
    """`peaks`, or what a curve reached where that is more: a ceiling is what is possible."""
    flops = dict(peaks.flops_per_s)
    for curve in curves:
        if curve.kind == "gemm" and curve.per == FLOPS:
            flops[curve.dtype] = max(flops.get(curve.dtype, 0.0), curve.rate)
    return dataclasses.replace(peaks, flops_per_s=flops)


def _checked(made: Calibration, held: list[Probe], times: list[Times]) -> tuple[Checked, ...]:
    """Those that were measured undisturbed; the six products of an adapter as one."""
    groups: dict[str, list[tuple[Probe, Times]]] = {}
    for probe, taken in zip(held, times, strict=True):
        name = f"adapter, {probe.rows:.0f} rows" if probe.per == NARROW else probe.label
        groups.setdefault(f"{probe.kind} {probe.dtype} {name}", []).append((probe, taken))
    return tuple(
        Checked(
            probe.kind,
            probe.dtype,
            name.removeprefix(f"{probe.kind} {probe.dtype} "),
            statistics.mean(predicted(made, p) for p, _ in group),
            statistics.mean(t.best_s for _, t in group),
        )
        for name, group in groups.items()
        for probe in [group[0][0]]
        if all(t.clean for _, t in group)
    )


def _count(held: list[Probe]) -> int:
    """Held-out calls, the products of an adapter counted once."""
    adapters = {(p.dtype, p.rows) for p in held if p.per == NARROW}
    return sum(p.per != NARROW for p in held) + len(adapters)


def predicted(calibration: Calibration, probe: Probe) -> float:
    """Seconds that the curves give for a probe."""
    found = calibration.seconds(probe.kind, probe.dtype, probe.flops, probe.bytes, probe.rows)
    return float(found[0])


def _with_interval(made: Calibration, checked: tuple[Checked, ...]) -> Calibration:
    errors = [abs(one.error) for one in checked] or [1.0]
    interval = min(max(float(np.percentile(errors, 90)), _LEAST_INTERVAL), _MOST_INTERVAL)
    return dataclasses.replace(made, interval=round(interval, 3))


# --- What the device is


def device_name(device: torch.device) -> str:
    """As the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return environment.cpu_model()


def _memory_bytes(device: torch.device) -> int:
    """Memory of the GPU, or of this machine or container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    found = environment.memory_bytes()
    if found is None:
        raise DeviceError("this system does not tell how much memory it has")
    return found


def _context_bytes(device: torch.device) -> int:
    """What a CUDA context and its libraries took of the device; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)
    torch.cuda.synchronize(device)
    from peftprof.run.meters import Absent, process_memory

    try:
        return process_memory(device, os.getpid()) - torch.cuda.memory_reserved(device)
    except Absent:
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
