"""What claims are judged by: the results at hand, and how a verdict follows from an interval."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from peftprof.breakdowns import Breakdown
from peftprof.studies import CellResult, Figure, Interval, Paired, Rung, Study, Verdict
from peftprof.study import estimates, ladder

HOLDS, FAILS, UNTESTABLE = "holds", "fails", "not testable here"


@dataclass(frozen=True)
class Results:
    """A study and what several claims ask of it, worked out once."""

    study: Study

    @cached_property
    def accuracy(self) -> dict[str, Interval]:
        """Accuracy by configuration."""
        return estimates.accuracies(self.study)

    @cached_property
    def throughput(self) -> dict[str, Interval]:
        """Examples a second by configuration."""
        return estimates.throughputs(self.study)

    @cached_property
    def memory(self) -> dict[str, Interval]:
        """Peak memory by configuration."""
        return estimates.memories(self.study)

    @cached_property
    def ladder(self) -> tuple[Rung, ...]:
        """The decomposition of the speed-up."""
        return ladder.rungs(self.study)

    @cached_property
    def runs(self) -> dict[str, list[CellResult]]:
        """Complete runs by configuration."""
        return estimates.by_configuration(self.study)

    def name(self, method: str) -> str:
        """The configuration that stands for a method."""
        return estimates.reference(self.study, method)

    def breakdown(self, method: str) -> Breakdown | None:
        """The breakdown of the first profiled run that stands for a method."""
        found = (run.breakdown for run in self.runs.get(self.name(method), []))
        return next((breakdown for breakdown in found if breakdown is not None), None)

    def faster(self, a: str, b: str) -> Paired | None:
        """How many times as many examples a second method b does as method a."""
        return estimates.compare_time(self.study, self.name(a), self.name(b))

    def batches(self, *methods: str) -> str:
        """The batch sizes of these methods, where they differ: what a reader must know."""
        sizes = {
            method: run.cell.config["batch_size"]
            for method in methods
            for run in self.runs.get(self.name(method), [])[:1]
        }
        if len(set(sizes.values())) < 2:
            return ""
        told = ", ".join(f"{method} {size}" for method, size in sizes.items())
        return f"The batches are unequal ({told}): the ratio is of more than the method."


@dataclass(frozen=True)
class Claim:
    """A claim's id, what it says, and the function that judges it."""

    id: str
    text: str
    decide: Callable[[Results, "Claim"], Verdict]

    def judge(self, results: Results) -> Verdict:
        """The verdict, with how the study was cut short among its caveats."""
        found = self.decide(results, self)
        quick = results.study.quick
        told = " ".join(filter(None, [found.caveat, f"A quick look: {quick}." if quick else ""]))
        return Verdict(found.claim, found.text, found.verdict, found.figures, found.evidence, told)

    def verdict(
        self, verdict: str, figures: Sequence[Figure], evidence: str, caveat: str = ""
    ) -> Verdict:
        """A verdict on this claim."""
        return Verdict(self.id, self.text, verdict, tuple(figures), evidence, caveat)

    def untestable(self, why: str, figures: Sequence[Figure] = ()) -> Verdict:
        """What cannot be judged here, and why."""
        return self.verdict(UNTESTABLE, figures, why)


def above(interval: Interval, least: float) -> str:
    """The verdict on "at least so much": by the whole interval, or not at all."""
    if interval.low >= least:
        return HOLDS
    return FAILS if interval.high < least else UNTESTABLE


def ratio_above(interval: Interval, least: float) -> str:
    """The same of a ratio of times, which one pair of runs cannot tell."""
    return above(interval, least) if interval.n > 1 else UNTESTABLE


def figure(what: str, interval: Interval, unit: str = "", paper: float | None = None) -> Figure:
    """An interval as a figure of the evidence."""
    return Figure(what, interval.value, interval.low, interval.high, unit, paper)


def number(what: str, value: float | None, unit: str = "", paper: float | None = None) -> Figure:
    """A number without an interval as a figure of the evidence."""
    return Figure(what, value, None, None, unit, paper)


def share(breakdown: Breakdown, category: str, phase: str = "") -> float:
    """Share (0 to 1) of a category in a breakdown's step, or in the work and idle of a phase."""
    rows = [row for row in breakdown.rows if not phase or row.phase == phase]
    idle = breakdown.idle_by_phase_ns.get(phase, 0.0) if phase else 0.0
    whole = sum(row.ns for row in rows) + idle if phase else breakdown.step_ns.median
    return sum(row.ns for row in rows if row.category == category) / whole if whole else 0.0


def few(interval: Interval) -> str:
    """What must be known of an interval of a single pair of runs."""
    return (
        "One pair of runs: the interval knows nothing of how runs differ." if interval.n < 2 else ""
    )
