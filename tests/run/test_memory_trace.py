"""The memory step of real runs, against counts of the model's own tensors."""

import gzip
import json
from pathlib import Path

import pytest
import torch

from peftprof.breakdowns import MEMORY_PARTS
from peftprof.errors import FolderError
from peftprof.records import RunRecord, decode, encode
from peftprof.run import memory_trace, runner
from peftprof.run.folder import RunFolder, Step
from peftprof.run.loop import Trainee
from peftprof.trace import kineto, memory

METHODS = ("full", "lora", "qlora")
STEP = Step(0, 0.0, 0.0, 1, 1, 1, 1, False)
FP32 = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs, small_run, quiet):
    """`run(method)`: the folder of a run, made once."""

    def make(method: str) -> RunFolder:
        path = runs / method
        if path.exists():
            return RunFolder.open(path)
        kernels = "auto" if method == "full" else "torch"
        config = small_run(method, kernels=kernels, hidden=128, precision="bf16")
        return runner.train(config, path, ["train"], quiet)

    return make


@pytest.fixture
def model(small_run):
    """`model(method)`: the same model once more."""

    def make(method: str) -> torch.nn.Module:
        kernels = "auto" if method == "full" else "torch"
        config = small_run(method, kernels=kernels, hidden=128, precision="bf16")
        return runner.prepare(config).build()[0].model

    return make


def entries(folder: RunFolder, name: str) -> list[dict]:
    with gzip.open(folder.path / name) as file:
        return json.load(file)["traceEvents"]


def parts(folder: RunFolder, trace: Path | None = None) -> dict[str, int]:
    events = kineto.read(trace or folder.path / "memory.json.gz")
    found = memory.peak(events, folder.read_record())
    assert [part.part for part in found.parts] == [*MEMORY_PARTS]
    assert sum(part.bytes for part in found.parts) == found.peak_bytes
    return {part.part: part.bytes for part in found.parts}


def in_the_optimizer(folder: RunFolder, tmp_path: Path) -> dict[str, int]:
    """The parts as if the step were its optimizer phase alone: then every gradient is there."""
    events = entries(folder, "memory.json.gz")
    phase = next(e for e in events if e["name"] == "phase:optimizer")
    step = next(e for e in events if e["name"].startswith("step:"))
    step |= {"ts": phase["ts"], "dur": phase["dur"]}
    path = tmp_path / "optimizer.json"
    path.write_text(json.dumps({"traceEvents": events}))
    return parts(folder, path)


