"""Which method, rank, batch and precision for a model on a device, and what it will take."""

import functools
import itertools
import multiprocessing
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

from peftprof import devices
from peftprof.advice import OBJECTIVES, Advice, Choice, Prediction
from peftprof.advise import kept, lessons, shapes
from peftprof.advise.predict import Predictor, Subject
from peftprof.calibrations import Calibration
from peftprof.config import METHODS
from peftprof.errors import ConfigError

VERSION = 1
BATCHES = (1, 2, 4, 8, 16, 32, 64)
RANKS = (4, 8, 16, 32, 64)
USUAL_RANK = 8
KERNELS = {"cpu": ("torch", "bnb"), "cuda": ("bnb", "triton")}
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Wanted:
    """What to choose from; empty: everything that the device can do."""

    methods: tuple[str, ...] = ()
    ranks: tuple[int, ...] = ()
    batch_sizes: tuple[int, ...] = ()
    precisions: tuple[str, ...] = ()
    checkpointing: tuple[bool, ...] = ()
    kernels: tuple[str, ...] = ()
    objective: str = "throughput"


def choices(subject: Subject, wanted: Wanted) -> list[Choice]:
    """Every choice there is. Raises ConfigError where none is left."""
    kind = subject.device.kind
    # fp16 only where there is no bf16: it is as fast there, and loses its small gradients.
    here = [p for p in PRECISIONS if p in subject.device.dtypes]
    usual = [p for p in here if p != "fp16" or "bf16" not in here]
    precisions = wanted.precisions or tuple(usual)
    if unknown := [p for p in precisions if p not in here]:
        raise ConfigError(
            f"{subject.device.device} has no {unknown[0]} products; --precision is one of "
            f"{', '.join(here)}"
        )
    kernels = wanted.kernels or KERNELS[kind]
    if kind == "cpu" and "triton" in kernels:
        raise ConfigError("--kernels triton needs a GPU; name one with --device, or leave it out")
    largest = subject.facts.largest_rank
    if wanted.ranks and max(wanted.ranks) > largest and wanted.methods != ("full",):
        raise ConfigError(
            f"--rank {max(wanted.ranks)} is more than {largest}, the smaller side of a layer that "
            "is adapted"
        )
    ranks = wanted.ranks or tuple(r for r in RANKS if r <= largest) or (largest,)
    found = [
        Choice(method, rank, batch, precision, checkpointing, backend)
        for method, rank, batch, precision, checkpointing, backend in itertools.product(
            wanted.methods or METHODS,
            ranks,
            wanted.batch_sizes or BATCHES,
            precisions,
            wanted.checkpointing or (False, True),
            kernels,
        )
        if method != "full" or (rank, backend) == (ranks[0], kernels[0])
    ]
    return found


def advise(subject: Subject, memory_bytes: int, wanted: Wanted, processes: int = 1) -> Advice:
    """The answer for `memory_bytes`, worked out in so many processes.

    They are forked: ask for several only where no thread of this one has computed anything, or
    they may wait for ever for what it held. Raises ConfigError for what cannot be chosen.
    """
    if wanted.objective not in OBJECTIVES:
        raise ConfigError(
            f"unknown --objective {wanted.objective!r}; it is one of {', '.join(OBJECTIVES)}"
        )
    every = choices(subject, wanted)
    predictions = _predict(subject, every, processes)
    fits = [p for p in predictions if p.needed_bytes <= memory_bytes]
    order = _order(wanted)
    ranked = sorted(fits, key=order)
    rest = sorted((p for p in predictions if p.needed_bytes > memory_bytes), key=_need)
    return Advice(
        version=VERSION,
        model=subject.shape.name,
        model_basis=subject.shape.basis,
        parameters=subject.facts.parameters,
        layers=subject.shape.layers,
        device=subject.device.device,
        device_basis=subject.device.basis,
        memory_bytes=memory_bytes,
        tokens=subject.tokens,
        objective=wanted.objective,
        predictions=(*ranked, *rest),
        fitting=len(ranked),
        reason=_reason(ranked, wanted.objective) if ranked else "",
        command=_command(ranked[0].choice, subject) if ranked else "",
        instead=() if ranked else _instead(predictions, subject, memory_bytes),
        basis=_basis(subject, ranked[0] if ranked else None),
    )


