import dataclasses
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from peftprof.errors import FolderError, TraceError
from peftprof.records import DataInfo, ModelInfo, Profiled, RunRecord, Timed, encode
from peftprof.trace import load
from peftprof.trace.compare import compare
from tests.trace.build import Trace


def record(name: str = "run", **changes: Any) -> RunRecord:
    base = RunRecord(
        version=1,
        name=name,
        state="complete",
        created="2026-01-02T03:04:05+00:00",
        command=("train",),
        config={
            "method": "lora",
            "batch_size": 8,
            "max_length": 128,
            "precision": "bf16",
            "seed": 1,
            "device": "cpu",
        },
        environment={},
        model=ModelInfo("minilm", "x", "bert", "a" * 64, 1, 1),
        data=DataInfo("reviews", "x", "x", "b" * 64, 1, 1, ("n", "p")),
        timed=Timed(9, 1, 1.0, 1.0, 1.0, 1.0, 200.0, 256.0, 1.0, 1.0, 1.0, 0.7, 0.6),
        profiled=Profiled("torch", "trace.json.gz", 3, 1.0, 1.1, True, 0.0),
    )
    return dataclasses.replace(base, **changes)


def make_run(parent: Path, made: RunRecord, trace: bool = True) -> Path:
    folder = parent / made.name
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(encode(made)))
    if trace:
        written = Trace()
        written.range("step:0", 0, 1000)
        written.op("aten::mm", 0, 500)
        written.write(folder, "trace.json.gz")
    return folder


def names(paths: list[Path], **options: Any) -> list[str]:
    return [b.name for b in load(paths, **options).breakdowns]


def test_a_run_folder_a_trace_and_a_folder_of_runs(tmp_path: Path) -> None:
    one = make_run(tmp_path, record("one"))
    assert names([one]) == ["one"]
    assert names([one / "trace.json.gz"]) == ["trace"]
    assert names([tmp_path]) == ["one"]
    assert names([one, one / "trace.json.gz"]) == ["one", "trace"]


def test_the_newest_four_complete_runs_in_order_of_creation(tmp_path: Path) -> None:
    # The second is the oldest by the clock: its offset is two hours ahead.
    created = ["2026-01-01T10:00:00+00:00", "2026-01-01T11:00:00+02:00"]
    created += [f"2026-01-0{day}T00:00:00+00:00" for day in (5, 4, 3, 2)]
    for i, when in enumerate(created):
        make_run(tmp_path, record(f"run{i}", created=when))
    make_run(tmp_path, record("going", state="running", created="2026-02-01T00:00:00+00:00"))
    (tmp_path / "README.md").write_text("not a run")
    loaded = load([tmp_path])
    assert [b.name for b in loaded.breakdowns] == ["run5", "run4", "run3", "run2"]
    assert loaded.left_out == 2
    assert names([tmp_path], all_runs=True) == ["run1", "run0", "run5", "run4", "run3", "run2"]


def test_runs_without_a_readable_trace_are_passed_over_in_a_folder(tmp_path: Path) -> None:
    make_run(tmp_path, record("a", profiled=None), trace=False)
    make_run(tmp_path, record("b", profiled=Profiled("nsys", None, 3, 1.0, 1.0, None, None)), False)
    make_run(tmp_path, record("c"))
    assert names([tmp_path]) == ["c"]


@pytest.mark.parametrize(
    ("made", "trace", "error", "says"),
    [
        (record(state="running"), True, FolderError, "not complete"),
        (record(profiled=None), False, FolderError, "not profiled.*--profiler torch"),
        (
            record(profiled=Profiled("nsys", None, 3, 1.0, 1.0, None, None)),
            False,
            FolderError,
            "Nsight.*--profiler torch",
        ),
        (record(), False, TraceError, "lost its trace"),
    ],
)
def test_a_run_that_cannot_be_read_says_why(
    tmp_path: Path, made: RunRecord, trace: bool, error: type[Exception], says: str
) -> None:
    folder = make_run(tmp_path, made, trace)
    with pytest.raises(error, match=says):
        load([folder])
    with pytest.raises((FolderError, TraceError)):
        load([tmp_path])


