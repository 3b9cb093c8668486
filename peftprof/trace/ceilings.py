"""Reads measured ceilings back: those of a run, or a file written by hand for another device."""

import json
from pathlib import Path

from peftprof.breakdowns import Ceilings
from peftprof.errors import ConfigError
from peftprof.records import decode

MOST_BYTES = 1 << 24
MOST_RATE = 1e24  # a second; what divides by one and is divided by one stays a number


def read(path: Path) -> Ceilings:
    """The ceilings in a run's folder, its run.json, or a JSON file such as

        {"source": "...", "flops_per_s": {"bf16": 1e14}, "bytes_per_s": 1e12}

    Raises ConfigError, in one line, when there are none or they cannot be.
    """
    file = path / "run.json" if path.is_dir() else path
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ValueError("it is too large")
        value = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(value, dict) and "state" in value:  # a run's record
            value = value.get("ceilings")
            if value is None:
                raise ValueError("that run measured none")
        ceilings = decode(Ceilings, value)
        if not can_be(ceilings):
            raise ValueError("it has rates that cannot be")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        why = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"--ceilings {path} cannot be used ({why}); name a run that was profiled, or a JSON "
            "file with source, flops_per_s and bytes_per_s"
        ) from error
    return ceilings


def can_be(ceilings: Ceilings) -> bool:
    """Whether all rates are those of a machine."""
    rates = (ceilings.bytes_per_s, *ceilings.flops_per_s.values())
    return all(1 <= rate <= MOST_RATE for rate in rates)
