"""Files that a report is written to: whole, or not at all."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from peftprof.errors import FolderError

WEB_FONT = re.compile(r"\s*@font-face\s*\{.*?\}", re.DOTALL)


def check_writable(path: Path, option: str = "--svg") -> None:
    """Raise FolderError where no file can be at `path`: better before an hour's run than after.

    Nor on anything else that is there, a device, a pipe or a link: it would be replaced.
    """
    taken = path.is_symlink() or (path.exists() and not path.is_file())
    if not path.name or taken or not path.absolute().parent.is_dir():
        raise FolderError(f"{option} {path} is no file that can be written; name one in a folder")


def check_apart(outputs: Mapping[str, Path], inputs: Sequence[Path]) -> None:
    """Raise FolderError where an output, by its option, is another, or would write over an input.

    Everything in a run's folder is an input.
    """
    seen = {_place(path): "what is read" for path in inputs}
    for option, path in outputs.items():
        check_writable(path, option)
        place = _place(path)
        inside = (place.parent / "run.json").exists() and place.exists()
        if place in seen or inside:
            other = seen.get(place, "a run's own file")
            raise FolderError(f"{option} {path} would write over {other}; name another file")
        seen[place] = f"what {option} writes"


def _place(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):  # a link that leads to itself
        return path.absolute()


def make_folder(path: Path) -> None:
    """Make a folder for pictures. Raises FolderError when it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FolderError(f"cannot make {path}: {error.strerror}") from error


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what the recording `console` printed to `path`, whole, as SVG.

    Raises FolderError when the file cannot be written.
    """
    # rich names web fonts; a picture must not call anywhere when it is opened.
    save(WEB_FONT.sub("", console.export_svg(title=title)), path, "--svg")


def save(text: str, path: Path, option: str) -> None:
    """Write `text` to `path`, whole, as UTF-8. Raises FolderError when it cannot be written."""
    with whole(path, option) as new:
        new.write_text(text, encoding="utf-8")


@contextmanager
def whole(path: Path, option: str) -> Iterator[Path]:
    """A file to write that becomes `path` when all went well, and is gone when not.

    Raises FolderError when it cannot be written.
    """
    check_writable(path, option)
    temporary = path.with_name(f".new-{os.getpid()}-{path.name}")
    try:
        yield temporary
        temporary.replace(path)
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
