"""Verdicts worked out once more, by other code, from the files that `results.export` writes.

Plain functions over lists; nothing of peftprof. The rules are those of docs/study.md.
"""

import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from scipy import special

HOLDS, FAILS, UNTESTABLE = "holds", "fails", "not testable here"
BEST_RANK = 8


class Raw:
    """The raw results in a folder."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "results.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines]
        self.runs = {r["name"]: r for r in pq.read_table(folder / "runs.parquet").to_pylist()}
        self.steps: dict[str, list[dict[str, Any]]] = {}
        for step in pq.read_table(folder / "steps.parquet").to_pylist():
            if not step["warmup"]:
                self.steps.setdefault(step["cell"], []).append(step)
        self.right: dict[str, list[bool]] = {}
        for one in pq.read_table(folder / "predictions.parquet").to_pylist():
            self.right.setdefault(one["cell"], []).append(one["label"] == one["predicted"])

    def named(self, method: str, rank: int | None = None) -> dict[int, str]:
        """Names of a method's complete runs by seed; at the rank nearest to 8."""
        cells = [r["cell"] for r in self.rows if r["cell"]["part"] == "matrix"]
        ranks = {c["rank"] for c in cells if c["method"] == method and c["rank"] is not None}
        if rank is None and ranks:
            rank = min(ranks, key=lambda r: (abs(r - BEST_RANK), r))
        return {
            run["seed"]: name
            for name, run in self.runs.items()
            if (run["part"], run["state"]) == ("matrix", "complete")
            and run["method"] == method
            and run["rank"] == rank
        }

    def time(self, name: str) -> float:
        """Median time of an example in ns."""
        return statistics.median(step["ns"] / step["samples"] for step in self.steps[name])

    def breakdown(self, method: str) -> dict[str, Any] | None:
        rows = {row["cell"]["name"]: row for row in self.rows}
        found = (rows[name]["breakdown"] for _, name in sorted(self.named(method).items()))
        return next((one for one in found if one is not None), None)


def student(values: list[float]) -> tuple[float, float]:
    half = special.stdtrit(len(values) - 1, 0.975) * statistics.stdev(values)
    middle = statistics.mean(values)
    return middle - half / math.sqrt(len(values)), middle + half / math.sqrt(len(values))


def faster(raw: Raw, a: str, b: str) -> tuple[float, float] | None:
    """The interval of how many times as many examples a second b does."""
    before, after = raw.named(a), raw.named(b)
    shared = sorted(before.keys() & after.keys())
    if not shared:
        return None
    logs = [math.log(raw.time(before[s]) / raw.time(after[s])) for s in shared]
    if len(logs) == 1:
        return None
    low, high = student(logs)
    return math.exp(low), math.exp(high)


def at_least(interval: tuple[float, float] | None, least: float) -> str:
    if interval is None:
        return UNTESTABLE
    return HOLDS if interval[0] >= least else FAILS if interval[1] < least else UNTESTABLE


def both(verdicts: list[str]) -> str:
    """Of a claim on both adapters."""
    if FAILS in verdicts:
        return FAILS
    return UNTESTABLE if UNTESTABLE in verdicts else HOLDS


def gradient_work(raw: Raw) -> str:
    rungs: dict[int, dict[int, str]] = {}
    causes = {}
    for name, run in raw.runs.items():
        if run["part"] == "ladder":
            rungs.setdefault(run["rung"], {})
            causes[run["rung"]] = run["cause"]
            if run["state"] == "complete":
                rungs[run["rung"]][run["seed"]] = name
    logs: dict[str, float] = {}
    for before, after in itertools.pairwise(sorted(rungs)):
        shared = rungs[before].keys() & rungs[after].keys()
        if not shared:
            break
        logs[causes[after]] = statistics.mean(
            math.log(raw.time(rungs[before][s]) / raw.time(rungs[after][s])) for s in shared
        )
    if "gradient work" not in logs:
        return UNTESTABLE
    whole = logs["gradient work"] + logs.get("batch size", 0.0)
    return HOLDS if whole > 0 and logs["gradient work"] / whole > 0.5 else FAILS


def adapter_products(raw: Raw) -> str:
    found = raw.breakdown("lora")
    if found is None:
        return UNTESTABLE
    rows = [row for row in found["rows"] if row["phase"] == "backward"]
    whole = sum(row["ns"] for row in rows) + found["idle_by_phase_ns"].get("backward", 0)
    mine = sum(row["ns"] for row in rows if row["category"] == "adapter_gemm")
    return HOLDS if whole and mine / whole > 0.5 else FAILS


def bound(raw: Raw) -> str:
    most = []
    for method in ("full", "lora"):
        found = raw.breakdown(method)
        if found is None or not any(work["bound"] for work in found["work"]):
            return UNTESTABLE
        ns = {
            kind: sum(work["ns"] for work in found["work"] if work["bound"] == kind)
            for kind in ("memory", "compute", "overhead")
        }
        most.append(max(ns, key=ns.__getitem__))
    return HOLDS if most == ["memory", "compute"] else FAILS


