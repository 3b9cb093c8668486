"""What the runs of `bench.train_vs_stock` say together: pairs, ratios, losses, MFU.

A pair is a stock run and one of ours of the same cell and round. Ratios are of pairs, so
that a machine that slows down slows both; what is told of them is median and extremes.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.train_vs_stock_flops import share
from peftprof.run.loop import WARMUP_STEPS
from peftprof.run.meters import percentiles

STOCK, OURS = "stock", "ours"


@dataclass(frozen=True)
class Cell:
    """One comparison: a method in a precision."""

    method: str
    precision: str

    def __str__(self) -> str:
        return f"{self.method} {self.precision}"


@dataclass(frozen=True)
class Run:
    """What a child process measured, step by step; `dropout` says whether it was on."""

    round: int
    cell: Cell
    side: str
    dropout: bool
    found: Mapping[str, Any]

    def timed(self, name: str) -> list[Any]:
        """`name` of the steps after the warm-up."""
        return list(self.found[name][WARMUP_STEPS:])

    def per_second(self, name: str) -> float:
        return float(sum(self.timed(name)) / sum(self.timed("seconds")))

    @property
    def samples_per_s(self) -> float:
        return self.per_second("samples")

    @property
    def peak_bytes(self) -> int:
        """Of the training; the model's loading is left out."""
        return int(self.found["peak_bytes"])

    @property
    def above_bytes(self) -> int:
        """The peak without what the process held just before its model was loaded."""
        return self.peak_bytes - int(self.found["held_bytes"])

    def to_json(self) -> dict[str, Any]:
        """Everything raw, and the run's own figures."""
        p50, p95, _ = percentiles([1e9 * s for s in self.timed("seconds")])
        return {
            "round": self.round,
            "method": self.cell.method,
            "precision": self.cell.precision,
            "side": self.side,
            "dropout": self.dropout,
            "samples_per_s": self.samples_per_s,
            "real_tokens_per_s": self.per_second("real_tokens"),
            "padded_tokens_per_s": self.per_second("padded_tokens"),
            "step_p50_ms": p50 / 1e6,
            "step_p95_ms": p95 / 1e6,
            **self.found,
        }


@dataclass(frozen=True)
class Ratio:
    """Of pairs: the median and the extremes."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[float, float]]) -> "Ratio":
        """The first of each pair over the second."""
        found = [a / b for a, b in pairs]
        return cls(statistics.median(found), min(found), max(found))

    def __str__(self) -> str:
        return f"{self.median:.2f}x [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class LossDifference:
    """The largest relative difference of two runs' losses, and its step (from 0)."""

    relative: float
    step: int

    @classmethod
    def of(cls, stock: Sequence[float], ours: Sequence[float]) -> "LossDifference":
        differences = [abs(b - a) / max(abs(a), 1e-12) for a, b in zip(stock, ours, strict=True)]
        largest = max(differences)
        return cls(largest, differences.index(largest))


class UnequalError(RuntimeError):
    """Two runs that are no pair: they did not train the same thing on the same examples."""


def check_pair(stock: Run, ours: Run) -> None:
    """Raises UnequalError unless both began with the same weights and saw the same examples."""
    same = {
        "initial_sha256": "initial weights of what is trained",
        "order_sha256": "the order of examples",
        "samples": "samples by step",
        "real_tokens": "real tokens by step",
        "threads": "number of threads",
    }
    for key, what in same.items():
        if stock.found[key] != ours.found[key]:
            raise UnequalError(f"{stock.cell}: {what} differ between stock and ours")
    for run in (stock, ours):
        if not run.dropout and (where := run.found["drops_out"]):
            raise UnequalError(f"{run.cell}: {run.side} still drops out: {where}")


def pairs(
    runs: Iterable[Run],
    one: tuple[str, Cell],
    other: tuple[str, Cell],
    value: Callable[[Run], float] = lambda run: run.samples_per_s,
) -> list[tuple[float, float]]:
    """By round, `value` of the timing runs of two (side, cell)."""
    timing = {(r.round, r.side, r.cell): r for r in runs if r.dropout}
    rounds = sorted({number for number, side, cell in timing if (side, cell) == one})
    return [(value(timing[n, *one]), value(timing[n, *other])) for n in rounds]


