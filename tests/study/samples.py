"""Studies made by hand, with known times, answers, memory, energy; and one written to a folder."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from peftprof.breakdowns import Breakdown, MemoryPart, MemoryPeak, Row, Spread, Work
from peftprof.records import Accuracy, Energy, Memory, RunRecord, encode
from peftprof.run.folder import Evaluation, RunFolder, Step
from peftprof.studies import Cell, CellResult, Forgetting, Study
from peftprof.study.folder import Stored, StudyFolder
from peftprof.study.plan import configuration

SEEDS = (1, 2, 3)
RANKS = (4, 8)
EXAMPLES = 400
SAMPLES = 8  # of a step
STEPS = 21
SAME = 1e6  # ns an example, of every run until a test says otherwise
JITTER = (0.99, 1.0, 1.01)  # of the steps: the median step is the one in the middle
LABELS = tuple(i % 2 for i in range(EXAMPLES))


def config(method: str, rank: int | None, seed: int, **more) -> dict:
    common = {
        "method": method,
        "model": "small",
        "dataset": "sentences.csv",
        "learning_rate": 1e-3,
        "rank": rank or 8,
        "seed": seed,
        "batch_size": SAMPLES,
        "padding": "pad",
        "precision": "fp32",
        "kernels": "torch",
    }
    return common | more


def complete(cell: Cell) -> CellResult:
    """A run of that cell that was right on all but every tenth example."""
    wrong = set(range(0, EXAMPLES, 10))
    result = CellResult(
        cell,
        "complete",
        record=RunRecord(
            version=1,
            name=cell.name,
            state="complete",
            created="2026-01-02T03:04:05+00:00",
            command=(),
            config=cell.config,
            environment={},
            accuracy=Accuracy(EXAMPLES - len(wrong), EXAMPLES, 0.9, 0.86, 0.93, 0.3),
            memory=Memory(10**9, 2 * 10**9, None, 3 * 10**9),
            energy=Energy({}, {"GPU": "there is none"}),
        ),
        predicted=answers(wrong),
    )
    return at(result, SAME)


def answers(wrong: set[int]) -> tuple[int, ...]:
    """Predictions that are wrong on these examples."""
    return tuple(1 - label if i in wrong else label for i, label in enumerate(LABELS))


def at(result: CellResult, ns: float, samples: int = SAMPLES) -> CellResult:
    """The same at a median time of `ns` an example."""
    steps = tuple(round(ns * samples * JITTER[i % len(JITTER)]) for i in range(STEPS))
    return replace(
        result, step_ns=steps, step_samples=(samples,) * STEPS, step_tokens=(16 * samples,) * STEPS
    )


def study(seeds: Sequence[int] = SEEDS, ranks: Sequence[int] = RANKS, quick: str = "") -> Study:
    """Full, LoRA and QLoRA, all alike."""
    results = []
    for seed in seeds:
        for method in ("full", "lora", "qlora"):
            for rank in (None,) if method == "full" else ranks:
                name = f"{configuration(method, rank)}-s{seed}"
                cell = Cell(name, "matrix", method, rank, seed, config(method, rank, seed))
                results.append(complete(cell))
    return Study(
        recipe="hand",
        about="made by hand",
        quick=quick,
        created="2026-01-02T03:04:05+00:00",
        settings={},
        environment={},
        labels=LABELS,
        results=tuple(results),
    )


def changed(
    made: Study, which: str, change: Callable[[CellResult], CellResult], part: str = "matrix"
) -> Study:
    """The study with every run of a method or configuration changed; "" are all of them."""

    def meant(cell: Cell) -> bool:
        names = ("", cell.method, configuration(cell.method, cell.rank), cell.name)
        return cell.part == part and which in names

    return replace(made, results=tuple(change(r) if meant(r.cell) else r for r in made.results))


def timed(made: Study, which: str, ns: dict[int, float]) -> Study:
    """Times of an example in ns, by seed."""
    return changed(made, which, lambda result: at(result, ns[result.cell.seed]))


def answered(made: Study, which: str, wrong: Callable[[int], set[int]]) -> Study:
    """What was answered wrongly, by seed."""

    def answer(result: CellResult) -> CellResult:
        return replace(result, predicted=answers(wrong(result.cell.seed)))

    return changed(made, which, answer)


def of_record(made: Study, which: str, **fields) -> Study:
    """Fields of the records, each a value or a function of the seed."""

    def change(result: CellResult) -> CellResult:
        assert result.record is not None
        known = {k: v(result.cell.seed) if callable(v) else v for k, v in fields.items()}
        return replace(result, record=replace(result.record, **known))

    return changed(made, which, change)


def batched(made: Study, which: str, size: int) -> Study:
    """A batch size in the cells and the records."""

    def change(result: CellResult) -> CellResult:
        settings = result.cell.config | {"batch_size": size}
        assert result.record is not None
        return replace(
            result,
            cell=replace(result.cell, config=settings),
            record=replace(result.record, config=settings),
        )

    return changed(made, which, change)


def sized(made: Study, which: str, peak: int) -> Study:
    """The allocator's peak in bytes."""
    return of_record(made, which, memory=Memory(peak, peak, None, 2 * peak))


