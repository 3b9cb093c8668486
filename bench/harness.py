"""The one place that measures: verify each provider, then time them in turn, beside a self-pair.

A *provider* is one implementation of a case. Its result is first compared with the float64
reference; what is wrong is reported as wrong and not timed, what is not here as absent. The
right ones are then timed in alternating rounds, so that a machine that slows down slows
all of them down, and the first of them, the baseline, takes part twice: at both ends of
each round. How far those two differ, the self-pair's spread, is what this machine can
tell apart just now, and a ratio inside it is "no difference measured".

Times are milliseconds and quantiles are 20, 50 and 80 %, over the samples of all rounds.
"""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.work import Ceilings, Work

Run = Callable[[], object]
Sampler = Callable[[Run, float, float], list[float]]  # run, warm-up ms, ms to measure -> ms each

# A group of launches lasts at least this long between two events, whose own resolution is
# about half a microsecond.
_GROUP_MS = 0.2
_MOST_SAMPLES = 10_000

NO_DIFFERENCE = "no difference measured"


class Effort(NamedTuple):
    """How long a measurement may take: rounds, and milliseconds a provider a round."""

    rounds: int
    warmup_ms: float
    rep_ms: float


QUICK = Effort(rounds=3, warmup_ms=5, rep_ms=15)
FULL = Effort(rounds=7, warmup_ms=25, rep_ms=100)


class AbsentError(Exception):
    """A provider that is not on this machine; the message says why."""


class WrongError(Exception):
    """A provider whose result is not the reference's; the message says by how much."""


class Deadline:
    """When to stop; `passed` once `seconds` have gone by. None never passes."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = None if seconds is None else clock() + seconds

    @property
    def passed(self) -> bool:
        return self._end is not None and self._clock() >= self._end

    @property
    def left(self) -> float | None:
        return None if self._end is None else max(0.0, self._end - self._clock())


# --- Samplers


def on_cpu(clock: Callable[[], float] = time.perf_counter) -> Sampler:
    """Call by call on a CPU, caches as the call before left them."""

    def sample(run: Run, warmup_ms: float, rep_ms: float) -> list[float]:
        def call() -> float:
            start = clock()
            run()
            return (clock() - start) * 1e3

        first = call()
        spent = first
        while spent < warmup_ms:
            spent += call()
        samples = [call()]
        spent = samples[0]
        while (spent < rep_ms or len(samples) < 3) and len(samples) < _MOST_SAMPLES:
            samples.append(call())
            spent += samples[-1]
        return samples

    return sample


def cold_on_cuda(run: Run, warmup_ms: float, rep_ms: float) -> list[float]:
    """`triton.testing.do_bench`: the L2 cache is overwritten before each call.

    As a layer of a model finds it, after all the others. The overwriting also gives the
    CPU time to launch ahead, so that launches are not counted unless a call has many.
    """
    from triton.testing import do_bench

    samples = do_bench(run, warmup=warmup_ms, rep=rep_ms, return_mode="all")
    return [float(sample) for sample in samples]


def warm_on_cuda(run: Run, warmup_ms: float, rep_ms: float) -> list[float]:
    """Groups of launches back to back between two events: L2 as the call before left it.

    Where the CPU launches more slowly than the GPU works, this is the launches' time.
    """

    def group(calls: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            run()
        end.record()
        return start, end

    run()
    torch.cuda.synchronize()
    start, end = group(5)
    torch.cuda.synchronize()
    estimate_ms = max(start.elapsed_time(end) / 5, 1e-3)
    calls = max(1, round(_GROUP_MS / estimate_ms))
    group(max(1, int(warmup_ms / estimate_ms)))
    pairs = [group(calls) for _ in range(max(3, int(rep_ms / (calls * estimate_ms))))]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / calls for start, end in pairs]


def sampler_for(device: torch.device, l2: str) -> Sampler:
    """The sampler of a device; `l2` is cold or warm and means CUDA only."""
    if device.type == "cpu":
        return on_cpu()
    return cold_on_cuda if l2 == "cold" else warm_on_cuda


# --- Statistics


@dataclass(frozen=True)
class Quantiles:
    """20, 50 and 80 % of the samples, in ms."""

    p20: float
    p50: float
    p80: float
    samples: int

    @classmethod
    def of(cls, samples: Sequence[float]) -> "Quantiles":
        """Quantiles by linear interpolation between the samples."""
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], 1)
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7], len(samples))


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the baseline, and what the self-pair can tell apart.

    `median`, `low` and `high` are over the rounds: the baseline's median time in a round
    (the mean of its two places) over this provider's. `self_spread` is the farthest that
    the baseline's two places lay apart in any round, as a factor of 1 or more.
    """

    to: str
    median: float
    low: float
    high: float
    self_spread: float

    @classmethod
    def of(
        cls, to: str, first: list[list[float]], again: list[list[float]], own: list[list[float]]
    ) -> "Ratio":
        """From the samples of each round: of the baseline's two places, and of the provider."""
        a, b, c = ([statistics.median(r) for r in rounds] for rounds in (first, again, own))
        # The mean of both ends of a round is what a steady drift makes of its middle.
        ratios = [(x + y) / 2 / z for x, y, z in zip(a, b, c, strict=True)]
        spread = max(max(x / y, y / x) for x, y in zip(a, b, strict=True))
        return cls(to, statistics.median(ratios), min(ratios), max(ratios), spread)

    @property
    def verdict(self) -> str:
        """faster or slower where every round says so, beyond the self-pair; else no difference."""
        if self.low > 1 and self.median > self.self_spread:
            return "faster"
        if self.high < 1 and self.median < 1 / self.self_spread:
            return "slower"
        return NO_DIFFERENCE


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius, in float64; NaN counts as infinite."""
    difference: float = (actual.detach().double() - expected).norm().item()
    if difference != difference:
        return float("inf")
    size: float = expected.double().norm().item()
    return difference / size if size else difference


def verify(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], allowed: Mapping[str, float]
) -> float:
    """The largest relative error of any tensor. Raises WrongError beyond what is allowed."""
    worst = 0.0
    for name, reference in expected.items():
        if actual[name].shape != reference.shape:
            shapes = f"{(*actual[name].shape,)}, not {(*reference.shape,)}"
            raise WrongError(f"{name} has the shape {shapes}")
        error = relative_error(actual[name], reference)
        if not error <= allowed[name]:
            raise WrongError(
                f"{name} is off by {error:.2g} of its size, allowed are {allowed[name]:.2g}"
            )
        worst = max(worst, error)
    return worst


# --- Measuring


class Prepared(NamedTuple):
    """A provider ready to run: what is timed, what compares it, and what else is known."""

    run: Run
    check: Callable[[], float]  # the relative error; raises WrongError
    notes: Callable[[], dict[str, Any]] = dict


@dataclass(frozen=True)
class Provider:
    """A named implementation. `prepare` raises AbsentError where it is not here."""

    name: str
    prepare: Callable[[], Prepared]


@dataclass(frozen=True)
class Case:
    """One question: what it is about, the least work it takes, and who answers it."""

    key: dict[str, Any]
    work: Work
    providers: list[Provider]


@dataclass(frozen=True)
class Row:
    """What was found of one provider in one case.

    `status` is timed, right (verified and not timed), absent, wrong or failed, with the
    reason in `why`. `light` is the share of the speed of light (`bench.work`).
    """

    case: dict[str, Any]
    provider: str
    status: str
    why: str = ""
    error: float | None = None
    ms: Quantiles | None = None
    light: float | None = None
    ratio: Ratio | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values, the ratio with its verdict."""
        values = asdict(self)
        if self.ratio is not None:
            values["ratio"]["verdict"] = self.ratio.verdict
        return values