def test_folders_that_hold_no_run(tmp_path: Path) -> None:
    with pytest.raises(FolderError, match="holds no run"):
        load([tmp_path])
    with pytest.raises(FolderError, match="there is no"):
        load([tmp_path / "nowhere"])


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 1}', "[" * 100_000, "\xff"])
def test_a_damaged_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(FolderError, match="damaged") as error:
        load([tmp_path])
    assert "\n" not in str(error.value)


def test_a_run_that_cannot_be_read_is_left_out_of_its_folder_and_told(tmp_path: Path) -> None:
    make_run(tmp_path, record("good"))
    (make_run(tmp_path, record("torn")) / "trace.json.gz").write_bytes(b"\x1f\x8b torn")
    (make_run(tmp_path, record("odd")) / "run.json").write_text("{")
    make_run(tmp_path, record("lost"), trace=False)
    make_run(tmp_path, record("going", state="running"))
    loaded = load([tmp_path])
    assert [b.name for b in loaded.breakdowns] == ["good"]
    assert [any(w in text for text in loaded.unreadable) for w in ("torn", "odd", "lost")] == (
        [True] * 3
    )
    assert len(loaded.unreadable) == 3
    with pytest.raises(TraceError, match="torn"):
        load([tmp_path / "torn"])


def test_a_folder_of_traces(tmp_path: Path) -> None:
    for rank in (0, 1):
        trace = Trace()
        trace.document["distributedInfo"] = {"backend": "nccl", "rank": rank, "world_size": 2}
        trace.range("step:0", 0, 1000)
        trace.op("aten::mm", 0, 500 + rank)
        os.utime(trace.write(tmp_path, f"rank{rank}.json.gz"), (rank, rank))
    (tmp_path / "notes.txt").write_text("no trace")
    loaded = load([tmp_path])
    assert [(b.name, b.rank) for b in loaded.breakdowns] == [("rank0", 0), ("rank1", 1)]
    assert loaded.comparable is None
    assert loaded.differences == tuple(
        f"{name} has no run.json that says its model, data and batches"
        for name in ("rank0", "rank1")
    )
    (tmp_path / "rank0.json.gz").write_bytes(b"")
    assert names([tmp_path]) == ["rank1"]


def test_a_run_under_nsys_is_read_from_its_export(tmp_path: Path) -> None:
    made = record("run", profiled=Profiled("nsys", None, 3, 1.0, 1.0, None, None))
    folder = make_run(tmp_path, made, trace=False)
    for place in (tmp_path / "run.sqlite", folder / "report.sqlite"):
        place.write_bytes(b"SQLite format 3\0")
        with pytest.raises(TraceError, match=place.name):
            load([folder])


def test_a_trace_beside_runs_is_read_with_them_by_its_age(tmp_path: Path) -> None:
    make_run(tmp_path, record("run"))
    loose = make_run(tmp_path, record("other")) / "trace.json.gz"
    for name, when in (("old.json.gz", 0), ("new.json.gz", 4e9)):
        os.utime(shutil.copy(loose, tmp_path / name), (when, when))
    assert names([tmp_path]) == ["old", "other", "run", "new"]


WORK = {"aten::mm": 300, "aten::layer_norm": 200, "aten::copy_": 100, "mystery::op": 50}


def write_steps(folder: Path, name: str, scale: float, length: int, skip: str = "") -> Path:
    trace = Trace()
    for n in range(3):
        begin = at = n * 10_000
        trace.range(f"step:{n}", begin, begin + length + n)
        for operator, ns in WORK.items():
            if operator != skip:
                trace.op(operator, at, at + round(ns * scale) + n)
                at += round(ns * scale) + n
    return trace.write(folder, name)


def test_the_bars_of_a_waterfall_add_up_to_the_difference_of_the_steps(tmp_path: Path) -> None:
    paths = [
        write_steps(tmp_path, "a.json", 1.0, 1000),
        write_steps(tmp_path, "b.json", 3.3, 4003, skip="aten::copy_"),
        write_steps(tmp_path, "c.json", 0.37, 907),
    ]
    loaded = load(paths)
    assert [(c.base, c.other) for c in loaded.comparisons] == [(0, 1), (0, 2)]
    for comparison in loaded.comparisons:
        first, other = loaded.breakdowns[0], loaded.breakdowns[comparison.other]
        assert comparison.step_ns == other.step_ns.median - first.step_ns.median
        assert math.fsum(bar.ns for bar in comparison.bars) == comparison.step_ns
        assert {bar.category for bar in comparison.bars} == {
            "base_gemm", "elementwise", "memcpy", "idle", "unattributed"
        }  # fmt: skip
        copies = next(bar.ns for bar in comparison.bars if bar.category == "memcpy")
        assert copies < 0
        assert comparison.speedup is None  # nothing is known of what these runs did
        assert comparison.timed_speedup is None
    fair = load(paths, unfair=True)
    assert fair.unfair
    assert fair.comparisons[0].speedup == pytest.approx(1001 / 4004)


