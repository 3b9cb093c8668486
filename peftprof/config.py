"""What a run is asked to do: `RunConfig`, and the recipes it is made from.

A setting comes from the command line, else from the recipe's table for the method,
else from the recipe's table `all`, else from the defaults below; nothing else decides.
"""

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from peftprof.errors import ConfigError

METHODS = ("full", "lora", "qlora")
KERNELS = ("auto", "bnb", "torch", "triton")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LARGEST = 1e30  # still a number when it is multiplied in fp32
PADDINGS = ("auto", "packed", "split", "pad")
CUDA_GRAPHS = ("auto", "on", "off")
SPLITS = ("validation", "tuning")
OF_ADAPTERS = ("rank", "alpha", "dropout", "target_modules")
PROFILERS = ("auto", "none", "torch", "nsys")


@dataclass(frozen=True)
class RunConfig:
    """Every setting of a run. Raises ConfigError for a value that cannot be.

    `alpha` None is 2 x rank; `max_steps` None is `epochs` over the data; `auto` values are
    settled on the machine (`peftprof.run.resolve`) before the configuration is recorded.
    Empty `target_modules` are the family's query and value projections; empty
    `text_columns` and an empty `label_column` are found by their usual names. `subset` is
    how many training examples are used, None all of them. `evaluate_on` "tuning" trains on
    nine tenths of the training examples and evaluates on the rest, so that settings can be
    chosen without looking at the validation split.
    """

    method: str
    model: str
    dataset: str
    learning_rate: float
    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ()
    kernels: str = "auto"
    weight_decay: float = 0.01
    warmup_ratio: float = 0.1
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 32
    max_length: int = 128
    precision: str = "auto"
    padding: str = "auto"
    cuda_graphs: str = "auto"
    checkpointing: bool = False
    seed: int = 42
    device: str = "auto"
    profiler: str = "auto"
    recipe: str = "default"
    text_columns: tuple[str, ...] = ()
    label_column: str = ""
    checkpoint_every: int = 100
    subset: int | None = None
    evaluate_on: str = "validation"

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _one_of("method", self.method, METHODS)
        _one_of("kernels", self.kernels, KERNELS)
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("padding", self.padding, PADDINGS)
        _one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        _one_of("profiler", self.profiler, PROFILERS)
        _one_of("evaluate_on", self.evaluate_on, SPLITS)
        for name in ("rank", "batch_size", "max_length", "checkpoint_every"):
            _at_least(name, getattr(self, name), 1)
        for name in ("max_steps", "subset"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        _between("seed", self.seed, 0, 2**32 - 1)  # what every library takes
        _between("dropout", self.dropout, 0, 1, "less than 1", strict=True)
        _between("warmup_ratio", self.warmup_ratio, 0, 1)
        _between("weight_decay", self.weight_decay, 0, math.inf)
        for name in ("learning_rate", "epochs", "max_grad_norm"):
            _positive(name, getattr(self, name))
        if len(self.text_columns) > 2:
            raise ConfigError("--text-column names one column, or two for pairs of sentences")
        _between("learning_rate", self.learning_rate, 0, LARGEST)
        _between("alpha", self.alpha or 1, 0, LARGEST)
        _between("epochs", self.epochs, 0, 1e6)
        _between("max_steps", self.max_steps or 1, 0, 10**9)
        if self.alpha is not None:
            _positive("alpha", self.alpha)
        for name in ("model", "dataset"):
            if not getattr(self, name).strip():
                raise ConfigError(f"--{name} is empty; name one, or leave the option out")
        if self.method == "full" and self.kernels in ("bnb", "triton"):
            raise ConfigError(
                f"--kernels {self.kernels} chooses how adapters are computed and --method full "
                "has none; leave --kernels out"
            )

    @property
    def scaling(self) -> float:
        """LoRA's factor alpha / r (Hu et al. 2021, section 4.1)."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "RunConfig":
        """The configuration in `values`. Raises ConfigError for unknown or missing settings."""
        kinds = {f.name: f.type for f in dataclasses.fields(cls)}
        unknown = sorted(values.keys() - kinds.keys())
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}; the settings are {', '.join(sorted(kinds))}"
            )
        try:
            return cls(**{name: _as(kinds[name], name, value) for name, value in values.items()})
        except TypeError as error:
            raise ConfigError(f"the configuration is incomplete: {error}") from error


def recipes() -> list[str]:
    """Names of the recipes that come with the package."""
    folder = resources.files("peftprof") / "recipes"
    return sorted(
        f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml")
    )


def make_config(method: str, recipe: str | None = None, **given: Any) -> RunConfig:
    """The configuration of `recipe` for `method`, with `given` (None: not given) on top.

    Raises ConfigError for an unknown recipe, method, setting or value.
    """
    name = "default" if recipe is None else recipe
    _one_of("method", method, METHODS)
    _one_of("recipe", name, recipes())
    tables = tomllib.loads((resources.files("peftprof") / "recipes" / f"{name}.toml").read_text())
    chosen = {key: value for key, value in given.items() if value is not None}
    return RunConfig.from_json(
        {"method": method, "recipe": name} | tables.get("all", {}) | tables.get(method, {}) | chosen
    )


def check_used(method: str | None, given: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting of adapters that is given (not None) where none are."""
    idle = [key for key in OF_ADAPTERS if method == "full" and given.get(key) is not None]
    if idle:
        raise ConfigError(
            f"{_option(idle[0])} is a setting of adapters and --method full has none; leave it out"
        )


def _as(kind: Any, name: str, value: Any) -> Any:
    if kind == tuple[str, ...]:
        if isinstance(value, str) or not all(isinstance(v, str) for v in value):
            raise ConfigError(f"{name} wants a list of names, not {value!r}")
        return tuple(value)
    if kind in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, kind):
        raise ConfigError(f"{name} cannot be {value!r}")
    return value


def _option(name: str) -> str:
    return "--lr" if name == "learning_rate" else "--" + name.replace("_", "-")


def _one_of(name: str, value: str, known: tuple[str, ...] | list[str]) -> None:
    if value not in known:
        raise ConfigError(f"unknown {_option(name)} {value!r}; it is one of {', '.join(known)}")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{_option(name)} is {value}; it must be {least} or more")


def _positive(name: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ConfigError(f"{_option(name)} is {value}; it must be more than 0")


def _between(
    name: str, value: float, low: float, high: float, text: str = "", strict: bool = False
) -> None:
    if not (low <= value < high if strict else low <= value <= high) or math.isnan(value):
        bound = f"{low} or more" + (f" and {text or f'at most {high}'}" if high < math.inf else "")
        raise ConfigError(f"{_option(name)} is {value}; it must be {bound}")
