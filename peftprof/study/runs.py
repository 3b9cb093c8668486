"""A study from what was asked for to what was judged: the room's front door."""

import datetime
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from peftprof.errors import ConfigError, StudyError
from peftprof.run.launch import launched
from peftprof.studies import Judged
from peftprof.study import claims, matrix, results
from peftprof.study.folder import Stored, StudyFolder
from peftprof.study.plan import Overrides, make_plan
from peftprof.watcher import StudyWatcher


@dataclass(frozen=True)
class Asked:
    """A study as the command line asks for it; None is the recipe's."""

    recipe: str
    out: Path | None = None
    model: str | None = None
    dataset: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None
    max_steps: int | None = None
    subset: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Opened:
    """A study whose cells are settled and stored."""

    folder: StudyFolder
    stored: Stored

    def names(self) -> list[str]:
        """The names of its cells, in the order in which they run."""
        return [cell.name for cell in self.stored.cells]

    def run(self, watcher: StudyWatcher, only: Sequence[str] = (), again: bool = False) -> None:
        """Run what is left of it, or of the cells `only` names; failed ones too with `again`.

        Whole studies hold the folder for themselves; single cells may run side by side, as a
        scheduler starts them, each holding its run's folder.

        Raises StudyError where one of `only` has failed, now or before.
        """
        cells = matrix.Matrix(self.folder, self.stored, watcher)
        with _held(self.folder, not only):
            if again:
                for name in only or self.names():
                    self.folder.forgive(name)
            cells.run(only)
        for name in only:  # a scheduler goes by the exit code
            if (why := self.folder.failure(name)) is not None:
                raise StudyError(f"{name} failed: {why}; --again tries it once more")

    def judge(self) -> Judged:
        """The raw results written out, and all that follows from them."""
        study = results.read(self.folder)
        results.export(self.folder, study)
        judged = claims.judge(study)
        results.export_verdicts(self.folder, judged)
        return judged


@contextmanager
def _held(folder: StudyFolder, alone: bool) -> Iterator[None]:
    if not alone:
        yield
        return
    with folder.held():
        yield


def open_study(asked: Asked) -> Opened:
    """The study in the folder asked for, made if it is not there yet.

    Raises the errors of `peftprof.errors`; nothing is left behind when the input is bad.
    """
    if launched() is not None:
        raise ConfigError(
            "a study is one process and starts its runs itself: spread them over devices by --list "
            "and --only (docs/study.md); one run over several is torchrun -m peftprof train"
        )
    for name in ("max_steps", "subset"):
        if (value := getattr(asked, name)) is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be 1 or more")
    overrides = Overrides(
        asked.model,
        asked.dataset,
        asked.max_steps,
        asked.subset,
        asked.device,
        asked.text_columns,
        asked.label_column,
    )
    plan = make_plan(asked.recipe, overrides)
    folder = StudyFolder(asked.out or Path("traces") / f"study-{plan.recipe}")
    known = folder.exists
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    stored = matrix.make(folder, plan, overrides.to_json(), now)
    if not known:
        with folder.held():
            if folder.exists:  # another process has made one meanwhile: the same, or refused
                stored = matrix.make(folder, plan, overrides.to_json(), now)
            else:
                folder.store(stored)
    return Opened(folder, stored)
