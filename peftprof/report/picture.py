"""What was printed, as a picture."""

import os
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from peftprof.errors import FolderError


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what the recording `console` printed to `path`, whole, as SVG.

    Raises FolderError when the file cannot be written.
    """
    text = console.export_svg(title=title, theme=MONOKAI)
    temporary = path.with_name(f".new-{os.getpid()}-{path.name}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)
