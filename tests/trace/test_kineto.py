import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from peftprof.errors import PeftprofError, TraceError
from peftprof.trace import kineto, load, stream
from peftprof.trace.attribute import attribute
from peftprof.trace.events import NONE, Kind
from tests.trace.build import CPU, GPU, MAIN, Trace


def step_with_one_op() -> Trace:
    trace = Trace()
    trace.range("step:0", 0, 1000)
    trace.op("aten::mm", 100, 900)
    return trace


def test_columns_hold_what_the_file_says(tmp_path: Path) -> None:
    trace = step_with_one_op()
    trace.kernel("gemm", 2000, 2600, launched=200)
    events = kineto.read(trace.write(tmp_path, "t.json.gz"))
    assert [events.named(i) for i in range(4)] == ["step:0", "aten::mm", "cudaLaunchKernel", "gemm"]
    assert events.kind.tolist() == [Kind.RANGE, Kind.OPERATOR, Kind.LAUNCH, Kind.KERNEL]
    assert events.start.tolist() == [0, 100, 200, 2000]
    assert events.end.tolist() == [1000, 900, 200, 2600]
    assert events.launch.tolist() == [NONE, NONE, NONE, 2]
    assert events.device == "Test GPU"


def test_enclosing_events_come_first_where_times_are_equal(tmp_path: Path) -> None:
    trace = Trace()
    trace.op("aten::mm", 0, 1000)
    trace.range("step:0", 0, 1000)
    events = kineto.read(trace.write(tmp_path))
    assert [events.named(i) for i in range(2)] == ["step:0", "aten::mm"]


@pytest.mark.parametrize("base", [0, 4_458_676_522_690_000, 1_712_195_495_519_689_000])
def test_times_are_exact_to_the_nanosecond(tmp_path: Path, base: int) -> None:
    """Absolute times have more digits than a double: 1712195495519689.047 us."""
    times = [base + 47, base + 812, base + 999, base + 1001]
    events = ",".join(
        f'{{"ph": "X", "cat": "cpu_op", "name": "o", "pid": 1, "tid": 1, '
        f'"ts": {t // 1000}.{t % 1000:03}, "dur": 0.001}}'
        for t in times
    )
    path = tmp_path / "t.json"
    path.write_text(f'{{"traceEvents": [{events}]}}')
    read = kineto.read(path)
    assert read.start.tolist() == [t - times[0] for t in times]
    assert (read.end - read.start).tolist() == [1] * 4


def test_old_spellings_and_missing_fields(tmp_path: Path) -> None:
    """torch 1.8 wrote other categories, and a range came as an operator; args may be missing."""
    raw = [
        {"ph": "X", "cat": "Operator", "name": "step:3", "pid": 1, "tid": 1, "ts": 0, "dur": 9},
        {"ph": "X", "cat": "Operator", "name": "aten::mm", "pid": 1, "tid": "1", "ts": 1},
        {"ph": "X", "cat": "Kernel", "name": "k", "pid": 0, "tid": 7, "ts": 1, "dur": -1},
        {"ph": "X", "cat": "python_function", "name": "f", "pid": 1, "tid": 1, "ts": 0, "dur": 9},
        {"ph": "i", "name": "mark"},
        "not an event",
    ]
    path = tmp_path / "t.json"
    path.write_text(json.dumps(raw))  # a bare list is a Chrome trace too
    events = kineto.read(path)
    assert events.kind.tolist() == [Kind.RANGE, Kind.OPERATOR, Kind.KERNEL]
    assert (events.end - events.start).tolist() == [9000, 0, 0]
    assert events.device == "unknown device"


def test_arrows_stand_in_for_missing_correlation_ids(tmp_path: Path) -> None:
    trace = step_with_one_op()
    trace.add("cuda_runtime", "cudaLaunchKernel", 200, 250)
    trace.add("kernel", "gemm", 2000, 2600, 7, GPU)
    trace.arrow("ac2g", 5, (200, MAIN, CPU), (2000, 7, GPU))
    events = kineto.read(trace.write(tmp_path))
    assert events.launch.tolist() == [NONE, NONE, NONE, 2]


