"""The folder of a study: everything its runs gave, and what was made of it.

study.json           recipe, plan (every cell with its settings), labels, environment
runs/CELL/           the run's own folder, as `train` makes it
failures/CELL.json   why a run failed; it is not tried again unless asked for
logs/CELL.txt        what a run's libraries wrote to stderr
general/             the head and the losses of `forgetting`
results.jsonl, runs.parquet, steps.parquet, predictions.parquet    the raw results
verdicts.json, index.html, summary.md, figures/                    what was made of them
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftprof.errors import BusyError, FolderError
from peftprof.records import decode, encode
from peftprof.run.folder import writable
from peftprof.studies import Audit, Cell

FOLDERS = ("runs", "failures", "logs")


@dataclass(frozen=True)
class Stored:
    """The content of study.json."""

    version: int
    recipe: str
    about: str
    quick: str
    created: str
    settings: dict[str, Any]  # what the command line put over the recipe
    environment: dict[str, Any]
    labels: tuple[int, ...]
    cells: tuple[Cell, ...]
    left_out: dict[str, str]  # cells that this machine cannot do, and why
    forgetting: tuple[int, ...]
    audit: tuple[Audit, ...] = ()
    asked: str = ""  # a digest of the plan and the command line's settings, to know it again


@dataclass(frozen=True)
class StudyFolder:
    """A study's folder at `path`."""

    path: Path

    def run(self, cell: str) -> Path:
        """The run folder of a cell."""
        return self.path / "runs" / cell

    def log(self, cell: str) -> Path:
        """What a cell's process wrote to stderr."""
        return self.path / "logs" / f"{cell}.txt"

    @property
    def exists(self) -> bool:
        """Whether there is a study here."""
        return (self.path / "study.json").is_file()

    def check_free(self) -> None:
        """Raise FolderError where no study can be made, or something else is."""
        if self.path.exists() and (not self.path.is_dir() or not self._bare()):
            raise FolderError(f"{self.path} is there and is no study; name another --out")
        parent = next(p for p in [self.path, *self.path.absolute().parents] if p.exists())
        if not parent.is_dir() or not writable(parent):
            raise FolderError(f"cannot write to {parent}; name another --out")

    def _bare(self) -> bool:
        """Whether nothing is in the folder, or only what a study killed at its birth leaves."""
        return all(
            path.name.startswith(".new-")
            or (path.name in FOLDERS and path.is_dir() and not any(path.iterdir()))
            for path in self.path.iterdir()
        )

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The folder, made if it is not there, for this process alone. Raises FolderError."""
        try:
            for folder in FOLDERS:
                (self.path / folder).mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise FolderError(f"cannot make {self.path}: {error.strerror}") from error
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise BusyError(f"another study is at work in {self.path}; wait for it") from error
            yield
        finally:
            os.close(lock)

    def store(self, stored: Stored) -> None:
        """Write study.json."""
        self.write("study.json", json.dumps(encode(stored), indent=1) + "\n")

    def stored(self) -> Stored:
        """Read study.json. Raises FolderError when it is damaged."""
        path = self.path / "study.json"
        try:
            return decode(Stored, json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise FolderError(f"{path} is damaged ({error}); name another --out") from error

    def failure(self, cell: str) -> str | None:
        """Why a cell failed, None where it has not."""
        path = self.path / "failures" / f"{cell}.json"
        if not path.exists():
            return None
        try:
            return str(json.loads(path.read_text(encoding="utf-8"))["why"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FolderError(f"{path} is damaged ({error}); delete it") from error

    def fail(self, cell: str, why: str) -> None:
        """Record that a cell failed."""
        self.write(f"failures/{cell}.json", json.dumps({"why": why}) + "\n")

    def forgive(self, cell: str) -> None:
        """Forget that a cell failed."""
        (self.path / "failures" / f"{cell}.json").unlink(missing_ok=True)

    def write(self, name: str, content: str | bytes) -> None:
        """Write a file of the study, whole or not at all. Raises FolderError."""
        path = self.path / name
        temporary = path.with_name(f".new-{os.getpid()}-{path.name}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            data = content.encode("utf-8") if isinstance(content, str) else content
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except OSError as error:
            raise FolderError(
                f"cannot write {path}: {error.strerror}; what was written before is whole, and "
                "the same command goes on from it"
            ) from error
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
