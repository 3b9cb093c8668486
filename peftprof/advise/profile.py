"""One traced step, for any batch, rank and depth: what is allocated as a function of the three.

Traced is a batch of b0 sequences and a rank r0, both primes that divide no other size of the
model. So the bytes of a block say by themselves what it grows with: those that b0 divides
grow with the batch, those that r0 divides with the rank, and no second trace is needed. Of a
deep model four layers are traced. The third stands in forward for all that follow one like
themselves, and in backward the second, which comes after the third there.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from peftprof.advise import blueprint
from peftprof.advise.blueprint import Held
from peftprof.advise.shapes import Shape
from peftprof.advise.tracker import BACKWARD, FORWARD, HEAD, Log, Mark, Operator
from peftprof.config import RunConfig

Floats = npt.NDArray[np.float64]

BATCHES = (11, 13, 17, 19, 23, 29, 31)
RANKS = (5, 7, 11, 13, 17, 19, 23)
PARTS = ("gradients", "activations", "dequant_workspace", "other")
GRADIENTS, ACTIVATIONS, WORKSPACE, OTHER = range(4)
TRACED, FIRST, LIKE = 4, 1, 2  # layers, and those that stand for others
ROUNDED = 512  # bytes of which PyTorch's caching allocator gives a multiple


@dataclass(frozen=True)
class Segment:
    """Events that happen `times` over, one after the other.

    `blocks` are numbers, `counts` how many like it are allocated (freed: below 0) at once.
    """

    blocks: npt.NDArray[np.int64]
    counts: Floats
    operators: tuple[Operator, ...]
    times: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a step, by PARTS, beside what is held throughout."""

    total: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Profile:
    """A step of one method, precision and backend over sequences of one length.

    `bytes`, `by_batch` and `by_rank` are of each block: its size as traced, and whether it
    grows with the batch and with the rank. `held` is the whole model's at rank `rank`.
    """

    config: RunConfig
    length: int
    batch: int
    rank: int
    bytes: Floats
    by_batch: npt.NDArray[np.bool_]
    by_rank: npt.NDArray[np.bool_]
    part: npt.NDArray[np.int64]
    segments: tuple[Segment, ...]
    held: Held

    def sizes(self, batch: float, rank: int, rounded: bool) -> Floats:
        """Bytes of each block, for `batch` sequences (a part of one may be meant)."""
        grown = np.where(self.by_batch, batch / self.batch, 1.0)
        found = self.bytes * grown * np.where(self.by_rank, rank / self.rank, 1.0)
        return np.ceil(found / ROUNDED) * ROUNDED if rounded else found

    def holds(self, rank: int) -> Held:
        """What the model holds at `rank`."""
        lora = self.held.lora * rank // self.rank
        return dataclasses.replace(self.held, lora=lora)

    def peak(self, batch: float, rank: int, rounded: bool = False) -> Peak:
        """The most that forward and backward have allocated at once."""
        sizes = self.sizes(batch, rank, rounded)
        parts = np.zeros(len(PARTS))
        best, at = 0.0, np.zeros(len(PARTS))
        for segment in self.segments:
            changes = segment.counts * sizes[segment.blocks]
            sums = np.cumsum(changes)
            net = _by_part(changes, self.part[segment.blocks])
            if len(sums):
                before = max(segment.times - 1, 0) if sums[-1] > 0 else 0
                last = int(np.argmax(sums))
                total = parts.sum() + before * sums[-1] + sums[last]
                if total > best and segment.times:
                    within = _by_part(changes[: last + 1], self.part[segment.blocks[: last + 1]])
                    best, at = total, parts + before * net + within
            parts = parts + segment.times * net
        return Peak(round(best), dict(zip(PARTS, map(round, at.tolist()), strict=True)))


def _by_part(changes: Floats, part: npt.NDArray[np.int64]) -> Floats:
    found: Floats = np.bincount(part, changes, len(PARTS)).astype(np.float64)
    return found


