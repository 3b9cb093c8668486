"""Intervals and tests against closed forms, other computations of the same, and what must not
matter."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special
from scipy import stats as scipy_stats

from peftprof.run.statistics import wilson
from peftprof.study import statistics

slowly = settings(max_examples=25, deadline=None)
times = st.lists(st.integers(1_000, 10**10), min_size=1, max_size=12)


def finite(interval) -> bool:
    return all(map(math.isfinite, (interval.value, interval.low, interval.high)))


def wilson_again(p: float, n: int) -> tuple[float, float]:
    """The two shares at which p is 1.96 standard errors away: a quadratic's roots."""
    z2 = special.ndtri(0.975) ** 2
    low, high = sorted(np.roots([1 + z2 / n, -(2 * p + z2 / n), p * p]).real)
    return low, high


def student_again(values) -> tuple[float, float]:
    n = len(values)
    middle = sum(values) / n
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    half = special.stdtrit(n - 1, 0.975) * spread / math.sqrt(n)
    return middle - half, middle + half


@given(st.integers(1, 3000), st.data())
def test_accuracy_of_one_run_is_wilsons(examples, data):
    correct = data.draw(st.integers(0, examples))
    found = statistics.accuracy([correct], examples)
    assert found.value == correct / examples
    assert (found.low, found.high) == pytest.approx(wilson_again(correct / examples, examples))
    assert (found.low, found.high) == pytest.approx(wilson(correct, examples))
    assert 0 <= found.low <= found.value <= found.high <= 1


@given(st.integers(1, 3000), st.data())
def test_more_seeds_narrow_no_accuracy(examples, data):
    correct = data.draw(st.lists(st.integers(0, examples), min_size=1, max_size=5))
    found = statistics.accuracy(correct, examples)
    assert found.value == pytest.approx(sum(correct) / len(correct) / examples)
    assert found.n == len(correct)
    # Between two whole numbers the ends are interpolated, which is within a hair of Wilson.
    # Below one wrong answer Wilson's end bends most.
    near = wilson_again(found.value, examples)
    assert abs(found.low - near[0]) < 0.3 / examples
    assert abs(found.high - near[1]) < 0.3 / examples
    assert statistics.accuracy(correct[::-1], examples) == found


def test_nothing_to_count_is_said():
    for make in (
        lambda: statistics.accuracy([], 10),
        lambda: statistics.accuracy([1], 0),
        lambda: statistics.rate([], []),
        lambda: statistics.rate([[]], [[]]),
        lambda: statistics.median([]),
        lambda: statistics.median([[1.0], []]),
        lambda: statistics.mean([]),
        lambda: statistics.accuracy_difference([[True]], [[True, False]]),
        lambda: statistics.accuracy_difference([], []),
        lambda: statistics.time_ratio([], []),
        lambda: statistics.time_ratio([[1.0]], [[1.0], [2.0]]),
    ):
        with pytest.raises(ValueError, match=r"no |pairs|partner"):
            make()


@slowly
@given(st.lists(times, min_size=1, max_size=4), st.integers(1, 64))
def test_a_rate_is_all_amounts_over_all_times(runs, samples):
    amounts = [[samples] * len(run) for run in runs]
    found = statistics.rate(runs, amounts)
    assert found.value == pytest.approx(sum(map(sum, amounts)) / sum(map(sum, runs)) * 1e9)
    assert finite(found)
    slowest, fastest = max(map(max, runs)), min(map(min, runs))
    assert samples / slowest * 1e9 <= found.low * (1 + 1e-9)
    assert found.low <= found.high <= samples / fastest * 1e9 * (1 + 1e-9)
    assert found.n == len(runs)
    assert statistics.rate(runs, amounts) == found
    double = statistics.rate(runs, [[2 * n for n in run] for run in amounts])
    assert double.low == pytest.approx(2 * found.low)


