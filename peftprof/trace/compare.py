"""Whether several runs did the same work, so that their times may be held against each other."""

from collections.abc import Sequence
from typing import Any

from peftprof.records import RunRecord


def compare(records: Sequence[RunRecord | None]) -> tuple[bool | None, list[str]]:
    """Whether the runs are comparable, and in what they differ, such as `batch_size: 8 vs 32`.

    None where nothing can be said: a single run, or a trace without its run.json.
    """
    known = [record for record in records if record is not None]
    if len(records) < 2 or len(known) < len(records):
        return None, []
    compared = [_work(record) for record in known]
    differences = [
        f"{name}: {' vs '.join(_distinct([str(work[name]) for work in compared]))}"
        for name in compared[0]
        if len({str(work[name]) for work in compared}) > 1
    ]
    return not differences, differences


def _work(record: RunRecord) -> dict[str, Any]:
    """What a step works on and where, but not how it is trained: the method is the question."""
    model, data, timed = record.model, record.data, record.timed
    config = record.config
    return {
        "model": f"{model.name} {model.fingerprint[:8]}" if model else "unknown",
        "data": f"{data.name} {data.fingerprint[:8]}" if data else "unknown",
        "batch_size": config.get("batch_size", "unknown"),
        "max_length": config.get("max_length", "unknown"),
        "precision": config.get("precision", "unknown"),
        "seed": config.get("seed", "unknown"),
        "device": _device(record),
        "real_tokens_per_step": f"{timed.real_tokens_per_step:.1f}" if timed else "unknown",
    }


def _device(record: RunRecord) -> str:
    """The device by its setting and, where the run recorded it, by its make."""
    device = str(record.config.get("device", "unknown"))
    triton = _table(record, "kernels").get("triton")
    interpreted = isinstance(triton, dict) and triton.get("interpreted")
    if record.config.get("kernels") == "triton" and interpreted:
        return f"{device}, kernels interpreted (times without meaning)"
    kind, _, index = device.partition(":")
    if kind == "cuda":
        made = _table(record, "cuda").get("devices")
        names = [d.get("name") for d in made if isinstance(d, dict)] if made else []
        number = int(index) if index.isdecimal() else 0
        return f"{device} {names[number]}" if number < len(names) else device
    threads = _table(record, "torch").get("threads")
    model = _table(record, "cpu").get("model")
    return device + (f" {model}" if model else "") + (f", threads {threads}" if threads else "")


def _table(record: RunRecord, key: str) -> dict[str, Any]:
    value = record.environment.get(key)
    return value if isinstance(value, dict) else {}


def _distinct(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))