def _predict(subject: Subject, every: Sequence[Choice], processes: int) -> list[Prediction]:
    """All predictions, those that need one trace together."""
    ways: dict[Choice, list[Choice]] = {}
    for choice in every:
        ways.setdefault(Predictor.way(choice), []).append(choice)
    new = sum(not kept.has(subject.shape, subject.config(way)) for way in ways)
    workers = min(processes, new) if sys.platform == "linux" else 1
    if workers <= 1:
        return [p for choices in ways.values() for p in _of_one_way(subject, choices)]
    _ = subject.shape.inputs  # what tracing needs is imported once, before the fork
    # Forked, so that nothing is imported anew.
    with ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        found = pool.map(functools.partial(_of_one_way, subject), ways.values())
        return [p for predictions in found for p in predictions]


def _of_one_way(subject: Subject, choices: Sequence[Choice]) -> list[Prediction]:
    predictor = Predictor(subject)
    return [predictor.predict(choice) for choice in choices]


def _need(prediction: Prediction) -> int:
    return prediction.needed_bytes


def _order(wanted: Wanted) -> Callable[[Prediction], Any]:
    """Best first. A rank is a matter of accuracy, so the usual one stands for all."""

    def usual(p: Prediction) -> bool:
        return not wanted.ranks and p.choice.method != "full" and p.choice.rank != USUAL_RANK

    def throughput(p: Prediction) -> float:
        return -(p.samples_per_s or 0.0)

    if wanted.objective == "memory":
        return lambda p: (usual(p), p.peak_bytes, throughput(p))
    if wanted.objective == "accuracy":
        # What trains more of the model first: full, LoRA on exact weights, on rounded ones.
        def order(p: Prediction) -> tuple[object, ...]:
            return (METHODS.index(p.choice.method), usual(p), throughput(p), p.peak_bytes)

        return order
    return lambda p: (usual(p), throughput(p), p.peak_bytes)


def _reason(ranked: Sequence[Prediction], objective: str) -> str:
    """Why the first is first, in one sentence."""
    best = ranked[0]
    other = next((p for p in ranked if p.choice.method != best.choice.method), None)
    what = {
        "throughput": "the most examples a second of all that fit",
        "memory": "the least memory of all",
        "accuracy": "trains the most of the model that fits, as fast as it can",
    }[objective]
    if other is None:
        return f"{what}; no other method fits"
    if objective != "memory" and best.samples_per_s and other.samples_per_s:
        ratio = best.samples_per_s / other.samples_per_s
        return f"{what}; {ratio:.2f} times the examples a second of the best {other.choice.method}"
    ratio = best.peak_bytes / other.peak_bytes
    return f"{what}; {ratio:.2f} times the memory of the best {other.choice.method}"


def _command(choice: Choice, subject: Subject) -> str:
    model = subject.shape.reference
    words = ["python", "-m", "peftprof", "train", "--method", choice.method, "--model", model]
    if choice.method != "full":
        words += ["--rank", str(choice.rank), "--kernels", choice.kernels]
    words += ["--batch-size", str(choice.batch_size), "--max-length", str(subject.tokens)]
    words += ["--precision", choice.precision, "--padding", subject.padding]
    if choice.checkpointing:
        words.append("--checkpointing")
    words += ["--device", subject.device.kind]
    return shlex.join(words)


