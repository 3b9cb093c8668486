"""The calibrations that there are: measured ones in the cache, and devices by their data sheets.

`load`, `store`, `known` and `find` are the ways in; no torch here. `devices.toml` holds the
data sheets, and `sheet` makes of one a calibration whose curves are ceilings times a stated
typical share of them.
"""

import json
import re
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from peftprof.breakdowns import Ceilings
from peftprof.cache import cache_folder, write_whole
from peftprof.calibrations import (
    BYTES,
    FLOPS,
    ITEMSIZE,
    MOVES,
    PRODUCTS,
    VERSION,
    Calibration,
    Curve,
    Overheads,
    key_of,
    moved,
)
from peftprof.errors import ConfigError, FolderError, InputError
from peftprof.records import decode, encode

__all__ = [
    "Calibration",
    "Curve",
    "Known",
    "Overheads",
    "find",
    "key_of",
    "known",
    "load",
    "moved",
    "shipped",
    "store",
]

# --- Measured


@dataclass(frozen=True)
class Known:
    """All that is stored, by device, and a line about each file that cannot be used."""

    calibrations: tuple[Calibration, ...]
    unreadable: tuple[str, ...]


def folder() -> Path:
    """Where calibrations are kept, below the cache."""
    return cache_folder() / "calibrations"


def path_for(key: str) -> Path:
    """The file of the calibration that is kept under `key`."""
    return folder() / f"{key}.json"


def load(key: str) -> Calibration | None:
    """The calibration kept under `key` (`key_of`); None where there is none.

    Raises InputError when the file is damaged: what is in it must not be believed in part.
    """
    path = path_for(key)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    try:
        found = decode(Calibration, json.loads(text))
        if found.version != VERSION:
            raise ValueError(f"it is of version {found.version}, not {VERSION}")
        if found.key != key:
            raise ValueError(f"it is of {found.key}")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(
        f"{path} cannot be used ({error}); remove it, or measure again with "
        "`python -m peftprof calibrate`"
    )


