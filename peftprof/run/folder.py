"""The run folder: everything needed to understand a run years later, written whole.

    run.json                 `records.RunRecord`
    steps.jsonl              one line a timed step: step, loss, lr, ns, samples, tokens, warmup
    evaluations.jsonl        one line an evaluation: step, `records.Accuracy`, classes predicted
    trace.json.gz            Kineto trace of the profiled pass (--profiler torch)
    memory.json.gz           Kineto trace of one step's allocations (unless --profiler none)
    adapter/ or model/       what was trained, as PEFT or transformers save it
    checkpoint.safetensors   only while the run is not complete: where --resume goes on

Every file appears under its name by a rename, so a killed run leaves none half-written.
"""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from peftprof.errors import BusyError, FolderError
from peftprof.records import Accuracy, RunRecord, decode, encode, read_record

T = TypeVar("T")


@dataclass(frozen=True)
class Step:
    """One optimiser step of the timed pass. `warmup` steps count in no figure."""

    step: int
    loss: float
    lr: float
    ns: int
    samples: int
    real_tokens: int
    padded_tokens: int
    warmup: bool


@dataclass(frozen=True)
class Evaluation:
    """Validation accuracy after `step` optimiser steps, and the class given to each example."""

    step: int
    accuracy: Accuracy
    predicted: tuple[int, ...] = ()


@dataclass(frozen=True)
class RunFolder:
    """A run folder at `path`; of several processes one `writes`, and the others drop it."""

    path: Path
    writes: bool = True

    @classmethod
    def check_free(cls, path: Path) -> "RunFolder":
        """The folder to be made at `path`. Raises FolderError when it cannot be."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FolderError(
                f"{path} already exists; name another --out, or --resume it"
                if path.is_dir()
                else f"{path} is a file, and a run needs a folder; name another --out"
            )
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not writable(parent):
            raise FolderError(f"cannot write to {parent}; name another --out")
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> "RunFolder":
        """The existing run at `path`. Raises FolderError when there is none."""
        if not path.exists():
            raise FolderError(f"there is no folder {path}")
        if not (path / "run.json").is_file():
            raise FolderError(f"{path} is no run folder: it has no run.json")
        return cls(path)

    @contextlib.contextmanager
    def held(self, new: bool) -> Iterator[None]:
        """The folder made, if it is new, and held for this process alone.

        Raises FolderError when another process holds it, has made a run in it meanwhile,
        or it cannot be made.
        """
        if not self.writes:
            yield
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FolderError(f"cannot make {self.path}: {error.strerror}") from error
        try:
            if not _locked(lock) or (new and any(self.path.iterdir())):
                raise BusyError(f"another run is at work in {self.path}; wait for it")
            self._tidy()
            yield
        finally:
            os.close(lock)

    @property
    def checkpoint(self) -> Path:
        """Where the checkpoint is, if there is one."""
        return self.path / "checkpoint.safetensors"

    def write_record(self, record: RunRecord) -> None:
        """Write run.json."""
        if not self.writes:
            return
        text = json.dumps(encode(record), indent=2)
        with self.whole("run.json") as new:
            new.write_text(text + "\n", encoding="utf-8")

    def read_record(self) -> RunRecord:
        """Read run.json. Raises FolderError when it is damaged."""
        return read_record(self.path)

    def write_steps(self, steps: Iterable[Step]) -> None:
        """Write steps.jsonl."""
        self._write_lines("steps.jsonl", steps)

    def read_steps(self) -> list[Step]:
        """Read steps.jsonl; empty when there is none."""
        return self._read_lines("steps.jsonl", Step)

    def write_evaluations(self, evaluations: Iterable[Evaluation]) -> None:
        """Write evaluations.jsonl."""
        self._write_lines("evaluations.jsonl", evaluations)

    def read_evaluations(self) -> list[Evaluation]:
        """Read evaluations.jsonl; empty when there is none."""
        return self._read_lines("evaluations.jsonl", Evaluation)

    def _write_lines(self, name: str, rows: Iterable[Any]) -> None:
        if not self.writes:
            return
        lines = "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in rows)
        with self.whole(name) as new:
            new.write_text(lines, encoding="utf-8")

    def _read_lines(self, name: str, kind: type[T]) -> list[T]:
        path = self.path / name
        if not path.exists():
            return []
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
            return [decode(kind, json.loads(line)) for line in lines]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FolderError(f"{path} is damaged: {error}") from error

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A temporary path for a file that becomes `name` when the block ends well.

        For the process that `writes` alone.
        """
        # The suffix stays at the end: writers choose their format by it.
        temporary = self.path / f".new-{os.getpid()}-{name}"
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(name, error) from error
        finally:
            temporary.unlink(missing_ok=True)

    def save_folder(self, name: str, save: Callable[[Path], None]) -> None:
        """Let `save` fill a temporary folder that then becomes `name`."""
        if not self.writes:
            return
        try:
            with tempfile.TemporaryDirectory(dir=self.path, prefix=".new-") as work:
                made = Path(work) / name
                made.mkdir()
                save(made)
                shutil.rmtree(self.path / name, ignore_errors=True)
                made.replace(self.path / name)
        except (OSError, SafetensorError) as error:
            raise self._cannot_write(name, error) from error

    def _cannot_write(self, name: str, error: Exception) -> FolderError:
        why = getattr(error, "strerror", None) or str(error)
        return FolderError(
            f"cannot write {self.path / name}: {why}; what was written before is whole, and "
            "--resume goes on from it"
        )

    def _tidy(self) -> None:
        """Remove what a killed process may have left under temporary names."""
        for leftover in self.path.glob(".new-*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()


def _locked(descriptor: int) -> bool:
    """Lock a folder for this process; the lock goes with the process, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`: tried, for root may where nobody can."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
