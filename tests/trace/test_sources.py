import dataclasses
import json
import os
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
        (record(profiled=None), False, TraceError, "not profiled.*--profiler torch"),
        (
            record(profiled=Profiled("nsys", None, 3, 1.0, 1.0, None, None)),
            False,
            TraceError,
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


@pytest.mark.parametrize("name", ["x.nsys-rep", "x.sqlite"])
def test_nsys_files_are_for_later(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"SQLite format 3\0")
    with pytest.raises(TraceError, match=r"later version.*--profiler torch"):
        load([tmp_path / name])


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
    assert compare([record(), None]) == (None, [])


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
            "batch_size: 8 vs 32",
            "real_tokens_per_step: 200.0 vs unknown",
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
