"""The peak of memory: what it is made of, and how it grows to what the process holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftprof.breakdowns import MemoryPeak
from peftprof.report import pieces, words
from peftprof.report.pieces import Bar

LABEL_WIDTH = 20  # the longest part's name, indented


@dataclass(frozen=True)
class Level:
    """A line of the reconciliation: a total, or what is added to the total before it."""

    label: str
    bytes: int
    is_total: bool


def levels(memory: MemoryPeak) -> list[Level]:
    """Allocated, reserved, process and what each adds to the one before; known ones only."""
    on_device = memory.device != "cpu"
    known = [
        ("allocated", "", memory.allocated_bytes),
        ("reserved", "cached", memory.reserved_bytes),
        ("process", "context, libraries" if on_device else "code, libraries", memory.process_bytes),
    ]
    found: list[Level] = []
    before: int | None = None
    for label, added, size in known:
        if size is None:
            continue
        if before is not None:
            found.append(Level(added, size - before, is_total=False))
        found.append(Level(label, size, is_total=True))
        before = size
    return found


def where(memory: MemoryPeak) -> str:
    """Where in the step the peak was, as far as it is known."""
    layer = words.clean(memory.layer)
    place = f"in {words.clean(memory.phase)}" if memory.phase else ""
    place += f"{', ' if place else 'in '}{layer}" if layer else ""
    return f"The peak was {place}." if place else ""


def section(memory: MemoryPeak) -> Iterator[RenderableType]:
    """The parts at the peak as lines with bars, the reconciliation, notes."""
    table = pieces.table(expand=True)
    table.add_column("memory at the peak", width=LABEL_WIDTH, no_wrap=True)
    for name in ("MiB", "share", "blocks"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    largest = max([part.bytes for part in memory.parts] + [1])
    for part in memory.parts:
        table.add_row(
            Text(words.MEMORY.get(part.part, part.part)),
            words.mib(part.bytes),
            words.percent(part.bytes / memory.peak_bytes if memory.peak_bytes else 0.0),
            Text(f"{part.blocks:,}", "dim"),
            Bar(part.bytes / largest, "dim"),
        )
    bold = [
        Text(text, "bold") for text in ("peak", words.mib(memory.peak_bytes), words.percent(1.0))
    ]
    table.add_row(*bold, "", "")
    yield Padding(table, (1, 0, 0, 0))
    if reconciled := levels(memory):
        yield Padding(_levels(reconciled), (1, 0, 0, 0))
    place = where(memory)
    sources = f"{words.clean(memory.source)}, {words.clean(memory.device)}"
    yield pieces.note(f"{place} Read from: {sources}.".strip())
    for text in memory.notes:
        yield pieces.note(words.clean(text))


def _levels(found: list[Level]) -> Table:
    table = pieces.table()
    table.add_column("in the timed pass", width=LABEL_WIDTH, no_wrap=True)
    table.add_column("MiB", justify="right", no_wrap=True)
    for level in found:
        if level.is_total:
            table.add_row(Text(level.label, "bold"), Text(words.mib(level.bytes), "bold"))
        else:
            table.add_row(Text(f"  {level.label}"), words.mib(level.bytes, sign="+"))
    return table
