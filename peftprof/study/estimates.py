"""Figures with intervals for each configuration of the matrix, and paired tests between them."""

import itertools
import statistics as plain
from collections.abc import Callable, Sequence

from peftprof.records import RunRecord
from peftprof.studies import CellResult, Interval, Paired, Study
from peftprof.study import statistics
from peftprof.study.plan import configuration

REFERENCE_RANK = 8  # the rank that the paper compares methods at


def by_configuration(study: Study) -> dict[str, list[CellResult]]:
    """Complete runs of the matrix by `method` or `method-rR`, each list in order of its seeds."""
    found: dict[str, list[CellResult]] = {}
    for result in study.results:
        if result.cell.part == "matrix":
            found.setdefault(configuration(result.cell.method, result.cell.rank), [])
            if result.state == "complete":
                found[configuration(result.cell.method, result.cell.rank)].append(result)
    for results in found.values():
        results.sort(key=lambda result: result.cell.seed)
    order = ("full", "lora", "qlora")
    return dict(
        sorted(
            found.items(),
            key=lambda item: (
                order.index(item[0].partition("-")[0]),
                int(item[0].partition("-r")[2] or 0),
            ),
        )
    )


def reference(study: Study, method: str) -> str:
    """The configuration of a method that others are compared with: full, or rank 8 if it is there.

    Else the rank nearest to 8. Empty where the study has none.
    """
    ranks = sorted(
        {r.cell.rank for r in study.results if r.cell.part == "matrix" and r.cell.method == method},
        key=lambda rank: (abs((rank or 0) - REFERENCE_RANK), rank or 0),
    )
    return configuration(method, ranks[0]) if ranks else ""


def right(study: Study, result: CellResult) -> list[bool]:
    """Whether a run was right on each validation example."""
    return [a == b for a, b in zip(study.labels, result.predicted, strict=True)]


def per_example_ns(result: CellResult) -> list[float]:
    """Time of an example in each timed step, in ns."""
    return [ns / n for ns, n in zip(result.step_ns, result.step_samples, strict=True)]


def peak_bytes(record: RunRecord) -> int | None:
    """The peak of the timed pass: the allocator's on a GPU, the resident peak on a CPU."""
    memory = record.memory
    if memory is None:
        return None
    return memory.rss_bytes if memory.allocated_bytes is None else memory.allocated_bytes


def accuracies(study: Study) -> dict[str, Interval]:
    """Accuracy by configuration."""
    return _each(
        study,
        lambda results: statistics.accuracy(
            [sum(right(study, result)) for result in results], len(study.labels)
        ),
        lambda result: bool(result.predicted),
    )


def throughputs(study: Study) -> dict[str, Interval]:
    """Examples a second of the timed steps, by configuration."""
    return _each(
        study,
        lambda results: statistics.rate(
            [result.step_ns for result in results], [result.step_samples for result in results]
        ),
    )


def step_times(study: Study) -> dict[str, Interval]:
    """Median step in milliseconds, by configuration."""
    return _each(
        study,
        lambda results: statistics.median([[ns / 1e6 for ns in r.step_ns] for r in results]),
    )


def memories(study: Study) -> dict[str, Interval]:
    """Peak memory in bytes, by configuration: the runs' median, smallest and largest."""

    def middle(results: Sequence[CellResult]) -> Interval:
        peaks = sorted(
            peak
            for result in results
            if result.record is not None and (peak := peak_bytes(result.record)) is not None
        )
        return Interval(float(plain.median(peaks)), peaks[0], peaks[-1], len(peaks))

    def measured(result: CellResult) -> bool:
        return result.record is not None and peak_bytes(result.record) is not None

    return _each(study, middle, measured)


def _timed(result: CellResult) -> bool:
    return bool(result.step_ns)  # a run of fewer steps than the warm-up has none


def _each(
    study: Study,
    make: Callable[[Sequence[CellResult]], Interval],
    known: Callable[[CellResult], bool] = _timed,
) -> dict[str, Interval]:
    found = {}
    for name, results in by_configuration(study).items():
        if of_use := [result for result in results if known(result)]:
            found[name] = make(of_use)
    return found


def pairs(a: Sequence[CellResult], b: Sequence[CellResult]) -> list[tuple[CellResult, CellResult]]:
    """Runs of the same seed."""
    others = {result.cell.seed: result for result in b}
    return [(one, others[one.cell.seed]) for one in a if one.cell.seed in others]


def compare_accuracy(study: Study, a: str, b: str) -> Paired | None:
    """Accuracy of b - a with its paired test; None without a pair of runs."""
    groups = by_configuration(study)
    found = pairs(groups.get(a, []), groups.get(b, []))
    if not found:
        return None
    difference, p = statistics.accuracy_difference(
        [right(study, one) for one, _ in found], [right(study, other) for _, other in found]
    )
    return Paired("accuracy", a, b, difference, p)


def compare_time(study: Study, a: str, b: str) -> Paired | None:
    """How many times as many examples a second b does as a, with its paired test."""
    groups = by_configuration(study)
    found = [
        pair
        for pair in pairs(groups.get(a, []), groups.get(b, []))
        if pair[0].step_ns and pair[1].step_ns
    ]
    if not found:
        return None
    ratio, p = statistics.time_ratio(
        [per_example_ns(one) for one, _ in found], [per_example_ns(other) for _, other in found]
    )
    return Paired("examples a second", a, b, ratio, p)


def comparisons(study: Study) -> tuple[Paired, ...]:
    """Every comparison the report shows: methods at rank 8, and the ranks of each method."""
    methods = [reference(study, method) for method in ("full", "lora", "qlora")]
    wanted = list(itertools.combinations([name for name in methods if name], 2))
    for method in ("lora", "qlora"):
        ranks = [name for name in by_configuration(study) if name.startswith(f"{method}-")]
        wanted += list(itertools.combinations(ranks, 2))
    found = [make(study, a, b) for make in (compare_accuracy, compare_time) for a, b in wanted]
    return tuple(one for one in found if one is not None)
