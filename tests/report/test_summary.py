import dataclasses
import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from peftprof.records import Accuracy, Energy, Memory, Profiled, RunRecord, Timed, Trainable
from peftprof.report.picture import save_svg
from peftprof.report.summary import render

RECORD = RunRecord(
    version=1,
    name="run",
    state="complete",
    created="2026-01-01T00:00:00+00:00",
    command=(),
    config={
        "method": "qlora",
        "model": "[red]odd[/red]",
        "dataset": "d",
        "precision": "bf16",
        "device": "cuda:0",
        "kernels": "bnb",
        "seed": 42,
    },
    environment={},
    trainable=Trainable(live=600, nominal=700, total=10_000, packed_total=6_000),
    timed=Timed(20, 5, 2.0, 64.0, 1000.0, 2000.0, 100.0, 200.0, 10.0, 20.0, 30.0, 0.7, 0.3),
    accuracy=Accuracy(correct=80, examples=100, accuracy=0.8, low=0.711, high=0.867, loss=0.4),
    memory=Memory(2**30, 2**31, None, 3 * 2**30, {"nvml_bytes": "no NVML"}),
    energy=Energy({"GPU": 123.45}, {"CPU": "no RAPL"}),
    profiled=Profiled("torch", "trace.json.gz", 3, 12.0, 1.25, True, 0.0),
)


def shown(record: RunRecord, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(record, Path("traces/run")))
    return console.file.getvalue()


def test_every_figure_is_there_as_it_is():
    text = shown(RECORD)
    for part in (
        "qlora on [red]odd[/red] / d",
        "80.00 %  (95 % interval 71.10 to 86.70, 80 of 100)",
        "64.0",
        "1,000 real  (2,000 with padding)",
        "10.0 / 20.0 / 30.0 ms",
        "15 of 20 steps",
        "allocated 1024 MiB, reserved 2048 MiB, host RSS 3072 MiB",
        "NVML absent: no NVML",
        "600 live of 700 nominal; 6.00 % of 10,000",
        "6,000 (4-bit weights packed)",
        "GPU 123.5 J",
        "3 steps by torch, 1.25x the same steps unprofiled, same losses",
        "bf16 on cuda:0, kernels bnb, seed 42",
        "python -m peftprof breakdown traces/run",
    ):
        assert part in text, part


@pytest.mark.parametrize("width", [60, 80, 120])
def test_it_fits(width):
    assert max(map(len, shown(RECORD, width).splitlines())) <= width


def test_what_is_absent_says_so():
    bare = dataclasses.replace(
        RECORD, timed=None, profiled=None, energy=Energy({}, {"CPU": "no counter"})
    )
    text = shown(bare)
    assert "not measured: every step was warm-up" in text
    assert "not measurable here: no counter" in text
    assert "breakdown" not in text


def test_more_that_was_held_while_loading_is_said():
    memory = dataclasses.replace(RECORD.memory, loading_bytes=4 * 2**30)
    assert "4096 MiB while the model was loaded" in shown(
        dataclasses.replace(RECORD, memory=memory)
    )
    memory = dataclasses.replace(RECORD.memory, loading_bytes=2**30)
    assert "was loaded" not in shown(dataclasses.replace(RECORD, memory=memory))


def test_a_picture_is_written_whole(tmp_path):
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(render(RECORD, Path("traces/run")))
    save_svg(console, tmp_path / "a.svg", "title")
    picture = (tmp_path / "a.svg").read_text()
    assert picture.startswith("<svg")
    assert "@font-face" not in picture
    assert set(re.findall(r"https?://[^\"')\s]+", picture)) <= {
        "http://www.w3.org/2000/svg",
        "https://www.textualize.io",
    }
    assert [p.name for p in tmp_path.iterdir()] == ["a.svg"]
