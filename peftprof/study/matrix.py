"""Runs a study's cells, each in its own process, and goes on where the last time ended."""

import contextlib
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peftprof import errors
from peftprof.errors import ConfigError, FetchError, FolderError, PeftprofError, StudyError
from peftprof.records import decode, encode, read_record
from peftprof.studies import Audit, Cell
from peftprof.study.folder import Stored, StudyFolder
from peftprof.study.plan import Plan
from peftprof.watcher import StudyWatcher

# Errors that every further cell would meet too, so that the study stops and loses nothing.
FATAL = (FolderError, FetchError)


def make(folder: StudyFolder, plan: Plan, settings: Mapping[str, Any], created: str) -> Stored:
    """The study of `plan` in `folder`: stored, if it is new; what is stored, if it is the same.

    Every configuration is settled on this machine and its input looked at before anything
    is written. Raises FolderError where the folder holds another study, and the errors of a
    run for bad input.
    """
    if folder.exists:
        stored = folder.stored()
        if stored.asked != asked(plan, settings):
            raise FolderError(
                f"{folder.path} holds a study of other settings ({stored.recipe}); name another "
                "--out"
            )
        return stored
    folder.check_free()
    request = {
        "do": "settle",
        "configs": [cell.config for cell in plan.cells],
        "at_most": settings.get("max_steps"),
    }
    answer = ask(request, Path(os.devnull))
    cells = [
        replace(cell, config=config)
        for cell, config in zip(plan.cells, answer["configs"], strict=True)
    ]
    kept, left_out = _that_change(cells)
    ranks = sorted({cell.rank for cell in cells if cell.rank is not None and cell.part == "matrix"})
    audits = ask({"do": "audit", "ranks": ranks}, Path(os.devnull))
    return Stored(
        version=1,
        recipe=plan.recipe,
        about=plan.about,
        quick=plan.quick,
        created=created,
        settings=dict(settings),
        environment=answer["environment"],
        labels=tuple(answer["labels"]),
        cells=tuple(kept),
        left_out=left_out,
        forgetting=plan.forgetting,
        audit=tuple(decode(Audit, one) for one in audits),
        asked=asked(plan, settings),
    )


