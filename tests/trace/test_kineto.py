import gzip
import json
from pathlib import Path

import pytest

from peftprof.errors import PeftprofError, TraceError
from peftprof.trace import kineto, load
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
        "no steps": stepless.text().encode(),
        "step of no length": instant.text().encode(),
        "nothing in the steps": outside.text().encode(),
        "only a step": empty_step.text().encode(),
        "kernels without launches": unlaunched.text().encode(),
        "launches without kernels": lost.text().encode(),
        "time of text": good.replace(b"0.1", b'"soon"'),
        "time of null": good.replace(b'"ts": 0.0', b'"ts": null'),
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


def test_a_bomb_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b"[" + b" " * (kineto.RATIO_FROM_BYTES + kineto.CHUNK)))
    with pytest.raises(TraceError, match="200-fold"):
        kineto.read(path)
    monkeypatch.setattr(kineto, "MAX_BYTES", 1 << 20)
    with pytest.raises(TraceError, match="expands past"):
        kineto.read(path)


def test_a_missing_or_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(PeftprofError, match="there is no"):
        load([tmp_path / "none.json"])
    with pytest.raises(TraceError, match="cannot read"):
        kineto.read(tmp_path)
