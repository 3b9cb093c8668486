"""A breakdown reads what it was given and nothing else, whatever the files in it say."""

import dataclasses
import gzip
import json
import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from peftprof.errors import PeftprofError
from peftprof.records import MemoryStep, encode
from peftprof.trace import load
from tests.trace import nsys_files
from tests.trace.damage import damaged
from tests.trace.seeds import healthy
from tests.trace.test_damage import command, ended_well, is_one_clear_line
from tests.trace.test_sources import make_run, record

SECRET = b'{"traceEvents": [{"ph": "X", "cat": "cpu_op", "name": "secret", "ts": 0, "dur": 5}]}'

# Runs the command line and tells what it opened, listed, connected to, started and unpickled.
WATCHED = """
import json, sys
from peftprof import cli
seen = []
KINDS = ("open", "os.listdir", "os.scandir", "sqlite3.connect", "pickle.find_class", "exec.remote")
KINDS += ("subprocess.Popen", "os.exec", "os.system", "os.posix_spawn", "os.fork", "os.remove")
def hook(kind, args):
    if kind in KINDS or kind.startswith(("socket.", "ctypes.", "shutil.", "urllib.")):
        seen.append((kind, str(args[0]) if args else ""))
sys.addaudithook(hook)
sys.argv = ["peftprof", "breakdown", *sys.argv[1:]]
try:
    cli.main()
finally:
    print(json.dumps(seen), file=sys.stderr)
"""
PYTHON = tuple(
    f"{Path(folder).resolve()}/"
    for folder in (sys.prefix, sys.base_prefix, Path(__file__).parents[2] / "peftprof")
)


def opened(path: Path, *options: str) -> tuple[int, str, list[tuple[str, str]]]:
    """Exit code, output and what was done to anything outside Python and peftprof themselves."""
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(path), *options], capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    seen = [tuple(pair) for pair in json.loads(done.stderr.splitlines()[-1])]
    foreign = [
        (kind, what)
        for kind, what in seen
        if not (kind == "open" and (what.isdecimal() or os.path.realpath(what).startswith(PYTHON)))
        and not (kind in ("os.listdir", "os.scandir") and what.startswith(PYTHON))
        and (kind, what) != ("ctypes.dlopen", "None")  # of numpy: the process itself
    ]
    return done.returncode, done.stdout + done.stderr.splitlines()[0], foreign


class Evil:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


@pytest.mark.slow
def test_only_the_given_path_is_opened(tmp_path: Path) -> None:
    inside = tmp_path / "given"
    inside.mkdir()
    seeds = healthy()
    paths = [make_run(inside, record("run"))]
    for name in ("cpu", "gpu"):
        paths.append(inside / f"{name}.json.gz")
        paths[-1].write_bytes(gzip.compress(json.dumps(seeds.traces[name]).encode()))
    paths.append(nsys_files.small().write(inside))
    for number in range(8):
        folder = inside / f"{number}"
        folder.mkdir()
        paths.append(damaged(number, seeds).write(folder))
    codes = set()
    for path in paths:
        code, _, foreign = opened(path)
        codes.add(code)
        assert all(kind in ("open", "os.listdir", "sqlite3.connect") for kind, _ in foreign)
        for _, what in foreign:
            assert what.removeprefix("file://").startswith(str(path))
    assert codes == {0, 2}


@pytest.mark.parametrize("name", ["trace.json.gz", "trace.json", "trace.sqlite", "trace.pkl"])
@pytest.mark.parametrize("packed", [False, True])
def test_a_pickle_is_not_loaded(tmp_path: Path, name: str, packed: bool) -> None:
    mark = tmp_path / "was loaded"
    data = pickle.dumps(Evil(mark))
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if packed else data)
    code, said, foreign = opened(path)
    assert code == 2
    assert f"{name} is not JSON" in said
    assert set(foreign) == {("open", str(path))}
    assert not mark.exists()


def outside(tmp_path: Path) -> Path:
    secret = tmp_path / "secret.json"
    secret.write_bytes(SECRET)
    return secret


