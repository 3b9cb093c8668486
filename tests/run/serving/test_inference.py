"""The whole command, and what cannot be: every figure comes from calls.jsonl."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from peftprof import trace
from peftprof.errors import (
    DeviceError,
    FolderError,
    InputError,
    PeftprofError,
)
from peftprof.inferences import VARIANTS, read_inference
from peftprof.run.folder import RunFolder
from peftprof.run.serving import timing
from peftprof.run.serving.timing import Turn
from tests.run.serving.small import measure
from tests.test_cli import in_process, interpreting, peftprof

# --- The whole of it


def from_calls(folder: Path):
    rows = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return [Turn(**{**row, "ns": tuple(row["ns"])}) for row in rows]


@pytest.mark.slow
def test_the_command_from_a_run_to_its_breakdown(run, tmp_path, monkeypatch, capsys):
    out, folder = tmp_path / "served", run("qlora")
    capsys.readouterr()  # what making the run has said
    given = ["infer", folder, "--batch-sizes", "1,4", "--lengths", "8", "--requests", "6"]
    given += ["--precision", "fp32", "--device", "cpu", "--variants", "nf4,merged,base"]
    code, shown, err = in_process(monkeypatch, capsys, *given, "--out", out)
    assert (code, err) == (0, "")
    for word in ("p50 ms", "4 x 8", "merged", "dequantised", "not measurable here", "breakdown"):
        assert word in shown
    record = read_inference(out)
    assert (record.version, record.run, record.task) == (1, "qlora-bert", "classify")
    assert record.model.fingerprint == RunFolder(folder).read_record().model.fingerprint
    files = {f"{v}-forward.json.gz" for v in ("base", "merged", "nf4")}
    assert {p.name for p in out.iterdir()} == files | {"infer.json", "calls.jsonl"}
    turns = from_calls(out)
    for cell in record.cells:
        own = [t for t in turns if (t.batch, t.length) == (cell.batch, cell.length)]
        again = {c.variant: c for c in timing.cells(own, VARIANTS, {})}[cell.variant]
        for name in ("calls", "p50_ns", "p95_ns", "p99_ns", "examples_per_s", "ratio"):
            assert getattr(cell, name) == getattr(again, name), name
        assert cell.peak_bytes > 2**20
    tensors = {one.variant: one.weight_bytes for one in record.footprints}
    assert tensors["nf4"] < tensors["base"] == tensors["merged"]
    loaded = trace.load([out])
    assert {b.name for b in loaded.breakdowns} == {name.removesuffix(".json.gz") for name in files}
    assert loaded.comparable is True, loaded.differences
    assert not loaded.unreadable
    spent = {b.name: {row.category: row.ns for row in b.rows} for b in loaded.breakdowns}
    for name, by in spent.items():
        assert ("dequant" in by) == ("adapter_gemm" in by) == (name == "nf4-forward")
        assert by["base_gemm"] > 0
        assert by["attention"] > 0
    assert all(b.steps == 3 for b in loaded.breakdowns)


@pytest.mark.slow
def test_a_language_model_has_two_phases_and_a_trace_of_each(
    language_model, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "served"
    capsys.readouterr()
    given = ["infer", "--model", language_model, "--rank", "4", "--batch-sizes", "2"]
    given += ["--lengths", "8", "--decode", "3", "--requests", "4", "--device", "cpu"]
    given += ["--precision", "fp32", "--variants", "base,unmerged", "--json", "--out", out]
    code, shown, err = in_process(monkeypatch, capsys, *given)
    assert (code, err) == (0, "")
    said = json.loads(shown)
    assert said == json.loads((out / "infer.json").read_text())
    cells = {(c["variant"], c["phase"]): c for c in said["cells"]}
    assert cells.keys() == {(v, p) for v in ("base", "unmerged") for p in ("prefill", "decode")}
    assert cells["base", "decode"]["calls"] == 12  # 4 rounds of whole sequences
    assert cells["base", "decode"]["examples_per_s"] is None
    assert cells["base", "decode"]["peak_bytes"] > 0
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    loaded = trace.load([out], all_runs=True)
    assert {b.name for b in loaded.breakdowns} == {
        f"{variant}-{phase}" for phase in ("prefill", "decode") for variant in ("base", "unmerged")
    }
    assert loaded.comparable is False  # a prompt is not a token


# --- What cannot be


def break_file(folder: Path, name: str, content: bytes) -> None:
    (folder / "adapter" / name).write_bytes(content)


def test_runs_that_cannot_be_served(run, tmp_path, tiny):
    good = run("lora")

    def copy(name):
        shutil.copytree(good, tmp_path / name)
        return tmp_path / name

    lost, damaged, unfinished = copy("lost"), copy("damaged"), copy("unfinished")
    settings, foreign, other = copy("settings"), copy("foreign"), copy("other")
    (lost / "adapter" / "adapter_model.safetensors").unlink()
    break_file(damaged, "adapter_model.safetensors", b"\x08\x00torn")
    break_file(settings, "adapter_config.json", b"{")
    shutil.copy(run("lora", "llama") / "adapter" / "adapter_model.safetensors", foreign / "adapter")
    for folder, old, new in (
        (unfinished, '"complete"', '"running"'),
        (other, '"model": ' + json.dumps(str(tiny("bert"))), json.dumps(str(tiny("bert", 128)))),
    ):
        text = (folder / "run.json").read_text()
        new = new if old.startswith('"c') else '"model": ' + new
        (folder / "run.json").write_text(text.replace(old, new))
    expected = {
        tmp_path / "none": (FolderError, "no folder"),
        tmp_path: (FolderError, "no run folder"),
        lost: (FolderError, "has lost its adapter_model"),
        damaged: (InputError, "is damaged"),
        settings: (InputError, "is damaged"),
        unfinished: (FolderError, "train --resume"),
        foreign: (InputError, "does not belong to"),
        other: (InputError, "not what the run was trained on"),
    }
    before = sorted(p.name for p in tmp_path.iterdir())
    for folder, (kind, says) in expected.items():
        with pytest.raises(PeftprofError, match=says) as raised:
            measure(tmp_path / "out", run=folder)
        assert isinstance(raised.value, kind), folder
        assert "\n" not in str(raised.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == before


BAD = [
    (["--variants", "fast"], "unknown variant 'fast'"),
    (["--variants", "base,,nf4"], "an empty name"),
    (["--batch-sizes", "0"], "--batch-sizes has 0"),
    (["--batch-sizes", "1,x"], "'x' in it"),
    (["--batch-sizes", ""], "whole numbers"),
    (["--lengths", "-3"], "--lengths has -3"),
    (["--lengths", "100000000000"], "--lengths has 100000000000"),
    (["--lengths", "513"], "512 positions"),
    (["--rank", "0"], "--rank is 0"),
    (["--rank", "65"], "--rank 65 is more than 64"),
    (["--decode", "4"], "--decode is of causal models"),
    (["--requests", "0"], "--requests is 0"),
    (["--target-modules", "nope"], "its linear layers are"),
    (["--kernels", "cuda"], "unknown --kernels"),
    (["--precision", "fp16"], "--precision fp16"),
    (["--profiler", "perf"], "unknown --profiler"),
    (["--device", "abacus"], "abacus"),
    (["--out", "/proc/served"], "cannot write"),
    (["/no/such/run", "--rank", "4"], "leave it out"),
    (["--colour"], "No such option"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_input(arguments, says, tiny, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = arguments if arguments[0].startswith("/") else ["--model", tiny("bert"), *arguments]
    if "--device" not in arguments:
        given += ["--device", "cpu"]
    capsys.readouterr()  # what making the small model has said
    code, out, err = in_process(monkeypatch, capsys, "infer", *given)
    assert code == 2
    assert says in err
    assert err.startswith("peftprof: ")
    assert len(err.splitlines()) == 1
    assert "comparing" not in out or says == "--rank 65 is more than 64"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu(tiny, tmp_path):
    with pytest.raises(DeviceError, match="cuda"):
        measure(tmp_path / "out", model=str(tiny("bert")), device="cuda")
    out = ("--out", tmp_path / "out")
    done = peftprof(
        "infer", "--model", tiny("bert"), "--kernels", "triton", *out, env=interpreting(None)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("peftprof: --kernels triton needs a GPU")
    assert len(done.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_leaves_nothing(small_disk, tiny, no_children):
    disk = small_disk("16k")
    with pytest.raises(FolderError, match="cannot write") as raised:
        measure(disk / "out", model=str(tiny("bert")))
    assert "\n" not in str(raised.value)
    assert list(disk.iterdir()) == []


def test_lengths_leave_room_for_what_is_made(language_model, tmp_path):
    with pytest.raises(InputError, match="less the 100 of --decode"):
        measure(tmp_path / "out", model=str(language_model), lengths=(2000,), decode=100)


def test_the_page_names_every_option_that_help_names(monkeypatch, capsys):
    _, shown, _ = in_process(monkeypatch, capsys, "infer", "--help")
    page = (Path(__file__).parents[3] / "docs" / "inference.md").read_text()
    options = set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}
    assert len(options) > 12
    for option in options:
        assert f"`{option}`" in page, option
