"""Ceilings: measured here, kept in a run's record, read back, refused when they cannot be."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from peftprof.breakdowns import Ceilings
from peftprof.errors import ConfigError
from peftprof.records import RunRecord, encode
from peftprof.run import ceilings
from peftprof.trace.ceilings import read

CPU = torch.device("cpu")
GOOD = {
    "source": "a data sheet",
    "flops_per_s": {"bf16": 10**15, "fp32": 6.7e13},
    "bytes_per_s": 3e12,
}


@pytest.fixture(scope="module")
def measured() -> Ceilings:
    return ceilings.measure(CPU)


def test_what_this_machine_reaches(measured: Ceilings) -> None:
    assert set(measured.flops_per_s) == {"fp32", "bf16"}
    # Between a core of the last century and a rack of today's: units are right.
    assert all(1e8 < rate < 1e15 for rate in measured.flops_per_s.values())
    assert 1e8 < measured.bytes_per_s < 1e13
    for told in (torch.__version__, f"{torch.get_num_threads()} threads", "measured by peftprof"):
        assert told in measured.source


def test_only_the_dtypes_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_CPU_SIDE", 64)
    monkeypatch.setattr(ceilings, "_CPU_COPY", 1 << 16)
    assert set(ceilings.measure(CPU, [torch.float32]).flops_per_s) == {"fp32"}


def test_rates_are_operations_and_bytes_over_the_fastest_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ceilings, "_CPU_SIDE", 64)
    monkeypatch.setattr(ceilings, "_CPU_COPY", 1 << 16)

    class SlowerEachTime:
        calls = 0

        def __init__(self, device: torch.device) -> None:
            assert device == CPU

        def start(self) -> None:
            SlowerEachTime.calls += 1

        def stop(self) -> None:
            pass

        def durations_ns(self) -> list[int]:
            return [1000 * SlowerEachTime.calls]

    monkeypatch.setattr(ceilings, "StepClock", SlowerEachTime)
    found = ceilings.measure(CPU, [torch.float32])
    assert found.flops_per_s["fp32"] == pytest.approx(2 * 64**3 / 1e-6)
    # The copy's first call comes after the first turn of the products.
    assert found.bytes_per_s == pytest.approx(2 * (1 << 16) / (1e-6 * (ceilings._MOST_CALLS + 1)))


def test_a_measurement_is_read_back_from_a_run(tmp_path: Path, measured: Ceilings) -> None:
    record = RunRecord(1, "a", "complete", "", (), {}, {}, ceilings=measured)
    (tmp_path / "run.json").write_text(json.dumps(encode(record)))
    assert read(tmp_path) == read(tmp_path / "run.json") == measured


def test_ceilings_of_another_device_are_written_by_hand(tmp_path: Path) -> None:
    path = tmp_path / "h100.json"
    path.write_text(json.dumps(GOOD))
    assert read(path) == Ceilings("a data sheet", {"bf16": 1e15, "fp32": 6.7e13}, 3e12)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "null",
        '"text"',
        "[" * 100_000,
        "{}",
        json.dumps({"state": "complete", "ceilings": None}),
        json.dumps({"state": "complete"}),
        *(
            json.dumps(GOOD | change)
            for change in (
                {"bytes_per_s": 0},
                {"bytes_per_s": -1.0},
                {"bytes_per_s": True},
                {"bytes_per_s": "3e12"},
                {"bytes_per_s": math.nan},
                {"bytes_per_s": 10**400},
                {"flops_per_s": {"bf16": math.inf}},
                {"flops_per_s": {"bf16": None}},
                {"flops_per_s": [1e15]},
                {"source": 3},
            )
        ),
    ],
)
def test_bad_content_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content)
    check_refused(path)


def check_refused(path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        read(path)
    message = str(refused.value)
    assert "\n" not in message
    assert str(path) in message
    assert "name a run" in message


def test_what_is_not_there_and_what_is_no_text(tmp_path: Path) -> None:
    check_refused(tmp_path / "nothing.json")
    check_refused(tmp_path)  # a folder without run.json
    (tmp_path / "run.json").write_bytes(b"\xff\xfe\x00")
    check_refused(tmp_path)


def test_a_file_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "large.json"
    path.write_text(json.dumps(GOOD))

    def fail(*_: Any, **__: Any) -> str:
        raise AssertionError("read")

    monkeypatch.setattr("peftprof.trace.ceilings.MOST_BYTES", 10)
    monkeypatch.setattr(Path, "read_text", fail)
    check_refused(path)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_measured_by_its_own_clock() -> None:
    found = ceilings.measure(torch.device("cuda", 0))
    assert {"fp32", "fp16"} <= set(found.flops_per_s)
    assert torch.cuda.get_device_name(0) in found.source
    assert 1e10 < found.bytes_per_s < 1e14
    assert all(1e11 < rate < 1e16 for rate in found.flops_per_s.values())