def summary(cell: Cell, runs: Sequence[Run], peak: float) -> dict[str, Any]:
    """A cell's figures; `peak` is the GEMM's, in FLOP/s, in the cell's precision."""
    timing = [r for r in runs if r.cell == cell and r.dropout]
    by = {side: [r for r in timing if r.side == side] for side in (STOCK, OURS)}
    flops = by[STOCK][0].timed("flops")  # the same examples every time, on both sides
    ratios = {
        name: vars(Ratio.of(pairs(runs, (OURS, cell), (STOCK, cell), value)))
        for name, value in (
            ("samples_per_s", lambda r: r.samples_per_s),
            ("peak_bytes", lambda r: r.peak_bytes),
            ("above_bytes", lambda r: r.above_bytes),
        )
    }
    return {
        "method": cell.method,
        "precision": cell.precision,
        "pairs": len(by[STOCK]),
        "stock": _side(by[STOCK], flops, peak),
        "ours": _side(by[OURS], flops, peak),
        "ours_over_stock": ratios,
        "loss_dropout_off": _losses([r for r in runs if r.cell == cell and not r.dropout]),
        "loss_dropout_on": _losses(timing),
    }


def _side(runs: Sequence[Run], flops: Sequence[int], peak: float) -> dict[str, Any]:
    nanoseconds = [1e9 * s for run in runs for s in run.timed("seconds")]
    p50, p95, _ = percentiles(nanoseconds)
    middle = statistics.median
    return {
        "samples_per_s": middle(r.samples_per_s for r in runs),
        "real_tokens_per_s": middle(r.per_second("real_tokens") for r in runs),
        "padded_tokens_per_s": middle(r.per_second("padded_tokens") for r in runs),
        "step_p50_ms": p50 / 1e6,
        "step_p95_ms": p95 / 1e6,
        "peak_bytes": max(r.peak_bytes for r in runs),
        "above_bytes": max(r.above_bytes for r in runs),
        "loading_peak_bytes": max(r.found["loading_peak_bytes"] for r in runs),
        "mfu": middle(share(flops, r.timed("seconds"), peak) for r in runs),
    }


def _losses(runs: Sequence[Run]) -> dict[str, Any] | None:
    """The pair whose losses lie furthest apart, with both curves; None without a pair."""
    by = {
        side: {r.round: r.found["losses"] for r in runs if r.side == side} for side in (STOCK, OURS)
    }
    found = [
        vars(LossDifference.of(stock, by[OURS][number]))
        | {"round": number, "stock": stock, "ours": by[OURS][number]}
        for number, stock in by[STOCK].items()
    ]
    return max(found, key=lambda one: one["relative"], default=None)


def across(runs: Sequence[Run], cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Ratios between cells, paired within a round.

    Ours in the precision that is fastest for the method, over stock in fp32, the method's
    own and LoRA's; and QLoRA's throughput over LoRA's in each precision, on both sides.
    """
    found: list[dict[str, Any]] = []

    def add(what: str, one: tuple[str, Cell], other: tuple[str, Cell]) -> None:
        if one[1] in cells and other[1] in cells:
            names = [f"{side} {cell}" for side, cell in (one, other)]
            ratio = Ratio.of(pairs(runs, one, other))
            found.append({"what": what, "of": names[0], "over": names[1], **vars(ratio)})

    for method in dict.fromkeys(cell.method for cell in cells):
        own = [cell for cell in cells if cell.method == method]
        best = max(own, key=lambda cell: _median(runs, OURS, cell))
        for base in dict.fromkeys((method, "lora")):
            add("best precision over stock fp32", (OURS, best), (STOCK, Cell(base, "fp32")))
    for precision in dict.fromkeys(cell.precision for cell in cells):
        qlora, lora = Cell("qlora", precision), Cell("lora", precision)
        for side in (OURS, STOCK):
            add("qlora over lora", (side, qlora), (side, lora))
    return found


def _median(runs: Sequence[Run], side: str, cell: Cell) -> float:
    own = [r for r in runs if r.dropout and r.side == side and r.cell == cell]
    return statistics.median(r.samples_per_s for r in own)


def order(round_: int, cells: Sequence[Cell]) -> list[tuple[Cell, str]]:
    """The runs of a round: every cell on both sides, odd rounds backwards.

    Which side goes first changes from cell to cell, and for each cell from round to round.
    """
    numbered = list(enumerate(cells))
    if round_ % 2:
        numbered.reverse()
    sides = (STOCK, OURS)
    return [
        (cell, side)
        for number, cell in numbered
        for side in (sides if (number + round_) % 2 == 0 else sides[::-1])
    ]
