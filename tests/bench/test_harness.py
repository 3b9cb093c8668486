"""Statistics with made-up timings and a clock that only moves when it is told to."""

import itertools
import math

import pytest
import torch

from bench import harness
from bench.harness import (
    NO_DIFFERENCE,
    AbsentError,
    Case,
    Deadline,
    Effort,
    Prepared,
    Provider,
    Quantiles,
    Ratio,
    WrongError,
    alternate,
    measure,
    relative_error,
    verify,
)
from bench.work import Ceilings, Work

ONCE = Effort(rounds=3, warmup_ms=0, rep_ms=0)
WORK = Work(bytes=1_000_000, flops=0)


class Clock:
    """Seconds that pass when something runs."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, ms: float):
        def run() -> None:
            self.now += ms / 1e3

        return run


def test_quantiles_are_interpolated_between_samples():
    found = Quantiles.of([float(n) for n in range(11)])
    assert (found.p20, found.p50, found.p80, found.samples) == (2, 5, 8, 11)
    assert Quantiles.of([7.0]) == Quantiles(7, 7, 7, 1)


def test_a_cpu_is_sampled_for_the_time_asked_after_the_warm_up():
    clock = Clock()
    samples = harness.on_cpu(clock)(clock.takes(2), 10, 30)
    assert samples == pytest.approx([2.0] * 15)
    assert clock.now == pytest.approx(0.010 + 0.030)


def test_a_slow_call_is_sampled_three_times_all_the_same():
    clock = Clock()
    assert len(harness.on_cpu(clock)(clock.takes(5000), 10, 30)) == 3


def rounds(*medians: float) -> list[list[float]]:
    return [[median] * 3 for median in medians]


def test_a_ratio_inside_the_self_pair_is_no_difference():
    first, again = rounds(10, 10, 10), rounds(10, 11, 10)  # 10 % apart in one round
    ratio = Ratio.of("base", first, again, rounds(9.5, 9.5, 9.5))
    assert ratio.self_spread == pytest.approx(1.1)
    assert ratio.median == pytest.approx(10 / 9.5)
    assert ratio.verdict == NO_DIFFERENCE


def test_a_ratio_beyond_the_self_pair_is_told():
    first, again = rounds(10, 10, 10), rounds(10.1, 10, 10)
    assert Ratio.of("base", first, again, rounds(5, 5, 5)).verdict == "faster"
    assert Ratio.of("base", first, again, rounds(20, 20, 20)).verdict == "slower"


def test_one_round_that_says_otherwise_is_no_difference():
    same = rounds(10, 10, 10)
    assert Ratio.of("base", same, same, rounds(5, 5, 10.5)).verdict == NO_DIFFERENCE
    assert Ratio.of("base", same, same, rounds(20, 20, 9.9)).verdict == NO_DIFFERENCE


def test_a_steady_drift_makes_no_ratio():
    """First, middle and last of a round, each slower than the one before, backwards in turn."""
    first, middle, last = rounds(10, 14, 14), rounds(11, 13, 15), rounds(12, 12, 16)
    ratio = Ratio.of("base", first, last, middle)
    assert (ratio.low, ratio.median, ratio.high) == (1, 1, 1)


def test_rounds_alternate_and_the_baseline_runs_at_both_ends():
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in ("a", "b", "c")}

    def once(run, warmup_ms, rep_ms):
        run()
        return [1.0]

    samples, failures = alternate(runs, once, ONCE)
    assert "".join(order) == "abcaacbaabca"
    assert not failures
    assert {name: len(own) for name, own in samples.items()} == {
        "a": 3,
        "b": 3,
        "c": 3,
        "a (again)": 3,
    }


def provider(name: str, clock: Clock, ms: float, check=lambda: 0.0) -> Provider:
    return Provider(name, lambda: Prepared(clock.takes(ms), check))


def raises(error: Exception):
    def check():
        raise error

    return check


def test_what_is_wrong_or_absent_or_broken_is_said_and_not_timed():
    clock = Clock()
    providers = [
        Provider("away", raises(AbsentError("not installed"))),
        provider("liar", clock, 0.001, raises(WrongError("y is off"))),
        provider("broken", clock, 1, raises(ValueError("first line\nsecond line"))),
        provider("base", clock, 10),
        provider("ours", clock, 5),
    ]
    ceilings = Ceilings(copy_bytes_per_s=1e9, gemm_flops_per_s=1e12, dtype="float32")
    found = measure(Case({"layer": "x"}, WORK, providers), harness.on_cpu(clock), ONCE, ceilings)
    by_name = {row.provider: row for row in found}
    assert list(by_name) == ["away", "liar", "broken", "base", "ours"]
    assert [row.status for row in found] == ["absent", "wrong", "failed", "timed", "timed"]
    assert by_name["broken"].why == "ValueError: first line"
    assert all(by_name[name].ms is None for name in ("away", "liar", "broken"))
    ours = by_name["ours"]
    assert ours.ms is not None
    assert ours.ms.p50 == pytest.approx(5)
    assert ours.light == pytest.approx(1 / 5)  # a megabyte at 1 GB/s takes a millisecond
    assert ours.ratio is not None
    assert (ours.ratio.to, ours.ratio.verdict) == ("base", "faster")
    assert ours.ratio.median == pytest.approx(2)
    assert by_name["base"].ratio == Ratio("base", 1, 1, 1, pytest.approx(1))
    assert ours.to_json()["ratio"]["verdict"] == "faster"


def test_a_provider_that_fails_while_it_is_timed_takes_nobody_along():
    clock = Clock()
    calls = itertools.count()

    def fails_late() -> None:
        if next(calls) > 4:
            raise MemoryError("no more")
        clock.takes(1)()

    providers = [
        provider("base", clock, 10),
        Provider("late", lambda: Prepared(fails_late, lambda: 0.0)),
        provider("ours", clock, 5),
    ]
    found = measure(Case({}, WORK, providers), harness.on_cpu(clock), ONCE, None)
    assert [row.status for row in found] == ["timed", "failed", "timed"]
    assert found[1].why == "MemoryError: no more"
    assert found[1].ms is None
    assert found[2].ratio is not None


def test_without_a_sampler_nothing_is_timed():
    clock = Clock()
    found = measure(Case({}, WORK, [provider("base", clock, 10)]), None, ONCE, None)
    assert [(row.status, row.ms) for row in found] == [("right", None)]
    assert clock.now == 0


def test_errors_are_relative_and_nan_is_infinite():
    expected = torch.full((4,), 2.0, dtype=torch.float64)
    assert relative_error(torch.full((4,), 2.5), expected) == pytest.approx(0.25)
    assert math.isinf(relative_error(torch.tensor([2.0, 2.0, 2.0, math.nan]), expected))


def test_verify_names_what_is_off():
    expected = {"y": torch.ones(3, dtype=torch.float64)}
    assert verify({"y": torch.full((3,), 1.001)}, expected, {"y": 0.01}) == pytest.approx(
        0.001, rel=1e-3
    )
    with pytest.raises(WrongError, match=r"y is off by 0\.5 of its size, allowed are 0\.01"):
        verify({"y": torch.full((3,), 1.5)}, expected, {"y": 0.01})
    with pytest.raises(WrongError, match="y is off by inf"):
        verify({"y": torch.full((3,), math.nan)}, expected, {"y": 0.01})
    with pytest.raises(WrongError, match=r"y has the shape \(4,\), not \(3,\)"):
        verify({"y": torch.ones(4)}, expected, {"y": 0.01})


def test_a_deadline_passes_and_none_never_does():
    clock = Clock()
    soon, never = Deadline(2, clock), Deadline(None, clock)
    clock.now = 1.5
    assert not soon.passed
    clock.now = 2
    assert soon.passed
    assert not never.passed


class Gpu:
    """CUDA's events and waiting, on a made-up clock."""

    def __init__(self, clock: Clock) -> None:
        self.waits = 0

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def elapsed_time(self, end: "Event") -> float:
                return (end.at - self.at) * 1e3

        self.Event = Event

    def synchronize(self) -> None:
        self.waits += 1


@pytest.mark.parametrize("ms", [0.01, 0.5, 40.0])
def test_warm_samples_are_the_time_of_one_call(monkeypatch, ms):
    clock = Clock()
    monkeypatch.setattr(torch, "cuda", Gpu(clock))
    samples = harness.warm_on_cuda(clock.takes(ms), 5, 20)
    assert samples == pytest.approx([ms] * len(samples))
    assert len(samples) == {0.01: 100, 0.5: 40, 40.0: 3}[ms]


def test_cold_samples_are_all_of_do_bench(monkeypatch):
    asked = {}

    def do_bench(run, **settings):
        asked.update(settings)
        return [1, 2]

    monkeypatch.setattr("triton.testing.do_bench", do_bench)
    assert harness.cold_on_cuda(lambda: None, 5, 20) == [1.0, 2.0]
    assert asked == {"warmup": 5, "rep": 20, "return_mode": "all"}
