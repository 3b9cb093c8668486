"""What was printed, as a picture."""

import os
import re
from pathlib import Path

from rich.console import Console

from peftprof.errors import FolderError

WEB_FONT = re.compile(r"\s*@font-face\s*\{.*?\}", re.DOTALL)


def save_svg(console: Console, path: Path, title: str) -> None:
    """Write what the recording `console` printed to `path`, whole, as SVG.

    Raises FolderError when the file cannot be written.
    """
    if not path.name:
        raise FolderError("--svg is empty; name a file")
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
