"""What `infer` leaves behind: `InferenceRecord`, the content of its folder's `infer.json`.

Times are nanoseconds (`*_ns`), memory is bytes (`*_bytes`), energy joules. A figure that is
not there is None, and `absent` beside it says why.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from peftprof.errors import FolderError
from peftprof.records import ModelInfo, decode

VARIANTS = ("base", "merged", "unmerged", "nf4")
FILE = "infer.json"


@dataclass(frozen=True)
class Inputs:
    """What the variants were given: where its tokens are from, SHA-256 over them."""

    source: str
    fingerprint: str


@dataclass(frozen=True)
class Equality:
    """Logits, or weights, that must be the reference's: |difference| / |reference|, Frobenius."""

    variant: str
    of: str
    precision: str
    error: float
    allowed: float


@dataclass(frozen=True)
class Drift:
    """Logits of `variant` against those of `against`, both as served; told, not judged.

    Differences are absolute. `changed` of the `predictions` (an example's class, or the
    token after each token) are others.
    """

    variant: str
    against: str
    max_difference: float
    mean_difference: float
    changed: int
    predictions: int


@dataclass(frozen=True)
class Checks:
    """What was compared before anything was timed, on `examples` of `length` tokens.

    `effect` is how far the adapter moves the logits, relative as an `Equality`'s error; None
    without an adapter. A merge that did nothing would be as wrong as that.
    """

    examples: int
    length: int
    equal: tuple[Equality, ...]
    effect: float | None
    drift: tuple[Drift, ...]


@dataclass(frozen=True)
class Ratio:
    """A variant's time over base's: geometric mean over rounds, with its 95 % interval.

    A round's ratio is of medians. Of one round there is no interval.
    """

    value: float
    low: float | None
    high: float | None
    rounds: int


@dataclass(frozen=True)
class Cell:
    """One variant at one batch size and length, in one phase: forward, prefill or decode.

    A call is one forward of the batch; in decode it makes one token for each sequence.
    """

    variant: str
    phase: str
    batch: int
    length: int
    calls: int = 0
    p50_ns: float | None = None
    p95_ns: float | None = None
    p99_ns: float | None = None
    examples_per_s: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    joules: dict[str, float] = field(default_factory=dict)
    ratio: Ratio | None = None
    absent: str | None = None
    peak_absent: str | None = None


@dataclass(frozen=True)
class Footprint:
    """A variant alone in a process: its tensors, and what was held when they were loaded."""

    variant: str
    weight_bytes: int
    loaded_bytes: int | None


@dataclass(frozen=True)
class Trace:
    """A profiled pass of one variant; `file` is in the folder, None under nsys."""

    variant: str
    phase: str
    batch: int
    length: int
    file: str | None


@dataclass(frozen=True)
class InferenceRecord:
    """Everything that is needed to understand the figures years later.

    `task` is classify or generate. `dense` says what the dense variants' weights are. `memory`
    is what the peaks are of; `energy_absent` says by counter why there is none.
    """

    version: int
    name: str
    created: str  # ISO 8601, with its offset
    command: tuple[str, ...]
    run: str | None
    task: str
    config: dict[str, Any]
    settings: dict[str, Any]
    environment: dict[str, Any]
    model: ModelInfo
    dense: str
    adapter: str | None
    inputs: Inputs
    checks: Checks
    cells: tuple[Cell, ...]
    memory: str
    footprints: tuple[Footprint, ...] = ()
    energy_absent: dict[str, str] = field(default_factory=dict)
    traces: tuple[Trace, ...] = ()


class Progress(Protocol):
    """The seam between measuring and its display; see `peftprof.report.inference`."""

    def begin(self, what: str, total: int) -> None:
        """A part of `total` pieces starts."""

    def done(self, figures: str) -> None:
        """One more piece of it is done; `figures` says what came of it in a few characters."""


def read_inference(folder: Path) -> InferenceRecord:
    """The record in `folder`. Raises FolderError when it is damaged or not there."""
    path = folder / FILE
    try:
        return decode(InferenceRecord, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise FolderError(f"{path} cannot be read ({error}); run `peftprof infer` again") from error
