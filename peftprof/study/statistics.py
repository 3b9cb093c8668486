"""Intervals and paired tests over a study's runs.

Whatever the runs of one configuration share is not counted twice: all seeds are judged on
the same validation examples, so an accuracy's interval is that of one run of so many
examples (Wilson 1927), however many seeds; and steps of one run are no runs.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from peftprof.run.statistics import wilson
from peftprof.studies import Interval

RESAMPLES = 9999
LEVEL = 0.95
SEED = 0  # the same results give the same intervals


def accuracy(correct: Sequence[int], examples: int) -> Interval:
    """Mean share over runs of `correct` of `examples`, with Wilson's interval at that share.

    Runs of other seeds see the same examples, so they narrow nothing: n is the number of
    examples. Raises ValueError without runs.
    """
    if not correct or examples < 1:
        raise ValueError("no run to take an accuracy of")
    mean = sum(correct) / len(correct)
    # Wilson's formula holds for any share; between two whole numbers it is interpolated.
    below, above = wilson(math.floor(mean), examples), wilson(math.ceil(mean), examples)
    part = mean - math.floor(mean)
    low, high = (a + part * (b - a) for a, b in zip(below, above, strict=True))
    return Interval(mean / examples, low, high, len(correct))


def rate(ns: Sequence[Sequence[int]], amounts: Sequence[Sequence[int]]) -> Interval:
    """Amount a second (examples, tokens) over runs, each its steps' times and amounts.

    The value is all amounts over all times. The interval is a bootstrap over runs and, in
    each, over its steps (Davison and Hinkley 1997, section 3.8), percentile method; with one
    run it knows nothing of differences between runs, which `n` says.
    """
    generator = np.random.default_rng(SEED)
    times = [np.asarray(one, dtype=float) for one in ns]
    done = [np.asarray(one, dtype=float) for one in amounts]
    if not times or any(len(one) == 0 for one in times):
        raise ValueError("no step to take a rate of")
    total = sum(map(np.sum, done)) / sum(map(np.sum, times)) * 1e9
    drawn = generator.integers(len(times), size=(RESAMPLES, len(times)))
    sums = np.stack([_resampled(t, d, generator) for t, d in zip(times, done, strict=True)])
    # A run drawn twice brings other steps the second time.
    places = (np.arange(RESAMPLES)[:, None] + np.arange(len(times))) % RESAMPLES
    taken = sums[drawn, :, places].sum(axis=1)  # [RESAMPLES, 2]
    found = taken[:, 1] / taken[:, 0] * 1e9
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(total), float(low), float(high), len(times))


def _resampled(
    times: np.ndarray, amounts: np.ndarray, generator: np.random.Generator
) -> np.ndarray:
    """[2, RESAMPLES]: sums of times and of amounts over steps drawn with replacement."""
    weights = generator.multinomial(len(times), np.full(len(times), 1 / len(times)), RESAMPLES)
    return np.stack([weights @ times, weights @ amounts])


def median(values: Sequence[Sequence[float]]) -> Interval:
    """Median over the runs' medians, with a bootstrap over runs and their steps."""
    runs = [np.asarray(one, dtype=float) for one in values]
    if not runs or any(len(one) == 0 for one in runs):
        raise ValueError("no value to take a median of")
    generator = np.random.default_rng(SEED)
    middle = float(np.median([np.median(one) for one in runs]))
    medians = np.stack(
        [
            np.median(one[generator.integers(len(one), size=(RESAMPLES, len(one)))], axis=1)
            for one in runs
        ]
    )
    drawn = generator.integers(len(runs), size=(RESAMPLES, len(runs)))
    places = (np.arange(RESAMPLES)[:, None] + np.arange(len(runs))) % RESAMPLES
    found = np.median(medians[drawn, places], axis=1)
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(middle, float(low), float(high), len(runs))


def mean(values: Sequence[float]) -> Interval:
    """Mean over runs with Student's interval; of one run the interval is not known (nan)."""
    if not values:
        raise ValueError("no value to take a mean of")
    middle = float(np.mean(values))
    if len(values) < 2:
        return Interval(middle, math.nan, math.nan, 1)
    half = float(stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * stats.sem(values))
    return Interval(middle, middle - half, middle + half, len(values))


def accuracy_difference(
    a: Sequence[Sequence[bool]], b: Sequence[Sequence[bool]]
) -> tuple[Interval, float]:
    """Accuracy of b - a, its bootstrap interval over examples, and a paired test's p.

    a, b: [runs, examples], whether each was right; run i of both has the same seed. Each
    example gives its mean difference over the runs, and under the hypothesis that a and b
    are alike its sign could be either (Fisher 1935, section 21): p is two-sided. For one run
    of each it asks what McNemar's test asks.
    """
    before, after = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if before.shape != after.shape or before.size == 0:
        raise ValueError(f"runs of {before.shape} and {after.shape} are no pairs")
    each = (after - before).mean(axis=0)
    return _about(each, len(before)), _signs(each)


def time_ratio(
    a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]
) -> tuple[Interval, float | None]:
    """How many times the time of a is that of b, over pairs of runs with the same seed.

    a, b: times of an example, [runs][steps]. A pair's ratio is of the runs' medians: steps
    of one run share whatever slowed the machine, so only runs are counted as independent. The
    value is the geometric mean; the interval is Student's over the logarithms, or, of a
    single pair, a bootstrap over its steps, which knows nothing of differences between runs.
    p is of a two-sided test that the ratio is 1; None of a single pair, or of pairs that all
    have the same ratio and it is not 1.
    """
    if len(a) != len(b) or not a:
        raise ValueError("runs without a partner are no pairs")
    logs = [float(np.log(np.median(x) / np.median(y))) for x, y in zip(a, b, strict=True)]
    if len(logs) == 1:
        upper, lower = median([a[0]]), median([b[0]])
        return (
            Interval(math.exp(logs[0]), upper.low / lower.high, upper.high / lower.low, 1),
            None,
        )
    found = mean(logs)
    # Without a spread nothing is known but that no difference is none.
    p: float | None = None if any(logs) else 1.0
    if len(set(logs)) > 1:
        p = float(stats.ttest_1samp(logs, 0).pvalue)
    return (
        Interval(math.exp(found.value), math.exp(found.low), math.exp(found.high), len(logs)),
        p,
    )


def _about(each: np.ndarray, runs: int) -> Interval:
    if len(each) < 2:  # one example can say anything
        return Interval(float(each.mean()), -1.0, 1.0, runs)
    found = stats.bootstrap(
        (each,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=LEVEL,
        method="percentile",
        batch=500,
        rng=np.random.default_rng(SEED),
    ).confidence_interval
    return Interval(float(each.mean()), float(found.low), float(found.high), runs)


def _signs(each: np.ndarray) -> float:
    """Two-sided p of the mean under random signs; examples without a difference say nothing."""
    telling = each[each != 0]
    if len(telling) < 2:  # of one either sign is as far from 0
        return 1.0
    found = stats.permutation_test(
        (telling,),
        np.mean,
        permutation_type="samples",
        n_resamples=RESAMPLES,
        batch=500,
        rng=np.random.default_rng(SEED),
        axis=-1,
    )
    return float(found.pvalue)