def test_equal_steps_leave_no_room():
    found = statistics.rate([[10**9] * 5] * 3, [[8] * 5] * 3)
    assert (found.low, found.value, found.high) == pytest.approx((8, 8, 8))
    middle = statistics.median([[2.0, 2.0], [2.0]])
    assert (middle.low, middle.value, middle.high) == (2, 2, 2)


def covered(make, truth: float, samples: int = 60) -> float:
    generator = np.random.default_rng(1)
    found = [make(generator) for _ in range(samples)]
    return sum(one.low <= truth <= one.high for one in found) / samples


@pytest.mark.slow
def test_bootstrap_intervals_cover_the_truth_about_as_often_as_they_say():
    """60 samples: 95 % less three standard errors, and less what few steps cost a bootstrap."""

    def steps(generator):
        ns = generator.lognormal(math.log(1e6), 0.3, size=(1, 80))
        return statistics.rate(ns.tolist(), [[8] * 80])

    assert covered(steps, 8e9 / (1e6 * math.exp(0.3**2 / 2))) >= 0.84

    def middles(generator):
        return statistics.median(generator.lognormal(0, 0.3, size=(1, 80)).tolist())

    assert covered(middles, 1.0) >= 0.84

    def differences(generator):
        both = generator.random((2, 1, 300)) < np.array([0.8, 0.85])[:, None, None]
        return statistics.accuracy_difference(*both.tolist())[0]

    assert covered(differences, 0.05) >= 0.84


def test_runs_that_differ_widen_what_steps_alone_would_not():
    alike = statistics.rate([[10**6] * 20] * 3, [[1] * 20] * 3)
    apart = statistics.rate([[9 * 10**5] * 20, [10**6] * 20, [11 * 10**5] * 20], [[1] * 20] * 3)
    assert alike.high - alike.low < 1e-6
    assert apart.low == pytest.approx(1e9 / 11e5)  # the slowest run, drawn three times
    assert apart.high == pytest.approx(1e9 / 9e5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=2, max_size=10))
def test_means_interval_is_students(values):
    found = statistics.mean(values)
    assert found.value == pytest.approx(sum(values) / len(values), abs=1e-6)
    assert (found.low, found.high) == pytest.approx(student_again(values), rel=1e-6, abs=1e-6)


def test_a_mean_of_one_run_says_that_it_knows_no_interval():
    found = statistics.mean([3.0])
    assert found.value == 3
    assert math.isnan(found.low)
    assert math.isnan(found.high)
    assert statistics.mean([2.0, 2.0]).low == statistics.mean([2.0, 2.0]).high == 2


rows = st.integers(1, 3).flatmap(
    lambda runs: st.integers(1, 40).flatmap(
        lambda n: st.tuples(
            *[st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=runs,
                       max_size=runs)] * 2
        )
    )
)  # fmt: skip


@slowly
@given(rows)
def test_swapping_two_runs_turns_their_difference_around(pair):
    a, b = pair
    there, p = statistics.accuracy_difference(a, b)
    back, q = statistics.accuracy_difference(b, a)
    assert there.value == pytest.approx(np.mean(b) - np.mean(a))
    assert back.value == pytest.approx(-there.value)
    # The same resamples, drawn from what is negated.
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert q == pytest.approx(p, abs=0.02)
    assert finite(there)
    assert there.low <= there.value + 1e-12
    assert there.value <= there.high + 1e-12
    assert 0 < p <= 1
    assert there.n == len(a)


