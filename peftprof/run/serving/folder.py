"""The folder of an inference measurement.

    infer.json                   `inferences.InferenceRecord`
    calls.jsonl                  a line for each turn: variant, phase, batch, length, round, ns
    VARIANT-PHASE.json.gz        Kineto traces (--profiler torch)
    adapter/                     the adapter that was made, where no run has one

Every file appears under its name by a rename. A measurement that fails leaves no folder.
"""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError

from peftprof.errors import FolderError
from peftprof.inferences import FILE, InferenceRecord
from peftprof.records import encode
from peftprof.run.folder import RunFolder, writable
from peftprof.run.serving.adapter import Adapter
from peftprof.run.serving.timing import Turn


@dataclass(frozen=True)
class InferenceFolder:
    """A folder at `path`."""

    path: Path

    @classmethod
    def check_free(cls, path: Path) -> "InferenceFolder":
        """The folder to be made at `path`. Raises FolderError when it cannot be."""
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            what = "already exists" if path.is_dir() else "is a file, and a folder is needed"
            raise FolderError(f"{path} {what}; name another --out")
        parent = next(p for p in [path, *path.absolute().parents] if p.exists())
        if not parent.is_dir() or not writable(parent):
            raise FolderError(f"cannot write to {parent}; name another --out")
        return cls(path)

    @contextlib.contextmanager
    def made(self) -> Iterator[None]:
        """The folder, made and held; and gone again unless what is done inside ends well.

        Raises FolderError, also where another process has begun in it meanwhile.
        """
        was_there = self.path.exists()
        with RunFolder(self.path).held(new=True):
            try:
                yield
            except BaseException:
                for child in self.path.iterdir():
                    shutil.rmtree(child) if child.is_dir() else child.unlink()
                if not was_there:
                    self.path.rmdir()
                raise

    def write_record(self, record: InferenceRecord) -> None:
        """Write infer.json."""
        with self.whole(FILE) as new:
            new.write_text(json.dumps(encode(record), indent=2) + "\n", encoding="utf-8")

    def write_turns(self, turns: Iterable[Turn]) -> None:
        """Write calls.jsonl."""
        lines = "".join(json.dumps(dataclasses.asdict(turn)) + "\n" for turn in turns)
        with self.whole("calls.jsonl") as new:
            new.write_text(lines, encoding="utf-8")

    def save_adapter(self, adapter: Adapter) -> Path:
        """Write the adapter into a folder of its own; that folder."""
        folder = self.path / "adapter"
        try:
            folder.mkdir()
            adapter.save(folder)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(folder, error) from error
        return folder

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Path]:
        """A temporary path for a file that becomes `name` when the block ends well."""
        temporary = self.path / f".new-{os.getpid()}-{name}"  # writers go by the suffix
        try:
            yield temporary
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(self.path / name)
        except OSError as error:
            raise _cannot_write(self.path / name, error) from error
        finally:
            temporary.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception) -> FolderError:
    why = getattr(error, "strerror", None) or str(error)
    return FolderError(f"cannot write {path}: {why}; name another --out")
