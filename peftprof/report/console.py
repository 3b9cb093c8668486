"""Where a report goes: coloured to a terminal, plain to a file or a pipe."""

import io
import os
import sys
from typing import TextIO

from rich.console import Console, RenderableType

WIDTH = 80  # where there is no terminal to ask
LEAST = 40


def show(renderable: RenderableType, out: TextIO | None = None, record: bool = False) -> Console:
    """Print `renderable` on `out` (default stdout); the console that did it.

    On a terminal it is printed as it is. Elsewhere there are no colours and no spaces at
    the ends of lines, and lines are 80 columns wide, or `COLUMNS`. A character that the
    output's encoding lacks becomes a question mark. With `record` the console can be saved
    as a picture.
    """
    out = _forgiving(sys.stdout if out is None else out)
    console = Console(file=out, record=record)
    if console.is_terminal:
        console.print(renderable)
        return console
    console, text = _plain(renderable, getattr(out, "encoding", None) or "utf-8", record)
    out.write(text)
    return console


def put(text: str, out: TextIO | None = None) -> None:
    """Write `text`, such as CSV, on `out` (default stdout) as it is."""
    _forgiving(sys.stdout if out is None else out).write(text)


def plain(renderable: RenderableType, encoding: str = "utf-8") -> str:
    """`renderable` as a file gets it; see `show`."""
    return _plain(renderable, encoding, record=False)[1]


def _forgiving(out: TextIO) -> TextIO:
    """`out`, which now writes a question mark for what its encoding lacks."""
    if isinstance(out, io.TextIOWrapper):
        out.reconfigure(errors="replace")
    return out


def _plain(renderable: RenderableType, encoding: str, record: bool) -> tuple[Console, str]:
    # rich asks the file for its encoding, to know whether it has blocks for bars.
    page = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace", newline="\n")
    console = Console(file=page, width=_width(), color_system=None, record=record)
    console.print(renderable)
    page.seek(0)
    return console, "".join(f"{line.rstrip()}\n" for line in page.read().split("\n")[:-1])


def _width() -> int:
    columns = os.environ.get("COLUMNS", "")
    return max(LEAST, int(columns)) if columns.isdecimal() else WIDTH