def asked(plan: Plan, settings: Mapping[str, Any]) -> str:
    """A digest of everything that is asked for, before anything is settled on a machine."""
    text = json.dumps([encode(plan), dict(settings)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _that_change(cells: Sequence[Cell]) -> tuple[list[Cell], dict[str, str]]:
    """The cells without rungs that change nothing on this machine: bf16 without bf16, say."""
    kept: list[Cell] = []
    left_out: dict[str, str] = {}
    last: dict[int, Cell] = {}  # the rung before, by seed
    for cell in sorted(cells, key=lambda cell: -1 if cell.rung is None else cell.rung):
        if cell.rung is None:
            continue
        before = last.get(cell.seed)
        if before is not None and before.config == cell.config:
            left_out[cell.name] = f"{cell.cause}: it changes nothing on this machine"
        else:
            last[cell.seed] = cell
    kept = [cell for cell in cells if cell.name not in left_out]
    return kept, left_out


@dataclass
class Matrix:
    """The cells of a stored study, run one after the other."""

    folder: StudyFolder
    stored: Stored
    watcher: StudyWatcher
    clock: Callable[[], float] = time.monotonic

    def state(self, cell: Cell) -> str:
        """Whether a cell is complete, failed, begun or missing."""
        if self.folder.failure(cell.name) is not None:
            return "failed"
        path = self.folder.run(cell.name)
        if not (path / "run.json").is_file():
            return "missing"
        if read_record(path).state != "complete":
            return "begun"
        return "complete" if self._general_known(cell) else "begun"

    def run(self, names: Sequence[str] = ()) -> None:
        """Run every cell that is neither complete nor failed; of `names` only, if there are any.

        Raises the errors that every cell would meet; others are recorded, and the rest goes on.
        """
        wanted = [c for c in self.stored.cells if not names or c.name in names]
        if unknown := set(names) - {c.name for c in self.stored.cells}:
            raise ConfigError(f"--only {min(unknown)}: the study has no such cell; see --list")
        states = {cell.name: self.state(cell) for cell in wanted}
        todo = [cell for cell in wanted if states[cell.name] in ("missing", "begun")]
        self.watcher.study(len(wanted), len(wanted) - len(todo))
        took: dict[str, list[float]] = {}
        for number, cell in enumerate(todo):
            self.watcher.cell(cell.name, _left(todo[number:], took))
            began = self.clock()
            said = self.one(cell)
            took.setdefault(_kind(cell), []).append(self.clock() - began)
            self.watcher.ended(cell.name, said, _left(todo[number + 1 :], took))

    def one(self, cell: Cell) -> str:
        """Run one cell; what came of it, in a few words."""
        path = self.folder.run(cell.name)
        general = self.folder.path / "general" if self._asks_general(cell) else None
        request = {
            "do": "run",
            "config": self.settled(cell),
            "folder": str(path),
            "forgetting": None if general is None else str(general),
        }
        log = self.folder.log(cell.name)
        try:
            ask(request, log, self.watcher)
        except ChildError as error:
            self.folder.fail(cell.name, str(error))
            return f"failed: {error}"
        log.unlink(missing_ok=True)
        accuracy = read_record(path).accuracy
        return "" if accuracy is None else f"accuracy {100 * accuracy.accuracy:.1f} %"

    def settled(self, cell: Cell) -> dict[str, Any]:
        """The configuration of a cell, with the rate that the search chose for its method."""
        rates = chosen(self.folder, self.stored)
        if cell.part == "search" or cell.method not in rates:
            return cell.config
        rate = rates[cell.method]
        if rate is None:
            raise StudyError(
                f"no rate is chosen for {cell.method} yet: the search's cells come first"
            )
        return cell.config | {"learning_rate": rate}

    def _asks_general(self, cell: Cell) -> bool:
        of_full = cell.method == "full" and bool(self.stored.forgetting)
        return cell.part == "matrix" and (of_full or cell.rank in self.stored.forgetting)

    def _general_known(self, cell: Cell) -> bool:
        return (
            not self._asks_general(cell)
            or (self.folder.run(cell.name) / "forgetting.json").is_file()
        )


def chosen(folder: StudyFolder, stored: Stored) -> dict[str, float | None]:
    """The rate with the best accuracy on the tuning split, by method; None where not all are done.

    Of equal accuracies the lower loss wins. A rate that failed is out; if all failed, so is
    the method, and its cells keep the recipe's rate.
    """
    found: dict[str, list[tuple[float, float, float]] | None] = {}
    for cell in (c for c in stored.cells if c.part == "search"):
        tried = found.setdefault(cell.method, [])
        if folder.failure(cell.name) is not None or tried is None:
            continue
        path = folder.run(cell.name)
        record = read_record(path) if (path / "run.json").is_file() else None
        if record is None or record.state != "complete" or record.accuracy is None:
            found[cell.method] = None
            continue
        accuracy = record.accuracy
        tried.append((accuracy.accuracy, -accuracy.loss, cell.config["learning_rate"]))
    return {
        method: None if tried is None else max(tried)[2]
        for method, tried in found.items()
        if tried is None or tried
    }


class ChildError(StudyError):
    """A process that has not done what it was asked, for a reason of its own."""


def ask(request: Mapping[str, Any], log: Path, watcher: StudyWatcher | None = None) -> Any:
    """What a process of its own answers (`peftprof.study.child`); its stderr goes to `log`.

    Raises ChildError with one line, or the error itself where every process would meet it.
    """
    with log.open("wb") as errors_of_it:
        process = subprocess.Popen(
            [sys.executable, "-m", "peftprof.study.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors_of_it,
            text=True,
            encoding="utf-8",
        )
        try:
            answer = _listen(process, request, watcher)
        finally:
            _end(process)
    if "done" in answer:
        return answer["done"]
    if "error" not in answer:
        raise ChildError(_how(process.returncode, log))
    raised = _raised(answer)
    if watcher is None or isinstance(raised, FATAL):
        raise raised
    raise ChildError(str(raised))


def _listen(
    process: subprocess.Popen[str], request: Mapping[str, Any], watcher: StudyWatcher | None
) -> dict[str, Any]:
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # how it ended is told below
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
    for line in process.stdout:
        try:
            said = json.loads(line)
        except ValueError:
            continue  # a library that prints
        if not isinstance(said, dict):
            continue
        if "done" in said or "error" in said:
            return said
        if watcher is not None and "begin" in said:
            watcher.begin(said["begin"], said["total"], said["step"])
        elif watcher is not None and "loss" in said:
            watcher.steps(said["step"], said["loss"], said["samples_per_s"], None)
    return {}


def _end(process: subprocess.Popen[str]) -> None:
    """Wait for a process that has answered, or whose writer wants no answer any more."""
    with contextlib.suppress(BrokenPipeError):
        process.communicate()


def _how(code: int, log: Path) -> str:
    if code < 0:
        name = signal.Signals(-code).name
        why = "; the machine may have run out of memory" if name == "SIGKILL" else ""
        return f"its process was killed ({name}){why}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    return f"its process ended with exit code {code}: {last.strip()}"


def _raised(answer: Mapping[str, Any]) -> PeftprofError:
    kind = getattr(errors, str(answer["kind"]), PeftprofError)
    raised = kind(str(answer["error"]))
    assert isinstance(raised, PeftprofError)
    return raised


def _kind(cell: Cell) -> str:
    return f"{cell.part} {cell.method}"


def _left(cells: Sequence[Cell], took: Mapping[str, Sequence[float]]) -> float | None:
    """Seconds that these cells will take, by those that are behind; None before the first, or
    where there are none.
    """
    everything = [seconds for times in took.values() for seconds in times]
    if not everything or not cells:
        return None
    usual = statistics.mean(everything)
    return sum(statistics.mean(took[_kind(c)]) if _kind(c) in took else usual for c in cells)
