"""Traces from other people's machines, against a plain count over the JSON itself."""

import gzip
import json
import time
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from peftprof.trace import kineto, load
from peftprof.trace.attribute import attribute
from peftprof.trace.events import NONE

TRACES = Path(__file__).parents[3] / "shared" / "traces"
pytestmark = pytest.mark.skipif(
    not TRACES.is_dir(), reason="the folder of other people's traces, ../shared/traces, is missing"
)

DDP = ["v100_ddp_training.json.gz", "a100_ddp_training.json.gz"]
DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@cache
def raw(name: str) -> list[dict[str, Any]]:
    with gzip.open(TRACES / name) as file:
        events: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return events


def union(spans: list[tuple[float, float]]) -> float:
    total, reached = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


@pytest.mark.parametrize("name", DDP)
def test_busy_time_agrees_with_a_plain_count(name: str) -> None:
    """Device time of what each step launched, in microseconds, one interval after another."""
    steps = sorted(
        (e["ts"], e["ts"] + e["dur"]) for e in raw(name) if "ProfilerStep#" in str(e.get("name"))
        and e.get("cat") == "user_annotation"
    )  # fmt: skip
    launches = {
        e["args"]["correlation"]: e["ts"] for e in raw(name) if e.get("cat") == "cuda_runtime"
    }
    spans = [
        (e["ts"], e["ts"] + e["dur"], launches[e["args"]["correlation"]])
        for e in raw(name)
        if e.get("cat") in DEVICE
    ]
    launched = [s for s in spans if steps[0][0] <= s[2] < steps[-1][1]]
    first, last = min(s[0] for s in launched), max(s[1] for s in launched)
    busy = union([(s[0], s[1]) for s in spans if s[1] > first and s[0] < last])

    found = attribute(kineto.read(TRACES / name))
    assert len(found.windows) == len(steps)
    assert found.pieces.ns.sum() == pytest.approx(busy * 1000, rel=1e-3)
    assert found.windows.end[-1] - found.windows.start[0] == pytest.approx(
        (max(last, steps[-1][1]) - first) * 1000, rel=1e-3
    )
    for step, window in enumerate(found.windows.length.tolist()):
        spent = int(found.pieces.ns[found.pieces.step == step].sum())
        assert spent + int(found.idle_ns[step].sum()) == window


def kind_of(name: str) -> str:
    return "talk" if name.startswith("nccl") else "copy" if name.startswith("Mem") else "compute"


@pytest.mark.parametrize("name", DDP)
def test_the_whole_trace_by_type_to_the_nanosecond(name: str) -> None:
    """A plain sweep over the edges of all device events."""
    edges = []
    for e in raw(name):
        if e.get("cat") in DEVICE:
            start, end = round(e["ts"] * 1000), round(e["ts"] * 1000) + round(e["dur"] * 1000)
            edges += [(start, 1, kind_of(e["name"])), (end, -1, kind_of(e["name"]))]
    edges.sort(key=lambda edge: edge[:2])
    running: Counter[str] = Counter()
    spent: Counter[str] = Counter()
    busy, before = 0, edges[0][0]
    for time_, change, kind in edges:
        for each in running:
            spent[each] += (time_ - before) * (running[each] > 0)
        busy += (time_ - before) * any(running.values())
        before = time_
        running[kind] += change
    (breakdown,) = load([TRACES / name]).breakdowns
    totals = breakdown.totals
    assert totals is not None
    span = edges[-1][0] - edges[0][0]
    # Absolute times lose their last digits as doubles, here and not in our reader.
    assert totals.span_ns == pytest.approx(span, rel=1e-6)
    assert totals.busy_ns == pytest.approx(busy, rel=1e-5)
    assert totals.idle_ns == totals.span_ns - totals.busy_ns
    assert totals.compute_ns == pytest.approx(spent["compute"], rel=1e-5)
    assert totals.communication_ns == pytest.approx(spent["talk"], rel=1e-5)
    assert totals.memory_ns == pytest.approx(spent["copy"], rel=1e-4)


@pytest.mark.parametrize("name", DDP)
def test_every_kernel_finds_its_launch_and_every_backward_its_forward(name: str) -> None:
    events = kineto.read(TRACES / name)
    assert (events.launch[events.on_device] != NONE).all()
    arrows = sum(e.get("cat") == "fwdbwd" and e["ph"] == "f" for e in raw(name))
    assert (events.forward != NONE).sum() >= arrows > 500
    assert (events.start[events.forward] < events.start)[events.forward != NONE].all()


@pytest.mark.parametrize("name", DDP)
def test_a_foreign_training_step_is_told_apart(name: str) -> None:
    (breakdown,) = load([TRACES / name]).breakdowns
    total = breakdown.step_ns.median
    assert sum(r.ns for r in breakdown.rows) + breakdown.idle_ns + breakdown.unattributed_ns == (
        pytest.approx(total, rel=1e-9)
    )
    rows = {(r.phase, r.category) for r in breakdown.rows}
    assert rows >= {
        ("forward", "base_gemm"),
        ("forward", "elementwise"),
        ("backward", "base_gemm"),
        ("backward", "elementwise"),
        ("optimizer", "optimizer"),
    }
    assert not {phase for phase, _ in rows} & {"other", "data"}
    assert breakdown.unattributed_ns < 0.01 * total
    assert breakdown.device in ("Tesla V100-SXM2-32GB", "NVIDIA A100-PG509-200")


def test_collectives_are_communication_and_overlap_is_listed() -> None:
    (breakdown,) = load([TRACES / "a100_ddp_training.json.gz"]).breakdowns
    nccl = [o for o in breakdown.operators if o.name.startswith("nccl")]
    assert nccl
    assert {o.category for o in nccl} == {"communication"}
    assert breakdown.overlap_ns > 0


def test_a_kernel_launched_through_the_driver_by_another_process() -> None:
    (breakdown,) = load([TRACES / "a100_triton_launch.json.gz"]).breakdowns
    (operator,) = breakdown.operators
    assert operator.name == "triton_poi_fused_add_cos_sin_0"
    assert operator.category == "elementwise"
    assert operator.ns == 1760
    assert breakdown.steps == 1


def test_reading_is_quick() -> None:
    start = time.process_time()
    load([TRACES / "v100_ddp_training.json.gz"])
    assert time.process_time() - start < 15  # about 1.5 s; a slow machine is no failure