def store(calibration: Calibration) -> Path:
    """Keep `calibration` in the cache, whole; its file. Raises FolderError where it cannot."""
    path = path_for(calibration.key)
    try:
        write_whole(path, json.dumps(encode(calibration), indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise FolderError(
            f"cannot write {path}: {error.strerror or error}; name another folder in PEFTPROF_CACHE"
        ) from error
    return path


def check_writable() -> None:
    """Raises FolderError where `store` would: said before a minute is spent on measuring."""
    try:
        probe = folder() / ".writable"
        write_whole(probe, "")
        probe.unlink()
    except OSError as error:
        raise FolderError(
            f"cannot write to {folder()}: {error.strerror or error}; name another folder in "
            "PEFTPROF_CACHE"
        ) from error


def known() -> Known:
    """Every calibration in the cache, the newest of a device first."""
    found, unreadable = [], []
    for path in sorted(folder().glob("*.json")):
        try:
            calibration = load(path.stem)
        except InputError as error:
            unreadable.append(str(error))
        else:
            found += [calibration] if calibration is not None else []
    found.sort(key=lambda c: c.created, reverse=True)
    return Known(tuple(sorted(found, key=lambda c: c.device)), tuple(unreadable))


# --- Data sheets


@dataclass(frozen=True)
class Typical:
    """What is reached of a data sheet's figures, and seconds of a call. Rough.

    `gemm` is the share of the dense peak in large products, `memory` that of the memory's
    rate by elementwise operators on large tensors; `kernel_s` a small kernel on the device,
    `call_s` the host's time for an operator.
    """

    gemm: float
    memory: float
    kernel_s: float
    call_s: float


TYPICAL: Final = {
    "gpu": Typical(0.55, 0.80, 4e-6, 8e-6),
    "module": Typical(0.45, 0.70, 10e-6, 40e-6),
    "board": Typical(0.30, 0.40, 0.0, 60e-6),
}
# Other kinds of operators against these two: attention against gemm, the rest against memory.
_SLOWER: Final = {
    "bmm": 0.5,
    "attention": 0.5,
    "attention_backward": 0.4,
    "transcendental": 0.9,
    "softmax": 0.8,
    "normalisation": 0.7,
    "dequant": 0.6,
    "dropout": 0.3,
    "optimizer": 0.8,
}
# On processors without vector units for them, exp and random bits cost arithmetic.
_BOARD_SLOWER: Final = {"transcendental": 0.25, "softmax": 0.25, "dequant": 0.25, "dropout": 0.1}
SHEET_INTERVAL: Final = 0.5
# Resident memory after the imports of a run: 0.6 GB on x86 with torch for the CPU, 1 to 1.5 GB
# with torch for CUDA; a CUDA context 0.3 to 0.6 GB.
_PROCESS: Final = {"cpu": 600 * 2**20, "cuda": 1280 * 2**20}
_CONTEXT: Final = {"cpu": 0, "cuda": 500 * 2**20}
_TABLE: Final = Path(__file__).with_name("devices.toml")


@cache
def shipped() -> tuple[Calibration, ...]:
    """The devices of devices.toml, as rough calibrations."""
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    return tuple(sheet(entry) for entry in table["device"])


def sheet(entry: dict[str, Any]) -> Calibration:
    """A calibration of a data sheet's figures; the entry's fields are explained in the table."""
    typical, kind = TYPICAL[entry["class"]], "cpu" if entry["class"] == "board" else "cuda"
    peaks = {d: 1e12 * entry[f"{d}_tflops"] for d in ITEMSIZE if f"{d}_tflops" in entry}
    bandwidth = 1e9 * entry["memory_gb_per_s"]
    floor = typical.kernel_s if kind == "cuda" else typical.call_s
    slower = _SLOWER | (_BOARD_SLOWER if kind == "cpu" else {})
    curves = []
    for dtype, peak in peaks.items():
        for product in PRODUCTS:
            rate = peak * typical.gemm * slower.get(product, 1.0)
            curves.append(_ideal(product, dtype, FLOPS, floor, rate))
            curves.append(_ideal(product, dtype, BYTES, floor, bandwidth * typical.memory))
        for move in (*MOVES, "dequant", "dropout", "optimizer"):
            rate = bandwidth * typical.memory * slower.get(move, 1.0)
            curves.append(_ideal(move, dtype, BYTES, floor, rate))
    call = typical.call_s
    return Calibration(
        version=VERSION,
        basis="datasheet",
        source=entry["source"],
        device=entry["name"],
        kind=kind,
        memory_bytes=round(entry["memory_gib"] * 2**30),
        threads=entry.get("cores", 1),
        created=entry.get("checked", "2026-11-27"),
        versions={},
        ceilings=Ceilings(f"{entry['source']}, dense", peaks, bandwidth),
        curves=tuple(curves),
        overheads=Overheads(call, call / 2, call, call / 3, call / 3, typical.kernel_s),
        process_bytes=_PROCESS[kind],
        context_bytes=_CONTEXT[kind],
        interval=SHEET_INTERVAL,
        notes=(
            f"{100 * typical.gemm:.0f} % of the peak and {100 * typical.memory:.0f} % of the "
            "memory's rate assumed, not measured",
            *([entry["note"]] if "note" in entry else []),
        ),
        aliases=tuple(entry.get("aliases", ())),
    )


def _ideal(kind: str, dtype: str, per: str, floor_s: float, rate: float) -> Curve:
    """A floor, and size / rate above it."""
    sizes = np.geomspace(1e3, 1e13 if per == FLOPS else 1e11, 41)
    seconds = tuple(floor_s + sizes / rate)
    return Curve(kind, dtype, per, tuple(sizes), seconds, seconds, (0.0,) * len(sizes))


# --- By name

# Words that makers put before a name, and words that make it another device.
_EMPTY: Final = {"nvidia", "geforce", "tesla", "gpu", "generation", "graphics", "card"}
_TELLING: Final = {"ti", "super", "ada", "laptop", "mobile", "max", "d", "blackwell"}


def find(name: str) -> Calibration:
    """The device that `name` means, loosely written: "4090", "rtx-4090", "a100-80gb".

    A measured one before a data sheet's; of several measured on one device the newest, or
    the one whose key `name` is.
    Raises ConfigError, with names that are near, where none or more than one is meant.
    """
    measured = known().calibrations
    for calibration in measured:
        if calibration.key == name:
            return calibration
    for calibrations in (_newest(measured), shipped()):
        found = _matching(name, calibrations)
        if len(found) > 1:
            raise ConfigError(
                f"{name!r} can be {_either([c.device for c in found])}; name one of them"
            )
        if found:
            return found[0]
    raise ConfigError(f"no device {name!r} is known; {_near(name)}")


def _newest(calibrations: Iterable[Calibration]) -> tuple[Calibration, ...]:
    """The first of each device."""
    by_device: dict[str, Calibration] = {}
    for calibration in calibrations:
        by_device.setdefault(calibration.device, calibration)
    return tuple(by_device.values())


def _matching(name: str, calibrations: Iterable[Calibration]) -> list[Calibration]:
    """Those with exactly this name, else those that have all of its words."""
    named = [(c, [c.device, *c.aliases]) for c in calibrations]
    exact = [c for c, names in named if _joined(name) in {_joined(n) for n in names}]
    if exact or len(_joined(name)) < 2:
        return exact
    wanted = _words(name)
    return [
        c
        for c, names in named
        if any(wanted <= has and wanted & _TELLING == has & _TELLING for has in map(_words, names))
    ]


def _words(name: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", name.lower())) - _EMPTY


def _joined(name: str) -> str:
    return "".join(word for word in re.findall(r"[a-z0-9]+", name.lower()) if word not in _EMPTY)


def _near(name: str) -> str:
    devices = {c.device for c in (*known().calibrations, *shipped())}
    by_word: dict[str, list[str]] = {}
    for device in sorted(devices):
        for text in {_joined(device), *_words(device)}:
            by_word.setdefault(text, []).append(device)
    near: dict[str, None] = {}
    for word in (_joined(name), *sorted(_words(name), key=len, reverse=True)):
        for hit in get_close_matches(word, by_word, n=4, cutoff=0.6):
            near.update(dict.fromkeys(by_word[hit]))
    if near:
        return f"near it are {', '.join(list(near)[:4])}"
    return "`python -m peftprof calibrate --list` shows those that are"


def _either(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
