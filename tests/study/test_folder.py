"""A study's folder: whole files, one study at a time, damage said in one line."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import pytest

from peftprof.errors import BusyError, FolderError
from peftprof.studies import Cell
from peftprof.study.audit import audit
from peftprof.study.folder import FOLDERS, Stored, StudyFolder

CELL = Cell("full-s1", "matrix", "full", None, 1, {"method": "full", "text_columns": ["a"]})
STORED = Stored(1, "small", "about", "", "2026", {"max_steps": 3}, {"os": "x"}, (0, 1, 1), (CELL,),
                {"ladder-1-s1": "why"}, (8,), (), "digest")  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> StudyFolder:
    found = StudyFolder(tmp_path / "study")
    with found.held():
        found.store(STORED)
    return found


def test_what_is_stored_is_read(folder):
    assert folder.exists
    assert folder.stored() == STORED
    counted = replace(STORED, audit=audit([2]))
    folder.store(counted)
    assert folder.stored() == counted


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": "one"}', "\x00", "[" * 100_000])
def test_a_damaged_study_is_said_in_one_line(folder, text):
    (folder.path / "study.json").write_text(text)
    with pytest.raises(FolderError, match="damaged") as raised:
        folder.stored()
    assert "\n" not in str(raised.value)


def test_failures_are_kept_and_forgiven(folder):
    assert folder.failure("full-s1") is None
    folder.fail("full-s1", "out of memory")
    assert folder.failure("full-s1") == "out of memory"
    folder.forgive("full-s1")
    folder.forgive("full-s1")
    assert folder.failure("full-s1") is None
    (folder.path / "failures" / "full-s1.json").write_text("[]")
    with pytest.raises(FolderError, match="delete it"):
        folder.failure("full-s1")


def test_it_is_held_by_one_and_let_go_of(folder):
    with folder.held():
        with pytest.raises(BusyError, match="another study is at work"), folder.held():
            pass
        with pytest.raises(BusyError), StudyFolder(folder.path).held():
            pass
    with pytest.raises(KeyError), folder.held():
        raise KeyError
    with folder.held():
        pass


@pytest.mark.parametrize(
    "left", [(), FOLDERS, ("runs",), (*FOLDERS, ".new-12-study.json")], ids=str
)
def test_what_a_study_killed_at_its_birth_leaves_is_free(left, tmp_path):
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    for name in left:
        if name in FOLDERS:
            (folder.path / name).mkdir()
        else:
            (folder.path / name).write_text("{")
    folder.check_free()


@pytest.mark.parametrize("taken", ["notes.txt", "runs/full-s1/run.json", "logs"])
def test_anything_else_is_not(taken, tmp_path):
    folder = StudyFolder(tmp_path / "study")
    path = folder.path / taken
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    with pytest.raises(FolderError, match="is no study"):
        folder.check_free()
    assert path.read_text() == "mine"


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    before = (folder.path / "study.json").read_bytes()

    def full(self, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(FolderError, match=r"No space left on device; what was written before is"):
        folder.write("study.json", "{")
    assert (folder.path / "study.json").read_bytes() == before
    assert not list(folder.path.rglob(".new-*"))
    monkeypatch.undo()
    folder.write("figures/a.bin", b"\x00\xff")
    assert (folder.path / "figures" / "a.bin").read_bytes() == b"\x00\xff"
    folder.write("verdicts.json", json.dumps({"word": "\u6f22"}, ensure_ascii=False))
    assert json.loads((folder.path / "verdicts.json").read_text("utf-8")) == {"word": "\u6f22"}


def test_a_place_where_no_folder_can_be(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (Path("/proc/x"), Path("/proc/x/y"), tmp_path / "file" / "study"):
        with pytest.raises(FolderError, match="cannot write to"):
            StudyFolder(path).check_free()
        with pytest.raises(FolderError, match="cannot make"), StudyFolder(path).held():
            pass
