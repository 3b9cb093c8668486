"""The breakdown as one JSON object, versioned: fields may be added, never renamed."""

from typing import Any

import orjson

from peftprof.records import encode
from peftprof.trace import Loaded

VERSION = 1


def to_json(loaded: Loaded) -> str:
    """`loaded` as indented JSON, its fields those of `peftprof.breakdowns`.

    Times are nanoseconds a step, shares are of the step, memory is bytes; null is not known.
    """
    document = {
        "version": VERSION,
        "runs": [encode(breakdown) for breakdown in loaded.breakdowns],
        "comparable": loaded.comparable,
        "differences": list(loaded.differences),
        "comparisons": [encode(comparison) for comparison in loaded.comparisons],
        "left_out": loaded.left_out,
        "unreadable": list(loaded.unreadable),
    }
    # A trace may hold broken surrogate pairs, which are no UTF-8.
    return orjson.dumps(_clean(document), option=orjson.OPT_INDENT_2).decode()


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_clean(item) for item in value]
    return value
