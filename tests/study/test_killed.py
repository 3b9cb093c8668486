"""Real processes: killed, interrupted and side by side they come to what one alone comes to."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from peftprof.records import read_record
from peftprof.study.folder import StudyFolder
from tests.study.conftest import outcomes

ROOT = Path(__file__).parents[2]
LONG = {"max_steps = 8": "max_steps = 150", "checkpoint_every = 3": "checkpoint_every = 20"}
PATIENCE = 240  # seconds, on a machine that does other things too


@pytest.fixture
def started(tmp_path):
    """`started(*arguments)`: `python -m peftprof study` as a process and group of its own."""
    processes = []

    def start(*arguments) -> subprocess.Popen[str]:
        environment = os.environ | {
            "PEFTPROF_CACHE": str(tmp_path / "cache"),
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(ROOT),
        }
        # Where tests run in the background Ctrl-C is ignored, and a process inherits that.
        handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        process = subprocess.Popen(
            [sys.executable, "-m", "peftprof", "study", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tmp_path,
            start_new_session=True,
        )
        signal.signal(signal.SIGINT, handler)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def until(process: subprocess.Popen[str], there) -> None:
    """Wait until something is there, or the process has ended."""
    began = time.monotonic()
    while not there() and process.poll() is None:
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.05)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


@pytest.fixture
def long(recipe, tmp_path):
    """A recipe of runs that take a few seconds each."""
    path = Path(recipe())
    text = path.read_text()
    for old, new in LONG.items():
        assert old in text
        text = text.replace(old, new)
    path.write_text(text)
    return str(path)


@pytest.mark.slow
def test_a_study_killed_again_and_again_comes_to_the_same(opened, long, heard, started, tmp_path):
    """The process of the study is killed alone: its child has to notice by itself."""
    whole = opened(long, out=tmp_path / "whole")
    whole.run(heard)
    out = tmp_path / "study"
    folder = StudyFolder(out)
    moments = [
        lambda: True,  # before there is anything
        lambda: (folder.run("full-s1") / "checkpoint.safetensors").exists(),
        lambda: (folder.run("lora-r2-s1") / "steps.jsonl").exists(),
        lambda: (folder.run("qlora-r2-s1") / "run.json").exists(),
    ]
    chance = random.Random(1)
    complete: dict[str, str] = {}
    for moment in moments:
        process = started("--recipe", long, "--out", out)
        until(process, moment)
        time.sleep(chance.uniform(0, 2))
        process.kill()
        ended(process)
        opened(long, out=out)  # settled here, which saves a minute; the same study afterwards
        for name in heard.cells:
            run = folder.run(name)
            if (run / "run.json").exists() and (record := read_record(run)).state == "complete":
                assert complete.setdefault(name, record.created) == record.created
    code, _, err = ended(started("--recipe", long, "--out", out))
    assert (code, err) == (0, "")
    for name, created in complete.items():
        assert read_record(folder.run(name)).created == created
    assert complete
    assert outcomes(folder) == outcomes(whole.folder)
    assert not list(out.rglob(".new-*"))
    assert (out / "index.html").exists()


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_a_second_study_is_refused_meanwhile(opened, long, started):
    study = opened(long)
    given = ["--recipe", long, "--out", study.folder.path]
    process = started(*given)
    until(process, lambda: (study.folder.run("full-s1") / "steps.jsonl").exists())
    code, _, err = ended(started(*given))
    assert code == 2
    assert err.count("\n") == 1
    assert "another study is at work" in err
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process of the command
    code, _, err = ended(process)
    assert code == 130
    assert err == "peftprof: interrupted; the same command goes on with the study\n"
    assert study.folder.failure("full-s1") is None
    # Nothing goes on in the background.
    with study.folder.held():
        steps = (study.folder.run("full-s1") / "steps.jsonl").read_bytes()
        time.sleep(2)
        assert (study.folder.run("full-s1") / "steps.jsonl").read_bytes() == steps


@pytest.mark.slow
def test_runs_by_name_side_by_side_then_what_is_left_and_the_report(
    opened, recipe, heard, started, tmp_path
):
    whole = opened(recipe(), out=tmp_path / "whole")
    whole.run(heard)
    study = opened(recipe())
    given = ["--recipe", recipe(), "--out", study.folder.path]
    processes = [started(*given, "--only", name) for name in study.names()[:2]]
    assert [ended(process)[::2] for process in processes] == [(0, "")] * 2
    created = [read_record(study.folder.run(n)).created for n in study.names()[:2]]
    code, out, err = ended(started(*given))
    assert (code, err) == (0, "")
    assert "study: 3 runs, 2 done" in out
    assert [read_record(study.folder.run(n)).created for n in study.names()[:2]] == created
    assert outcomes(study.folder) == outcomes(whole.folder)


@pytest.mark.slow
def test_bad_input_to_a_real_process(recipe, started, tmp_path):
    """Through settling children, whose errors travel back."""
    out = tmp_path / "study"
    for more, says in (
        (["--dataset", "nobody/nothing"], "check the name and the network"),
        (["--recipe", "soup"], "unknown --recipe 'soup'"),
    ):
        given = ["--recipe", recipe()] if "--recipe" not in more else []
        code, _, err = ended(started(*given, "--out", out, *more))
        assert code == 2
        assert says in err
        assert err.startswith("peftprof: ")
        assert err.count("\n") == 1
        assert not out.exists()
