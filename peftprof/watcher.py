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
