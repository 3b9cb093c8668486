"""What a run tells of its progress, and whoever shows it hears."""

from typing import Protocol


class Watcher(Protocol):
    """The seam between a run and its display; see `peftprof.report.progress`."""

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass of `total` steps starts, `done` of them already behind it."""

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """`done` steps are behind; the loss of the last, the rate of the last few, memory now."""

    def say(self, text: str) -> None:
        """Something worth a line happened."""


class StudyWatcher(Watcher, Protocol):
    """The same for a study, whose runs come one after the other."""

    def study(self, cells: int, done: int) -> None:
        """A study of `cells` runs starts, `done` of them already behind it."""

    def cell(self, name: str, left_s: float | None) -> None:
        """A run starts; about `left_s` seconds are left for the study, None if not known."""

    def ended(self, name: str, what: str, left_s: float | None) -> None:
        """A run has ended, and what came of it."""