@pytest.mark.parametrize("how", ["absolute", "above", "link"])
@pytest.mark.parametrize("which", ["trace", "memory"])
def test_a_record_names_no_file_outside_its_folder(tmp_path: Path, how: str, which: str) -> None:
    secret = outside(tmp_path)
    named = {"absolute": str(secret), "above": "../secret.json", "link": "linked.json"}[how]
    made = record("run")
    assert made.profiled is not None
    if which == "trace":
        made = dataclasses.replace(made, profiled=dataclasses.replace(made.profiled, trace=named))
    else:
        made = dataclasses.replace(made, memory_step=MemoryStep(named, 1, "cpu", ()))
    folder = make_run(tmp_path, made)
    if how == "link":
        (folder / "linked.json").symlink_to(secret)
    if which == "trace":
        with pytest.raises(PeftprofError, match=r"has lost its trace|is a link to somewhere else"):
            load([folder])
    else:
        (found,) = load([folder]).breakdowns
        assert found.memory is None
        assert any(note.startswith("No memory: ") for note in found.notes)
        assert "secret" not in str(encode(found)).replace("secret.json", "")


def test_no_link_in_a_folder_leads_out_of_it(tmp_path: Path) -> None:
    secret = outside(tmp_path)
    elsewhere = make_run(tmp_path, record("elsewhere"))
    given = tmp_path / "given"
    given.mkdir()
    (given / "linked").symlink_to(elsewhere)
    (given / "linked.json").symlink_to(secret)
    (given / "half").mkdir()
    (given / "half" / "run.json").symlink_to(elsewhere / "run.json")
    with pytest.raises(PeftprofError, match="is a link to somewhere else; name what it leads to"):
        load([given])
    make_run(given, record("good"))
    loaded = load([given])
    assert [run.name for run in loaded.breakdowns] == ["good"]
    assert len(loaded.unreadable) == 3
    # Whoever names a link means what it leads to.
    assert load([given / "linked"]).breakdowns[0].name == "elsewhere"


def test_links_within_a_folder_are_followed(tmp_path: Path) -> None:
    folder = make_run(tmp_path, record("run"))
    (folder / "trace.json.gz").rename(folder / "real.json.gz")
    (folder / "trace.json.gz").symlink_to("real.json.gz")
    assert load([folder]).breakdowns[0].name == "run"


def special(tmp_path: Path, what: str) -> Path:
    path = tmp_path / "trace.json"
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(str(path))
    elif what == "link to a device":
        path.symlink_to("/dev/zero")
    elif what == "link to itself":
        path.symlink_to(path)
    elif what == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    elif what == "a name past all length":
        return tmp_path / ("x" * 5000)
    else:
        return Path(what)
    return path


SPECIAL = ("pipe", "socket", "link to a device", "link to itself", "link to nothing")
SPECIAL += ("a name past all length", "/dev/zero", "/dev/full", "/dev/stdin", "/dev/tty", "/proc/1")


@pytest.mark.parametrize("what", SPECIAL)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, what: str) -> None:
    done = command(special(tmp_path, what))
    ended_well(done)
    assert done.returncode == 2


@pytest.mark.parametrize("what", ["run.json", "trace.json.gz", "memory.json.gz"])
def test_a_pipe_in_a_run_is_not_waited_for(tmp_path: Path, what: str) -> None:
    made = dataclasses.replace(
        record("run"), memory_step=MemoryStep("memory.json.gz", 1, "cpu", ())
    )
    folder = make_run(tmp_path, made)
    (folder / what).unlink(missing_ok=True)
    os.mkfifo(folder / what)
    done = command(folder)
    ended_well(done)
    # Without a record the folder is one of traces.
    assert done.returncode == (2 if what == "trace.json.gz" else 0)


def test_names_that_speak_to_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "\x1b[31mred\x07\n\u202etrace.json"
    with pytest.raises(PeftprofError) as caught:
        load([path])
    is_one_clear_line(str(caught.value).replace("trace.json", str(tmp_path)), tmp_path)
    path.write_bytes(b"{")
    ended_well(command(path))
    (tmp_path / "run.json").write_text('"\\u001b[31mred"')
    ended_well(command(tmp_path))