@slowly
@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_identical_runs_do_not_differ(runs):
    found, p = statistics.accuracy_difference(runs, runs)
    assert (found.value, found.low, found.high, p) == (0, 0, 0, 1)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided test: of the examples that one alone got right, half by chance."""
    n, k = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(k + 1)) / 2**n
    return min(1.0, 2 * tail)


@pytest.mark.parametrize(
    ("only_a", "only_b"), [(0, 1), (1, 1), (0, 5), (2, 9), (10, 3), (20, 45), (60, 90), (30, 30)]
)
def test_of_one_pair_of_runs_it_is_mcnemars_exact_test(only_a, only_b):
    a = [True] * only_a + [False] * only_b + [True] * 50 + [False] * 20
    b = [False] * only_a + [True] * only_b + [True] * 50 + [False] * 20
    found, p = statistics.accuracy_difference([a], [b])
    assert found.value == pytest.approx((only_b - only_a) / len(a))
    exact = mcnemar(only_a, only_b)
    assert exact == pytest.approx(scipy_stats.binomtest(only_a, only_a + only_b).pvalue)
    # Few enough signs are all tried; of more, 9,999 are drawn.
    assert p == pytest.approx(exact, abs=1e-9 if only_a + only_b < 13 else 0.02)


def test_examples_that_nobody_tells_apart_do_not_change_p():
    a, b = [True] * 3 + [False] * 9, [False] * 3 + [True] * 9
    more = [True] * 500
    _, p = statistics.accuracy_difference([a], [b])
    _, same = statistics.accuracy_difference([a + more], [b + more])
    assert same == p


def test_one_example_alone():
    found, p = statistics.accuracy_difference([[True]], [[False]])
    assert (found.value, p) == (-1, 1)
    assert finite(found)
    assert finite(statistics.accuracy([1], 1))


@slowly
@given(st.lists(times, min_size=1, max_size=4), st.data())
def test_a_ratio_of_times_and_its_inverse(a, data):
    b = [data.draw(times) for _ in a]
    there, p = statistics.time_ratio(a, b)
    back, q = statistics.time_ratio(b, a)
    logs = [math.log(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)]
    assert there.value == pytest.approx(math.exp(sum(logs) / len(logs)))
    assert back.value == pytest.approx(1 / there.value)
    assert finite(there) or there.high == math.inf
    if len(a) > 1:
        low, high = student_again(logs)
        assert math.log(there.low) == pytest.approx(low, rel=1e-6, abs=1e-6) or low < -700
        assert (high > 700) or math.log(there.high) == pytest.approx(high, rel=1e-6, abs=1e-6)
        assert (p is None) == (q is None)
        if p is not None:
            assert q == pytest.approx(p, abs=1e-6)
            assert 0 <= p <= 1
    else:
        assert p is q is None


def test_of_one_pair_the_interval_is_of_its_steps_and_there_is_no_p():
    slow, fast = [3.6e6, 3.6e6, 3.7e6], [1e6, 1e6, 1.1e6]
    found, p = statistics.time_ratio([slow], [fast])
    assert found.value == pytest.approx(3.6)
    assert found.low == pytest.approx(3.6e6 / 1.1e6)
    assert found.high == pytest.approx(3.7)
    assert (found.n, p) == (1, None)


def test_students_p_of_three_pairs():
    logs = [0.1, 0.2, 0.45]
    found, p = statistics.time_ratio([[math.exp(x)] for x in logs], [[1.0]] * 3)
    middle = sum(logs) / 3
    error = math.sqrt(sum((x - middle) ** 2 for x in logs) / 2 / 3)
    assert p == pytest.approx(2 * special.stdtr(2, -middle / error))
    assert found.value == pytest.approx(math.exp(middle))
    # p is below 5 % exactly where the interval leaves 1 out.
    assert (p < 0.05) == (found.low > 1)


def test_pairs_without_any_spread():
    """Twice the same ratio tells nothing of how ratios spread; that of nothing is no difference."""
    same, p = statistics.time_ratio([[2.0], [2.0]], [[2.0], [2.0]])
    assert (same.value, same.low, same.high, p) == (1, 1, 1, 1)
    twice, p = statistics.time_ratio([[2.0], [4.0]], [[1.0], [2.0]])
    assert (twice.value, twice.low, twice.high) == pytest.approx((2, 2, 2))
    assert p is None
