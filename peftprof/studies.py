"""Frozen results of a study: what its runs were and gave, the estimates, the verdicts.

Read from a study's folder by `peftprof.study.results`, judged by `peftprof.study.claims`,
shown by `peftprof.report.study`. None means not known, never zero.
"""

from dataclasses import dataclass, field
from typing import Any

from peftprof.breakdowns import Breakdown
from peftprof.records import RunRecord

# A study's parts: rates tried for the recipe, methods x ranks x seeds, and the ladder, whose
# rungs each change one thing against the rung before.
PARTS = ("search", "matrix", "ladder")
VERDICTS = ("holds", "fails", "not testable here")


@dataclass(frozen=True)
class Cell:
    """One run that a study asks for. `rank` is None where there are no adapters.

    `rung` is the place on the ladder, from 0, and `cause` what it changes against the rung
    before; None and empty elsewhere. `config` is the content of a `RunConfig`.
    """

    name: str
    part: str
    method: str
    rank: int | None
    seed: int
    config: dict[str, Any]
    rung: int | None = None
    cause: str = ""


@dataclass(frozen=True)
class Forgetting:
    """Mean loss in nats a token on general text, before and after fine-tuning.

    `measure` is "masked language model" or "language model"; `head` says where the head
    over the vocabulary is from. Both losses are of the same tokens.
    """

    measure: str
    text: str
    head: str
    tokens: int
    before: float
    after: float


@dataclass(frozen=True)
class CellResult:
    """What a cell gave: `state` is complete, failed (`why` says so) or missing.

    The steps are those of the timed pass after its warm-up: nanoseconds, examples, real
    tokens. `predicted` is the class of each validation example after the last step.
    """

    cell: Cell
    state: str
    why: str = ""
    record: RunRecord | None = None
    breakdown: Breakdown | None = None
    step_ns: tuple[int, ...] = ()
    step_samples: tuple[int, ...] = ()
    step_tokens: tuple[int, ...] = ()
    predicted: tuple[int, ...] = ()
    forgetting: Forgetting | None = None
    no_forgetting: str = ""  # why it is not known


@dataclass(frozen=True)
class Count:
    """Trainable parameters of one group of tensors (`audit`)."""

    what: str
    live: int
    nominal: int


@dataclass(frozen=True)
class Audit:
    """Trainable parameters of the paper's model, by our counting and by the paper's.

    `rows` add up to `live` and `nominal`; `as_the_paper` is what its code counted, with
    `duplicated` parameters of the head twice, of which `without_gradient` never got one.
    """

    method: str
    rank: int
    rows: tuple[Count, ...]
    live: int
    nominal: int
    total: int
    packed_total: int
    as_the_paper: int
    printed: int
    duplicated: int
    without_gradient: int


@dataclass(frozen=True)
class Study:
    """A study as its folder holds it.

    `quick` says how it was cut short, empty where it was not. `labels` are the classes of
    the validation examples, in the order of every `predicted`.
    """

    recipe: str
    about: str
    quick: str
    created: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    labels: tuple[int, ...]
    results: tuple[CellResult, ...]
    rates: dict[str, float] = field(default_factory=dict)  # chosen by the search
    audit: tuple[Audit, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)  # cells that cannot be here, and why


@dataclass(frozen=True)
class Interval:
    """A figure and its 95 % interval; `n` says of how many runs."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Figure:
    """One number of a verdict's evidence."""

    what: str
    value: float | None
    low: float | None = None
    high: float | None = None
    unit: str = ""
    paper: float | None = None  # what the paper prints


@dataclass(frozen=True)
class Verdict:
    """What a study says of one claim of the paper.

    `evidence` is where the figures are from, in a sentence or two, the breakdown's part of
    it included; `caveat` what must be known beside the verdict, empty if nothing must.
    """

    claim: str
    text: str
    verdict: str
    figures: tuple[Figure, ...]
    evidence: str
    caveat: str = ""


@dataclass(frozen=True)
class Rung:
    """A step of the decomposition: what a cause adds to or takes from the time of an example.

    `ns` is the difference of nanoseconds an example (negative: faster), `factor` the time
    before over the time after.
    """

    cause: str
    ns: float
    factor: Interval
    note: str = ""


@dataclass(frozen=True)
class Judged:
    """A study with all that was worked out from it; what the report shows."""

    study: Study
    accuracy: dict[str, Interval]  # by `method` or `method-rR`, shares of 1
    throughput: dict[str, Interval]  # samples/s
    memory: dict[str, Interval]  # bytes at the peak
    step_ms: dict[str, Interval]  # median step
    comparisons: tuple["Paired", ...]
    ladder: tuple[Rung, ...]
    verdicts: tuple[Verdict, ...]


@dataclass(frozen=True)
class Paired:
    """A paired test between two configurations, by the same seeds and examples or batches.

    `difference` is b - a (accuracy, shares of 1) or b / a (time of an example); `p` is the
    probability of as large a difference where there is none, None where it cannot be said.
    """

    quantity: str
    a: str
    b: str
    difference: Interval
    p: float | None
