"""What runs on a device have taught: factors on predictions, kept beside its calibration.

Every run's prediction is compared with what it measured, and the comparison is kept in the
cache. A later prediction for the same device and model is corrected by them: its time by the
median of measured over predicted, its memory by what processes held beside their tensors.
"""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from peftprof.advice import CheckedRun, Choice
from peftprof.cache import cache_folder, write_whole
from peftprof.calibrations import Calibration
from peftprof.errors import FolderError
from peftprof.records import decode, encode

KEPT = 200  # comparisons of a device; the oldest go first
# Before any run was compared. A step is more than its operators: Python, allocation, code that
# libraries write for new shapes. And a process is more than its imports: docs/advice.md.
STEP_FACTOR = {"cpu": 1.4, "cuda": 1.0}
STEP_INTERVAL = {"cpu": 0.5, "cuda": 0.5}
MORE = 160 << 20
LEAST_INTERVAL = 0.15
# A step that took longer than this, against its operators, was of a machine at other work.
LARGEST_FACTOR = 3.0
ENOUGH = 3  # runs, before their spread says anything


@dataclass(frozen=True)
class Lessons:
    """Comparisons of runs on one device."""

    device: Calibration
    checked: tuple[CheckedRun, ...] = ()

    def without(self, run: str) -> "Lessons":
        """The same, but for one run (`CheckedRun.run_id`): what it is not judged by itself."""
        kept = tuple(one for one in self.checked if one.run_id != run)
        return Lessons(self.device, kept)

    def of(self, model: str) -> "Lessons":
        """Those of one model (`model_of`): for others the same factors were worse than none."""
        kept = tuple(one for one in self.checked if one.model == model)
        return Lessons(self.device, kept)

    def step(self, choice: Choice) -> tuple[float, float, int]:
        """Factor on a step's seconds, relative error to expect, and how many runs say so.

        By the runs that compute alike, among which what is known without any counts as one:
        a single run teaches half of what it says.
        """
        kind = self.device.kind
        factors = [run.factor for run in self._alike(choice)]
        known = [f for f in factors if f is not None and f <= LARGEST_FACTOR]
        if not known:
            return STEP_FACTOR[kind], STEP_INTERVAL[kind], 0
        middle = math.exp(_beside(math.log(STEP_FACTOR[kind]), [math.log(f) for f in known]))
        return middle, _spread([f / middle for f in known]), len(known)

    def process_bytes(self, choice: Choice) -> tuple[int, int]:
        """What a process holds beside its tensors, and how many runs say so; as `step`."""
        if self.device.kind == "cuda":
            return self.device.context_bytes, 0
        rest = [run.rest_bytes for run in self._alike(choice) if run.rest_bytes is not None]
        return round(_beside(self.device.process_bytes + MORE, rest)), len(rest)

    def _alike(self, choice: Choice) -> list[CheckedRun]:
        """Runs of the same way to compute, whatever their batch and rank."""
        way = dataclasses.replace(choice, rank=1, batch_size=1)
        return [
            run
            for run in self.checked
            if dataclasses.replace(run.choice, rank=1, batch_size=1) == way
        ]


def model_of(family: str, parameters: int) -> str:
    """What tells a model's shape from others, wherever it is kept."""
    return f"{family} {parameters}"


def _beside(known: float, learnt: Sequence[float]) -> float:
    """The median of what was learnt, and what was known before as one more."""
    if not learnt:
        return known
    return (known + len(learnt) * statistics.median(learnt)) / (1 + len(learnt))


def _spread(ratios: Sequence[float]) -> float:
    """The relative error that nine of ten ratios stay within."""
    if len(ratios) < ENOUGH:
        return 0.3
    apart = sorted(math.exp(abs(math.log(ratio))) - 1 for ratio in ratios)
    return max(LEAST_INTERVAL, apart[math.ceil(0.9 * len(apart)) - 1])


def path_for(device: Calibration) -> Path:
    """Where the comparisons of `device` are kept."""
    return cache_folder() / "lessons" / f"{device.key}.jsonl"


def read(device: Calibration) -> Lessons:
    """What was learnt of `device`; a line that cannot be read is passed over."""
    found = []
    try:
        lines = path_for(device).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return Lessons(device)
    for line in lines:
        try:
            found.append(decode(CheckedRun, json.loads(line)))
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
    return Lessons(device, tuple(found))


def keep(device: Calibration, checked: Iterable[CheckedRun]) -> None:
    """Add comparisons to what is kept; one of the same run replaces the former.

    Raises FolderError where the cache cannot be written.
    """
    by_run = {run.run_id: run for run in (*read(device).checked, *checked)}
    rows = list(by_run.values())[-KEPT:]
    plain = [dataclasses.replace(run, parts={}) for run in rows]
    try:
        write_whole(path_for(device), "".join(json.dumps(encode(run)) + "\n" for run in plain))
    except OSError as error:
        raise FolderError(
            f"cannot write {path_for(device)}: {error.strerror or error}; name another folder in "
            "PEFTPROF_CACHE"
        ) from error
