"""The variants timed in turn, and the figures that come of it.

In a round every variant has its calls, one variant after the other, and every second round
goes backwards: a machine that slows down slows all of them. Each turn begins with a call that
is not counted, which finds the caches as another variant left them. A ratio is taken within a
round and then over the rounds.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftprof.inferences import Cell, Ratio
from peftprof.run.meters import EnergyMeter, percentiles
from peftprof.run.serving.calls import CLOCK, OUT_OF_MEMORY, Clock, Timed, out_of_memory

ROUNDS = 10
LEAST_CALLS, MOST_CALLS = 20, 5000
ABOUT_NS = 1_000_000_000
LEVEL = 0.95


@dataclass(frozen=True)
class Turn:
    """One variant's calls in one round: a line of calls.jsonl, durations in order."""

    variant: str
    phase: str
    batch: int
    length: int
    round: int
    ns: tuple[int, ...]


@dataclass(frozen=True)
class Measured:
    """All variants at one batch size and length in one phase; why some have no figure."""

    turns: tuple[Turn, ...]
    joules: dict[str, dict[str, float]]
    failed: dict[str, str]
    energy_absent: dict[str, str]


def measure(
    models: Mapping[str, Any],
    phase: str,
    ids: torch.Tensor,
    length: int,
    requests: int | None,
    clock: Clock = CLOCK,
) -> Measured:
    """Time every model on `ids` [batch, length, and in decode what follows].

    `requests` are the calls of each; None: for about a second, 20 or more. A variant that is
    out of memory has no figures, and the others go on.
    """
    timed = {name: Timed(model, phase, ids, length, clock) for name, model in models.items()}
    meters = {name: EnergyMeter(ids.device) for name in models}
    failed: dict[str, str] = {}
    typical = 0
    for name, one in timed.items():
        try:
            one.warm()
            typical = max(typical, one.warm())
        except OUT_OF_MEMORY as error:
            failed[name] = out_of_memory(error)
    calls, rounds = _effort(requests, typical)
    turns: list[Turn] = []
    for number in range(rounds):
        for name in list(timed) if number % 2 == 0 else reversed(list(timed)):
            if name in failed:
                continue
            meter = meters[name]
            try:
                timed[name].warm()
                ns = timed[name].count(math.ceil(calls / rounds), meter.resume, meter.pause)
            except OUT_OF_MEMORY as error:
                failed[name] = out_of_memory(error)
                meter.pause()
                continue
            turns.append(Turn(name, phase, ids.shape[0], length, number, tuple(ns)))
    energies = {name: meter.result() for name, meter in meters.items() if name not in failed}
    absent = next((e.absent for e in energies.values()), {})
    return Measured(
        tuple(turn for turn in turns if turn.variant not in failed),
        {name: energy.joules for name, energy in energies.items()},
        failed,
        absent,
    )


def _effort(requests: int | None, typical_ns: int) -> tuple[int, int]:
    """Calls of a variant, and the rounds they are dealt over."""
    if requests is None:
        requests = max(LEAST_CALLS, min(MOST_CALLS, math.ceil(ABOUT_NS / max(1, typical_ns))))
    return requests, min(ROUNDS, max(requests // 4, min(requests, 5)))


def cells(
    turns: Iterable[Turn], variants: Sequence[str], joules: Mapping[str, Mapping[str, float]]
) -> list[Cell]:
    """The figures of the turns of one phase, batch size and length, in the order of `variants`."""
    by: dict[str, list[Turn]] = defaultdict(list)
    for turn in turns:
        by[turn.variant].append(turn)
    return [
        _cell(by[name], None if name == "base" else by.get("base"), joules.get(name, {}))
        for name in variants
        if name in by
    ]


def _cell(turns: list[Turn], base: list[Turn] | None, joules: Mapping[str, float]) -> Cell:
    first = turns[0]
    ns = [duration for turn in turns for duration in turn.ns]
    p50, p95, p99 = percentiles(ns)
    sequences = first.batch * len(ns) / (sum(ns) / 1e9)  # each gets on by one call
    decoding = first.phase == "decode"
    return Cell(
        variant=first.variant,
        phase=first.phase,
        batch=first.batch,
        length=first.length,
        calls=len(ns),
        p50_ns=p50,
        p95_ns=p95,
        p99_ns=p99,
        examples_per_s=None if decoding else sequences,
        tokens_per_s=sequences * (1 if decoding else first.length),
        joules=dict(joules),
        ratio=None if base is None else ratio(turns, base),
    )


def ratio(turns: Sequence[Turn], base: Sequence[Turn]) -> Ratio:
    """The time of `turns` over that of `base`, paired by round; see `inferences.Ratio`."""
    lower = {turn.round: statistics.median(turn.ns) for turn in base}
    logs = [
        math.log(statistics.median(turn.ns) / lower[turn.round])
        for turn in turns
        if turn.round in lower
    ]
    middle = statistics.fmean(logs)
    if len(logs) < 2:
        return Ratio(math.exp(middle), None, None, len(logs))
    from scipy import special

    half = float(special.stdtrit(len(logs) - 1, (1 + LEVEL) / 2))
    half *= statistics.stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(middle), math.exp(middle - half), math.exp(middle + half), len(logs))
