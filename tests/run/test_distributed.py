"""One run over several processes: the same training as one, and one end for all of them.

Real processes, through torchrun and gloo on the CPU. Nothing here needs a GPU, and nothing
says that nccl works.
"""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from peftprof import cli, trace
from peftprof.breakdowns import CATEGORIES
from peftprof.errors import ConfigError, FolderError
from peftprof.records import Energy, Execution, decode
from peftprof.run import distributed, graphs, launch, runner
from peftprof.run.folder import RunFolder
from peftprof.run.meters import energy_of_all
from peftprof.trace.compare import compare
from tests.tolerances import LOSS_STOCK

ROOT = Path(__file__).parent.parent.parent
SAME = [
    ("full", "packed"),
    ("lora", "split"),
    ("qlora", "pad"),
    ("qlora", "packed"),
]


def torchrun(cache, *arguments, timeout=300):
    """Two processes, each with one thread, that keep their tokens in `cache`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m"]
    environment = os.environ | {"PEFTPROF_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def still(tiny, tmp_path_factory):
    """A model without dropout, of weights so large that its logits tell texts apart."""
    folder = tmp_path_factory.mktemp("still") / "bert"
    shutil.copytree(tiny("bert"), folder)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    config.initializer_range = 0.1
    torch.manual_seed(0)
    net = transformers.AutoModelForSequenceClassification.from_config(config)
    net.save_pretrained(folder)
    return folder


@pytest.fixture
def undropped(small_run, still):
    """Batches of 17 of 86 examples: the last of an epoch is one example, and a rank has none."""

    def make(method, padding):
        settings = {"batch_size": 17, "max_steps": 8, "profiler": "none", "dropout": 0.0}
        return small_run(method, model=str(still), padding=padding, **settings)

    return make


@pytest.fixture(scope="module")
def made():
    """Where the runs of two processes are, once they are made."""
    return {}


@pytest.fixture
def two(made, undropped, small_run, tmp_path_factory):
    """Everything that is asked of two processes, in one start of them: a folder."""
    if made:
        return made["folder"]
    folder = tmp_path_factory.mktemp("two")
    lively = small_run("lora", checkpoint_every=4, max_steps=12, profiler="none")
    alike = undropped("lora", "packed")
    requests = [
        *({"out": f"{m}-{p}", "config": undropped(m, p)} for m, p in SAME),
        {"out": "whole", "config": lively},
        {"out": "resumed", "config": lively, "kill_at": 9, "resume": True},
        {"out": "killed", "config": lively, "kill_at": 9},
        {"out": "no_sum", "config": alike, "no_sum": True},
        {"out": "own_seeds", "config": alike, "own_seeds": True},
        {"out": "too_few", "config": dataclasses.replace(alike, batch_size=1)},
    ]
    for request in requests:
        request["out"] = str(folder / request["out"])
        request["config"] = request["config"].to_json()
    (folder / "requests.json").write_text(json.dumps(requests))
    done = torchrun(folder / "cache", "tests.run.ranks", "runs", folder / "requests.json")
    assert done.returncode == 0, done.stderr
    made["folder"] = folder
    return folder


def told(folder, name):
    return json.loads((folder / f"{name}.told").read_text())


@pytest.mark.slow
@pytest.mark.parametrize(("method", "padding"), SAME)
def test_two_processes_train_as_one_does(method, padding, two, undropped, tmp_path, quiet):
    one = runner.train(undropped(method, padding), tmp_path / "one", [], quiet)
    both = RunFolder.open(two / f"{method}-{padding}")
    a, b = one.read_steps(), both.read_steps()
    assert [s.loss for s in b] == pytest.approx([s.loss for s in a], rel=LOSS_STOCK[torch.float32])
    assert len({round(s.loss, 3) for s in a}) > 4  # there is something to be different
    assert [(s.step, s.lr, s.samples, s.real_tokens) for s in a] == [
        (s.step, s.lr, s.samples, s.real_tokens) for s in b
    ]
    assert [s.samples for s in b] == [17, 17, 17, 17, 17, 1, 17, 17]
    for ours, theirs in zip(one.read_evaluations(), both.read_evaluations(), strict=True):
        assert (ours.step, ours.predicted) == (theirs.step, theirs.predicted)
        assert ours.accuracy.correct == theirs.accuracy.correct
        assert ours.accuracy.loss == pytest.approx(theirs.accuracy.loss, rel=1e-4)
    before, after = one.read_record(), both.read_record()
    assert (before.base_sha256, before.trainable) == (after.base_sha256, after.trainable)
    assert (after.execution.processes, after.execution.backend) == (2, "gloo")
    assert after.state == "complete"
    comparable, differences = compare([before, after])
    assert not comparable
    assert "devices: 1 vs 2" in differences


@pytest.mark.slow
def test_two_processes_resume_to_the_same_bits(two):
    whole, resumed = RunFolder.open(two / "whole"), RunFolder.open(two / "resumed")
    assert [s.loss for s in whole.read_steps()] == [s.loss for s in resumed.read_steps()]
    a, b = whole.read_record(), resumed.read_record()
    assert (a.accuracy, a.trainable, a.state) == (b.accuracy, b.trainable, b.state)
    adapters = [f.path / "adapter" / "adapter_model.safetensors" for f in (whole, resumed)]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()


@pytest.mark.slow
def test_another_number_of_processes_cannot_go_on(two, quiet):
    with pytest.raises(FolderError, match=r"over 2 processes and this is 1.*--nproc-per-node 2"):
        runner.resume(two / "killed", quiet)
    with safe_open(RunFolder(two / "killed").checkpoint, framework="pt") as file:
        states = [file.get_tensor(key) for key in ("rng/cpu", "rng/cpu/1")]
    assert not torch.equal(*states)  # each process drops out other numbers


@pytest.mark.slow
def test_what_differs_between_processes_is_noticed(two):
    weights = "InputError: rank 1 has other weights to train than rank 0"
    assert all(text.startswith(weights) for text in told(two, "own_seeds"))
    drift = "TrainingError: rank 1 has other trained weights than rank 0"
    assert all(text.startswith(drift) for text in told(two, "no_sum"))
    few = "ConfigError: --batch-size 1 is less than the 2 processes"
    assert all(text.startswith(few) for text in told(two, "too_few"))
    assert not (two / "too_few").exists()
    assert not (two / "own_seeds").exists()
    assert [told(two, name) for name in ("whole", "resumed", "killed")] == [["", ""]] * 3


def options(model, data, out):
    return [
        "train", "--model", model, "--dataset", data, "--rank", 4, "--batch-size", 8,
        "--max-steps", 14, "--device", "cpu", "--precision", "fp32", "--out", out,
    ]  # fmt: skip


@pytest.mark.slow
def test_the_command_line_makes_one_run(tiny, sentences, tmp_path):
    out = tmp_path / "runs" / "run"
    out.parent.mkdir()
    done = torchrun(tmp_path / "cache", "peftprof", *options(tiny("bert"), sentences, out))
    assert done.returncode == 0, done.stderr
    assert "peftprof" not in done.stderr
    assert done.stdout.count("training: 14 steps") == done.stdout.count("\nsamples/s ") == 1
    assert "joined by gloo" in done.stdout
    assert [path.name for path in out.parent.iterdir()] == ["run"]
    files = {"run.json", "steps.jsonl", "evaluations.jsonl", "trace.json.gz", "memory.json.gz"}
    assert {path.name for path in out.iterdir()} == files | {"adapter"}
    record = RunFolder.open(out).read_record()
    assert record.state == "complete"
    assert record.profiled.same_losses
    (found,) = trace.load([out]).breakdowns
    spent = dict.fromkeys(CATEGORIES, 0.0)
    for row in found.rows:
        spent[row.category] += row.ns
    assert spent["communication"] > 0
    assert found.unattributed_ns < 0.05 * found.step_ns.median


def ended(done):
    """The lines that peftprof wrote to stderr, and how each process ended."""
    assert done.returncode == 1  # torchrun's own
    assert not re.search(r'File ".*/peftprof/\w', done.stderr), done.stderr
    codes = re.findall(r"exitcode\s+: (-?\d+)", done.stderr)
    return [line for line in done.stderr.splitlines() if line.startswith("peftprof: ")], codes


@pytest.mark.slow
def test_an_error_of_one_process_ends_all(tiny, sentences, tmp_path):
    arguments = options(tiny("bert"), sentences, tmp_path / "run")
    done = torchrun(tmp_path / "cache", "tests.run.ranks", "fails", 1, *arguments)
    (line,), codes = ended(done)
    assert line.startswith("peftprof: rank 1: out of memory (no more of it)")
    assert codes == ["2", "2"]
    assert RunFolder.open(tmp_path / "run").read_record().state == "running"


@pytest.mark.slow
def test_an_error_of_all_processes_is_said_once(tiny, sentences, tmp_path):
    """Started without torchrun, as a scheduler does: the first process holds what they share."""
    arguments = options(tiny("bert"), sentences, tmp_path / "run")
    command = [sys.executable, "-m", "peftprof", *map(str, arguments), "--target-modules", "nope"]
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    common = os.environ | place | {"PEFTPROF_CACHE": str(tmp_path / "cache")}
    processes = [
        subprocess.Popen(
            command,
            env=common | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in "01"
    ]
    (out, said), silent = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [2, 2]
    assert silent == ("", "")
    assert out == ""
    assert len(said.splitlines()) == 1
    assert said.startswith("peftprof: no module of")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def rank_1_of_2(monkeypatch):
    """The environment of a second process; the group itself is not made."""
    names = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"}
    for name, value in (names | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)


def test_before_they_are_joined_the_first_process_speaks(rank_1_of_2, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peftprof", "train", "--rank", "0"])
    for rank, line in ((1, ""), (0, "peftprof: --rank is 0; it must be 1 or more\n")):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code == 2
        assert capsys.readouterr() == ("", line)


def test_a_study_says_how_it_is_spread(rank_1_of_2, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(sys, "argv", ["peftprof", "study", "--out", str(tmp_path / "study")])
    with pytest.raises(SystemExit) as left:
        cli.main()
    said = capsys.readouterr().err
    assert left.value.code == 2
    assert "--only" in said
    assert "torchrun -m peftprof train" in said
    assert not (tmp_path / "study").exists()


def test_the_environment_says_which_process_this_is(rank_1_of_2, monkeypatch):
    assert launch.launched() == launch.Launch(1, 1, 2)
    assert not launch.speaks()
    monkeypatch.setenv("RANK", "7")
    with pytest.raises(ConfigError, match="do not go together"):
        launch.launched()
    monkeypatch.setenv("RANK", "one")
    with pytest.raises(ConfigError, match="no whole number"):
        launch.launched()
    monkeypatch.delenv("RANK")
    with pytest.raises(ConfigError, match="RANK is not set"):
        launch.launched()
    for alone in ("1", "0"):
        monkeypatch.setenv("WORLD_SIZE", alone)
        assert launch.launched() is None
    monkeypatch.delenv("WORLD_SIZE")
    assert launch.launched() is None
    assert launch.speaks()


def test_alone_nothing_is_joined():
    values = torch.ones(2)
    with distributed.joined():
        assert not torch.distributed.is_initialized()
        assert distributed.summed(values) is values
    assert (distributed.size(), distributed.rank(), distributed.first()) == (1, 0, True)
    assert distributed.gathered(3) == [3]
    assert distributed.share([1, 2, 3]) == [1, 2, 3]
    assert distributed.seed(42) == 42
    assert distributed.own_device("cuda:3") == "cuda:3"
    assert distributed.backend("cpu") is None


def test_each_process_has_its_own_gpu_seed_and_examples(rank_1_of_2, monkeypatch, small_run):
    config = small_run("lora")
    monkeypatch.setattr(distributed, "size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    assert distributed.own_device("cuda") == "cuda:1"
    assert distributed.own_device("cpu") == "cpu"
    assert distributed.kind("cuda:0") == "cuda"
    with pytest.raises(ConfigError, match="each gets its own"):
        distributed.own_device("cuda:0")
    assert distributed.backend("cuda:1") == "nccl"
    assert distributed.seed(42) != 42
    on_gpu = dataclasses.replace(config, device="cuda:1", padding="packed")
    assert "several processes" in graphs.possible(on_gpu)
    batches = runner.prepare(config).train
    mine = batches.at(0)
    monkeypatch.setattr(distributed, "rank", lambda: 0)
    theirs = batches.at(0)
    assert (mine.samples, theirs.samples) == (4, 4)
    assert mine.whole == theirs.whole == 8
    assert mine.real_tokens + theirs.real_tokens == sum(
        batches.lengths[i] for i in batches.indices(0)
    )


def test_buckets_hold_every_parameter_once_and_are_bounded(monkeypatch):
    monkeypatch.setattr(distributed, "BUCKET", 40)
    sizes = [(3, torch.float32), (20, torch.float32), (4, torch.float32), (4, torch.float16)]
    parameters = [torch.nn.Parameter(torch.zeros(n, dtype=dtype)) for n, dtype in sizes]
    buckets = list(distributed._buckets(parameters))
    assert [[p.numel() for p in bucket] for bucket in buckets] == [[3], [20], [4], [4]]
    assert [id(p) for bucket in buckets for p in bucket] == [id(p) for p in parameters]


def test_a_cpu_package_is_counted_once_a_machine():
    first = Energy({"GPU": 10.0, "CPU package-0": 5.0})
    second = Energy({"GPU": 20.0, "CPU package-0": 5.0})
    assert energy_of_all([(first, True)]) is first
    assert energy_of_all([(first, True), (second, False)]).joules == {
        "GPU": 30.0,
        "CPU package-0": 5.0,
    }
    assert energy_of_all([(first, True), (second, True)]).joules["CPU package-0"] == 10.0
    without = Energy({"GPU": 1.0}, {"CPU": "no counter"})
    two_machines = energy_of_all([(first, True), (without, True)])
    assert two_machines == Energy({"GPU": 11.0}, {"CPU": "no counter"})


def test_a_record_of_before_went_over_one_device():
    fields = dataclasses.asdict(Execution("packed", 64, "adamw", None, False, False, 2))
    del fields["processes"], fields["backend"]
    assert decode(Execution, fields).processes == 1
