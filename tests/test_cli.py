"""The command line as a user meets it; most of it in this process, some in a fresh one."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from peftprof.run.folder import RunFolder
from tests.nvtx import build_recorder, check_nesting, read_record, recording
from tests.trace.build import Trace

ROOT = Path(__file__).parent.parent


def peftprof(*arguments: object, **options):
    return subprocess.run(
        [sys.executable, "-m", "peftprof", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        **options,
    )


def in_process(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    from peftprof import cli

    monkeypatch.setattr(sys, "argv", ["peftprof", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


BAD_TRAIN = [
    (["--method", "prefix"], "unknown --method 'prefix'"),
    (["--kernels", "cuda"], "unknown --kernels 'cuda'"),
    (["--kernels", "triton", "--method", "full"], "--method full has none"),
    (["--model", "nobody/nothing"], "check the name and the network"),
    (["--model", "/no/such/folder"], "no folder '/no/such/folder'"),
    (["--model", "a/b/c"], "no name a hub could have"),
    (["--dataset", "nobody/nothing"], "check the name and the network"),
    (["--dataset", "missing.csv"], "no file or folder 'missing.csv'"),
    (["--recipe", "soup"], "unknown --recipe 'soup'"),
    (["--rank", "0"], "--rank is 0"),
    (["--rank", "many"], "--rank"),
    (["--rank", "4", "--method", "full"], "--method full has none"),
    (["--cuda-graphs", "on", "--device", "cpu"], "--cuda-graphs on cannot be: "),
    (["--rank", "1000"], "--rank 1000 is more than 384"),
    (["--batch-size", "0"], "--batch-size is 0"),
    (["--batch-size", "100000"], "--batch-size 100000 is more than"),
    (["--max-length", "513"], "512 positions"),
    (["--target-modules", "query,,value"], "an empty name"),
    (["--target-modules", "nope"], "its linear layers are"),
    (["--device", "cuda"], "device cuda"),
    (["--device", "abacus"], "abacus"),
    (["--precision", "fp16", "--device", "cpu"], "--precision fp16"),
    (["--out", "/proc/run"], "cannot write"),
    (["--resume", "/no/such"], "no folder"),
    (["--resume", "traces", "--rank", "8"], "give it alone"),
    (["--colour"], "No such option"),
    (["--method", ""], "unknown --method ''"),
    (["--recipe", ""], "unknown --recipe ''"),
    (["--label-column", ""], "--label-column is empty"),
    (["--svg", "/no/such/a.svg"], "--svg /no/such/a.svg"),
    (["--svg", ""], "--svg"),
]


@pytest.mark.parametrize(("arguments", "says"), BAD_TRAIN)
def test_bad_input_to_train(arguments, says, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, out, err = in_process(monkeypatch, capsys, "train", *arguments)
    assert code == 2
    assert says in err
    assert err.startswith("peftprof: ")
    assert len(err.splitlines()) == 1
    assert out == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "no"),
        (lambda p: p.mkdir(), "no"),
        (lambda p: p.write_bytes(b""), "empty"),
        (lambda p: p.write_bytes(b"\x00\xff junk"), ""),
        (lambda p: p.write_text('{"traceEvents": []}'), ""),
        (lambda p: p.write_text('{"traceEvents": [{"ph": "X"'), ""),
        (lambda p: p.write_text("[1, 2, 3]"), ""),
    ],
)
def test_bad_input_to_breakdown(make, says, monkeypatch, capsys, tmp_path):
    path = tmp_path / "thing.json"
    make(path)
    code, out, err = in_process(monkeypatch, capsys, "breakdown", path)
    assert code == 2
    assert says in err
    assert len(err.splitlines()) == 1
    assert out == ""


def test_a_fresh_process_fails_in_one_line_too():
    done = peftprof("train", "--rank", "0")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "peftprof: --rank is 0; it must be 1 or more\n"


def interpreting(value: str | None) -> dict[str, str]:
    """This environment with TRITON_INTERPRET as given; the tests' own has it set."""
    rest = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return rest if value is None else rest | {"TRITON_INTERPRET": value}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("value", [None, "0"])
