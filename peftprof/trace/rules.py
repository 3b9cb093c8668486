"""The rules of categories.toml, matched once for every distinct name of a trace."""

import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.trace.events import NONE, Ints

# Beside the categories of records.py: time that turns out to be no operator's.
IDLE = len(CATEGORIES)
# The engine wraps every backward operator in a range of this name.
ENGINE = "autograd::engine::evaluate_function: "


class Reach(Enum):
    """How far a rule goes."""

    OWN = "own"  # the operator itself
    WITHIN = "within"  # and everything under it; of several the outermost holds
    INHERIT = "inherit"  # what the enclosing operator is, else the rule's category
    FIRST = "first"  # before all but the ranges; of operators, everything under it too
    LAST = "last"  # kernels: only where the enclosing operators say nothing


@dataclass(frozen=True)
class Rule:
    """Names that `match` (a whole name), under a parent that matches `under`, are `category`."""

    match: re.Pattern[str]
    under: re.Pattern[str] | None
    category: int
    reach: Reach


@dataclass(frozen=True)
class Range:
    """What a range of this name says of the work inside it; NONE where it says nothing."""

    match: re.Pattern[str]
    phase: int
    category: int


@dataclass(frozen=True)
class Rules:
    """All rules, in order: of several that match the first holds."""

    ranges: tuple[Range, ...]
    operators: tuple[Rule, ...]
    kernels: tuple[Rule, ...]
    layer: re.Pattern[str]
    head: re.Pattern[str]


@dataclass(frozen=True)
class NameRules:
    """For each of a list of names the category its rule gives, by the rule's reach, or NONE."""

    category: Ints
    reach: tuple[Reach | None, ...]

    def only(self, *reaches: Reach) -> Ints:
        """The categories of rules with these reaches, NONE elsewhere."""
        chosen = np.array([reach in reaches for reach in self.reach], np.bool_)
        return np.where(chosen, self.category, NONE)


@cache
def load() -> Rules:
    """The rules that come with peftprof."""
    data = tomllib.loads((files(__package__) / "categories.toml").read_text(encoding="utf-8"))
    return parse(data)


def parse(data: dict[str, Any]) -> Rules:
    """Rules from the tables of a TOML file. Raises KeyError or ValueError for a bad one."""
    return Rules(
        ranges=tuple(
            Range(
                _pattern(row["match"]),
                PHASES.index(row["phase"]) if "phase" in row else NONE,
                CATEGORIES.index(row["category"]) if "category" in row else NONE,
            )
            for row in data["range"]
        ),
        operators=tuple(_rule(row) for row in data["operator"]),
        kernels=tuple(_rule(row) for row in data["kernel"]),
        layer=_pattern(data["layer"]),
        head=_pattern(data["head"]),
    )


def _rule(row: dict[str, Any]) -> Rule:
    category = row["category"]
    return Rule(
        match=_pattern(row["match"]),
        under=_pattern(row["under"]) if "under" in row else None,
        category=IDLE if category == "idle" else CATEGORIES.index(category),
        reach=Reach(row.get("reach", "own")),
    )


def _pattern(parts: str | list[str]) -> re.Pattern[str]:
    return re.compile("|".join([parts] if isinstance(parts, str) else parts), re.DOTALL)


def match(rules: Sequence[Rule], names: Sequence[tuple[str, str]]) -> NameRules:
    """The first rule that fits each (name, name of the operator round it)."""
    found = [_first(rules, name.removeprefix(ENGINE), parent) for name, parent in names]
    return NameRules(
        np.fromiter((rule.category if rule else NONE for rule in found), np.int64, len(found)),
        tuple(rule.reach if rule else None for rule in found),
    )


def _first(rules: Sequence[Rule], name: str, parent: str) -> Rule | None:
    for rule in rules:
        if rule.match.fullmatch(name) and (rule.under is None or rule.under.fullmatch(parent)):
            return rule
    return None
