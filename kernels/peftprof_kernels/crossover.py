"""Up to how many rows the fused NF4 kernels beat dequantising and a library GEMM.

Data, not constants: `python -m bench.crossover` measures it on a GPU and stores it for
that GPU; whoever runs there hands it to ``set_crossovers``. Until then the default holds.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final


@dataclass(frozen=True)
class Crossover:
    """For a weight [N, K]: the most rows M at which the fused kernel wins; 0 is never."""

    N: int
    K: int
    forward_max_m: int
    dx_max_m: int


# One tile of rows: every fused program then unpacks its part of the weight once, so that
# the fused kernel reads a quarter of the bytes and does no more work than dequantising.
DEFAULT_MAX_M: Final = 16

_measured: tuple[Crossover, ...] = ()


def set_crossovers(entries: Sequence[Crossover] | None) -> tuple[Crossover, ...]:
    """Use ``entries`` from now on, None or none for the default; returns those before."""
    global _measured
    before = _measured
    _measured = tuple(entries or ())
    return before


def lookup(N: int, K: int) -> Crossover:
    """The measured entry whose N and K are nearest by ratio, or the default."""
    if not _measured:
        return Crossover(N, K, DEFAULT_MAX_M, DEFAULT_MAX_M)
    return min(_measured, key=lambda entry: abs(math.log(entry.N / N)) + abs(math.log(entry.K / K)))


def read_crossovers(path: Path) -> list[Crossover]:
    """The entries of a file by ``write_crossovers``. Raises OSError, or ValueError with why."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = [Crossover(**entry) for entry in content["crossovers"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"no table of crossovers: {error}") from error
    for entry in entries:
        values = [getattr(entry, field.name) for field in fields(entry)]
        if not all(type(value) is int and value >= 0 for value in values) or 0 in values[:2]:
            raise ValueError(f"no crossover: {entry}")
    return entries


def write_crossovers(
    path: Path, device: str, entries: Sequence[Crossover], environment: Mapping[str, Any]
) -> None:
    """Store what was measured on ``device``, whole: a reader sees the old file or the new."""
    content = {
        "device": device,
        "crossovers": [asdict(entry) for entry in entries],
        "environment": dict(environment),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