def test_triton_without_a_gpu_says_what_to_do(value, tmp_path):
    done = peftprof(
        "train", "--kernels", "triton", "--out", tmp_path / "run", env=interpreting(value)
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("peftprof: --kernels triton needs a GPU")
    assert len(done.stderr.splitlines()) == 1
    assert "use --kernels torch" in done.stderr
    assert "TRITON_INTERPRET=1" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_help_and_breakdown_import_no_torch():
    code = (
        "import sys; sys.argv = ['peftprof', *sys.argv[1:]]\n"
        "import peftprof.cli, atexit\n"
        "atexit.register(lambda: print('TORCH' if 'torch' in sys.modules else 'LIGHT'))\n"
        "peftprof.cli.main()"
    )
    for arguments in (["--help"], ["train", "--help"], ["breakdown", "/no/such"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
        )
        assert done.stdout.endswith("LIGHT\n"), done


def test_the_readme_names_every_option_that_help_names():
    readme = (ROOT / "README.md").read_text()
    for command in ("train", "breakdown", "env"):
        shown = peftprof(command, "--help").stdout
        for option in set(re.findall(r"^  (--[a-z-]+)", shown, re.MULTILINE)) - {"--help"}:
            assert f"`{option}" in readme, f"{command} {option} is not in the README"


def test_env_prints_text_and_json(monkeypatch, capsys):
    code, out, _ = in_process(monkeypatch, capsys, "env", "--json")
    assert code == 0
    assert json.loads(out)["packages"]["torch"]
    code, out, _ = in_process(monkeypatch, capsys, "env")
    assert code == 0
    assert "triton" in out


@pytest.fixture
def arguments(tiny, sentences):
    return [
        "train", "--model", tiny("bert"), "--dataset", sentences, "--rank", 4,
        "--batch-size", 8, "--max-steps", 30, "--checkpoint-every", 5, "--device", "cpu",
    ]  # fmt: skip


def test_train_and_breakdown_end_to_end(arguments, tmp_path, monkeypatch, capsys):
    out_folder = tmp_path / "run"
    done = peftprof(*arguments, "--method", "qlora", "--out", out_folder)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    for word in ("accuracy", "samples/s", "p50 / p95 / p99", "host RSS", "live of", "energy"):
        assert word in done.stdout
    # a rich line may be folded at the width of the terminal
    assert "peftprof breakdown" in done.stdout
    code, shown, _ = in_process(monkeypatch, capsys, "breakdown", out_folder, "--json")
    assert code == 0
    result = json.loads(shown)
    assert result["version"] == 1
    (run,) = result["runs"]
    assert {"name", "source", "device", "steps", "step_ns", "rows"} <= run.keys()
    total = sum(row["ns"] for row in run["rows"]) + run["idle_ns"] + run["unattributed_ns"]
    assert total == pytest.approx(run["step_ns"]["median"], rel=1e-3)
    picture = tmp_path / "picture.svg"
    code, shown, _ = in_process(monkeypatch, capsys, "breakdown", tmp_path, "--svg", picture)
    assert code == 0
    assert "dequant" in shown
    assert "\x1b" not in shown
    assert picture.read_text().startswith("<svg")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_triton_interpreted_trains_for_real(arguments, tmp_path, monkeypatch, capsys):
    out_folder = tmp_path / "run"
    options = ["--method", "qlora", "--kernels", "triton", "--max-steps", 3, "--out", out_folder]
    done = peftprof(*arguments, *options, env=interpreting("1"))
    assert (done.returncode, done.stderr) == (0, "")
    assert "interpreted" in done.stdout
    folder = RunFolder.open(out_folder)
    record = folder.read_record()
    assert record.state == "complete"
    assert record.config["kernels"] == "triton"
    assert record.environment["kernels"]["triton"]["interpreted"]
    assert record.trainable.live == record.trainable.nominal
    assert record.profiled.same_losses
    steps = folder.read_steps()
    assert [step.step for step in steps] == list(range(3))
    assert all(math.isfinite(step.loss) for step in steps)
    assert (out_folder / "adapter" / "adapter_model.safetensors").exists()
    # What the kernels did is found again in the trace, by our names.
    code, shown, _ = in_process(monkeypatch, capsys, "breakdown", out_folder)
    assert code == 0
    assert "dequant" in shown


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_can_be_resumed(arguments, tmp_path):
    folder = tmp_path / "run"
    # A shell that starts the tests in the background has them ignore Ctrl-C.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from peftprof.cli import main; main()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments), "--max-steps", "5000"]
    with subprocess.Popen(
        [*command, "--profiler", "none", "--out", str(folder)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not (folder / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            _, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 130
    assert err == "peftprof: interrupted; `train --resume FOLDER` goes on with a run\n"
    assert RunFolder.open(folder).read_record().state == "running"
    assert not list(folder.glob(".new-*"))


@pytest.mark.slow
def test_kill_9_at_a_random_moment_and_resume(arguments, tmp_path, monkeypatch, capsys):
    """Not at chosen steps, as in test_loop, but whenever the signal happens to arrive."""
    whole = tmp_path / "whole"
    options = ["--profiler", "none", "--out"]
    assert in_process(monkeypatch, capsys, *arguments, *options, whole)[0] == 0
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "peftprof", *map(str, arguments)]
    command += [*options, str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoint.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.03 * (os.getpid() % 7))
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert RunFolder.open(killed).read_record().state == "running"
    done = peftprof("train", "--resume", killed)
    assert done.returncode == 0, done.stderr
    a, b = (RunFolder(f).read_steps() for f in (whole, killed))
    assert [(s.step, s.loss) for s in a] == [(s.step, s.loss) for s in b]
    records = [RunFolder(f).read_record() for f in (whole, killed)]
    assert records[0].accuracy == records[1].accuracy
    assert not list(killed.glob(".new-*"))


def test_a_recorder_hears_balanced_ranges_of_our_domain(arguments, tmp_path):
    recorder = build_recorder(tmp_path)
    record = tmp_path / "record.txt"
    environment = os.environ | recording(recorder, record)
    arguments = [*arguments, "--max-steps", 3, "--method", "qlora", "--profiler", "nsys"]
    done = peftprof(*arguments, "--out", tmp_path / "run", env=environment)
    assert done.returncode == 0, done.stderr
    ranges = check_nesting(read_record(record))
    names = {path[-1] for path in ranges}
    assert {"step:0", "step:12", "phase:forward", "phase:backward"} <= names
    assert {"op:dequant", "op:base_gemm", "op:lora_A", "op:lora_dA", "op:loss"} <= names
    assert any(len(path) == 4 for path in ranges)  # step > phase > layer > op
    categories = {event.category for event in read_record(record) if event.kind == "push"}
    assert categories == {"step", "phase", "layer", "op"}


def test_a_run_that_cannot_be_read_is_named_on_stderr(tmp_path):
    steps = Trace()
    steps.range("step:0", 0, 1000)
    steps.op("aten::mm", 0, 500)
    steps.write(tmp_path, "good.json")
    (tmp_path / "torn.json.gz").write_bytes(b"\x1f\x8b torn")
    done = peftprof("breakdown", str(tmp_path))
    assert done.returncode == 0
    assert done.stderr.startswith("peftprof: left out: ")
    assert "torn.json.gz" in done.stderr
    assert done.stderr.count("\n") == 1
    limited = peftprof("breakdown", str(tmp_path), "--fail-if", "dequant>1%")
    assert limited.returncode == 2
    assert "--fail-if cannot be answered" in limited.stderr
