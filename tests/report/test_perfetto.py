import gzip
import json
import math
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.errors import FolderError, TraceError
from peftprof.report.breakdown import LABELS
from peftprof.report.perfetto import write
from peftprof.trace import kineto
from peftprof.trace.attribute import Attribution, attribute
from tests.trace.build import ENGINE, MAIN, Trace

Event = dict[str, Any]
WORK = {"unattributed", *(LABELS.get(category, category) for category in CATEGORIES)}
MADE = {"step", "phase", "idle", *WORK}


def attributed(trace: Trace) -> Attribution:
    with tempfile.TemporaryDirectory() as folder:
        return attribute(kineto.read(trace.write(Path(folder))))


def on_gpu() -> Trace:
    trace = Trace()
    trace.range("step:0", 0, 400)
    trace.range("phase:forward", 0, 100)
    trace.range("layer:encoder.0", 0, 80)
    trace.op("aten::linear", 5, 60)
    trace.kernel("sgemm\x1b[31m", 20, 90, launched=10)
    trace.kernel("elementwise_kernel", 70, 120, launched=30, stream=8)
    trace.kernel("sgemm", 80, 95, launched=40)  # overlaps on its own stream
    trace.range("phase:backward", 100, 300)
    trace.kernel("mystery_kernel", 200, 250, launched=150)
    return trace


def on_cpu() -> Trace:
    trace = Trace()
    for n in range(2):
        at = 1000 * n
        trace.range(f"step:{n}", at, at + 1000)
        trace.range("phase:forward", at + 100, at + 600)
        trace.op("aten::layer_norm", at + 150, at + 550)
        trace.op("aten::copy_", at + 200, at + 250)
        trace.op("aten::mul", at + 560, at + 900, tid=ENGINE)
    return trace


def written(*runs: tuple[str, Attribution]) -> list[Event]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "out.json"
        write(runs, path)
        assert [p.name for p in Path(folder).iterdir()] == ["out.json"]  # and nothing beside it
        document = json.loads(path.read_bytes())
    assert document["displayTimeUnit"] in ("ms", "ns")
    follows_the_format(document["traceEvents"])
    found: list[Event] = document["traceEvents"]
    return found


def follows_the_format(events: Sequence[Event]) -> None:
    """The rules of the trace event format: fields, microseconds, tracks that nest, names."""
    tracks: dict[tuple[int, int], list[tuple[int, int]]] = defaultdict(list)
    named = set()
    for event in events:
        assert event["ph"] in ("X", "M")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert event["name"]
        assert event["name"].isprintable()
        if event["ph"] == "M":
            values = {
                "process_name": "name",
                "process_labels": "labels",
                "process_sort_index": "sort_index",
                "thread_name": "name",
                "thread_sort_index": "sort_index",
            }
            assert list(event["args"]) == [values[event["name"]]]
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert event["cat"] in MADE
        assert event["ts"] >= 0
        assert event["dur"] >= 0
        assert math.isfinite(event["ts"] + event["dur"])
        start, end = round(event["ts"] * 1000), round((event["ts"] + event["dur"]) * 1000)
        tracks[event["pid"], event["tid"]].append((start, end))
    for (pid, tid), spans in tracks.items():
        assert ("thread_name", pid, tid) in named
        assert ("process_name", pid, 0) in named
        until = 0
        for start, end in spans:  # in order, and apart
            assert start >= until
            until = end


def on_track(events: Sequence[Event], name: str) -> list[tuple[str, float, float]]:
    tids = [e["tid"] for e in events if e["ph"] == "M" and e["args"].get("name") == name]
    return [
        (e["name"], round(1000 * e["ts"]), round(1000 * (e["ts"] + e["dur"])))
        for e in events
        if e["ph"] == "X" and e["tid"] in tids
    ]


