"""What a study runs: its recipe, a readable file, turned into cells.

A recipe is TOML:

    about, ranks, seeds           what it is; the matrix is full + (lora, qlora) x ranks, x seeds
    quick                         how it is cut short, where it is
    profiled                      ranks whose run of the first seed is profiled too (full's is)
    forgetting                    ranks whose loss on general text is measured (full always is)
    [all] [full] [lora] [qlora]   settings of `RunConfig`, as in the recipes of `train`
    [search]                      seed, rank, settings; [search.rates] lists rates by method
    [ladder]                      seeds, settings; [[ladder.rungs]] cause, method, settings

A search tries each rate on a split that is not the evaluation set; the best becomes the
rate of its method. Each rung of the ladder keeps the settings of the rung before and
changes what `cause` names; the first has no cause.
"""

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from peftprof.config import METHODS, RunConfig
from peftprof.errors import ConfigError
from peftprof.studies import Cell

BATCH = "batch size"  # the cause that the profile looks into
KEYS = {
    "about",
    "ranks",
    "seeds",
    "quick",
    "profiled",
    "forgetting",
    "all",
    *METHODS,
    "search",
    "ladder",
}
# What every run of a study has in common, or no two could be compared.
SUBJECT = ("model", "dataset", "text_columns", "label_column")
SEARCH_KEYS = {"seed", "rank", "settings", "rates"}
LADDER_KEYS = {"seeds", "settings", "rungs"}
RUNG_KEYS = {"cause", "method", "settings"}


@dataclass(frozen=True)
class Plan:
    """A study's cells, in the order in which they run, and what is measured beside the runs."""

    recipe: str
    about: str
    quick: str
    cells: tuple[Cell, ...]
    forgetting: tuple[int, ...]


@dataclass(frozen=True)
class Overrides:
    """What the command line puts over a recipe; None and empty where nothing is."""

    model: str | None = None
    dataset: str | None = None
    max_steps: int | None = None
    subset: int | None = None
    device: str | None = None
    text_columns: tuple[str, ...] | None = None
    label_column: str | None = None

    def settings(self) -> dict[str, Any]:
        """The settings that are given."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    def to_json(self) -> dict[str, Any]:
        """The same as plain values, to be stored and compared."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in self.settings().items()}

    def quick(self) -> str:
        """How a study under these is cut short, empty if it is not."""
        told = []
        if self.max_steps is not None:
            told.append(f"at most {self.max_steps} steps a run")
        if self.subset is not None:
            told.append(f"at most {self.subset} training examples")
        return ", ".join(told)


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("peftprof.study") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def make_plan(recipe: str, overrides: Overrides) -> Plan:
    """The plan of `recipe`, one of `recipes()` or a TOML file, under `overrides`.

    Raises ConfigError for a recipe that is unknown, unreadable or asks for what cannot be.
    """
    name, table = _read(recipe)
    _known(table, KEYS, "the recipe")
    ranks = _numbers(table, "ranks")
    seeds = _numbers(table, "seeds")
    make = _Maker(name, table, overrides)
    cells = [*make.search()]
    for turn, seed in enumerate(seeds):
        # Rounds, every second one backwards, so that a machine that gets slower or faster
        # does so for every cell.
        around = [*make.matrix(seed, ranks, turn), *make.ladder(seed, seeds, turn)]
        cells += reversed(around) if turn % 2 else around
    told = ". ".join(filter(None, [str(table.get("quick", "")), overrides.quick()]))
    forgetting = _ranks(table, "forgetting")
    _different(cells)
    _on_one_subject(cells)
    return Plan(name, str(table.get("about", "")), told, tuple(cells), forgetting)