def _instead(
    predictions: Iterable[Prediction], subject: Subject, memory_bytes: int
) -> tuple[str, ...]:
    """What would fit: the smallest of all, by how much it misses, and a card that holds it."""
    least = min(predictions, key=_need)
    misses = least.needed_bytes - memory_bytes
    lines = [
        f"the least of all choices, {describe(least.choice)}, takes up to {least.needed_bytes:,} "
        f"bytes and misses by {misses:,}"
    ]
    bigger = sorted(
        (d for d in devices.shipped() if d.kind == "cuda" and d.memory_bytes >= least.needed_bytes),
        key=lambda d: d.memory_bytes,
    )
    if bigger:
        lines.append(f"it fits a {bigger[0].device} ({bigger[0].memory_bytes / 2**30:.0f} GiB)")
    if least.choice.batch_size > 1:
        lines.append("a smaller --batch-size takes less")
    if not least.choice.checkpointing:
        lines.append("--checkpointing on takes less")
    if least.choice.method != "qlora":
        lines.append("--method qlora takes less")
    return tuple(lines)


def describe(choice: Choice) -> str:
    """A choice in a few words."""
    parts = [choice.method]
    if choice.method != "full":
        parts += [f"rank {choice.rank}", choice.kernels]
    parts += [f"batch {choice.batch_size}", choice.precision]
    return ", ".join(parts + (["checkpointing"] if choice.checkpointing else []))


def _basis(subject: Subject, first: Prediction | None) -> tuple[str, ...]:
    device = subject.device
    lines = [
        f"memory: a step of the {subject.shape.model_type} classifier traced without data, every "
        f"example {subject.tokens} tokens long",
        f"time: {device.source}",
    ]
    if device.kind == "cuda":
        lines.append(
            "GPU: allocator and context are assumed, and nothing of this was measured on a GPU"
        )
    if subject.learnt.checked and first is not None:
        factor, off, runs = subject.learnt.step(first.choice)
        rest, processes = subject.learnt.process_bytes(first.choice)
        if runs:
            lines.append(
                f"a step takes {factor:.2f} times its operators, within {100 * off:.0f} %: learnt "
                f"from {_runs(runs)} of this model on this device"
            )
        if processes:
            lines.append(
                f"a process holds {rest / 2**20:.0f} MiB beside its tensors: learnt from "
                f"{_runs(processes)}"
            )
    else:
        lines.append("no run of this model on this device has been compared; `train` does so")
    return tuple(lines)


def _runs(number: int) -> str:
    return "1 run" if number == 1 else f"{number} runs"


def calibration(name: str) -> Calibration:
    """What is known of the device that `name` means: this one's measured, or a data sheet's.

    Raises DeviceError where it is not here, ConfigError where it was not calibrated.
    """
    if name != "auto" and not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        return devices.find(name)
    from peftprof.run import calibrate

    where = calibrate.device_of(name)
    found = calibrate.stored(where)
    if found is not None:
        return found
    if where.type == "cuda":
        return devices.find(calibrate.device_name(where))
    raise ConfigError(
        "this device was not calibrated; run `python -m peftprof calibrate` once (about a minute), "
        "or name another with --device"
    )


def subject(
    model: str,
    device: str,
    tokens: int,
    padding: str,
    target_modules: tuple[str, ...],
) -> Subject:
    """What `advise` is asked about. Raises InputError, ConfigError, DeviceError, FolderError."""
    known = calibration(device)
    shape = shapes.find(model)
    facts = kept.facts_of(shape, target_modules or shape.family.targets)
    if facts.positions is not None and tokens > facts.positions:
        raise ConfigError(
            f"--tokens {tokens} is more than the {facts.positions} positions of {model!r}"
        )
    packs = facts.packable >= tokens
    if padding == "packed" and not packs:
        raise ConfigError(f"--padding packed is not known for {model!r}; use --padding split")
    if padding == "auto":
        padding = "packed" if packs else "split"
    return Subject(
        shape,
        facts,
        known,
        tokens,
        padding,
        target_modules=target_modules,
        lessons=lessons.read(known).of(lessons.model_of(shape.model_type, facts.parameters)),
    )
