"""Profiles and facts of models, kept in the cache: the second question is answered at once.

What is kept depends on a model's shape, the way that it is trained, and on the code that was
traced: torch's, transformers' and our own. A file's name is a digest of them all, so nothing
that is out of date is ever read. A damaged file is made anew.
"""

import dataclasses
import functools
import hashlib
import json
from importlib import metadata, resources
from pathlib import Path
from typing import Any, Final

import numpy as np
import orjson

from peftprof.advise import blueprint, profile
from peftprof.advise.blueprint import Facts, Held
from peftprof.advise.profile import Allocations, Profile, Segment
from peftprof.advise.shapes import Shape
from peftprof.advise.work import StepWork, Work
from peftprof.cache import cache_folder, write_whole
from peftprof.config import RunConfig

KEPT: Final = 400  # files, about 100 KiB each; the oldest go first
# Settings of a run that change what is traced. Batch, rank and length do not (`growth`).
_OF_THE_WAY: Final = (
    "method",
    "precision",
    "padding",
    "kernels",
    "checkpointing",
    "device",
    "dropout",
    "target_modules",
)


def profile_of(shape: Shape, config: RunConfig) -> Profile:
    """The profile of `shape` under `config`, traced if it is not kept.

    Raises ConfigError as `profile.make`.
    """
    path = _path(shape, _way(config))
    try:
        return _profile(orjson.loads(path.read_bytes()))
    except (OSError, ValueError, KeyError, TypeError):
        made = profile.make(shape, config)
        _keep(path, made)
        return made


def facts_of(shape: Shape, targets: tuple[str, ...]) -> Facts:
    """`blueprint.facts`, if they are not kept. Raises ConfigError as it does."""
    path = _path(shape, {"facts": targets})
    try:
        return Facts(**orjson.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        made = blueprint.facts(shape, targets)
        _keep(path, made)
        return made


def has(shape: Shape, config: RunConfig) -> bool:
    """Whether the profile is kept."""
    return _path(shape, _way(config)).exists()


def _way(config: RunConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in _OF_THE_WAY}


def _path(shape: Shape, way: dict[str, Any]) -> Path:
    asked = [shape.values, shape.labels, shape.family.targets, way, _code()]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode())
    return cache_folder() / "profiles" / f"{digest.hexdigest()[:32]}.json"


@functools.cache
def _code() -> tuple[str, ...]:
    """What is traced, besides the model: versions, and a digest of our own code."""
    own = hashlib.sha256()
    for package in ("peftprof", "peftprof_kernels"):
        root = Path(str(resources.files(package)))
        for file in sorted(root.rglob("*.py")):
            own.update(file.read_bytes())
    return (metadata.version("torch"), metadata.version("transformers"), own.hexdigest())


def _keep(path: Path, made: Profile | Facts) -> None:
    text = orjson.dumps(made, option=orjson.OPT_SERIALIZE_NUMPY).decode()
    try:
        write_whole(path, text)
        files = sorted(path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime)
        for old in files[:-KEPT]:
            old.unlink()
    except OSError:
        return  # it is only for speed, and another process may have been first


def _profile(found: dict[str, Any]) -> Profile:
    step = found["work"]
    return Profile(
        training=_allocations(found["training"]),
        evaluation=_allocations(found["evaluation"]),
        work=StepWork(**step | {"work": tuple(map(_work, step["work"]))}),
        held=Held(**found["held"]),
        rank=found["rank"],
    )


def _allocations(found: dict[str, Any]) -> Allocations:
    return Allocations(
        np.array(found["coefficients"], np.float64),
        np.array(found["terms"], np.int64),
        np.array(found["part"], np.int64),
        tuple(
            Segment(np.array(s["blocks"], np.int64), np.array(s["counts"], np.float64), s["times"])
            for s in found["segments"]
        ),
    )


def _work(found: dict[str, Any]) -> Work:
    names = [field.name for field in dataclasses.fields(Work) if field.type is not str]
    arrays = {name: np.array(found[name], np.float64) for name in names}
    return Work(**found | arrays)
