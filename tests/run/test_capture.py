import gzip
import json
import shutil

import pytest

from peftprof import trace
from peftprof.errors import DeviceError
from peftprof.run import runner
from peftprof.run.folder import RunFolder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def run(runs, small_run, quiet):
    """`run(method, kernels)`: the folder of a run, made once."""

    def make(method: str, kernels: str) -> RunFolder:
        path = runs / f"{method}-{kernels}"
        if path.exists():
            return RunFolder.open(path)
        config = small_run(method, kernels=kernels, hidden=128, precision="bf16")
        return runner.train(config, path, ["train"], quiet)

    return make


CASES = [("full", "auto"), ("lora", "torch"), ("lora", "bnb"), ("qlora", "torch"), ("qlora", "bnb")]


@pytest.mark.parametrize(("method", "kernels"), CASES)
def test_the_folder_describes_itself(run, method, kernels):
    folder = run(method, kernels)
    names = {p.name for p in folder.path.iterdir()}
    trained = "model" if method == "full" else "adapter"
    files = {"run.json", "steps.jsonl", "evaluations.jsonl", "trace.json.gz", "memory.json.gz"}
    assert names == files | {trained}
    record = folder.read_record()
    assert record.state == "complete"
    assert record.profiled.same_losses  # the profiler changed no number
    assert record.profiled.overhead > 0
    assert record.model.fingerprint
    assert record.data.fingerprint
    assert record.environment["packages"]["torch"]
    assert record.memory.rss_bytes > 0
    assert record.memory.allocated_bytes is None
    assert record.memory.absent


@pytest.mark.parametrize(("method", "kernels"), CASES)
def test_the_trace_holds_every_range(run, method, kernels):
    folder = run(method, kernels)
    with gzip.open(folder.path / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = {e["name"] for e in events if e.get("cat") == "user_annotation"}
    assert {"step:10", "step:11", "step:12"} <= names
    assert {"phase:data", "phase:forward", "phase:backward", "phase:optimizer"} <= names
    assert {"layer:bert.encoder.layer.0", "layer:bert.encoder.layer.1"} <= names
    assert {"layer:head.classifier", "op:loss", "op:grad_clip"} <= names
    if kernels == "torch" and method != "full":
        assert {"op:base_gemm", "op:lora_A", "op:lora_B"} <= names
        assert {"op:lora_dA", "op:lora_dB", "op:lora_dx"} <= names
        assert ("op:dequant" in names) == (method == "qlora")
    if kernels == "bnb":
        assert {"op:lora_A", "op:lora_B"} <= names


@pytest.mark.parametrize(("method", "kernels"), CASES)
def test_the_breakdown_is_whole(run, method, kernels):
    loaded = trace.load([run(method, kernels).path])
    (result,) = loaded.breakdowns
    assert result.steps == 3
    total = sum(r.ns for r in result.rows) + result.idle_ns + result.unattributed_ns
    assert total == pytest.approx(result.step_ns.median, rel=1e-3)
    assert result.unattributed_ns < 0.05 * result.step_ns.median
    spent = {(r.phase, r.category): r.ns for r in result.rows}

    def in_phase(category, phase):
        return spent.get((phase, category), 0)

    for phase in ("forward", "backward"):
        assert in_phase("base_gemm", phase) > 0
        assert (in_phase("adapter_gemm", phase) > 0) == (method != "full")
        assert (in_phase("dequant", phase) > 0) == (method == "qlora")
    assert in_phase("optimizer", "optimizer") > 0


def test_runs_side_by_side(run, runs, tmp_path):
    run("lora", "torch"), run("qlora", "torch")
    for name in ("lora-torch", "qlora-torch"):
        shutil.copytree(runs / name, tmp_path / name)
    loaded = trace.load([tmp_path])
    assert {b.name for b in loaded.breakdowns} == {"lora-torch", "qlora-torch"}
    assert loaded.comparable is True, loaded.differences


def test_no_profiler_no_trace(small_run, tmp_path, quiet):
    folder = runner.train(small_run("lora", profiler="none"), tmp_path / "run", [], quiet)
    assert folder.read_record().profiled is None
    assert folder.read_record().memory_step is None
    assert not list(folder.path.glob("*.json.gz"))


def test_under_nsys_the_torch_profiler_stays_away(small_run, tmp_path, quiet, monkeypatch):
    monkeypatch.setenv("NSYS_PROFILING_SESSION_ID", "1")
    config = small_run("lora")
    assert config.profiler == "nsys"
    folder = runner.train(config, tmp_path / "run", [], quiet)
    assert folder.read_record().profiled.profiler == "nsys"
    assert folder.read_record().profiled.trace is None
    # The memory step needs no CUPTI, which is what only one profiler can have.
    assert {p.name for p in folder.path.glob("*.json.gz")} == {"memory.json.gz"}
    monkeypatch.delenv("NSYS_PROFILING_SESSION_ID")
    monkeypatch.delenv("NVTX_INJECTION64_PATH", raising=False)
    with pytest.raises(DeviceError, match="under `nsys profile`"):
        small_run("lora", profiler="nsys")
