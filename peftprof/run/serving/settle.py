"""From what is asked for to what is served, on this machine; nothing is built yet."""

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftprof.config import RunConfig, make_config
from peftprof.errors import ConfigError, FolderError, InputError, PeftprofError
from peftprof.inferences import VARIANTS
from peftprof.records import RunRecord
from peftprof.run import data, packing, runner
from peftprof.run import model as models
from peftprof.run.folder import RunFolder
from peftprof.run.serving import adapter as adapting
from peftprof.run.serving.served import CLASSIFY, GENERATE, PHASES, Plan, Served
from peftprof.run.serving.tokens import Tokens

DECODE = 32  # tokens made where nothing is said
MOST = 1 << 20  # sequences in a batch, or tokens in a sequence, that anybody means
WITHOUT_ADAPTER = ("base", "nf4")
UNTRAINED = ("0", "1")  # classes of a head that nobody trained


@dataclass(frozen=True)
class Asked:
    """What the command line asks for; None and empty are not given.

    Raises ConfigError for what cannot be.
    """

    run: Path | None = None
    model: str | None = None
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] | None = None
    kernels: str | None = None
    precision: str | None = None
    device: str | None = None
    seed: int | None = None
    profiler: str | None = None
    variants: tuple[str, ...] | None = None
    batch_sizes: tuple[int, ...] = (1, 8, 32)
    lengths: tuple[int, ...] = (32, 128)
    decode: int | None = None
    requests: int | None = None
    out: Path | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name in self.variants or ():
            if name not in VARIANTS:
                raise ConfigError(
                    f"unknown variant {name!r} in --variants; they are {', '.join(VARIANTS)}"
                )
        for option, values in (("--batch-sizes", self.batch_sizes), ("--lengths", self.lengths)):
            for value in values:
                if not 1 <= value <= MOST:
                    raise ConfigError(f"{option} has {value}; each must be 1 to {MOST}")
        if self.decode is not None and not 0 <= self.decode <= MOST:
            raise ConfigError(f"--decode is {self.decode}; it must be 0 or more")
        if self.requests is not None and not 1 <= self.requests <= MOST:
            raise ConfigError(f"--requests is {self.requests}; it must be 1 or more")
        of_new: dict[str, Any] = {
            "--model": self.model,
            "--rank": self.rank,
            "--alpha": self.alpha,
            "--target-modules": self.target_modules,
        }
        for option, given in of_new.items():
            if self.run is not None and given is not None:
                raise ConfigError(f"{option} is the run's own; leave it out, or name no run")

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Every batch size with every length, once, from small to large."""
        return tuple(itertools.product(sorted(set(self.batch_sizes)), sorted(set(self.lengths))))


@dataclass(frozen=True)
class Settled:
    """What is asked for, on this machine; `record` is the run's, None without one."""

    asked: Asked
    served: Served
    record: RunRecord | None
    variants: tuple[str, ...]
    phases: tuple[str, ...]
    decode: int

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return self.served.config

    def more(self, phase: str) -> int:
        """Tokens that are made after a prompt in `phase`."""
        return self.decode if phase == "decode" else 0


def settle(asked: Asked) -> Settled:
    """Find what is asked for. Raises the errors of a run for what is not here or cannot be."""
    record = None if asked.run is None else _finished(asked.run)
    full = record is not None and record.config["method"] == "full"
    variants = tuple(v for v in VARIANTS if v in (asked.variants or VARIANTS))
    if full:
        wrong = [v for v in asked.variants or () if v not in WITHOUT_ADAPTER]
        if wrong:
            raise ConfigError(
                f"--variants {wrong[0]} needs an adapter and full fine-tuning has none; use "
                f"--variants {','.join(WITHOUT_ADAPTER)}"
            )
        variants = tuple(v for v in variants if v in WITHOUT_ADAPTER)
    config = _config(asked, record)
    found = Served.of(Plan(config, CLASSIFY, UNTRAINED))
    generates = _generates(asked, found, full)
    decode = (DECODE if asked.decode is None else asked.decode) if generates else 0
    plan = Plan(
        config=config,
        task=GENERATE if generates else CLASSIFY,
        labels=UNTRAINED if record is None else _labels(record),
        dequantised=record is not None and record.config["method"] == "qlora",
        adapter=None if asked.run is None or full else str((asked.run / "adapter").resolve()),
    )
    served = found.by(plan)
    if record is not None and not full:
        _same_model(record, served)
    _check_lengths(asked, served, decode)
    phases = tuple(p for p in PHASES[plan.task] if p != "decode" or decode)
    return Settled(asked, served, record, variants, phases, decode)


