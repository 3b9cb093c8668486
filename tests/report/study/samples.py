"""Studies made up for tests: every configuration of the paper, with profiles and a ladder."""

import random
from dataclasses import replace
from functools import cache

from peftprof.breakdowns import Breakdown
from peftprof.records import (
    Accuracy,
    Execution,
    Memory,
    ModelInfo,
    RunRecord,
    Trainable,
)
from peftprof.report.study.figures import Drawn, figures
from peftprof.studies import Audit, Cell, CellResult, Count, Forgetting, Judged, Study
from peftprof.study.claims import judge
from tests.report import page_samples

HOSTILE = "<script>alert('x')</script> a|b `c` $x^2 ![i](http://evil.example/i.png)\nnext \x1b[31m"
QUICK = "30 steps of 16 examples a run: accuracies are of unfinished training"
LABELS = tuple(i % 2 for i in range(120))
TIMES = {"full": 9.0, "lora": 5.5, "qlora": 7.0}  # ms an example
RIGHT = {"full": 0.9, "lora": 0.87, "qlora": 0.86}
PEAKS = {"full": 1300, "lora": 810, "qlora": 690}  # MiB
RANKS = (4, 8, 16, 32)
CAUSES = ("", "batch size", "gradient work", "padding", "precision", "dequantise")


def cell(
    method: str, rank: int | None, seed: int = 42, part: str = "matrix", **more: object
) -> Cell:
    name = f"{part}-{method}-{rank}-s{seed}-{more.get('rung', 0)}"
    config = {"learning_rate": 1e-4, "batch_size": 16, "method": method}
    return Cell(name, part, method, rank, seed, config, **more)  # type: ignore[arg-type]