def test_a_speedup_is_given_only_where_runs_are_comparable(tmp_path: Path) -> None:
    timed = record().timed
    assert timed is not None
    quick = dataclasses.replace(timed, step_p50_ms=timed.step_p50_ms / 2)
    one, two = make_run(tmp_path, record("one")), make_run(tmp_path, record("two", timed=quick))
    (comparison,) = load([one, two]).comparisons
    assert comparison.speedup == 1.0
    assert comparison.timed_speedup == 2.0
    other = make_run(tmp_path, record("other", config=record().config | {"batch_size": 9}))
    refused = load([one, other])
    assert refused.comparable is False
    assert refused.comparisons[0].speedup is refused.comparisons[0].timed_speedup is None
    (forced,) = load([one, other], unfair=True).comparisons
    assert forced.speedup == 1.0


def test_a_record_cannot_name_a_file_outside_its_folder(tmp_path: Path) -> None:
    outside = make_run(tmp_path, record("outside")) / "trace.json.gz"
    path = os.path.join("..", "outside", "trace.json.gz")  # noqa: PTH118
    evil = make_run(
        tmp_path, record("evil", profiled=Profiled("torch", path, 3, 1.0, 1.0, True, 0.0))
    )
    (evil / "trace.json.gz").unlink()
    assert outside.is_file()
    with pytest.raises(TraceError, match="lost its trace"):
        load([evil])


def test_one_run_is_compared_with_nothing(tmp_path: Path) -> None:
    loaded = load([make_run(tmp_path, record())])
    assert loaded.comparable is None
    assert loaded.differences == ()


def test_an_interpreted_run_is_comparable_with_no_other(tmp_path: Path) -> None:
    plain = record("plain")
    config = plain.config | {"kernels": "triton"}
    environment = {"kernels": {"triton": {"interpreted": True}}}
    slow = record("slow", config=config, environment=environment)
    loaded = load([make_run(tmp_path, plain), make_run(tmp_path, slow)])
    assert loaded.comparable is False
    assert loaded.differences == (
        "device: cpu vs cpu, kernels interpreted (times without meaning)",
    )


def test_a_trace_without_a_record_cannot_be_compared() -> None:
    reason = "x has no run.json that says its model, data and batches"
    assert compare([record(), None], ["run", "x"]) == (None, [reason])


def test_the_method_may_differ_the_work_may_not() -> None:
    lora = record()
    qlora = record(config={**lora.config, "method": "qlora"})
    assert compare([lora, qlora]) == (True, [])
    other = record(
        config={**lora.config, "batch_size": 32},
        model=ModelInfo("minilm", "x", "bert", "c" * 64, 1, 1),
        timed=None,
    )
    assert compare([lora, qlora, other]) == (
        False,
        [
            "model: minilm aaaaaaaa vs minilm cccccccc",
            "batch size: 8 vs 32",
            "timed steps: 9 vs unknown",
            "real tokens a step: 200.0 vs unknown",
        ],
    )


def test_devices_are_told_apart_by_make_and_threads() -> None:
    cpu = {"cpu": {"model": "EPYC"}, "torch": {"threads": 1}}
    one = record(environment=cpu)
    assert compare([one, record(environment=cpu)]) == (True, [])
    two = record(environment={**cpu, "torch": {"threads": 2}})
    assert compare([one, two])[1] == ["device: cpu EPYC, threads 1 vs cpu EPYC, threads 2"]
    cuda = {"cuda": {"devices": [{"name": "A100"}, {"name": "H100"}]}}
    gpus = [
        record(config={**one.config, "device": device}, environment=cuda)
        for device in ("cuda", "cuda:1", "cuda:2")
    ]
    assert compare(gpus)[1] == ["device: cuda A100 vs cuda:1 H100 vs cuda:2"]
    assert compare([record(environment={"cpu": 7, "torch": []}), one])[0] is False
