from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftprof.errors import FolderError
from peftprof.run import runner
from peftprof.run.folder import RunFolder, Step
from tests.test_records import RECORD


@given(st.lists(st.tuples(st.integers(0, 10**6), st.floats(allow_nan=False), st.booleans())))
def test_steps_survive_the_disk(tmp_path_factory, rows):
    folder = RunFolder(tmp_path_factory.mktemp("run"))
    steps = [Step(n, loss, 1e-3, 5, 32, 7, 9, warm) for n, loss, warm in rows]
    folder.write_steps(steps)
    assert folder.read_steps() == steps


def test_a_record_survives_the_disk(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_record(RECORD)
    assert folder.read_record() == RECORD
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_record(RECORD)
    with pytest.raises(ZeroDivisionError), folder.whole("run.json") as new:
        new.write_text("half")
        raise ZeroDivisionError
    assert folder.read_record() == RECORD
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_a_full_disk_is_one_line_and_loses_nothing(small_disk):
    folder = RunFolder(small_disk("64k"))
    folder.write_record(RECORD)
    with pytest.raises(FolderError, match="No space left"), folder.whole("run.json") as new:
        new.write_bytes(b"x" * 2**20)
    assert folder.read_record() == RECORD


@pytest.mark.parametrize(("method", "size"), [("full", "200k"), ("lora", "32k")])
def test_a_run_on_a_disk_that_fills_up_can_go_on(
    method, size, small_disk, small_run, quiet, tmp_path
):
    config = small_run(method, checkpoint_every=4, profiler="none")
    path = small_disk(size) / "run"
    with pytest.raises(FolderError, match="cannot write") as raised:
        runner.train(config, path, [], quiet)
    assert "\n" not in str(raised.value)
    assert RunFolder.open(path).read_record().state == "running"
    small_disk("100m")
    resumed = runner.resume(path, quiet)
    whole = runner.train(config, tmp_path / "whole", [], quiet)
    assert resumed.read_record().state == "complete"
    assert resumed.read_record().accuracy == whole.read_record().accuracy
    assert [s.loss for s in resumed.read_steps()] == [s.loss for s in whole.read_steps()]


def test_folders_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thing").write_text("")
    for name, says in (("file", "is a file"), ("full", "already exists")):
        with pytest.raises(FolderError, match=says):
            RunFolder.check_free(tmp_path / name)
    for path in (tmp_path / "file" / "run", "/proc/run"):
        with pytest.raises(FolderError, match="cannot write"):
            RunFolder.check_free(Path(path))
    with RunFolder.check_free(tmp_path / "new" / "deep").held(new=True):
        assert (tmp_path / "new" / "deep").is_dir()


def test_folders_that_are_no_run(tmp_path):
    with pytest.raises(FolderError, match="no folder"):
        RunFolder.open(tmp_path / "missing")
    with pytest.raises(FolderError, match="no run folder"):
        RunFolder.open(tmp_path)
    (tmp_path / "run.json").write_text('{"version": 1')
    with pytest.raises(FolderError, match="damaged"):
        RunFolder.open(tmp_path).read_record()
    (tmp_path / "run.json").write_text("[" * 100_000)
    with pytest.raises(FolderError, match="damaged"):
        RunFolder.open(tmp_path).read_record()
    (tmp_path / "steps.jsonl").write_text("{}\n")
    with pytest.raises(FolderError, match="damaged"):
        RunFolder.open(tmp_path).read_steps()


def test_leftovers_of_a_killed_run_are_tidied(tmp_path):
    (tmp_path / ".new-1-run.json").write_text("half")
    (tmp_path / ".new-abc").mkdir()
    (tmp_path / ".new-abc" / "x").write_text("")
    with RunFolder(tmp_path).held(new=False):
        assert list(tmp_path.iterdir()) == []


def test_a_folder_is_one_runs_alone(tmp_path):
    folder = RunFolder(tmp_path / "run")
    with folder.held(new=True):
        for new in (True, False):
            with pytest.raises(FolderError, match="another run is at work"), folder.held(new):
                pass
        folder.write_record(RECORD)
    with pytest.raises(FolderError, match="another run is at work"), folder.held(new=True):
        pass
    with folder.held(new=False):
        assert folder.read_record() == RECORD