def _finished(path: Path) -> RunRecord:
    """The record of the run at `path`. Raises FolderError where there is none to serve."""
    folder = RunFolder.open(path)
    record = folder.read_record()
    if record.state != "complete":
        raise FolderError(
            f"the run in {path} is not complete; finish it with: train --resume {path}"
        )
    trained = "model" if record.config.get("method") == "full" else "adapter"
    if not (path / trained).is_dir():
        raise FolderError(f"the run in {path} has lost its {trained}; train it again")
    return record


def _config(asked: Asked, record: RunRecord | None) -> RunConfig:
    """The resolved configuration: a run's own model and adapter, the rest as asked."""
    given: dict[str, Any] = {
        name: getattr(asked, name)
        for name in ("model", "rank", "alpha", "target_modules", "kernels", "precision")
    }
    given |= {name: getattr(asked, name) for name in ("device", "seed", "profiler")}
    if record is not None:
        for name in ("model", "rank", "alpha", "seed"):
            given[name] = record.config.get(name) if given[name] is None else given[name]
        given["target_modules"] = list(record.config.get("target_modules") or ())
        if record.config["method"] == "full":
            assert asked.run is not None
            given["model"] = str(asked.run / "model")
    return runner.resolve(make_config("lora", None, padding="pad", dropout=0.0, **given))


def _generates(asked: Asked, served: Served, full: bool) -> bool:
    """Whether a language model is served: of a run only where tokens are asked for."""
    causal = models.FAMILIES[served.source.family].pools == "last"
    if asked.decode is not None and not causal:
        raise ConfigError(
            f"--decode is of causal models, and {served.config.model!r} "
            f"({served.source.family}) is a classifier; leave it out"
        )
    if asked.decode is not None and full:
        raise ConfigError("--decode needs a language model, and the run made a classifier of it")
    return causal and (asked.run is None or asked.decode is not None)


def _labels(record: RunRecord) -> tuple[str, ...]:
    return UNTRAINED if record.data is None else record.data.labels


def _same_model(record: RunRecord, served: Served) -> None:
    if record.model is not None and record.model.fingerprint != served.source.fingerprint:
        raise InputError(
            f"model {record.model.name!r} is not what the run was trained on; put those weights "
            "back, or train again"
        )


def _check_lengths(asked: Asked, served: Served, decode: int) -> None:
    if served.source.positions is None:
        return
    first = packing.first_position(served.source.family, served.tokenizer.pad_token_id)
    most = served.source.positions - first - decode
    if max(asked.lengths) > most:
        made = f" less the {decode} of --decode" if decode else ""
        raise InputError(
            f"--lengths {max(asked.lengths)} is more than the {served.source.positions - first} "
            f"positions of the model{made}"
        )


def with_adapter(settled: Settled) -> Settled:
    """The same with an adapter made, where no run has one."""
    if settled.record is not None:
        return settled
    served = settled.served
    made = adapting.fresh(
        served.load(nf4=False), served.config, served.family, served.plan.task == CLASSIFY
    )
    return dataclasses.replace(settled, served=dataclasses.replace(served, adapter=made))


def tokens_of(settled: Settled) -> Tokens:
    """What the variants are given: a run's validation texts, else ids drawn from the seed."""
    tokenizer, seed = settled.served.tokenizer, settled.config.seed
    generates = settled.served.plan.task == GENERATE
    drawn = Tokens.drawn(tokenizer, seed, generates)
    if settled.record is None:
        return drawn
    try:
        loaded = data.load(RunConfig.from_json({"padding": "pad"} | settled.record.config))
        texts = [" ".join(parts) for parts in loaded.validation.texts]
        source = f"validation texts of {loaded.info.name}, one after the other"
        return Tokens.of_texts(tokenizer, texts, seed, generates, source)
    except (PeftprofError, ValueError) as error:
        why = str(error).partition(";")[0]
        return dataclasses.replace(drawn, source=f"{drawn.source} ({why})")