def measure(
    case: Case, sampler: Sampler | None, effort: Effort, ceilings: Ceilings | None
) -> list[Row]:
    """A row for each provider of the case, in order; without a sampler nothing is timed."""
    found: dict[str, dict[str, Any]] = {}
    runs: dict[str, Run] = {}
    for provider in case.providers:
        found[provider.name] = _checked(provider)
        if "run" in found[provider.name]:
            runs[provider.name] = found[provider.name].pop("run")
    if sampler is not None and runs:
        for name, timing in _timed(runs, sampler, effort).items():
            found[name] |= timing
            if ceilings is not None and "ms" in timing:
                found[name]["light"] = ceilings.least_ms(case.work) / timing["ms"].p50
    return [Row(case.key, name, **values) for name, values in found.items()]


def _timed(runs: Mapping[str, Run], sampler: Sampler, effort: Effort) -> dict[str, dict[str, Any]]:
    rounds, failures = alternate(runs, sampler, effort)
    found: dict[str, dict[str, Any]] = {}
    baseline = next(iter(runs))
    first, again = rounds.get(baseline), rounds.get(_again(baseline))
    for name in runs:
        if name in failures:
            found[name] = {"status": "failed", "why": failures[name]}
            continue
        own = rounds[name]
        found[name] = {"status": "timed", "ms": Quantiles.of([ms for r in own for ms in r])}
        if first and again:
            found[name]["ratio"] = Ratio.of(baseline, first, again, own)
    if first and again:  # against itself: only how far its two places lay apart
        spread = found[baseline]["ratio"].self_spread
        found[baseline]["ratio"] = Ratio(baseline, 1.0, 1.0, 1.0, spread)
    return found


def _checked(provider: Provider) -> dict[str, Any]:
    try:
        prepared = provider.prepare()
        error = prepared.check()
        notes = prepared.notes()
    except AbsentError as reason:
        return {"status": "absent", "why": str(reason)}
    except WrongError as reason:
        return {"status": "wrong", "why": str(reason)}
    except Exception as problem:  # noqa: BLE001  (whatever a provider raises is its result)
        return {"status": "failed", "why": one_line(problem)}
    return {"status": "right", "error": error, "notes": notes, "run": prepared.run}


def alternate(
    runs: Mapping[str, Run], sampler: Sampler, effort: Effort
) -> tuple[dict[str, list[list[float]]], dict[str, str]]:
    """Samples by provider and round, and why some have none; the first provider runs twice.

    Odd rounds go backwards, so that the first provider's two places swap.
    """
    first = next(iter(runs))
    order = {**runs, _again(first): runs[first]}
    samples: dict[str, list[list[float]]] = {name: [] for name in order}
    failures: dict[str, str] = {}
    for n in range(effort.rounds):
        for name in list(order) if n % 2 == 0 else reversed(list(order)):
            if name in failures:
                continue
            try:
                samples[name].append(sampler(order[name], effort.warmup_ms, effort.rep_ms))
            except Exception as problem:  # noqa: BLE001  (out of memory, say: a result too)
                failures[name] = one_line(problem)
    return {name: own for name, own in samples.items() if name not in failures}, failures


def _again(name: str) -> str:
    return f"{name} (again)"


def one_line(problem: BaseException) -> str:
    """An exception as its type and the first line of what it says."""
    lines = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {lines[0] if lines else 'no message'}"[:300]