def test_kernels_are_on_the_tracks_of_their_categories() -> None:
    events = written(("run\x07", attributed(on_gpu())))
    # One stream's overlapping kernels get a track each.
    assert on_track(events, "base GEMM, stream 7") == [("sgemm[31m", 20, 90)]
    assert on_track(events, "base GEMM, stream 7 (2)") == [("sgemm", 80, 95)]
    assert on_track(events, "unattributed, stream 7") == [("mystery_kernel", 200, 250)]
    (gemm,) = [event for event in events if event["name"] == "sgemm[31m"]
    assert gemm["cat"] == "base GEMM"
    assert gemm["args"]["phase"] == "forward"
    assert gemm["args"]["layer"] == "layer:encoder.0"
    assert gemm["args"]["rule"]
    assert on_track(events, "steps") == [("step 1 of 1", 20, 400)]
    assert on_track(events, "phases") == [("forward", 20, 120), ("backward", 200, 250)]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {"run"}


def test_idle_time_has_its_cause() -> None:
    events = written(("run", attributed(on_gpu())))
    idle = on_track(events, "idle")
    assert idle[0] == ("launch-bound", 120, 200)
    assert [(start, end) for _, start, end in idle] == [(120, 200), (250, 400)]


def test_on_a_cpu_time_is_self_time_on_each_thread() -> None:
    events = written(("run", attributed(on_cpu())))
    (norm,) = {
        e["args"]["name"]
        for e in events
        if e["ph"] == "M" and e["args"].get("name", "").startswith("elementwise, thread 1")
    }
    assert on_track(events, norm)[:2] == [
        ("aten::layer_norm", 150, 200),
        ("aten::layer_norm", 250, 550),
    ]
    assert {name for name, _, _ in on_track(events, "idle")} == {"idle"}


@pytest.mark.parametrize("trace", [on_gpu(), on_cpu()])
def test_the_idle_track_sums_to_idle(trace: Trace) -> None:
    found = attributed(trace)
    idle = sum(end - start for _, start, end in on_track(written(("run", found)), "idle"))
    assert idle == found.idle_ns.sum()


def test_each_run_is_a_process() -> None:
    events = written(("one", attributed(on_gpu())), ("two", attributed(on_cpu())))
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {1: "one", 2: "two"}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["sgemm", "elementwise_kernel", "ncclKernel_AllReduce", "what"]),
            st.integers(0, 300),
            st.integers(0, 60),
            st.integers(0, 199),
            st.integers(7, 8),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_whatever_overlaps_follows_the_format(
    kernels: list[tuple[str, int, int, int, int]],
) -> None:
    trace = Trace()
    for n in range(2):
        trace.range(f"step:{n}", 100 * n, 100 * n + 100)
        trace.range("phase:forward", 100 * n, 100 * n + 50)
    trace.op("aten::add", 0, 10)
    for name, later, lasts, launched, stream in kernels:
        start = launched + later
        trace.kernel(name, start, start + lasts, launched, MAIN, stream)
    found = attributed(trace)
    events = written(("run", found))
    work = [e for e in events if e["ph"] == "X" and e["cat"] in WORK]
    rows = np.unique(found.pieces.row)  # whatever was given time in a step is drawn
    assert len(work) >= len(rows)
    assert {event["args"]["phase"] for event in work} <= set(PHASES)


def test_a_name_with_gz_is_zipped(tmp_path: Path) -> None:
    found = attributed(on_cpu())
    write([("run", found)], tmp_path / "out.json")
    write([("run", found)], tmp_path / "out.json.gz")
    plain = (tmp_path / "out.json").read_bytes()
    assert gzip.decompress((tmp_path / "out.json.gz").read_bytes()) == plain


def test_where_no_file_can_be_is_an_error_of_a_line(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no" / "such.json", Path()):
        with pytest.raises(FolderError, match="--perfetto"):
            write([("run", attributed(on_cpu()))], path)
    assert not list(tmp_path.iterdir())


def test_our_own_reader_says_in_a_line_that_it_is_no_trace_to_read(tmp_path: Path) -> None:
    trace = on_gpu()
    trace.kernel("Memcpy DtoD", 300, 310, launched=290, cat="gpu_memcpy")
    write([("run", attributed(trace))], tmp_path / "out.json")
    with pytest.raises(TraceError) as caught:
        attribute(kineto.read(tmp_path / "out.json"))
    assert str(caught.value).isprintable()