def record(one: Cell, model: str = "minilm") -> RunRecord:
    rank, method = one.rank or 0, one.method
    live = 66_955_010 if method == "full" else 592_130 + 18_432 * rank
    peak = (PEAKS[method] + rank // 4) * 2**20
    return RunRecord(
        version=1,
        name=one.name,
        state="complete",
        created="2026-01-02T03:04:05+00:00",
        command=("python", "-m", "peftprof", "study"),
        config=one.config | {"padding": "auto", "precision": "bf16", "kernels": "auto"},
        environment={},
        model=ModelInfo(model, "somewhere", "bert", "0" * 64, 66_955_010, 6),
        trainable=Trainable(live, live, 66_955_010, 40_000_000),
        execution=Execution("packed", 64, "adamw", None, False, False, 2),
        accuracy=Accuracy(100, 120, 0.83, 0.7, 0.9, 0.4),
        memory=Memory(peak, peak, None, None),
    )


def complete(one: Cell, breakdown: Breakdown | None = None, speed: float = 1.0) -> CellResult:
    draw = random.Random(one.name)
    ms = TIMES[one.method] / speed
    ns = tuple(int(16e6 * ms * draw.uniform(0.95, 1.05)) for _ in range(24))
    share = RIGHT[one.method]
    return CellResult(
        cell=one,
        state="complete",
        record=record(one),
        breakdown=breakdown,
        step_ns=ns,
        step_samples=(16,) * len(ns),
        step_tokens=(900,) * len(ns),
        predicted=tuple(x if draw.random() < share else 1 - x for x in LABELS),
        forgetting=Forgetting("masked language model", "some text", "its own", 900, 2.0, 2.5),
    )


def profile(method: str) -> Breakdown:
    """A profiled run of the method: only QLoRA dequantises, only adapters have adapters."""
    made = page_samples.run(method, 16e6 * TIMES[method], seed=len(method))
    without = {"full": ("dequant", "adapter_gemm"), "lora": ("dequant",), "qlora": ()}[method]
    rows = tuple(row for row in made.rows if row.category not in without)
    step = sum(row.ns for row in rows) + made.idle_ns + made.unattributed_ns
    slower = {"full": 1.0, "lora": 1.6, "qlora": 2.5}[method]  # none reaches the same
    work = tuple(replace(w, ns=slower * w.ns) for w in made.work if w.category not in without)
    return replace(made, rows=rows, step_ns=replace(made.step_ns, median=step), work=work)


def results() -> tuple[CellResult, ...]:
    found = []
    for seed in (42, 43):
        for method in ("full", "lora", "qlora"):
            for rank in (None,) if method == "full" else RANKS:
                profiled = seed == 42 and rank in (None, 8)
                one = cell(method, rank, seed)
                found.append(complete(one, profile(method) if profiled else None))
    for rung, cause in enumerate(CAUSES):
        method = ("full", "full", "lora", "lora", "lora", "qlora")[rung]
        one = cell(method, None, part="ladder", rung=rung, cause=cause)
        profiled = profile(method) if rung < 2 else None
        found.append(complete(one, profiled, (0.5, 0.8, 0.9, 1.1, 1.3, 1.2)[rung]))
    found += [complete(cell(m, None, part="search")) for m in ("full", "lora")]
    return tuple(found)


def study(**changes: object) -> Study:
    rows = (Count("adapters", 147_456, 147_456), Count("head", 592_130, 592_130))
    made = Study(
        recipe="paper",
        about="The paper's study",
        quick="",
        created="2026-01-02T03:04:05+00:00",
        settings={"model": "minilm"},
        environment={"device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0"},
        labels=LABELS,
        results=results(),
        rates={"full": 1e-4, "lora": 2e-3},
        audit=(
            Audit("lora", 8, rows, 739_586, 739_586, 67_694_596, 67_694_596, 739_586, 740_000, 0,
                  0),
        ),
        left_out={"ladder-4-s42": "bf16 is slow here"},
    )  # fmt: skip
    return replace(made, **changes)  # type: ignore[arg-type]


@cache
def whole() -> Judged:
    return judge(study())


@cache
def failed() -> Judged:
    """Every QLoRA run failed, one rank of LoRA is missing, one rung is."""
    found = []
    for one in results():
        if one.cell.method == "qlora":
            one = CellResult(one.cell, "failed", "out of memory: tried to allocate 2 GiB")
        elif one.cell.rank == 16 or one.cell.rung == 3:
            one = CellResult(one.cell, "missing", "it has not been run to its end")
        found.append(one)
    return judge(study(results=tuple(found)))


@cache
def quick() -> Judged:
    return replace(failed(), study=replace(failed().study, quick=QUICK))


@cache
def single(method: str = "lora") -> Judged:
    """A single run, without a profile."""
    one = cell(method, None if method == "full" else 8)
    return judge(study(results=(complete(one),), audit=(), left_out={}, rates={}))


@cache
def empty() -> Judged:
    return judge(study(results=(), audit=(), left_out={}, rates={}, labels=()))


@cache
def hostile() -> Judged:
    """Hostile words wherever a study has words of its own, or of its recipe's or libraries'."""
    made = whole()
    words = HOSTILE
    results = []
    for one in made.study.results:
        breakdown = one.breakdown and page_samples.run(one.cell.method, words=words)
        results.append(replace(one, breakdown=breakdown))
    results.append(CellResult(cell("lora", 64), "failed", words))
    ladder = tuple(replace(r, cause=r.cause + words, note=r.note + words) for r in made.ladder)
    verdicts = tuple(
        replace(v, evidence=v.evidence + words, caveat=words,
                figures=tuple(replace(f, what=f.what + words) for f in v.figures))
        for v in made.verdicts
    )  # fmt: skip
    study_ = replace(
        made.study, recipe=words, about=words, quick=words, created=words,
        settings={words: words, "model": words}, environment={"device": [words], words: 1},
        results=tuple(results), left_out={words: words},
    )  # fmt: skip
    return replace(made, study=study_, ladder=ladder, verdicts=verdicts)


@cache
def drawn(name: str) -> tuple[Drawn, ...]:
    """The figures of one of `JUDGED`, drawn once for all tests."""
    return tuple(figures(JUDGED[name]()))


JUDGED = {
    "whole": whole,
    "quick": quick,
    "failed": failed,
    "single": single,
    "single full": lambda: single("full"),
    "empty": empty,
    "hostile": hostile,
}