def dequantise(raw: Raw) -> str:
    interval = faster(raw, "lora", "qlora")
    if interval is None:
        return UNTESTABLE
    if interval[0] >= 1:
        return FAILS
    lora, qlora = raw.breakdown("lora"), raw.breakdown("qlora")
    if interval[1] >= 1 or lora is None or qlora is None:
        return UNTESTABLE
    slower = qlora["step_ns"]["median"] - lora["step_ns"]["median"]
    dequant = sum(row["ns"] for row in qlora["rows"] if row["category"] == "dequant")
    if slower <= 0:
        return UNTESTABLE
    return HOLDS if 2 * dequant >= slower else FAILS


def less_memory(raw: Raw) -> str:
    def peaks(method: str) -> list[int]:
        runs = [raw.runs[name] for name in raw.named(method).values()]
        found = [
            run["memory_rss_bytes"]
            if run["memory_allocated_bytes"] is None
            else run["memory_allocated_bytes"]
            for run in runs
        ]
        return [peak for peak in found if peak is not None]

    full, verdicts = peaks("full"), []
    for method, least in (("lora", 0.38), ("qlora", 0.47)):
        mine = peaks(method)
        if not full or not mine:
            return UNTESTABLE
        verdicts.append(at_least((1 - max(mine) / min(full), 1 - min(mine) / max(full)), least))
    return both(verdicts)


def activations(raw: Raw) -> str:
    full, qlora = ((raw.breakdown(m) or {}).get("memory") for m in ("full", "qlora"))
    if not full or not qlora:
        return UNTESTABLE
    parts = {part["part"]: part["bytes"] for part in full["parts"]}
    stored = sum(
        part["bytes"]
        for part in qlora["parts"]
        if part["part"] in ("base_weights", "quantisation_state")
    )
    weights = parts.get("base_weights", 0) + parts.get("adapters", 0)
    return (
        HOLDS if 2 * parts["activations"] > sum(parts.values()) and weights >= 4 * stored else FAILS
    )


def ranks(raw: Raw) -> str:
    """At most one of the claim's halves can be: enough that two ranks have a seed in common."""
    for method in ("lora", "qlora"):
        seeds: dict[int, set[int]] = {}
        for run in raw.runs.values():
            if (run["method"], run["part"], run["state"]) == (method, "matrix", "complete"):
                seeds.setdefault(run["rank"], set()).add(run["seed"])
        if any(a & b for a, b in itertools.combinations(seeds.values(), 2)):
            return FAILS
    return UNTESTABLE


def lost_accuracy(raw: Raw) -> str:
    verdicts = []
    full = raw.named("full")
    for method in ("lora", "qlora"):
        mine = raw.named(method)
        shared = sorted(full.keys() & mine.keys())
        if not shared:
            return UNTESTABLE
        pairs = [list(zip(raw.right[full[s]], raw.right[mine[s]], strict=True)) for s in shared]
        each = [statistics.mean(a - b for a, b in example) for example in zip(*pairs, strict=True)]
        half = 1.96 * statistics.pstdev(each) / math.sqrt(len(each))  # a bootstrap's, near enough
        low, high = statistics.mean(each) - half, statistics.mean(each) + half
        verdicts.append(FAILS if high < 0.04 or low > 0.04 else HOLDS if low > 0 else UNTESTABLE)
    return both(verdicts)


def forgets(raw: Raw) -> str:
    def rises(method: str) -> dict[int, float]:
        return {
            seed: raw.runs[name]["general_after"] - raw.runs[name]["general_before"]
            for seed, name in raw.named(method).items()
            if raw.runs[name]["general_after"] is not None
        }

    full, verdicts = rises("full"), []
    for method in ("lora", "qlora"):
        mine = rises(method)
        shared = full.keys() & mine.keys()
        if len(shared) < 2:
            verdicts.append(UNTESTABLE)
            continue
        low, high = student([full[s] - mine[s] for s in shared])
        verdicts.append(HOLDS if low > 0 else FAILS if high < 0 else UNTESTABLE)
    return both(verdicts)


def energy(raw: Raw) -> str:
    def joules(method: str) -> list[float]:
        return [
            raw.runs[name]["joules"] / sum(step["samples"] for step in raw.steps[name])
            for name in raw.named(method).values()
            if raw.runs[name]["joules"] is not None
        ]

    full, lora = joules("full"), joules("lora")
    if not full or not lora:
        return UNTESTABLE
    if max(lora) < min(full):
        return HOLDS
    return FAILS if min(lora) > max(full) else UNTESTABLE


def verdicts(folder: Path) -> dict[str, str]:
    """Every claim's verdict by the files in `folder`."""
    raw = Raw(folder)
    return {
        "C1": at_least(faster(raw, "full", "lora"), 3.6),
        "C2": gradient_work(raw),
        "C3": adapter_products(raw),
        "C4": bound(raw),
        "C5": dequantise(raw),
        "C6": at_least(faster(raw, "full", "qlora"), 2.8),
        "C7": less_memory(raw),
        "C8": activations(raw),
        "C9": ranks(raw),
        "C10": lost_accuracy(raw),
        "C11": forgets(raw),
        "C12": UNTESTABLE,
        "C13": energy(raw),
    }
