"""Files that a report is written to: whole, or not at all."""

import os
import re
from pathlib import Path

from rich.console import Console

from peftprof.errors import FolderError

WEB_FONT = re.compile(r"\s*@font-face\s*\{.*?\}", re.DOTALL)


def check_writable(path: Path, option: str = "--svg") -> None:
    """Raise FolderError where no file can be at `path`: better before an hour's run than after."""
    if not path.name or path.is_dir() or not path.absolute().parent.is_dir():
        raise FolderError(f"{option} {path} is no file that can be written; name one in a folder")


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what the recording `console` printed to `path`, whole, as SVG.

    Raises FolderError when the file cannot be written.
    """
    # rich names web fonts; a picture must not call anywhere when it is opened.
    save(WEB_FONT.sub("", console.export_svg(title=title)), path, "--svg")


def save(text: str, path: Path, option: str) -> None:
    """Write `text` to `path`, whole, as UTF-8. Raises FolderError when it cannot be written."""
    check_writable(path, option)
    temporary = path.with_name(f".new-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
