"""Whether several runs did the same work, and what makes one slower than another."""

import math
from collections.abc import Sequence
from typing import Any

from peftprof.breakdowns import CATEGORIES, Bar, Breakdown, Comparison
from peftprof.records import RunRecord

LONGEST = 80  # characters that are shown of a setting
MOST_MS = 1e12  # of a step; a quotient of two is a number


def compare(
    records: Sequence[RunRecord | None], names: Sequence[str] = ()
) -> tuple[bool | None, list[str]]:
    """Whether the runs are comparable, and in what they differ, such as `batch size: 8 vs 32`.

    None where it is not known, for a trace without its run.json, whose name is then the
    reason; and for a single run.
    """
    if len(records) < 2:
        return None, []
    unknown = [
        f"{name} has no run.json that says its model, data and batches"
        for name, record in zip(names, records, strict=False)
        if record is None
    ]
    known = [record for record in records if record is not None]
    differences = _differences(known) if len(known) > 1 else []
    if differences:
        return False, differences + unknown
    return (None, unknown) if len(known) < len(records) else (True, [])


def _differences(records: Sequence[RunRecord]) -> list[str]:
    compared = [_work(record) for record in records]
    return [
        f"{name}: {' vs '.join(dict.fromkeys(str(work[name]) for work in compared))}"
        for name in compared[0]
        if len({str(work[name]) for work in compared}) > 1
    ]


def against_the_first(
    breakdowns: Sequence[Breakdown],
    records: Sequence[RunRecord | None],
    speedups: bool,
) -> tuple[Comparison, ...]:
    """Every further run against the first; with speed-up figures only where `speedups`."""
    return tuple(
        _comparison(breakdowns, records, other, speedups) for other in range(1, len(breakdowns))
    )


def _comparison(
    breakdowns: Sequence[Breakdown],
    records: Sequence[RunRecord | None],
    other: int,
    speedups: bool,
) -> Comparison:
    before, after = _by_category(breakdowns[0]), _by_category(breakdowns[other])
    step = breakdowns[other].step_ns.median - breakdowns[0].step_ns.median
    bars = [Bar(name, after[name] - before[name]) for name in before if before[name] or after[name]]
    if bars:
        # What rounding leaves goes to the longest, so that the bars add up to the last bit.
        longest = max(range(len(bars)), key=lambda i: abs(bars[i].ns))
        left = step - math.fsum(bar.ns for bar in bars)
        bars[longest] = Bar(bars[longest].category, bars[longest].ns + left)
    return Comparison(
        base=0,
        other=other,
        step_ns=step,
        bars=tuple(bars),
        speedup=breakdowns[0].step_ns.median / breakdowns[other].step_ns.median
        if speedups
        else None,
        timed_speedup=_timed(records[0], records[other]) if speedups else None,
    )


def _by_category(breakdown: Breakdown) -> dict[str, float]:
    found = {
        category: math.fsum(row.ns for row in breakdown.rows if row.category == category)
        for category in CATEGORIES
    }
    return found | {"idle": breakdown.idle_ns, "unattributed": breakdown.unattributed_ns}


def _timed(base: RunRecord | None, other: RunRecord | None) -> float | None:
    if base is None or other is None or base.timed is None or other.timed is None:
        return None
    before, after = base.timed.step_p50_ms, other.timed.step_p50_ms
    return before / after if all(0 < ms < MOST_MS for ms in (before, after)) else None


def _work(record: RunRecord) -> dict[str, Any]:
    """What a step works on and where, but not how it is trained: the method is the question."""
    model, data, timed, profiled = record.model, record.data, record.timed, record.profiled
    return {
        "model": f"{model.name} {model.fingerprint[:8]}" if model else "unknown",
        "data": f"{data.name} {data.fingerprint[:8]}" if data else "unknown",
        "batch size": setting(record, "batch_size"),
        "maximal length": setting(record, "max_length"),
        "precision": setting(record, "precision"),
        "seed": setting(record, "seed"),
        "device": _device(record),
        "devices": record.execution.processes if record.execution else 1,
        "timed steps": timed.steps if timed else "unknown",
        "profiled steps": profiled.active_steps if profiled else "unknown",
        "real tokens a step": f"{timed.real_tokens_per_step:.1f}" if timed else "unknown",
    }


def setting(record: RunRecord, key: str) -> str:
    """One of the run's settings; `unknown` where it has none, or none that a setting can be."""
    return _scalar(record.config.get(key)) or "unknown"


def _scalar(value: Any) -> str:
    return str(value)[:LONGEST] if isinstance(value, str | int | float) else ""


def _device(record: RunRecord) -> str:
    """The device by its setting and, where the run recorded it, by its make."""
    device = setting(record, "device")
    if interpreted(record):
        return f"{device}, kernels interpreted (times without meaning)"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        made = _table(record, "cuda").get("devices")
        listed = made if isinstance(made, list) else []
        names = [_scalar(d.get("name")) for d in listed if isinstance(d, dict)]
        number = int(index) if index.isdecimal() else 0
        return f"{device} {names[number]}" if number < len(names) else device
    threads = _scalar(_table(record, "torch").get("threads"))
    model = _scalar(_table(record, "cpu").get("model"))
    return device + (f" {model}" if model else "") + (f", threads {threads}" if threads else "")


def interpreted(record: RunRecord) -> bool:
    """Whether the run's kernels were interpreted, and its times mean nothing."""
    triton = _table(record, "kernels").get("triton")
    told = isinstance(triton, dict) and bool(triton.get("interpreted"))
    return told and record.config.get("kernels") == "triton"


def _table(record: RunRecord, key: str) -> dict[str, Any]:
    value = record.environment.get(key)
    return value if isinstance(value, dict) else {}