def stored(tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("method", METHODS)
def test_every_part_is_what_the_tensors_take(run, model, method, tmp_path):
    found, at_the_end = parts(run(method)), in_the_optimizer(run(method), tmp_path)
    named = dict(model(method).named_parameters())
    adapters = {n for n in named if ("lora_" in n or ".modules_to_save." in n) and method != "full"}
    trained = [named[n] for n in (adapters or named)]
    for split in (found, at_the_end):
        assert split["adapters"] == stored(named[n] for n in adapters)
        assert split["base_weights"] == stored(p for n, p in named.items() if n not in adapters)
        # Two moments, and a step count of its own for every tensor.
        assert split["optimizer_state"] == 2 * stored(trained) + FP32 * len(trained)
    assert at_the_end["gradients"] == stored(trained)
    assert found["activations"] > 0
    # A dequantised weight of this small model is less than what attention works with at the
    # peak; where it is not at the peak, the largest is told of.
    notes = memory.peak(
        kineto.read(run(method).path / "memory.json.gz"), run(method).read_record()
    ).notes
    told = any("dequantise workspace was largest at another moment" in note for note in notes)
    assert (found["dequant_workspace"] > 0 or told) == (method == "qlora")
    assert at_the_end["dequant_workspace"] == 0


@pytest.mark.parametrize("method", METHODS)
def test_quantisation_state_by_the_formula_of_nf4(run, model, method):
    """bitsandbytes' layout: 64 weights a block, 256 blocks a nested block; QLoRA, section 3."""
    shapes = [p.quant_state.shape for p in model(method).parameters() if hasattr(p, "quant_state")]
    assert len(shapes) == (13 if method == "qlora" else 0)
    expected = 0
    for shape in shapes:
        blocks = -(-shape.numel() // 64)
        nested = -(-blocks // 256)
        expected += blocks + FP32 * (nested + 1)  # absmax as bytes; nested absmax, offset
        expected += FP32 * (16 + 256)  # the two code books
        # On a CPU our kernels' own: a scale a block, un-nested, and two codes for each byte.
        expected += FP32 * (blocks + 2 * 256)
    assert parts(run(method))["quantisation_state"] == expected


def test_full_fine_tuning_peaks_when_every_gradient_is_there(run, tmp_path):
    folder = run("full")
    found = memory.peak(kineto.read(folder.path / "memory.json.gz"), folder.read_record())
    assert (found.phase, found.device) == ("backward", "cpu")
    assert found.process_bytes == folder.read_record().memory.rss_bytes > found.peak_bytes
    assert found.allocated_bytes is found.reserved_bytes is None
    assert parts(folder)["gradients"] == parts(folder)["base_weights"]
    # The update works in place: stock's for-each kind would hold one more copy of everything.
    updating = in_the_optimizer(folder, tmp_path)
    assert updating["other"] < updating["gradients"] / 100
    assert sum(updating.values()) <= found.peak_bytes


def test_without_the_inventory_what_was_held_is_not_known(run):
    for method in METHODS:
        folder = run(method)
        known, events = parts(folder), kineto.read(folder.path / "memory.json.gz")
        foreign = {part.part: part.bytes for part in memory.peak(events).parts}
        assert foreign["base_weights"] == foreign["optimizer_state"] == 0
        for part in ("gradients", "activations", "dequant_workspace"):
            assert foreign[part] == known[part]


def test_the_step_is_recorded_alone(run):
    folder = run("qlora")
    step = folder.read_record().memory_step
    assert (step.trace, step.device) == ("memory.json.gz", "cpu")
    longest = max(s.padded_tokens for s in folder.read_steps())
    assert folder.read_steps()[step.step].padded_tokens == longest
    recorded = entries(folder, "memory.json.gz")
    assert [e["name"] for e in recorded if e["name"].startswith("step:")] == [f"step:{step.step}"]
    assert {"op:dequant", "phase:backward", "layer:head.classifier"} <= {
        e["name"] for e in recorded
    }
    assert not any("Input Dims" in e.get("args", {}) for e in recorded)
    # The trace whose times count knows nothing of it.
    assert not any(e["name"] == "[memory]" for e in entries(folder, "trace.json.gz"))
    assert folder.read_record().profiled.same_losses


def test_a_run_killed_in_the_memory_step_goes_on(small_run, tmp_path, quiet, monkeypatch, run):
    def killed(*_):
        raise KeyboardInterrupt

    config = small_run("lora", kernels="torch", hidden=128, precision="bf16")
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(memory_trace, "record", killed)
        runner.train(config, tmp_path / "run", [], quiet)
    left = RunFolder.open(tmp_path / "run")
    assert left.read_record().state == "running"
    assert left.read_record().memory_step is None
    resumed, whole = runner.resume(left.path, quiet), run("lora")
    assert resumed.read_record().state == "complete"
    assert [s.loss for s in resumed.read_steps()] == [s.loss for s in whole.read_steps()]
    assert parts(resumed) == parts(whole)


def test_records_of_before_still_open(run):
    record = run("lora").read_record()
    older = json.loads(json.dumps(encode(record)))
    assert decode(RunRecord, older) == record
    del older["memory_step"]
    assert decode(RunRecord, older).memory_step is None


def test_a_trace_that_cannot_be_written_is_one_line(small_run, tmp_path):
    prepared = runner.prepare(small_run("lora", kernels="torch"))
    trainee, _ = prepared.build()
    with pytest.raises(FolderError, match=r"cannot write .*memory\.json\.gz"):
        memory_trace.record(trainee, prepared.family, RunFolder(tmp_path / "gone"), [STEP])


class Tied(torch.nn.Module):
    """A weight used twice, a parameter that is part of another's storage, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(10, 4)
        self.head = torch.nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight
        self.part = torch.nn.Parameter(self.embedding.weight.detach()[:2])
        self.empty = torch.nn.Parameter(torch.zeros(0))
        self.register_buffer("positions", torch.arange(10))


def test_a_storage_is_counted_once(small_run):
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters())
    trainee = Trainee(small_run("full"), model, optimizer, None, None, None, 1)
    before = {held.part: held for held in memory_trace.inventory(trainee)}
    assert before["base_weights"].storages == {hex(model.head.weight.data_ptr()): 10 * 4 * FP32}
    assert before["other"].bytes == model.positions.nbytes
    assert before["gradients"].storages == before["optimizer_state"].storages == {}

    model.head(model.embedding(torch.tensor([1]))).sum().backward()
    optimizer.step()
    after = {held.part: held.bytes for held in memory_trace.inventory(trainee)}
    assert after["gradients"] == 10 * 4 * FP32
    assert after["optimizer_state"] == 2 * 10 * 4 * FP32 + FP32
    assert after["base_weights"] == before["base_weights"].bytes
    # On another device there is none of it.
    there = Trainee(small_run("full"), model.to("meta"), optimizer, None, None, None, 1)
    held = {held.part: held.bytes for held in memory_trace.inventory(there)}
    assert held["base_weights"] == held["other"] == 0
