"""`python -m peftprof study` as a user meets it: bad input is one line, and leaves nothing."""

import sys
from pathlib import Path

import pytest

from peftprof import cli
from peftprof.records import read_record
from peftprof.study.folder import StudyFolder


@pytest.fixture
def command(in_process, monkeypatch, capsys):
    """`command(*arguments)`: exit code, stdout, stderr of the command, run in this process."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["peftprof", "study", *map(str, arguments)])
        capsys.readouterr()  # what a fixture's libraries wrote
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return ended.value.code, out, err

    return run


def refused(found: tuple[int, str, str], says: str) -> None:
    code, _, err = found
    assert code == 2, found
    assert says in err
    assert err.startswith("peftprof: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err


@pytest.fixture
def table(tmp_path):
    """`table(rows, head)`: the path of a CSV with those rows."""

    def make(rows, head="text,label"):
        path = tmp_path / "table.csv"
        path.write_text("\n".join([head, *rows]) + "\n", encoding="utf-8")
        return str(path)

    return make


def rows(labels=("0", "1"), text="a film number"):
    return [f"{text} {i},{labels[i % len(labels)]}" for i in range(60)]


BAD = {
    "recipe": (["--recipe", "soup"], "unknown --recipe 'soup'"),
    "no recipe": (["--recipe", ""], "unknown --recipe ''"),
    "max steps": (["--max-steps", "0"], "--max-steps is 0; it must be 1 or more"),
    "max steps in words": (["--max-steps", "few"], "--max-steps"),
    "subset": (["--subset", "-1"], "--subset is -1"),
    "device": (["--device", "abacus"], "abacus"),
    "unwritable": (["--out", "/proc/x"], "cannot write to /proc"),
    "model folder": (["--model", "/no/such/folder"], "no folder '/no/such/folder'"),
    "model of the hub": (["--model", "nobody/nothing"], "check the name and the network"),
    "dataset of the hub": (["--dataset", "nobody/nothing"], "check the name and the network"),
    "dataset file": (["--dataset", "missing.csv"], "no file or folder 'missing.csv'"),
    "text column": (["--text-column", "a,,b"], "an empty name"),
    "text column unknown": (["--text-column", "essay"], "name the one with the text"),
    "label column": (["--label-column", ""], "--label-column is empty"),
    "label column unknown": (["--label-column", "grade"], "name the one with the class"),
    "subset below a batch": (["--subset", "4"], "--batch-size 8 is more than the 4"),
    "unknown option": (["--colour"], "No such option"),
}


@pytest.mark.parametrize(("arguments", "says"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, says, command, recipe, tmp_path):
    out = tmp_path / "study"
    given = [] if "--recipe" in arguments else ["--recipe", recipe()]
    given += [] if "--out" in arguments else ["--out", out]
    refused(command(*given, *arguments), says)
    assert not out.exists()


BAD_DATA = {
    "no label column": (["a film,1"], "text,stars", "name the one with the class"),
    "no text column": (["1,a"], "label,essay", "name the one with the text"),
    "one class": (rows(labels=("1",)), "text,label", "one class only"),
    "no rows": ([], "text,label", "table.csv"),
    "an empty text": ([*rows(), '"",1'], "text,label", "has no text in text"),
    "a label is missing": ([*rows(), "a film,"], "text,label", "has no label"),
    "fractions": (rows(labels=("0.5", "1.5")), "text,label", "holds fractions"),
    "fewer rows than a batch": (rows()[:6], "text,label", "--batch-size 8 is more than"),
    "repeats": (["same,0", "same,1"] * 9, "text,label", "repeats count once"),
}


@pytest.mark.parametrize(("lines", "head", "says"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data(lines, head, says, command, recipe, table, tmp_path):
    out = tmp_path / "study"
    refused(command("--recipe", recipe(dataset=table(lines, head)), "--out", out), says)
    assert not out.exists()


BAD_RECIPES = {
    "rank above the layer": ({"ranks": [2, 65]}, "", "--rank 65 is more than 64"),
    "batch above the data": ({}, "[qlora]\nbatch_size = 1000\n", "--batch-size 1000 is more than"),
    "rank above it in a rung": (
        {},
        '[[ladder.rungs]]\nmethod = "lora"\nsettings = { rank = 999 }\n',
        "--rank 999 is more than 64",
    ),
    "batch above it in a rung": (
        {},
        '[[ladder.rungs]]\nmethod = "full"\nsettings = { batch_size = 999 }\n',
        "--batch-size 999 is more than",
    ),
    "fp16 on a CPU": ({}, '[lora]\nprecision = "fp16"\n', "fp16"),
    "too long for the model": ({}, "[full]\nmax_length = 4000\n", "positions"),
    "no such module": ({}, '[lora]\ntarget_modules = ["nope"]\n', "its linear layers are"),
    "no such module of QLoRA": ({}, '[qlora]\ntarget_modules = ["nope"]\n', "its linear layers"),
}


@pytest.mark.parametrize(("values", "more", "says"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_recipes_that_this_model_or_data_cannot_do(values, more, says, command, recipe, tmp_path):
    out = tmp_path / "study"
    refused(command("--recipe", recipe(more, **values), "--out", out), says)
    assert not out.exists()


@pytest.mark.parametrize("kind", ["file", "folder with something", "a run"])
def test_a_place_that_is_taken(kind, command, recipe, tmp_path):
    out = tmp_path / "study"
    if kind == "file":
        out.write_text("mine")
    else:
        out.mkdir()
        (out / ("run.json" if kind == "a run" else "notes.txt")).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    path = recipe()
    refused(command("--recipe", path, "--out", out), "is no study; name another --out")
    assert sorted(tmp_path.rglob("*")) == sorted([*before, Path(path)])


def test_a_study_that_is_damaged(command, recipe, tmp_path):
    out = tmp_path / "study"
    given = ["--recipe", recipe(), "--out", out]
    assert command(*given, "--list")[0] == 0
    (out / "study.json").write_text('{"version": 1')
    refused(command(*given), "study.json is damaged")


def test_list_prints_names_and_makes_no_run(command, recipe, tmp_path):
    out = tmp_path / "study"
    code, printed, err = command("--recipe", recipe(), "--out", out, "--list")
    assert (code, err) == (0, "")
    assert printed.splitlines() == ["full-s1", "lora-r2-s1", "qlora-r2-s1"]
    assert list((out / "runs").iterdir()) == []
    refused(command("--recipe", recipe(), "--out", out, "--only", "soup"), "see --list")


WORKS = {
    "100,000 characters": ([*rows(), f"{'word ' * 20_000},1"], {}),
    "labels as strings": (rows(labels=("dull", "fine")), {}),
    "quotes, commas, other scripts": ([*rows(), '"a, ""b"" \u6f22\u5b57 \U0001f600",0'], {}),
}


@pytest.mark.parametrize(("lines", "values"), WORKS.values(), ids=WORKS)
def test_odd_data_that_works(lines, values, command, recipe, table, tmp_path):
    out = tmp_path / "study"
    given = ["--recipe", recipe(dataset=table(lines), **values), "--out", out]
    code, _, err = command(*given, "--only", "lora-r2-s1")
    assert (code, err) == (0, "")
    folder = StudyFolder(out)
    record = read_record(folder.run("lora-r2-s1"))
    assert record.state == "complete"
    assert record.accuracy is not None
    assert record.accuracy.examples == len(folder.stored().labels)


@pytest.mark.slow
def test_the_whole_command_writes_its_report_and_says_where(command, recipe, tmp_path):
    out = tmp_path / "study"
    code, printed, err = command("--recipe", recipe(), "--out", out, "--max-steps", "7")
    assert (code, err) == (0, "")
    assert str(out) in printed.replace("\n", "")
    for name in ("index.html", "summary.md", "verdicts.json", "results.jsonl", "runs.parquet",
                 "steps.parquet", "predictions.parquet", "study.json"):  # fmt: skip
        assert (out / name).stat().st_size > 0
    assert "at most 7 steps a run" in (out / "summary.md").read_text()
    code, printed, err = command("--recipe", recipe(), "--out", out, "--max-steps", "7", "--list")
    assert (code, err) == (0, "")
    assert printed.split() == [cell.name for cell in StudyFolder(out).stored().cells]


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_study_and_loses_nothing(command, recipe, small_disk):
    disk = small_disk("4k")
    given = ["--recipe", recipe(), "--out", disk / "study"]
    refused(command(*given), "cannot write")
    small_disk("1m")
    refused(command(*given), "No space left on device")
    folder = StudyFolder(disk / "study")
    assert folder.exists
    assert folder.failure("full-s1") is None
    small_disk("200m")
    code, _, err = command(*given)
    assert (code, err) == (0, "")
    names = [cell.name for cell in folder.stored().cells]
    assert [read_record(folder.run(name)).state for name in names] == ["complete"] * 3
    assert not list((disk / "study").rglob(".new-*"))
