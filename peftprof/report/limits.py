"""Limits on a breakdown, such as `dequant>25%`, for an exit code that fails a build."""

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from peftprof.breakdowns import CATEGORIES, IDLE_CAUSES, MEMORY_PARTS, PHASES, Breakdown
from peftprof.errors import ConfigError
from peftprof.report.words import clean

GRAMMAR = re.compile(r"\s*([a-z_.]+)\s*(>=|<=|>|<)\s*(\d+(?:\.\d*)?|\.\d+)\s*(\S*)\s*", re.ASCII)
OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    ">=": operator.ge,
    "<": operator.lt,
    "<=": operator.le,
}
MISSED = {">": "over", ">=": "not under", "<": "under", "<=": "not over"}
TIME_UNITS = {"us": 1e3, "ms": 1e6, "s": 1e9}  # nanoseconds
MEMORY_UNITS = {"MiB": 2.0**20, "GiB": 2.0**30}  # bytes
EXAMPLES = "dequant>25%, forward.base_gemm>=4ms, idle.launch>10%, step<30ms or memory.peak>2GiB"
# `optimizer` and `communication` first mean the category.
TIMES = (
    *CATEGORIES,
    *PHASES,
    "idle",
    *(f"idle.{cause}" for cause in IDLE_CAUSES),
    "unattributed",
    "overlap",
    "communication.exposed",
    "step",
    *(f"{phase}.{category}" for phase in PHASES for category in CATEGORIES),
)
MEMORIES = ("memory.peak", *(f"memory.{part}" for part in MEMORY_PARTS))


@dataclass(frozen=True)
class Limit:
    """A run breaks the limit when `term` `op` `value` holds.

    `unit` is `%` of the step, us, ms or s for a time, MiB or GiB for memory. A category is
    its time in all phases, a phase the time of its categories.
    """

    term: str
    op: str
    value: float
    unit: str

    def broken(self, breakdown: Breakdown) -> str | None:
        """One line that says by how much `breakdown` breaks the limit; None where it does not.

        Raises ConfigError where the run cannot know the term: no limit passes unseen.
        """
        name = clean(breakdown.name)
        found = _known(self.term, breakdown)
        if found is None:
            raise ConfigError(
                f"run {name}: {self.term} is not known here, so no limit can be set on it; "
                f"{_remedy(self.term)}"
            )
        found /= self._one(breakdown)
        if not OPERATORS[self.op](found, self.value):
            return None
        unit = "% of the step" if self.unit == "%" else self.unit
        return (
            f"run {name}: {self.term} is {_apart(found, self.value)} {unit}, "
            f"{MISSED[self.op]} the limit of {self.value:g} {self.unit}"
        )

    def _one(self, breakdown: Breakdown) -> float:
        """One unit, in nanoseconds or bytes."""
        if self.unit == "%":
            return breakdown.step_ns.median / 100
        return TIME_UNITS.get(self.unit) or MEMORY_UNITS[self.unit]


def parse(text: str) -> Limit:
    """The limit that `text`, TERM OP VALUE UNIT, sets. Raises ConfigError for anything else.

    TERM is a category, `idle`, `unattributed`, `idle.CAUSE`, `overlap`,
    `communication.exposed`, `step`, a phase, `PHASE.CATEGORY`, `memory.peak` or
    `memory.PART`; OP is > >= < or <=; UNIT is % (of the step), us, ms or s for a time, MiB or
    GiB for memory.
    """
    found = GRAMMAR.fullmatch(text)
    if found is None:
        _refuse(text, "is no limit")
    term, op, value, unit = found.groups()
    if term in TIMES:
        units = {"%", *TIME_UNITS} - ({"%"} if term == "step" else set())
    elif term in MEMORIES:
        units = set(MEMORY_UNITS)
    else:
        _refuse(text, f"has no term that a breakdown knows in {term!r}")
    if unit not in units:
        kinds = ", ".join(sorted(units))
        _refuse(text, f"has the unit {clean(unit)!r}; {term} takes one of {kinds}")
    return Limit(term, op, float(value), unit)


def broken(limits: Sequence[Limit], breakdowns: Sequence[Breakdown]) -> list[str]:
    """A line for each limit that a run breaks. Raises ConfigError as `Limit.broken` does."""
    lines = [limit.broken(breakdown) for breakdown in breakdowns for limit in limits]
    return [line for line in lines if line is not None]


def _refuse(text: str, what: str) -> NoReturn:
    raise ConfigError(f"--fail-if {clean(text)!r} {what}; write it like {EXAMPLES}")


def _known(term: str, run: Breakdown) -> float | None:
    """Nanoseconds or bytes of `term`; None where the run does not know it."""
    first, _, second = term.partition(".")
    if first == "memory":
        return _memory(second, run)
    if first == "idle":
        if not second:
            return run.idle_ns
        by_cause = run.idle_by_cause_ns
        return by_cause.get(second, 0.0) if by_cause or not run.idle_ns else None
    if term == "communication.exposed":
        return run.communication.exposed_ns if run.communication else None
    plain = {
        "unattributed": run.unattributed_ns,
        "overlap": run.overlap_ns,
        "step": run.step_ns.median,
    }
    if term in plain:
        return plain[term]
    if second:
        chosen = [row for row in run.rows if (row.phase, row.category) == (first, second)]
    elif term in CATEGORIES:
        chosen = [row for row in run.rows if row.category == term]
    else:
        chosen = [row for row in run.rows if row.phase == term]
    return sum(row.ns for row in chosen)


def _memory(part: str, run: Breakdown) -> float | None:
    if run.memory is None:
        return None
    if part == "peak":
        return run.memory.peak_bytes
    return sum(p.bytes for p in run.memory.parts if p.part == part)


def _remedy(term: str) -> str:
    if term.startswith("memory."):
        return "give a run whose memory was recorded, or leave the limit out"
    return "the trace does not tell it; leave the limit out"


def _apart(found: float, limit: float) -> str:
    """`found` with as many decimals as tell it from the limit."""
    for decimals in range(1, 7):
        text = f"{found:.{decimals}f}"
        if not math.isclose(float(text), limit, rel_tol=0, abs_tol=10**-decimals / 2):
            break
    return text if found != limit else f"{found:g}"
