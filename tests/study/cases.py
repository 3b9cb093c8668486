"""For each claim hand-made studies in which it holds, fails, and cannot be told."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from peftprof.records import Memory
from peftprof.studies import Study
from peftprof.study.plan import BATCH
from tests.study import samples
from tests.study.samples import (
    answered,
    breakdown,
    ended,
    energised,
    forgot,
    laddered,
    of_record,
    profiled,
    sized,
    timed,
)

HOLDS, FAILS, UNTESTABLE = "holds", "fails", "not testable here"
NEAR = {1: 1.0, 2: 1.01, 3: 0.99}
FAR = {1: 0.6, 2: 1.0, 3: 1.6}
GRADIENT = "gradient work"


@dataclass(frozen=True)
class Case:
    claim: str
    verdict: str
    why: str
    make: Callable[[], Study]


def plain() -> Study:
    return samples.study(ranks=(8,))


def one_seed() -> Study:
    return samples.study(seeds=(1,), ranks=(8,))


def times(method: str, factor: float, by_seed=None, of: Study | None = None) -> Study:
    """That method takes `factor` times the time of the others."""
    by_seed = by_seed or NEAR
    made = of or plain()
    seeds = {r.cell.seed for r in made.results}
    return timed(made, method, {s: 4e6 * factor * by_seed[s] for s in seeds})


def slow(made: Study | None = None) -> Study:
    """Everything at 4 ms an example."""
    made = made or plain()
    return timed(made, "", dict.fromkeys((1, 2, 3), 4e6))


def ladder(batch: float, gradient: float) -> Study:
    start = 8e6
    return laddered(
        plain(),
        [
            ("", "full", {s: start * NEAR[s] for s in (1, 2)}, 8),
            (BATCH, "full", {s: start / batch * NEAR[s] for s in (1, 2)}, 32),
            (GRADIENT, "lora", {s: start / batch / gradient * NEAR[s] for s in (1, 2)}, 32),
        ],
    )


def backward(adapter: float, base: float, idle: float = 0.0) -> Study:
    rows = {
        ("backward", "adapter_gemm"): adapter,
        ("backward", "base_gemm"): base,
        ("forward", "adapter_gemm"): 40e6,  # another phase, which says nothing of backward
    }
    return profiled(plain(), "lora", breakdown(rows, 200e6, idle))


def bounds(full: dict[str, float], lora: dict[str, float]) -> Study:
    """Times of a category at each ceiling."""
    at = {"memory": "elementwise", "compute": "base_gemm", "overhead": "optimizer"}

    def of(shares: dict[str, float]):
        rows = {("forward", at[bound]): ns for bound, ns in shares.items()}
        return breakdown(rows, bound={category: bound for bound, category in at.items()})

    return profiled(profiled(plain(), "full", of(full)), "lora", of(lora))


def slower(factor: float) -> Study:
    return times("qlora", factor, of=slow())


def dequantised(made: Study, dequant: float, qlora_step: float) -> Study:
    made = profiled(made, "lora", breakdown({("forward", "base_gemm"): 90e6}, 100e6))
    rows = {("forward", "dequant"): dequant, ("forward", "base_gemm"): 90e6}
    return profiled(made, "qlora", breakdown(rows, qlora_step))


def peaks(full: int, lora: int, qlora: int) -> Study:
    return sized(sized(sized(plain(), "full", full), "lora", lora), "qlora", qlora)


def parts(activations: int, weights: int, stored: int) -> Study:
    full = {"activations": activations, "base_weights": weights, "gradients": 50, "other": 10}
    qlora = {"activations": 500, "base_weights": stored - 10, "quantisation_state": 10,
             "adapters": 7}  # fmt: skip
    made = profiled(plain(), "full", breakdown({}, parts=full))
    return profiled(made, "qlora", breakdown({}, parts=qlora))


def lost(lora: int, qlora: int, swapped: int = 0) -> Study:
    """So many examples fewer than full; and of `swapped` others each is right on its own."""
    made = answered(plain(), "full", lambda seed: set(range(10, 10 + swapped)))
    for method, wrong in (("lora", lora), ("qlora", qlora)):
        mistakes = set(range(100, 100 + wrong + swapped))
        made = answered(made, method, lambda seed, mistakes=mistakes: mistakes)
    return made


def rises(full: float, lora: float, qlora: float, by_seed=None) -> Study:
    by_seed = by_seed or NEAR
    made = plain()
    for method, rise in (("full", full), ("lora", lora), ("qlora", qlora)):
        made = forgot(made, method, {s: rise * by_seed[s] for s in (1, 2, 3)})
    return made


def joules(full: float, lora: float, by_seed=None) -> Study:
    by_seed = by_seed or NEAR
    made = energised(plain(), "full", lambda seed: full * by_seed[seed])
    return energised(made, "lora", lambda seed: lora * by_seed[seed])


def by_rank(wrong: dict[int, int]) -> Study:
    """So many wrong answers by rank, of both adapters."""
    made = samples.study(ranks=tuple(wrong))
    for rank, number in wrong.items():
        for method in ("lora", "qlora"):
            made = answered(made, f"{method}-r{rank}", lambda seed, n=number: set(range(n)))
    return made


CASES = [
    Case("C1", HOLDS, "4 times", lambda: times("lora", 1 / 4, of=slow())),
    Case("C1", FAILS, "2 times", lambda: times("lora", 1 / 2, of=slow())),
    Case("C1", UNTESTABLE, "3.7, widely", lambda: times("lora", 1 / 3.7, FAR, slow())),
    Case("C1", UNTESTABLE, "no pair", lambda: ended(plain(), "lora")),
    Case("C1", UNTESTABLE, "4 times, once", lambda: times("lora", 1 / 4, of=slow(one_seed()))),
    Case("C2", HOLDS, "2 of 2.4", lambda: ladder(1.2, 2.0)),
    Case("C2", HOLDS, "against a slower batch", lambda: ladder(0.8, 2.0)),
    Case("C2", FAILS, "1.2 of 3.6", lambda: ladder(3.0, 1.2)),
    Case("C2", FAILS, "nothing is faster", lambda: ladder(0.5, 0.9)),
    Case("C2", UNTESTABLE, "no ladder", plain),
    Case("C2", UNTESTABLE, "the rung failed",
         lambda: ended(ladder(1.2, 2), "lora", "failed", "ladder")),
    Case("C2", UNTESTABLE, "the rung before it failed",
         lambda: ended(ended(ladder(1.2, 2), "ladder-1-s1", part="ladder"), "ladder-1-s2",
                       part="ladder")),
    Case("C3", HOLDS, "60 of 100", lambda: backward(60e6, 40e6)),
    Case("C3", FAILS, "20 of 100", lambda: backward(20e6, 80e6)),
    Case("C3", FAILS, "55 of 100 with idle 30", lambda: backward(55e6, 45e6, 30e6)),
    Case("C3", UNTESTABLE, "no profile", plain),
    Case("C4", HOLDS, "as said", lambda: bounds({"memory": 60e6, "compute": 30e6},
                                                {"memory": 30e6, "compute": 60e6})),
    Case("C4", FAILS, "both compute", lambda: bounds({"memory": 30e6, "compute": 60e6},
                                                     {"memory": 30e6, "compute": 60e6})),
    Case("C4", FAILS, "LoRA overhead", lambda: bounds({"memory": 60e6, "compute": 30e6},
                                                      {"overhead": 50e6, "compute": 40e6})),
    Case("C4", UNTESTABLE, "no ceilings", lambda: backward(1e6, 1e6)),
    Case("C4", UNTESTABLE, "no profile", plain),
    Case("C5", HOLDS, "all of it", lambda: dequantised(slower(1.3), 40e6, 130e6)),
    Case("C5", FAILS, "a third of it", lambda: dequantised(slower(1.3), 1e7, 13e7)),
    Case("C5", FAILS, "QLoRA is faster", lambda: dequantised(slower(0.7), 4e7, 13e7)),
    Case("C5", UNTESTABLE, "not told apart",
         lambda: dequantised(times("qlora", 1.1, FAR, slow()), 4e7, 13e7)),
    Case("C5", UNTESTABLE, "no profile", lambda: slower(1.3)),
    Case("C5", UNTESTABLE, "profiled it is no slower",
         lambda: dequantised(slower(1.3), 4e7, 9e7)),
    Case("C5", UNTESTABLE, "once",
         lambda: dequantised(times("qlora", 1.3, of=slow(one_seed())), 4e7, 13e7)),
    Case("C5", UNTESTABLE, "no pair", lambda: ended(plain(), "qlora")),
    Case("C6", HOLDS, "3.2 times", lambda: times("qlora", 1 / 3.2, of=slow())),
    Case("C6", FAILS, "2 times", lambda: times("qlora", 1 / 2, of=slow())),
    Case("C6", UNTESTABLE, "2.9, widely", lambda: times("qlora", 1 / 2.9, FAR, slow())),
    Case("C6", UNTESTABLE, "no pair", lambda: ended(plain(), "full")),
    Case("C7", HOLDS, "40 and 50 % less", lambda: peaks(1000, 600, 500)),
    Case("C7", FAILS, "30 % less", lambda: peaks(1000, 700, 500)),
    Case("C7", FAILS, "QLoRA 40 % less", lambda: peaks(1000, 600, 600)),
    Case("C7", FAILS, "one fails, one cannot be told", lambda: of_record(
        peaks(1000, 600, 700), "lora", memory=lambda s: Memory(500 + 70 * s, 0, 0, 0))),
    Case("C7", UNTESTABLE, "runs on both sides", lambda: of_record(
        peaks(1000, 600, 500), "lora", memory=lambda s: Memory(500 + 70 * s, 0, 0, 0))),
    Case("C7", UNTESTABLE, "no memory", lambda: of_record(plain(), "", memory=None)),
    Case("C7", UNTESTABLE, "no QLoRA", lambda: ended(plain(), "qlora")),
    Case("C8", HOLDS, "as said", lambda: parts(600, 400, 90)),
    Case("C8", FAILS, "few activations", lambda: parts(300, 400, 90)),
    Case("C8", FAILS, "twice as small", lambda: parts(600, 400, 200)),
    Case("C8", UNTESTABLE, "no memory step", lambda: backward(1e6, 1e6)),
    Case("C9", FAILS, "all alike", lambda: samples.study(ranks=(4, 8, 16))),
    Case("C9", FAILS, "rank 8 is best by far", lambda: by_rank({4: 90, 8: 20, 16: 80})),
    Case("C9", FAILS, "rank 16 is best by far", lambda: by_rank({4: 90, 8: 80, 16: 20})),
    Case("C9", FAILS, "rank 8 is best by nothing to speak of", lambda: by_rank({4: 41, 8: 40})),
    Case("C9", UNTESTABLE, "one rank", plain),
    Case("C9", UNTESTABLE, "no seed in common",
         lambda: ended(ended(samples.study(seeds=(1, 2)), "", "missing"), "full")),
    Case("C10", HOLDS, "5 points", lambda: lost(20, 22)),
    Case("C10", FAILS, "none", plain),
    Case("C10", FAILS, "10 points", lambda: lost(40, 44)),
    Case("C10", FAILS, "1 point", lambda: lost(4, 4)),
    Case("C10", FAILS, "the adapters are better", lambda: lost(-10, -10, 15)),
    Case("C10", FAILS, "LoRA alone", lambda: lost(20, 0)),
    Case("C10", UNTESTABLE, "1 point, widely", lambda: lost(4, 4, 50)),
    Case("C10", UNTESTABLE, "no pair", lambda: ended(plain(), "lora")),
    Case("C11", HOLDS, "a third", lambda: rises(0.3, 0.1, 0.1)),
    Case("C11", FAILS, "more", lambda: rises(0.1, 0.3, 0.3)),
    Case("C11", FAILS, "QLoRA forgets more", lambda: rises(0.2, 0.1, 0.3)),
    Case("C11", UNTESTABLE, "widely", lambda: rises(0.2, 0.19, 0.19, {1: 1, 2: -3, 3: 2})),
    Case("C11", UNTESTABLE, "LoRA alone is measured", lambda: replace(
        rises(0.3, 0.1, 0.1), results=tuple(
            replace(r, forgetting=None) if r.cell.method == "qlora" else r
            for r in rises(0.3, 0.1, 0.1).results))),
    Case("C11", UNTESTABLE, "not asked for", plain),
    Case("C11", UNTESTABLE, "one seed", lambda: ended(ended(rises(3, 1, 1), "full-s1"), "full-s2")),
    Case("C12", UNTESTABLE, "never", plain),
    Case("C13", HOLDS, "half", lambda: joules(2.0, 1.0)),
    Case("C13", FAILS, "twice", lambda: joules(1.0, 2.0)),
    Case("C13", UNTESTABLE, "runs overlap", lambda: joules(1.1, 1.0, FAR)),
    Case("C13", UNTESTABLE, "no counter", plain),
]  # fmt: skip
