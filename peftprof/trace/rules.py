"""The rules of categories.toml and of a user's own file, matched once for each distinct name."""

import re
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.errors import ConfigError
from peftprof.trace.events import NONE, Ints

# Beside the categories of breakdowns.py: time that turns out to be no operator's.
IDLE = len(CATEGORIES)
# The engine wraps every backward operator in a range of this name.
ENGINE = "autograd::engine::evaluate_function: "
# Rules that are no pattern: a layer's range, a phase, what the trace itself calls a copy.
HEAD, OPTIMIZER, COPY = 0, 1, 2
BUILT_IN = (
    ("layer: head", "head_loss"),
    ("phase: optimizer", "optimizer"),
    ("kind: copy or fill", "memcpy"),
)


class Reach(Enum):
    """How far a rule goes."""

    OWN = "own"  # the operator itself
    WITHIN = "within"  # and everything under it; of several the outermost holds
    INHERIT = "inherit"  # what the enclosing operator is, else the rule's category
    FIRST = "first"  # before all but the ranges; of operators, everything under it too
    LAST = "last"  # kernels: only where the enclosing operators say nothing


@dataclass(frozen=True)
class Rule:
    """Names that `match` (a whole name), under a parent that matches `under`, are `category`.

    `number` is the rule's among all; `label` is what a report calls it.
    """

    number: int
    label: str
    match: re.Pattern[str]
    under: re.Pattern[str] | None
    category: int
    reach: Reach


@dataclass(frozen=True)
class Range:
    """What a range of this name says of the work inside it; NONE where it says nothing."""

    number: int
    label: str
    match: re.Pattern[str]
    phase: int
    category: int


@dataclass(frozen=True)
class Rules:
    """All rules, in order: of several that match the first holds.

    `category_of[number]` is a rule's category and `labels[number]` its name; the last entry
    of both is for no rule at all. `steps` are names of ranges that may be steps, the
    first that a trace has; `waits` are calls that wait for the device.
    """

    ranges: tuple[Range, ...]
    operators: tuple[Rule, ...]
    kernels: tuple[Rule, ...]
    steps: tuple[re.Pattern[str], ...]
    layer: re.Pattern[str]
    head: re.Pattern[str]
    waits: re.Pattern[str]
    category_of: Ints
    labels: tuple[str, ...]


@dataclass(frozen=True)
class NameRules:
    """For each of a list of names the number of its rule, and the rule's reach; or NONE."""

    rule: Ints
    reach: tuple[Reach | None, ...]

    def only(self, *reaches: Reach) -> Ints:
        """The rules with these reaches, NONE elsewhere."""
        chosen = np.array([reach in reaches for reach in self.reach], np.bool_)
        return np.where(chosen, self.rule, NONE)


@cache
def load(path: Path | None = None) -> Rules:
    """The rules that come with peftprof; before them those in the file at `path`.

    Raises ConfigError, in one line, for a file that cannot be read or has a bad rule.
    """
    ours = tomllib.loads((files(__package__) / "categories.toml").read_text(encoding="utf-8"))
    if path is None:
        return parse(ours)
    try:
        theirs = tomllib.loads(path.read_text(encoding="utf-8"))
        return parse(ours, theirs)
    except OSError as error:
        raise ConfigError(f"cannot read the rules in {path}: {error.strerror}") from error
    except KeyError as error:
        raise ConfigError(f"{path}: a rule has no {error}") from error
    except (ValueError, TypeError, AttributeError, re.error, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error


def parse(ours: dict[str, Any], theirs: dict[str, Any] | None = None) -> Rules:
    """Rules from the tables of TOML files, `theirs` before `ours`.

    Raises KeyError, ValueError, TypeError or re.error for a bad one.
    """
    theirs = theirs or {}
    unknown = theirs.keys() - {"range", "operator", "kernel", "steps", "layer", "waits"}
    if unknown:
        raise ValueError(f"{sorted(unknown)[0]!r} is no table of rules")
    labels = [label for label, _ in BUILT_IN]
    categories = [CATEGORIES.index(category) for _, category in BUILT_IN]

    def numbered(kind: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
        for whose, table in (("your ", theirs), ("", ours)):
            rows = table.get(kind, [])
            if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
                raise ValueError(f"rules of a kind are tables [[{kind}]]")
            for i, row in enumerate(rows, 1):
                labels.append(f"{whose}{kind}: {row.get('name', i)}")
                categories.append(_category(row) if "category" in row else NONE)
                yield len(labels) - 1, labels[-1], row

    ranges = tuple(_range(*found) for found in numbered("range"))
    operators = tuple(_rule(*found) for found in numbered("operator"))
    kernels = tuple(_rule(*found) for found in numbered("kernel"))
    return Rules(
        ranges=ranges,
        operators=operators,
        kernels=kernels,
        steps=tuple(_pattern(p) for p in [*_list(theirs, "steps"), *ours["steps"]]),
        layer=_pattern([*_list(theirs, "layer"), *_list(ours, "layer")]),
        head=_pattern(ours["head"]),
        waits=_pattern([*_list(theirs, "waits"), *ours["waits"]]),
        category_of=np.array([*categories, NONE], np.int64),
        labels=(*labels, ""),
    )


def _list(table: dict[str, Any], key: str) -> list[str]:
    value = table.get(key, [])
    return [value] if isinstance(value, str) else value


def _range(number: int, label: str, row: dict[str, Any]) -> Range:
    phase = PHASES.index(_one_of(row["phase"], PHASES)) if "phase" in row else NONE
    category = _category(row) if "category" in row else NONE
    return Range(number, label, _pattern(row["match"]), phase, category)


def _rule(number: int, label: str, row: dict[str, Any]) -> Rule:
    return Rule(
        number=number,
        label=label,
        match=_pattern(row["match"]),
        under=_pattern(row["under"]) if "under" in row else None,
        category=_category(row),
        reach=Reach(row.get("reach", "own")),
    )


def _category(row: dict[str, Any]) -> int:
    category = _one_of(row["category"], (*CATEGORIES, "idle"))
    return IDLE if category == "idle" else CATEGORIES.index(category)


def _one_of(value: str, known: Sequence[str]) -> str:
    if value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value


def _pattern(parts: str | Iterable[str]) -> re.Pattern[str]:
    joined = [parts] if isinstance(parts, str) else [f"(?:{part})" for part in parts]
    return re.compile("|".join(joined), re.DOTALL)


def match(rules: Sequence[Rule], names: Sequence[tuple[str, str]]) -> NameRules:
    """The first rule that fits each (name, name of the operator round it)."""

    @cache
    def fitting(name: str) -> tuple[Rule, ...]:
        """The rules that match, as far as the first that does so under any parent."""
        found: list[Rule] = []
        for rule in rules:
            if rule.match.fullmatch(name):
                found.append(rule)
                if rule.under is None:
                    break
        return tuple(found)

    @cache
    def holds(under: re.Pattern[str] | None, parent: str) -> bool:
        return under is None or under.fullmatch(parent) is not None

    # A name is matched once, however many parents it has.
    found = [
        next(
            (rule for rule in fitting(name.removeprefix(ENGINE)) if holds(rule.under, parent)), None
        )
        for name, parent in names
    ]
    return NameRules(
        np.fromiter((rule.number if rule else NONE for rule in found), np.int64, len(found)),
        tuple(rule.reach if rule else None for rule in found),
    )