class _Maker:
    """Cells of one recipe's tables."""

    def __init__(self, name: str, table: Mapping[str, Any], overrides: Overrides) -> None:
        self.name, self.table, self.overrides = name, table, overrides
        self.profiled = _ranks(table, "profiled")

    def search(self) -> Iterator[Cell]:
        search = _table(self.table, "search")
        _known(search, SEARCH_KEYS, "[search]")
        rates = _table(search, "rates")
        _known(rates, set(METHODS), "[search.rates]")
        for method, tried in rates.items():
            if not isinstance(tried, list) or not tried:
                raise ConfigError(f"[search.rates] {method} wants a list of rates")
            if wrong := [r for r in tried if not isinstance(r, int | float) or isinstance(r, bool)]:
                raise ConfigError(f"[search.rates] {method} has {wrong[0]!r}, which is no rate")
            for rate in tried:
                config = self._config(
                    method,
                    search.get("rank"),
                    search.get("seed", 0),
                    {"profiler": "none", "evaluate_on": "tuning", "learning_rate": rate},
                    _table(search, "settings"),
                )
                yield Cell(
                    f"search-{method}-{rate:g}",
                    "search",
                    method,
                    None if method == "full" else config.rank,
                    config.seed,
                    config.to_json(),
                )

    def matrix(self, seed: int, ranks: tuple[int, ...], turn: int) -> Iterator[Cell]:
        for method in METHODS:
            for rank in (None,) if method == "full" else ranks:
                profiled = turn == 0 and (rank is None or rank in self.profiled)
                config = self._config(method, rank, seed, _profiler(profiled))
                yield Cell(
                    f"{configuration(method, rank)}-s{seed}",
                    "matrix",
                    method,
                    rank,
                    seed,
                    config.to_json(),
                )

    def ladder(self, seed: int, seeds: tuple[int, ...], turn: int) -> Iterator[Cell]:
        ladder = _table(self.table, "ladder")
        _known(ladder, LADDER_KEYS, "[ladder]")
        asked = _numbers(ladder, "seeds") if "seeds" in ladder else seeds
        if wrong := [number for number in asked if number not in seeds]:
            raise ConfigError(f"[ladder] names seed {wrong[0]}, which is not among the seeds")
        if seed not in asked:
            return
        settings: dict[str, Any] = dict(_table(ladder, "settings"))
        method = ""
        rungs = ladder.get("rungs", [])
        if not isinstance(rungs, list) or not all(isinstance(rung, dict) for rung in rungs):
            raise ConfigError("the rungs of the ladder are no tables: write [[ladder.rungs]]")
        causes: set[str] = set()
        for number, rung in enumerate(rungs):
            _known(rung, RUNG_KEYS, "a rung of the ladder")
            if bool(rung.get("cause")) != bool(number):
                raise ConfigError("every rung of the ladder but the first has a cause")
            if number and (not isinstance(rung["cause"], str) or rung["cause"] in causes):
                raise ConfigError(f"the ladder's cause {rung['cause']!r} must be a name of its own")
            causes.add(rung.get("cause", ""))
            method = rung.get("method", method)
            settings |= _table(rung, "settings")
            cause = rung.get("cause", "")
            # The profile tells apart what a larger batch does; nothing else is asked of it.
            profiled = turn == 0 and cause in ("", BATCH)
            config = self._config(method, None, seed, _profiler(profiled), settings)
            yield Cell(
                f"ladder-{number}-s{seed}",
                "ladder",
                method,
                None if method == "full" else config.rank,
                seed,
                config.to_json(),
                number,
                cause,
            )

    def _config(
        self, method: str, rank: int | None, seed: Any, *more: Mapping[str, Any]
    ) -> RunConfig:
        if method not in METHODS:
            raise ConfigError(f"unknown method {method!r}; it is one of {', '.join(METHODS)}")
        settings: dict[str, Any] = {"method": method, "recipe": self.name, "seed": seed}
        if rank is not None and method != "full":
            settings["rank"] = rank
        for table in (_table(self.table, "all"), _table(self.table, method), *more):
            settings |= table
        given = self.overrides.settings()
        for key in ("max_steps", "subset"):
            # A quick look shortens; what is shorter already stays.
            if given.get(key) is not None and isinstance(settings.get(key), int):
                given[key] = min(given[key], settings[key])
        if settings.get("max_steps") is None:
            given.pop("max_steps", None)  # how many steps its epochs are shows when it is settled
        return RunConfig.from_json(settings | given)


def _profiler(profiled: bool) -> dict[str, Any]:
    return {} if profiled else {"profiler": "none"}


def configuration(method: str, rank: int | None) -> str:
    """What the runs of a method and rank are called, whatever their seed."""
    return method if rank is None else f"{method}-r{rank}"


def _read(recipe: str) -> tuple[str, dict[str, Any]]:
    if recipe in recipes():
        text = (resources.files("peftprof.study") / "recipes" / f"{recipe}.toml").read_text()
        return recipe, tomllib.loads(text)
    path = Path(recipe)
    if path.suffix != ".toml" or not path.is_file():
        raise ConfigError(
            f"unknown --recipe {recipe!r}; it is one of {', '.join(recipes())}, or a .toml file"
        )
    try:
        return path.stem, tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"the recipe {recipe} cannot be read: {error}") from error


def _known(table: Mapping[str, Any], keys: set[str], where: str) -> None:
    if unknown := sorted(table.keys() - keys):
        raise ConfigError(
            f"{where} has the unknown key {unknown[0]!r}; it may have {', '.join(sorted(keys))}"
        )


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = table.get(key, {})
    if not isinstance(value, dict):
        raise ConfigError(f"{key} of the recipe is no table")
    return value


def _on_one_subject(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where methods would be compared on other models or examples."""
    for setting in SUBJECT:
        values = {str(cell.config.get(setting)) for cell in cells}
        if len(values) > 1:
            raise ConfigError(
                f"the recipe compares runs with {setting} {' and '.join(sorted(values))}; give all "
                "methods the same, in its table [all]"
            )


def _different(cells: Sequence[Cell]) -> None:
    """Raise ConfigError where two cells would have the same name: rates that look the same."""
    names: set[str] = set()
    for cell in cells:
        if cell.name in names:
            raise ConfigError(f"the recipe asks twice for {cell.name}; leave one out")
        names.add(cell.name)


def _ranks(table: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """Some of the recipe's ranks; none where the key is not there."""
    found = _numbers(table, key, least=0) if key in table else ()
    if wrong := [rank for rank in found if rank not in table["ranks"]]:
        raise ConfigError(f"{key} names rank {wrong[0]}, which is not among the ranks")
    return found


def _numbers(table: Mapping[str, Any], key: str, least: int = 1) -> tuple[int, ...]:
    value = table.get(key)
    if (
        not isinstance(value, list)
        or len(value) < least
        or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
        or len(set(value)) < len(value)
    ):
        raise ConfigError(f"{key} of the recipe must be a list of different whole numbers")
    return tuple(value)
