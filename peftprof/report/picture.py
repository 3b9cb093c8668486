"""What was printed, as a picture."""

import os
import re
from pathlib import Path

from rich.console import Console

from peftprof.errors import FolderError

WEB_FONT = re.compile(r"\s*@font-face\s*\{.*?\}", re.DOTALL)


def check_writable(path: Path) -> None:
    """Raise FolderError where no file can be at `path`: better before an hour's run than after."""
    if not path.name or path.is_dir() or not path.absolute().parent.is_dir():
        raise FolderError(f"--svg {path} is no file that can be written; name one in a folder")


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what the recording `console` printed to `path`, whole, as SVG.

    Raises FolderError when the file cannot be written.
    """
    check_writable(path)
    # rich names web fonts; a picture must not call anywhere when it is opened.
    text = WEB_FONT.sub("", console.export_svg(title=title))
    temporary = path.with_name(f".new-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
