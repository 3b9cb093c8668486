"""The limits that keep a stranger's trace from taking all there is; what is exact within them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import Ceilings
from peftprof.errors import PeftprofError, TraceError
from peftprof.report import perfetto
from peftprof.trace import ceilings, columns, kineto, load, numbering, rules, stream
from peftprof.trace.attribute import attribute
from peftprof.trace.events import NONE, rows_of
from peftprof.trace.nesting import ROUNDING_NS, nest
from tests.trace.build import MAIN, Trace
from tests.trace.hostile import MM, ONE, OPEN, event, trace
from tests.trace.nsys_files import Nsys

FAR = 1_000_000


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), min_size=1, max_size=14))
def test_crossing_events_nest_as_a_plain_search_says(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    written = Trace()
    for start, length in spans:
        written.op("o", 300 * start, 300 * (start + length))
    for start in (FAR, FAR + 10 * ROUNDING_NS):  # so that events cross, whatever came before
        written.op("o", start, start + 20 * ROUNDING_NS)
    events = kineto.read(written.write(tmp_path_factory.mktemp("crossing")))
    start, end = events.start.tolist(), events.end.tolist()
    tree = nest(events)
    for i in range(len(events)):
        around = [
            j for j in range(i) if end[j] > start[i] and end[j] + ROUNDING_NS >= end[i]
        ]  # fmt: skip
        assert tree.parent[i] == (around[-1] if around else NONE)
    for at in range(0, FAR // 10, 300):
        open_now = [i for i in range(len(events)) if start[i] <= at < end[i]]
        inside = (tree.innermost.start <= at) & (at < tree.innermost.end)
        assert tree.innermost.row[inside].tolist() == open_now[-1:]


def test_names_are_cut_and_come_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    names = numbering.Names()
    assert names["a" * 9000] == names["a" * 5000] == 0
    assert [*names] == ["a" * numbering.MAX_NAME]
    monkeypatch.setattr(numbering.Names, "room", 3 * (numbering.NAME + 1))
    names = numbering.Names()
    assert [names[c] for c in "abcdeabc"] == [0, 1, 2, 3, 3, 0, 1, 2]
    assert [*names][3] == numbering.REST


def test_operands_come_to_an_end() -> None:
    signatures = numbering.Signatures()
    half = b"x" * (numbering.MAX_OPERANDS // 2)
    assert signatures[half, b"", b""] == 0
    assert signatures[half, b"y", b""] == NONE
    assert signatures[b"z", b"", b""] == 1


def test_more_entries_than_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(trace([MM] * 9))
    assert len(kineto.read(path)) == 9
    monkeypatch.setattr(columns, "MAX_ENTRIES", 8)
    with pytest.raises(TraceError, match="more than 8 events"):
        kineto.read(path)


@pytest.mark.parametrize("size", [1000, stream.MAX_ENTRY // 2])
@pytest.mark.parametrize("where", ["head", "event", "tail"])
def test_megabytes_between_two_events(tmp_path: Path, where: str, size: int) -> None:
    more = b'{"x": "' + b"},{" * (size // 3) + b'"}'
    path = tmp_path / "t.json.gz"
    text = {
        "head": b'{"more": ' + more + b", " + OPEN[1:] + ONE + b"]}",
        "event": OPEN + ONE + b"," + more + b"," + ONE + b"]}",
        "tail": OPEN + ONE + b'], "more": ' + more + b"}",
    }[where]
    path.write_bytes(gzip.compress(text, 1))
    assert len(kineto.read(path)) == (2 if where == "event" else 1)


def test_a_gzip_that_begins_with_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(gzip.compress(b"") + gzip.compress(b" \n") + gzip.compress(OPEN + ONE + b"]}"))
    assert len(kineto.read(path)) == 1


def test_a_time_that_is_nan_beside_times_of_text(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(trace([MM | {"ts": "1700000000000000.5"}, MM | {"ts": float("nan")}]))
    events = kineto.read(path)
    assert events.start.tolist() == [0]
    assert events.timeless == 1


def test_overlap_counts_all_that_runs_beside_what_is_counted(tmp_path: Path) -> None:
    """Three streams over two steps, one kernel across both: 25 + 20 - 20 and so on, by hand."""
    written = Trace()
    for n in range(2):
        written.range(f"step:{n}", 100 * n, 100 * n + 90)
        written.kernel("a", 100 * n, 100 * n + 50, launched=100 * n, stream=1)
        written.kernel("b", 100 * n + 20, 100 * n + 60, launched=100 * n + 1, stream=2)
    written.kernel("c", 10, 180, launched=2, stream=3)
    found = attribute(kineto.read(written.write(tmp_path)))
    assert found.windows.start.tolist() == [0, 100]
    # Of 50 + 40 + 90 ns in the first step 100 are its length, all of it busy; and so on.
    assert found.overlap_ns.tolist() == [50 + 40 + 90 - 100, 50 + 40 + 80 - 80]


def test_centuries_of_overlap_are_no_negative_number(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(trace(event("gemm", i, 4e15, "kernel", tid=i) for i in range(9)))
    (found,) = load([path]).breakdowns
    assert found.overlap_ns == pytest.approx(8 * 4e18, rel=1e-6)


def test_times_too_far_apart(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(trace([event("aten::mm", -4e15, 1), event("aten::mm", 4e15, 1)]))
    with pytest.raises(TraceError, match="146 years apart"):
        kineto.read(path)


def test_a_rule_under_a_parent_holds_only_there() -> None:
    only = {"match": "a", "under": "p", "category": "dequant"}
    any_ = {"match": "a|b", "category": "memcpy"}
    nothing = {"steps": [], "layer": [], "head": [], "waits": []}
    known = rules.parse({"operator": [only, any_], **nothing})
    matched = rules.match(known.operators, [("a", "p"), ("a", "q"), ("b", "p"), ("c", "p")])
    assert [known.labels[n] for n in matched.rule.tolist()] == [
        "operator: 1", "operator: 2", "operator: 2", "",
    ]  # fmt: skip


def test_a_process_in_which_nothing_ran_hides_no_other(tmp_path: Path) -> None:
    file = Nsys()
    for pid, text in ((1, "launcher"), (2, "aten::mm"), (3, "aten::gelu")):
        file.pid = pid
        file.range(text, 1000, 2000)
    loaded = load([file.write(tmp_path)])
    assert [run.name for run in loaded.breakdowns] == ["report pid 2", "report pid 3"]
    assert loaded.unreadable == (
        "report pid 1: no operator runs in the trace; was the profiler active?",
    )
    alone = Nsys()
    for pid in (1, 2):
        alone.pid = pid
        alone.range("launcher", 1000, 2000)
    with pytest.raises(PeftprofError, match=r"alone\.sqlite: no operator runs"):
        load([alone.write(tmp_path, "alone.sqlite")])


@pytest.mark.parametrize("rate", [0.0, -1.0, 1e-300, 1e300, float("inf"), float("nan")])
def test_ceilings_that_cannot_be(rate: float) -> None:
    assert ceilings.can_be(Ceilings("a test", {"bf16": 1e15}, 1e12))
    assert not ceilings.can_be(Ceilings("a test", {"bf16": rate}, 1e12))
    assert not ceilings.can_be(Ceilings("a test", {}, rate))


def test_rows_of_each_value() -> None:
    found = rows_of(np.array([3, 1, 3, NONE]))
    assert [(value, rows.tolist()) for value, rows in found] == [(NONE, [3]), (1, [1]), (3, [0, 2])]
    assert rows_of(np.zeros(0, np.int64)) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30)), min_size=1, max_size=25))
def test_tracks_are_as_few_as_overlap_allows(
    tmp_path_factory: pytest.TempPathFactory, spans: list[tuple[int, int]]
) -> None:
    written = Trace()
    written.range("step:0", 0, 1000)
    for start, length in spans:
        written.kernel("gemm", start, start + length, launched=0, tid=MAIN)
    folder = tmp_path_factory.mktemp("tracks")
    found = attribute(kineto.read(written.write(folder)))
    perfetto.write([("run", found)], folder / "out.json")
    made = json.loads((folder / "out.json").read_text())["traceEvents"]
    kernels = [e for e in made if e["ph"] == "X" and e["cat"] == "base GEMM"]
    most = max(sum(s <= at < s + length for s, length in spans) for at in range(100))
    assert len(kernels) == len(spans)
    assert len({e["tid"] for e in kernels}) == most