def test_external_id_stands_in_for_a_launch_that_was_not_recorded(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 1000)
    trace.add("cpu_op", "aten::mm", 100, 900, **{"External id": 8})
    trace.add("kernel", "gemm", 2000, 2600, 7, GPU, **{"External id": 8, "correlation": 3})
    assert kineto.read(trace.write(tmp_path)).launch.tolist() == [NONE, NONE, 1]


def test_broken_numbers_and_text_of_kineto_itself_are_read(tmp_path: Path) -> None:
    text = step_with_one_op().text().replace("aten::mm", "aten::mm\x01\\ud800")
    path = tmp_path / "t.json"
    path.write_bytes(text.replace('"schemaVersion": 1', '"occupancy": NaN').encode() + b"\n")
    assert len(kineto.read(path)) == 2
    path.write_bytes(text.replace("aten", "\xff").encode("latin-1"))
    assert len(kineto.read(path)) == 2


def damaged() -> dict[str, bytes]:
    good = step_with_one_op().text().encode()
    packed = gzip.compress(good * 50)
    empty_step = Trace()
    empty_step.range("step:0", 0, 1000)
    lost = step_with_one_op()
    lost.add("cuda_runtime", "cudaLaunchKernel", 200, 250, correlation=1)
    return {
        "empty": b"",
        "blank": b" \n",
        "empty gzip": gzip.compress(b""),
        "truncated gzip": packed[: len(packed) // 2],
        "gzip header only": packed[:10],
        "broken gzip": packed[:40] + bytes(20) + packed[60:],
        "gzip and junk": gzip.compress(good) + b"junk",
        "truncated json": good[:-40],
        "cut in a string": good[: good.index(b"aten") + 2],
        "binary": bytes(range(256)) * 20,
        "text": b"step 1 loss 0.7\n",
        "html": b"<!doctype html>",
        "number": b"42",
        "json of another kind": b'{"loss": [1, 2]}',
        "list of numbers": b"[1, 2, 3]",
        "events no list": b'{"traceEvents": 7}',
        "no events": b'{"traceEvents": []}',
        "only a step": empty_step.text().encode(),
        "launches without kernels": lost.text().encode(),
        "time of text": good.replace(b"0.1", b'"soon"'),
        "huge time": good.replace(b'"ts": 0.0', b'"ts": 1e300'),
        "huge integer": good.replace(b'"ts": 0.0', b'"ts": ' + b"9" * 40),
        "huge text": good.replace(b'"ts": 0.0', b'"ts": ' + b"9" * 30 + b".5"),
        "deep": b"[" * 200_000,
        "sqlite": b"SQLite format 3\0" + bytes(100),
    }


@pytest.mark.parametrize("what", damaged())
def test_a_damaged_file_gives_one_clear_line(tmp_path: Path, what: str) -> None:
    path = tmp_path / "evil\n[red]name.json.gz"
    path.write_bytes(damaged()[what])
    with pytest.raises(TraceError) as error:
        load([path])
    message = str(error.value)
    assert "\n" not in message
    assert "name.json.gz" in message
    assert 20 < len(message) - len(str(path)) < 200


def without_steps() -> dict[str, Trace]:
    outside = Trace()
    outside.range("step:0", 0, 1000)
    outside.op("aten::mm", 2000, 3000)
    stepless = Trace()
    stepless.op("aten::mm", 0, 1000)
    instant = Trace()
    instant.range("step:0", 5, 5)
    instant.op("aten::mm", 0, 10)
    unlaunched = step_with_one_op()
    unlaunched.kernel("gemm", 0, 900, launched=None)
    return {"none": stepless, "no length": instant, "empty": outside, "no launches": unlaunched}


@pytest.mark.parametrize("what", without_steps())
def test_a_trace_without_steps_is_read_as_one(tmp_path: Path, what: str) -> None:
    (found,) = load([without_steps()[what].write(tmp_path)]).breakdowns
    assert found.steps_by == "whole trace"
    assert found.steps == 1
    assert [row.category for row in found.rows] == ["base_gemm"]
    total = sum(row.ns for row in found.rows) + found.idle_ns + found.unattributed_ns
    assert total == found.step_ns.median > 0


def test_an_event_without_a_time_is_left_out_and_counted(tmp_path: Path) -> None:
    trace = step_with_one_op()
    trace.op("aten::mm", 1, 2)
    trace.events[-1]["ts"] = None
    (found,) = load([trace.write(tmp_path)]).breakdowns
    assert found.notes == ("1 events say no time and were left out.",)


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.json.gz"
    text = b"[" + b'{"name": "x"},' * ((stream.RATIO_FROM_BYTES + stream.BLOCK) // 14)
    path.write_bytes(gzip.compress(text))
    with pytest.raises(TraceError, match="300-fold"):
        kineto.read(path)
    monkeypatch.setattr(stream, "MAX_BYTES", 1 << 20)
    with pytest.raises(TraceError, match="expands past"):
        kineto.read(path)


LONG = 1_682_725_898_237_042_456


@pytest.mark.parametrize("shift", [0, 10**18])
@pytest.mark.parametrize("compact", [True, False])
def test_a_trace_in_many_pieces_is_the_same_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compact: bool, shift: int
) -> None:
    """Cut at every chance; with braces in names, lists of objects, and times of 16 digits."""
    trace = Trace()
    for n in range(200):
        at = n * 1000
        trace.range(f"step:{n}", at, at + 900)
        trace.add("cpu_op", 'a}, {"ph": "X"},{', at + 1, at + 100, odd=[{"a": {}}, {"b": [{}]}])
        trace.kernel("gemm", at + 300 + n % 7, at + 500, at + 50)
    document = trace.document | {"traceEvents": trace.events, "after": [{"ph": "X"}, {"a": 1}]}
    path = tmp_path / "t.json"
    text = json.dumps(
        document, separators=(",", ":") if compact else None, indent=None if compact else 2
    )

    def absolute(found: re.Match[str]) -> str:
        ns = LONG + shift + round(float(found[2]) * 1000)
        return f"{found[1]}{ns // 1000}.{ns % 1000:03}"

    path.write_text(re.sub(r'("ts": ?)([0-9.]+)', absolute, text))
    whole = attribute(kineto.read(path))
    for size in (1, 7, 500, 4096):
        monkeypatch.setattr(stream, "BLOCK", size)
        pieces = attribute(kineto.read(path))
        assert (pieces.events.start == whole.events.start).all()
        assert (pieces.events.launch == whole.events.launch).all()
        assert pieces.events.names == whole.events.names
        assert (pieces.pieces.ns == whole.pieces.ns).all()
    assert (
        np.diff(np.unique(whole.events.start[whole.events.kind == Kind.RANGE])).tolist()
        == [1000] * 199
    )


def test_long_times_that_do_not_begin_alike_are_read_exactly(tmp_path: Path) -> None:
    trace = step_with_one_op()
    text = trace.text().replace('"ts": 0.0', '"ts": 1999999999999999.999')
    path = tmp_path / "t.json"
    path.write_text(text.replace('"ts": 0.1', '"ts": 2000000000000000.002'))
    events = kineto.read(path)
    assert events.start.tolist() == [0, 3]
    late = text.replace('"ts": 1999999999999999.999', '"pad": "' + "x" * 300_000 + '", "ts": 5')
    path.write_text(late.replace('"ts": 0.1', '"ts": 4000000000000000.007'))
    assert kineto.read(path).start.tolist() == [0, 4_000_000_000_000_000_007 - 5000]


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(PeftprofError, match="there is no"):
        load([tmp_path / "none.json"])
    with pytest.raises(TraceError, match="cannot read"):
        kineto.read(tmp_path)
