"""The options that every benchmark of kernels takes, settled on this machine."""

import argparse
import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.harness import FULL, QUICK, Effort, Sampler, sampler_for
from bench.layers import MOST, Layer, layers
from peftprof.errors import DeviceError
from peftprof.run import environment
from peftprof.run.model import DTYPES

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setup:
    """What the options said, settled on this machine."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    layers: tuple[Layer, ...]
    tokens: tuple[int, ...]
    l2: str
    verify_only: bool
    unsloth: bool
    seconds: float | None
    folder: Path

    @property
    def effort(self) -> Effort:
        return QUICK if self.quick else FULL

    @property
    def sampler(self) -> Sampler | None:
        return None if self.verify_only else sampler_for(self.device, self.l2)


def parser(name: str, question: str) -> argparse.ArgumentParser:
    """The options; `settle` makes a Setup of what was given."""
    made = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=question)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    made.add_argument("--dtype", choices=DTYPES, help="default: what the device computes in")
    made.add_argument("--quick", action="store_true", help="fewer cases, rounds and samples")
    made.add_argument("--shapes", help="models, all, or NxK, comma-separated")
    made.add_argument("--tokens", help="values of M, comma-separated")
    made.add_argument("--l2", choices=("cold", "warm"), default="cold", help="on CUDA only")
    made.add_argument("--seconds", type=float, help="stop after so many, and say so")
    made.add_argument("--verify-only", action="store_true", help="compare, time nothing")
    made.add_argument(
        "--with-unsloth", action="store_true", help="its import patches transformers and PEFT"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return made


def settle(
    given: argparse.Namespace,
    shapes: dict[tuple[str, bool], str],
    tokens: dict[tuple[str, bool], str],
) -> Setup:
    """The setup of what was given; `shapes` and `tokens` are the defaults.

    Raises DeviceError for a device or dtype that is not here, ValueError for a name or
    number that cannot be.
    """
    asked = environment.default_device() if given.device == "auto" else given.device
    device = environment.check_device(asked)
    precision = given.dtype or environment.default_precision(str(device))
    try:
        environment.check_precision(precision, str(device))
    except DeviceError as error:
        raise DeviceError(str(error).replace("--precision", "--dtype")) from error
    if given.seconds is not None and not 0 < given.seconds < math.inf:
        raise ValueError(f"--seconds wants a number above 0, not {given.seconds}")
    kind = (device.type, given.quick)
    asked_tokens = tokens[kind] if given.tokens is None else given.tokens or ","
    folder = given.out / slug(device_name(device))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--out {given.out} cannot be written: {error.strerror}") from error
    return Setup(
        device=device,
        dtype=DTYPES[precision],
        quick=given.quick,
        layers=tuple(layers(shapes[kind] if given.shapes is None else given.shapes)),
        tokens=tuple(numbers(asked_tokens)) if asked_tokens else (),
        l2=given.l2,
        verify_only=given.verify_only,
        unsloth=given.with_unsloth,
        seconds=given.seconds,
        folder=folder,
    )


def numbers(text: str) -> list[int]:
    """Comma-separated numbers of 1 or more. Raises ValueError for anything else."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in found if not part.isdecimal() or not 1 <= int(part) <= MOST]
    if wrong or not found:
        what = repr(wrong[0]) if wrong else "none"
        raise ValueError(f"--tokens wants numbers from 1 to {MOST}, not {what}")
    return [int(part) for part in found]


def device_name(device: torch.device) -> str:
    """The GPU's or the CPU's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return str(environment.describe()["cpu"]["model"])


def slug(name: str) -> str:
    """A device's name as a folder's: lower case, digits and hyphens."""
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") or "unknown"
