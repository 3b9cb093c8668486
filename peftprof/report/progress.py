"""The progress of a run: a live bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from peftprof.report.units import mib
from peftprof.watcher import StudyWatcher, Watcher

LINE_EVERY_S = 10.0


@contextlib.contextmanager
def watcher(console: Console) -> Iterator[Watcher]:
    """A watcher for `console`: live where it is a terminal, lines where it is not."""
    if not console.is_terminal:
        yield LineWatcher(console)
        return
    with _bars(console, TimeRemainingColumn(compact=True)) as progress:
        yield LiveWatcher(progress)


def _bars(console: Console, *more: ProgressColumn) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=16),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        *more,
        console=console,
    )


def figures(loss: float, samples_per_s: float, memory_bytes: int | None) -> str:
    """Loss, rate and memory in a few characters; what is not known is left out."""
    parts = [f"loss {loss:.4f}"]
    if samples_per_s:
        parts.append(f"{samples_per_s:.1f} samples/s")
    if memory_bytes is not None:
        parts.append(mib(memory_bytes))
    return "  ".join(parts)


class LiveWatcher:
    """A bar with loss, samples/s, memory and time left."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass starts: a bar of its own."""
        self.task = self.progress.add_task(what, total=total, completed=done, figures="")

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """Move the bar."""
        shown = figures(loss, samples_per_s, memory_bytes)
        self.progress.update(self.task, completed=done, figures=shown)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.progress.console.print(escape(text), highlight=False)


class LineWatcher:
    """A line at most every ten seconds, for logs."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass starts: one line."""
        self.what, self.total = what, total
        self.started = self.last = self.clock()
        self.first = done
        self.say(f"{what}: {total} steps" + (f", {done} done" if done else ""))

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """Steps are behind: a line when the last one is old enough, and at the end."""
        now = self.clock()
        if now - self.last < LINE_EVERY_S and done < self.total:
            return
        self.last = now
        left = (now - self.started) / max(1, done - self.first) * (self.total - done)
        self.say(
            f"{self.what}: {done}/{self.total}  {figures(loss, samples_per_s, memory_bytes)}"
            + (f"  {left:.0f} s left" if left >= 1 else "")
        )

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def study_watcher(console: Console) -> Iterator[StudyWatcher]:
    """The same for a study: a bar for its runs and one for the run at work, or lines."""
    if not console.is_terminal:
        yield StudyLines(console)
        return
    with _bars(console) as progress:
        yield StudyBars(progress)


def time_left(seconds: float | None) -> str:
    """How long a study will take yet, roughly; nothing where that is not known."""
    if seconds is None:
        return ""
    minutes = seconds / 60
    if minutes >= 90:
        return f"about {minutes / 60:.1f} h left"
    return f"about {minutes:.0f} min left" if minutes >= 1.5 else f"about {seconds:.0f} s left"


class StudyBars:
    """A bar for the study and, below it, one for the run at work."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def study(self, cells: int, done: int) -> None:
        """A study starts."""
        self.whole = self.progress.add_task("study", total=cells, completed=done, figures="")
        self.one = self.progress.add_task("", total=1, figures="", visible=False)

    def cell(self, name: str, left_s: float | None) -> None:
        """A run starts."""
        self.name = name
        self.progress.update(self.whole, figures=time_left(left_s))
        self.progress.reset(self.one, description=name, total=1, figures="starting", visible=True)

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass of it starts."""
        self.progress.reset(
            self.one, description=f"{self.name} {what}", total=total, completed=done, figures=""
        )

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """Move its bar."""
        shown = figures(loss, samples_per_s, memory_bytes)
        self.progress.update(self.one, completed=done, figures=shown)

    def say(self, text: str) -> None:
        """A line above the bars."""
        self.progress.console.print(escape(text), highlight=False)

    def ended(self, name: str, what: str, left_s: float | None) -> None:
        """A run has ended."""
        self.say(f"{name}: {what}")
        self.progress.advance(self.whole)
        self.progress.update(self.whole, figures=time_left(left_s))
        self.progress.update(self.one, visible=False)


class StudyLines:
    """A line when a run ends, for logs."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def study(self, cells: int, done: int) -> None:
        """A study starts."""
        self.cells, self.done = cells, done
        self.say(f"study: {cells} runs" + (f", {done} done" if done else ""))

    def cell(self, name: str, left_s: float | None) -> None:
        """A run starts; its end is told."""

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass of it starts; the run's end is told."""

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """Steps are behind; the run's end is told."""

    def say(self, text: str) -> None:
        """One plain line."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def ended(self, name: str, what: str, left_s: float | None) -> None:
        """A run has ended."""
        self.done += 1
        told = ", ".join(filter(None, [what, time_left(left_s)]))
        self.say(f"[{self.done}/{self.cells}] {name}: {told}")
