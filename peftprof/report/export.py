"""The breakdown as one JSON object, versioned: fields may be added, never renamed."""

from typing import Any

import orjson

from peftprof.breakdowns import Breakdown, Operator
from peftprof.records import encode
from peftprof.trace import Loaded

VERSION = 1


def to_json(loaded: Loaded) -> str:
    """`loaded` as indented JSON. Times are nanoseconds a step, shares are of the step."""
    document = {
        "version": VERSION,
        "runs": [_run(breakdown) for breakdown in loaded.breakdowns],
        "comparable": loaded.comparable,
        "differences": list(loaded.differences),
        "left_out": loaded.left_out,
    }
    # A trace may hold broken surrogate pairs, which are no UTF-8.
    clean = _clean(document)
    return orjson.dumps(clean, option=orjson.OPT_INDENT_2).decode()


def _run(breakdown: Breakdown) -> dict[str, Any]:
    return {
        "name": breakdown.name,
        "source": breakdown.source,
        "device": breakdown.device,
        "steps": breakdown.steps,
        "step_ns": encode(breakdown.step_ns),
        "rows": [encode(row) for row in breakdown.rows],
        "unattributed_ns": breakdown.unattributed_ns,
        "idle_ns": breakdown.idle_ns,
        "idle_by_phase_ns": breakdown.idle_by_phase_ns,
        "overlap_ns": breakdown.overlap_ns,
        "operators": _operators(breakdown.operators),
        "unattributed_operators": _operators(breakdown.unattributed_operators),
    }


def _operators(operators: tuple[Operator, ...]) -> list[dict[str, Any]]:
    return [encode(operator) for operator in operators]


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {key: _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
