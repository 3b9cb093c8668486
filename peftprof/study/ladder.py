"""What a speed-up is made of: the ladder's rungs, each one change against the rung before.

Times are those of one example: the median over timed steps of a step's time over its
examples, the median over seeds. A rung's `ns` is the difference to the rung before, so the
rungs add up to the whole difference, and their factors multiply to the whole speed-up. The
batch size works in two ways, which the profiled steps tell apart: less time in which no work
is on the device (launches on a GPU, Python and the framework on a CPU), and the rest: larger
products, and more padding.
"""

import statistics as plain
from collections.abc import Sequence

from peftprof.studies import CellResult, Rung, Study
from peftprof.study import statistics
from peftprof.study.estimates import pairs, per_example_ns
from peftprof.study.plan import BATCH

START = "start"
LAUNCH = "launch overhead"


def rungs(study: Study) -> tuple[Rung, ...]:
    """The decomposition; empty where fewer than two rungs are complete.

    The first is the start: its `ns` is the time of an example there.
    """
    steps = _complete(study)
    if len(steps) < 2:
        return ()
    times = [_ns(results) for results in steps]
    whole = statistics.median([per_example_ns(result) for result in steps[0]])
    found = [Rung(START, times[0], whole, _what(steps[0]))]
    for number in range(1, len(steps)):
        before, after = steps[number - 1], steps[number]
        matched = pairs(before, after)
        factor, _ = statistics.time_ratio(
            [per_example_ns(one) for one, _ in matched],
            [per_example_ns(other) for _, other in matched],
        )
        cause, ns = after[0].cell.cause, times[number] - times[number - 1]
        launch = _launch(before, after, times[number - 1], times[number])
        if cause == BATCH and launch is not None:
            # The factor is of both together; the parts are told by the profile.
            found.append(Rung(LAUNCH, launch, factor, "of the batch size, by the profile"))
            found.append(Rung(BATCH, ns - launch, factor, f"the rest of it. {_what(after)}"))
        else:
            found.append(Rung(cause, ns, factor, _what(after)))
    return tuple(found)


def factor(study: Study, causes: Sequence[str] | None = None) -> dict[str, float]:
    """The factor of each cause (all, or of `causes`), the batch size whole."""
    return {
        rung.cause: rung.factor.value
        for rung in rungs(study)
        if rung.cause not in (START, LAUNCH) and (causes is None or rung.cause in causes)
    }


def _complete(study: Study) -> list[list[CellResult]]:
    """Complete runs by rung, as long as every rung before has one of the same seed.

    A rung without any ends it: what comes after would change more than its cause says.
    """
    found: dict[int, list[CellResult]] = {}
    for result in study.results:
        if result.cell.part == "ladder":
            assert result.cell.rung is not None
            complete = found.setdefault(result.cell.rung, [])
            if result.state == "complete" and result.step_ns:
                complete.append(result)
    steps: list[list[CellResult]] = []
    for number in sorted(found):
        if not found[number] or (steps and not pairs(steps[-1], found[number])):
            break
        steps.append(sorted(found[number], key=lambda result: result.cell.seed))
    return steps


def _ns(results: Sequence[CellResult]) -> float:
    return plain.median(plain.median(per_example_ns(result)) for result in results)


def _launch(
    before: Sequence[CellResult], after: Sequence[CellResult], old: float, new: float
) -> float | None:
    """What time without work on the device takes from an example's time, by the profile."""
    shares = [_idle_share(results) for results in (before, after)]
    if shares[0] is None or shares[1] is None:
        return None
    return shares[1] * new - shares[0] * old


def _idle_share(results: Sequence[CellResult]) -> float | None:
    found = [
        result.breakdown.idle_ns / result.breakdown.step_ns.median
        for result in results
        if result.breakdown is not None and result.breakdown.step_ns.median
    ]
    return plain.median(found) if found else None


def _what(results: Sequence[CellResult]) -> str:
    record = results[0].record
    assert record is not None
    config = record.config
    padding = record.execution.padding if record.execution is not None else config["padding"]
    return (
        f"{config['method']}, batch {config['batch_size']}, {padding}, {config['precision']}, "
        f"kernels {config['kernels']}"
    )