def energised(made: Study, which: str, joules: Callable[[int], float]) -> Study:
    """Joules of the timed steps, by seed."""
    return of_record(made, which, energy=lambda seed: Energy({"GPU": joules(seed)}))


def forgot(made: Study, which: str, rise: dict[int, float]) -> Study:
    """By how much the loss on general text rose, by seed."""

    def change(result: CellResult) -> CellResult:
        after = 3.0 + rise[result.cell.seed]
        return replace(
            result, forgetting=Forgetting("language model", "text", "its own", 99, 3.0, after)
        )

    return changed(made, which, change)


def ended(made: Study, which: str, state: str = "failed", part: str = "matrix") -> Study:
    """These runs failed, or are missing."""
    return changed(made, which, lambda r: CellResult(r.cell, state, "out of memory"), part)


def laddered(made: Study, rungs: Sequence[tuple[str, str, dict[int, float], int]]) -> Study:
    """With a ladder: cause, method, ns of an example by seed, batch size, of each rung."""
    results = list(made.results)
    for number, (cause, method, ns, batch) in enumerate(rungs):
        for seed, value in ns.items():
            rank = None if method == "full" else 8
            settings = config(method, rank, seed, batch_size=batch)
            cell = Cell(f"ladder-{number}-s{seed}", "ladder", method, rank, seed, settings,
                        number, cause)  # fmt: skip
            results.append(at(complete(cell), value, batch))
    return replace(made, results=tuple(results))


def breakdown(
    rows: dict[tuple[str, str], float],
    step: float = 100e6,
    idle: float = 0.0,
    bound: dict[str, str] | None = None,
    parts: dict[str, int] | None = None,
) -> Breakdown:
    """A breakdown: ns by phase and category, each category's ceiling, bytes at the peak."""
    peak = None
    if parts is not None:
        held = tuple(MemoryPart(name, size, 1) for name, size in parts.items())
        total = sum(parts.values())
        peak = MemoryPeak("the memory step", "cpu", total, held, "backward", "")
    categories: dict[str, float] = {}
    for (_, category), ns in rows.items():
        categories[category] = categories.get(category, 0.0) + ns
    return Breakdown(
        name="hand",
        source="kineto",
        device="cpu",
        steps=3,
        step_ns=Spread(step, step, step),
        rows=tuple(Row(p, c, ns, ns / step, 1, ns, ns) for (p, c), ns in rows.items()),
        unattributed_ns=step - idle - sum(rows.values()),
        idle_ns=idle,
        idle_by_phase_ns={"backward": idle},
        overlap_ns=0.0,
        operators=(),
        unattributed_operators=(),
        work=tuple(
            Work(c, ns, 1.0, 0.0, 0.0, "fp32", bound=(bound or {}).get(c))
            for c, ns in categories.items()
        ),
        memory=peak,
    )


def profiled(made: Study, which: str, found: Breakdown) -> Study:
    """With this breakdown of the first seed's runs."""
    first = min(result.cell.seed for result in made.results)

    def change(result: CellResult) -> CellResult:
        return replace(result, breakdown=found) if result.cell.seed == first else result

    return changed(made, which, change)


def written(made: Study, path: Path) -> StudyFolder:
    """A folder as the runner would have left it, but for the traces."""
    folder = StudyFolder(path)
    with folder.held():
        folder.store(
            Stored(1, made.recipe, made.about, made.quick, made.created, made.settings,
                   made.environment, made.labels, tuple(r.cell for r in made.results), {}, ())
        )  # fmt: skip
    for result in made.results:
        if result.state == "failed":
            folder.fail(result.cell.name, result.why)
        if result.record is None:
            continue
        run = RunFolder(folder.run(result.cell.name))
        with run.held(new=True):
            run.write_record(result.record)
            times = zip(result.step_ns, result.step_samples, result.step_tokens, strict=True)
            steps = [Step(i, 0.5, 1e-3, ns, n, t, t, False) for i, (ns, n, t) in enumerate(times)]
            warm = Step(0, 0.7, 1e-3, 10**12, 1, 1, 1, True)
            run.write_steps([warm, *steps])
            assert result.record.accuracy is not None
            run.write_evaluations([Evaluation(9, result.record.accuracy, result.predicted)])
            if result.forgetting is not None:
                folder.write(
                    f"runs/{result.cell.name}/forgetting.json",
                    json.dumps(encode(result.forgetting)),
                )
    return folder