def make(shape: Shape, config: RunConfig, length: int) -> Profile:
    """Trace a step of `config` (batch and rank are the profile's own) over `length` tokens.

    Raises ConfigError where the configuration does not fit the model.
    """
    sizes = _sizes(shape, length)
    batch = _marker(BATCHES, sizes)
    rank = _marker([r for r in RANKS if r != batch], sizes)
    traced_as = dataclasses.replace(config, rank=rank, alpha=config.scaling * rank)
    trimmed = TRACED if shape.alike and shape.layers > TRACED else None
    one = blueprint.trace(
        shape, traced_as, blueprint.batch_of(shape, traced_as, batch, length, 1), trimmed
    )
    if trimmed and not _marked(one.log):
        trimmed = None
        one = blueprint.trace(
            shape, traced_as, blueprint.batch_of(shape, traced_as, batch, length, 1)
        )
    log, times = one.log, shape.layers - TRACED + 1 if trimmed else 1
    size = np.array([block.bytes for block in log.blocks], np.float64)
    whole = size.astype(np.int64)
    return Profile(
        config=config,
        length=length,
        batch=batch,
        rank=rank,
        bytes=size,
        by_batch=whole % batch == 0,
        by_rank=(whole % rank == 0) & (config.method != "full"),
        part=_parts(log),
        segments=_segments(log, times) if trimmed else (_segment(log, None, None, 1),),
        held=_whole(one.held, times),
    )


def _sizes(shape: Shape, length: int) -> set[int]:
    """Every number that a tensor's size may be a multiple of."""
    values = shape.config.to_dict().values()
    return {v for v in values if isinstance(v, int) and v > 1} | {length, shape.labels}


def _marker(primes: Iterable[int], sizes: set[int]) -> int:
    return next(p for p in primes if all(size % p for size in sizes))


def _parts(log: Log) -> npt.NDArray[np.int64]:
    backward = next(mark.events for mark in log.marks if mark.phase == BACKWARD)
    found = np.full(len(log.blocks), OTHER)
    for i, block in enumerate(log.blocks):
        if block.workspace:
            found[i] = WORKSPACE
        elif block.phase == FORWARD and (block.died is None or block.died >= backward):
            found[i] = ACTIVATIONS
        elif block.phase == BACKWARD and block.died is None:
            found[i] = GRADIENTS
    return found


def _marked(log: Log) -> bool:
    """Whether every layer had a backward; before the first that is adapted none has."""
    return len({mark.layer for mark in log.marks if mark.phase == BACKWARD}) == TRACED + 1


def _segments(log: Log, times: int) -> tuple[Segment, ...]:
    """The log cut round one layer's forward and one's backward, which happen `times` over."""
    at = {(mark.phase, mark.layer): mark for mark in log.marks}
    forward = at[FORWARD, LIKE], at[FORWARD, LIKE + 1]
    backward = at[BACKWARD, FIRST], at[BACKWARD, FIRST - 1]
    cuts = [None, *forward, *backward, None]
    repeats = (1, times, 1, times, 1)
    # What all layers keep until forward ends, such as the weights that autocast has cast.
    begun, ended = at[HEAD, None].events, at[BACKWARD, None].events
    counts = np.array([sign for _, sign in log.events], np.float64)
    for i in range(begun, ended):
        number, sign = log.events[i]
        if sign < 0 and forward[0].events <= log.blocks[number].born < forward[1].events:
            counts[i] *= times
    return tuple(
        _segment(log, a, b, n, counts) for a, b, n in zip(cuts, cuts[1:], repeats, strict=False)
    )


def _segment(
    log: Log, first: Mark | None, last: Mark | None, times: int, counts: Floats | None = None
) -> Segment:
    events = slice(first.events if first else 0, last.events if last else None)
    operators = slice(first.operators if first else 0, last.operators if last else None)
    pairs = np.array(log.events, np.int64).reshape(-1, 2)[events]
    counted = pairs[:, 1].astype(np.float64) if counts is None else counts[events]
    return Segment(pairs[:, 0], counted, tuple(log.operators[operators]), times)


def _whole(held: dict[int | None, Held], times: int) -> Held:
    """The model's, its middle layer counted `times`."""
    names = [field.name for field in dataclasses.fields(Held)]
    sums = dict.fromkeys(names, 0)
    for layer, parts in held.items():
        for name in names:
            sums[name] += getattr(parts, name) * (times if layer == FIRST else 1)
    return Held(**sums)
