"""A small recipe; and a study whose runs are made in this process, where torch is loaded."""

import functools
import io
import json
import subprocess
import traceback
from types import SimpleNamespace

import pytest

from peftprof.errors import PeftprofError
from peftprof.run.folder import RunFolder
from peftprof.study import child, matrix, runs
from peftprof.study.folder import StudyFolder


@functools.cache
def audited(*ranks: int) -> str:
    """The answer of `audit` as JSON, counted once a session: test_audit.py counts anew."""
    return json.dumps(child.audit(list(ranks)))


class InThisProcess:
    """Stands for a child: the same request, the same lines of answers, no process of its own."""

    def __init__(self, command, stderr, **options) -> None:
        assert command[-1] == "peftprof.study.child"
        self.stdin, self.stderr, self.returncode = io.StringIO(), stderr, 0
        self.stdout = self.lines()

    def lines(self):
        request = json.loads(self.stdin.getvalue())
        asked.append(request)
        said: list[str] = []
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(child, "say", lambda value: said.append(json.dumps(value)))
            try:
                what = request.pop("do")
                if what == "audit":
                    done = json.loads(audited(*request["ranks"]))
                else:
                    done = getattr(child, what)(**request)
                said.append(json.dumps({"done": done}))
            except PeftprofError as error:
                said.append(json.dumps({"error": str(error), "kind": type(error).__name__}))
                self.returncode = 2
            except Exception:  # noqa: BLE001  # what a process would end by
                self.stderr.write(traceback.format_exc().encode())
                self.stderr.flush()
                self.returncode = 1
        yield from said

    def communicate(self) -> None:
        """It has answered."""


asked: list[dict] = []


@pytest.fixture
def in_process(monkeypatch) -> list[dict]:
    """Children are calls; the requests that they got, but for what was to be done."""
    asked.clear()
    monkeypatch.setattr(
        matrix, "subprocess", SimpleNamespace(Popen=InThisProcess, PIPE=subprocess.PIPE)
    )
    return asked


SMALL = """
about = "a small study"
ranks = {ranks}
seeds = {seeds}
{top}
[all]
model = {model}
dataset = {dataset}
learning_rate = 1e-2
max_steps = 8
batch_size = 8
max_length = 32
device = "cpu"
precision = "fp32"
profiler = "none"
checkpoint_every = 3
{more}
"""


@pytest.fixture
def recipe(tmp_path, tiny, sentences):
    """`recipe(more, top, **values)`: the path of a small recipe."""

    def make(more="", top="", name="small", **values):
        values = {"ranks": [2], "seeds": [1], "model": str(tiny("bert"))} | values
        values.setdefault("dataset", str(sentences))
        text = {k: json.dumps(v) for k, v in values.items()}
        path = tmp_path / f"{name}.toml"
        path.write_text(SMALL.format(more=more, top=top, **text))
        return str(path)

    return make


def outcomes(folder: StudyFolder) -> dict[str, tuple]:
    """What must not depend on where a study was interrupted: all but times, of every run."""
    found = {}
    for cell in folder.stored().cells:
        run = RunFolder(folder.run(cell.name))
        record = run.read_record()
        losses = [(step.step, step.loss, step.lr, step.samples) for step in run.read_steps()]
        found[cell.name] = (losses, run.read_evaluations(), record.accuracy, record.trainable)
    return found


class Heard:
    """A watcher of a study that remembers."""

    def __init__(self) -> None:
        self.cells: list[str] = []
        self.what: dict[str, str] = {}
        self.left: list[float | None] = []
        self.begun: tuple[int, int] = (0, 0)
        self.passes: list[tuple[str, int, int]] = []

    def study(self, cells, done):
        self.begun = cells, done

    def cell(self, name, left_s):
        self.cells.append(name)
        self.left.append(left_s)

    def ended(self, name, what, left_s):
        self.what[name] = what
        self.left.append(left_s)

    def begin(self, what, total, done):
        self.passes.append((what, total, done))

    def steps(self, done, loss, samples_per_s, memory_bytes): ...

    def say(self, text): ...


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def opened(in_process, tmp_path):
    """`opened(recipe, **asked)`: a study in the folder `study`, its runs made in this process."""

    def make(recipe, **more):
        more.setdefault("out", tmp_path / "study")
        return runs.open_study(runs.Asked(recipe=recipe, **more))

    return make
