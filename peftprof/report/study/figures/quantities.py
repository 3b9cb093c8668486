"""What the paper's figures show of each configuration: ours, and what the paper prints."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from peftprof.report.study.figures.drawing import finite
from peftprof.report.study.paper import PRINTED, Printed
from peftprof.report.study.sheets import configurations, live, ordered
from peftprof.studies import CellResult, Interval, Judged

PER = 100_000  # parameters, of the paper's "parameter efficiency"
APART = 5.0  # from this ratio on the paper's values get an axis of their own
NINETY_FIVE = "Whiskers: 95 % intervals"
RANGE = "Whiskers: the lowest and the highest run"


@dataclass(frozen=True)
class Quantity:
    """A quantity in the unit of its axis: of a study, and of a row of the paper's tables."""

    label: str
    words: str
    form: str
    whiskers: str
    measured: Callable[[Judged], dict[str, Interval]]
    printed: Callable[[Printed], float | None]

    def of(self, judged: Judged) -> dict[str, Interval]:
        """By configuration, those that can be drawn, methods and ranks in order."""
        found = self.measured(judged)
        return {name: found[name] for name in ordered(found) if finite(found[name].value)}

    def paper(self, names: Iterable[str]) -> dict[str, float]:
        """What the paper prints of these configurations."""
        printed = ((name, self.printed(PRINTED[name])) for name in names if name in PRINTED)
        return {name: value for name, value in printed if value is not None}

    def apart(self, ours: dict[str, Interval]) -> bool:
        """Whether the paper's values are of another size, so that one axis would hide either."""
        theirs = self.paper(ours).values()
        tops = max((one.value for one in ours.values()), default=0.0), max(theirs, default=0.0)
        return min(tops) > 0 and max(tops) / min(tops) > APART


def profiled(judged: Judged) -> dict[str, CellResult]:
    """The first profiled run of each configuration of the matrix that has one."""
    found: dict[str, CellResult] = {}
    for result in judged.study.results:
        cell = result.cell
        if cell.part == "matrix" and result.breakdown is not None:
            name = cell.method if cell.rank is None else f"{cell.method}-r{cell.rank}"
            found.setdefault(name, result)
    return {name: found[name] for name in ordered(found)}


def batches(runs: dict[str, CellResult]) -> str:
    """The batch sizes of runs whose steps stand side by side, where they differ."""
    sizes = {name: run.cell.config.get("batch_size") for name, run in runs.items()}
    if len(set(sizes.values())) < 2:
        return ""
    told = ", ".join(f"{name} {size}" for name, size in sizes.items())
    return f"The batches are unequal ({told}), so the steps are of unequal work"


def _scaled(found: dict[str, Interval], scale: float) -> dict[str, Interval]:
    return {
        name: Interval(scale * one.value, scale * one.low, scale * one.high, one.n)
        for name, one in found.items()
    }


def _trained(judged: Judged) -> dict[str, Interval]:
    counts = {name: live(judged, name) for name in configurations(judged)}
    return {name: Interval(n, n, n, 1) for name, n in counts.items() if n}


def _efficiency(judged: Judged) -> dict[str, Interval]:
    trained = _trained(judged)
    found: dict[str, Interval] = {}
    for name, one in judged.accuracy.items():
        if name in trained:
            found |= _scaled({name: one}, 100 * PER / trained[name].value)
    return found


def _printed_efficiency(printed: Printed) -> float | None:
    if printed.accuracy is None or not printed.trainable:
        return None
    return printed.accuracy * PER / printed.trainable


ACCURACY = Quantity(
    "accuracy, %",
    "accuracy",
    "{:.1f}",
    NINETY_FIVE,
    lambda judged: _scaled(judged.accuracy, 100),
    lambda printed: printed.accuracy,
)
MEMORY = Quantity(
    "peak memory, MiB",
    "peak memory",
    "{:,.0f}",
    RANGE,
    lambda judged: _scaled(judged.memory, 1 / 2**20),
    lambda printed: printed.peak_mb,
)
THROUGHPUT = Quantity(
    "samples/s",
    "samples a second",
    "{:,.1f}",
    NINETY_FIVE,
    lambda judged: judged.throughput,
    lambda printed: printed.samples_per_s,
)
TRAINED = Quantity(
    "trained parameters",
    "trained parameters",
    "{:,.0f}",
    "",
    _trained,
    lambda printed: printed.trainable,
)
EFFICIENCY = Quantity(
    "points per 100 K parameters",
    "parameter efficiency",
    "{:.2f}",
    "Accuracy in points over trained parameters in units of 100 K. " + NINETY_FIVE,
    _efficiency,
    _printed_efficiency,
)
