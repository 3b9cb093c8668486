"""One traced step, for any batch, rank, length and depth: what is allocated and computed.

What a block grows with is read off its size (`growth`). Of a deep model few layers are
traced, and the second stands for all others that are neither the first nor the last.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from peftprof.advise import blueprint, growth, work
from peftprof.advise.blueprint import Held
from peftprof.advise.growth import Floats, Ints, Markers
from peftprof.advise.shapes import Shape
from peftprof.advise.tracker import BACKWARD, FORWARD, HEAD, Log, Mark, Operator
from peftprof.advise.work import StepWork
from peftprof.config import RunConfig

PARTS = ("gradients", "activations", "dequant_workspace", "other")
GRADIENTS, ACTIVATIONS, WORKSPACE, OTHER = range(4)
LIKE = 1  # the layer that stands for others
# Layers traced. Where the last is narrowed to the tokens that a classifier reads (`narrow`),
# the one before it prepares that, and is like no other either.
TRACED = {"first": 4, "last": 3, None: 3}
ROUNDED = 512  # bytes of which PyTorch's caching allocator gives a multiple


@dataclass(frozen=True)
class Segment:
    """Events that happen `times` over, one after the other.

    `blocks` are numbers, `counts` how many like it are allocated (freed: below 0) at once.
    """

    blocks: Ints
    counts: Floats
    times: int


@dataclass(frozen=True)
class Peak:
    """Bytes at the peak of a step, by PARTS, beside what is held throughout."""

    total: int
    parts: dict[str, int]


@dataclass(frozen=True)
class Allocations:
    """What is allocated and freed, in order: `coefficients` and `terms` are each block's size
    (`growth`), `part` what it is for, a number of PARTS.
    """

    coefficients: Floats
    terms: Ints
    part: Ints
    segments: tuple[Segment, ...]

    def peak(self, batch: float, rank: int, tokens: float, rounded: bool = False) -> Peak:
        """The most that is allocated at once, for `batch` examples of `tokens` tokens each."""
        sizes = self.coefficients * growth.products(batch, rank, tokens)[self.terms]
        if rounded:
            sizes = np.ceil(sizes / ROUNDED) * ROUNDED
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


def _by_part(changes: Floats, part: Ints) -> Floats:
    found: Floats = np.bincount(part, changes, len(PARTS)).astype(np.float64)
    return found


@dataclass(frozen=True)
class Profile:
    """A step of one method, precision and backend, and the evaluation of one batch.

    `held` is the whole model's, with adapters of rank `rank`.
    """

    training: Allocations
    evaluation: Allocations
    work: StepWork
    held: Held
    rank: int

    def holds(self, rank: int) -> Held:
        """What the model holds at `rank`."""
        return dataclasses.replace(self.held, lora=self.held.lora * rank // (self.rank or 1))


def make(shape: Shape, config: RunConfig) -> Profile:
    """Trace a step of `config`; batch, rank and length are the profile's own.

    Raises ConfigError where the configuration does not fit the model.
    """
    full = config.method == "full"
    marks = growth.markers(blueprint.sizes(shape), blueprint.positions(shape), not full)
    rank = marks.rank or config.rank
    traced_as = dataclasses.replace(config, rank=rank, alpha=config.scaling * rank)
    batch = blueprint.batch_of(shape, traced_as, marks.batch, marks.tokens, 1)
    few = TRACED[shape.family.pools]
    trimmed = few if shape.alike and shape.layers > few else None
    one = blueprint.trace(shape, traced_as, batch, trimmed)
    if trimmed and not _marked(one.training, few):
        trimmed = None
        one = blueprint.trace(shape, traced_as, batch)
    times = shape.layers - few + 1 if trimmed else 1
    training, operators = _allocations(one.training, marks, times, bool(trimmed))
    evaluation, _ = _allocations(one.evaluation, marks, times, bool(trimmed))
    return Profile(
        training,
        evaluation,
        work.of(operators, marks, config.precision != "fp32"),
        _whole(one.held, times),
        marks.rank,
    )


Operators = Sequence[tuple[int, Sequence[Operator]]]


def _allocations(
    log: Log, marks: Markers, times: int, repeated: bool
) -> tuple[Allocations, Operators]:
    """The log's blocks and events, and its operators with how often each is called."""
    sizes = [marks.term(block.bytes) for block in log.blocks]
    coefficients = np.array([coefficient for coefficient, _ in sizes], np.float64)
    terms = np.array([term for _, term in sizes], np.int64)
    pieces = _pieces(log) if repeated else [(None, None, False)]
    numbers = np.array([number for number, _ in log.events], np.int64)
    counts = np.array([sign for _, sign in log.events], np.float64)
    if repeated:
        _until_the_end(log, counts, times)
    segments = []
    operators = []
    for first, last, again in pieces:
        events = slice(first.events if first else 0, last.events if last else None)
        called = slice(first.operators if first else 0, last.operators if last else None)
        repeats = times if again else 1
        segments.append(Segment(numbers[events], counts[events], repeats))
        operators.append((repeats, log.operators[called]))
    made = Allocations(coefficients, terms, _parts(log), tuple(segments))
    return made, operators


def _parts(log: Log) -> Ints:
    end = len(log.events) + 1
    backward = next((mark.events for mark in log.marks if mark.phase == BACKWARD), end)
    found = np.full(len(log.blocks), OTHER)
    for i, block in enumerate(log.blocks):
        if block.workspace:
            found[i] = WORKSPACE
        elif backward == end:
            continue
        elif block.phase == FORWARD and (block.died is None or block.died >= backward):
            found[i] = ACTIVATIONS
        elif block.phase == BACKWARD and block.died is None:
            found[i] = GRADIENTS
    return found


def _marked(log: Log, layers: int) -> bool:
    """Whether every layer had a backward; before the first that is adapted none has."""
    return len({mark.layer for mark in log.marks if mark.phase == BACKWARD}) == layers + 1


def _pieces(log: Log) -> list[tuple[Mark | None, Mark | None, bool]]:
    """The log cut round one layer's forward and, if there is one, one's backward: from, to, and
    whether it is repeated.
    """
    at = {(mark.phase, mark.layer): mark for mark in log.marks}
    cuts: list[Mark | None] = [None, at[FORWARD, LIKE], at[FORWARD, LIKE + 1]]
    if (BACKWARD, LIKE) in at:
        cuts += [at[BACKWARD, LIKE], at[BACKWARD, LIKE - 1]]
    cuts.append(None)
    return [(cuts[i], cuts[i + 1], i % 2 == 1) for i in range(len(cuts) - 1)]


def _until_the_end(log: Log, counts: Floats, times: int) -> None:
    """Count `times` over what the repeated layer leaves until forward ends, in place.

    All layers leave such, weights that autocast has cast for one.
    """
    at = {(mark.phase, mark.layer): mark for mark in log.marks}
    first, last = at[FORWARD, LIKE].events, at[FORWARD, LIKE + 1].events
    begun = at[HEAD, None].events
    ended = at[BACKWARD, None].events if (BACKWARD, None) in at else len(log.events)
    for i in range(begun, ended):
        number, sign = log.events[i]
        if sign < 0 and first <= log.blocks[number].born < last:
            counts[i] *= times


def _whole(held: dict[int | None, Held], times: int) -> Held:
    """The model's, its middle layer counted `times`."""
    names = [field.name for field in dataclasses.fields(Held)]
    sums = dict.fromkeys(names, 0)
    for layer, parts in held.items():
        for name in names:
            sums[name] += getattr(parts, name) * (times if layer == LIKE else 1)
    return Held(**sums)
