"""A training step as one CUDA graph: forward, backward, clipping and optimiser, launched at once.

A graph records the launches of a step, addresses and shapes included, and repeats them by
one call. So shapes must be few (`static_batch`), inputs must lie at one place, and no number
may come from the host: the learning rate is read on the device, random numbers are the CUDA
generator's, which torch moves on at every replay as in the same step run eagerly.

Warming up changes no number: all steps are real. A shape's first are the caller's eager
ones; one more is the function that will be captured, on the stream that will capture, so
that kernels are loaded and work space is there; capturing executes nothing, and the first
replay is the next real step. There is nothing to save and put back.

All graphs share one pool of memory: what one leaves there holds until another is replayed.
So the loss is cloned at once, and outside a replay no parameter has a gradient.
"""

import contextlib
import copy
import gc
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.nn.utils import get_total_norm

from peftprof import annotate
from peftprof.config import RunConfig
from peftprof.records import GraphRecord
from peftprof.run import adapters, distributed
from peftprof.run.batches import Batch, Part, Segments
from peftprof.run.source import one_line
from peftprof_kernels import Group

if TYPE_CHECKING:  # loop.py imports this module
    from peftprof.run.loop import Trainee

BUCKET = 16  # attention is padded to a multiple of this; fused kernels want one of 8 at least
MOST_GRAPHS = 16
EAGER_USES = 3  # steps of a shape before it is worth a capture, which costs several
TRIAL = 5  # steps of one shape, eager and replayed, that are compared
CLIP_EPSILON = 1e-6  # as in torch.nn.utils.clip_grad_norm_


class Shape(NamedTuple):
    """What the shapes of a step depend on: tokens, padded length in attention, sequences."""

    tokens: int
    longest: int
    sequences: int


def possible(config: RunConfig) -> str | None:
    """Why the steps of this resolved configuration cannot be graphs; None where they can."""
    if not config.device.startswith("cuda"):
        return f"a CUDA graph needs a CUDA device, and the run is on {config.device}"
    if config.cuda_graphs == "off":
        return "asked not to"
    if distributed.size() > 1:
        return "several processes add up their gradients between backward and optimizer"
    if config.padding != "packed":
        return f"batches have few shapes only when they are packed, and these are {config.padding}"
    if config.precision == "fp16":
        return "the loss scaling of fp16 keeps its state on the host"
    if config.checkpointing:
        return "activation checkpointing keeps random states on the host"
    if config.kernels == "torch" and config.dropout > 0 and config.method != "full":
        return "the torch kernels seed an adapter's dropout on the host: a graph would repeat it"
    return None


def choose(eager_ns: Sequence[int], graphed_ns: Sequence[int]) -> bool:
    """Whether replayed steps were faster than eager ones, by their medians; not if unknown."""
    return bool(eager_ns and graphed_ns) and median(graphed_ns) < median(eager_ns)


def static_group(segments: Segments, tokens: int) -> Group:
    """All sequences as one group over all `tokens`, with shapes that depend on `Shape` alone.

    rows [B * L], places [tokens], absent [B, L]; L is the longest of B, rounded up. Tokens of
    no sequence get the result of a place of no token: no gradient goes through them.
    """
    sizes = segments.last - segments.first + 1
    count, real = len(sizes), int(sizes.sum())
    longest = -(-int(sizes.max()) // BUCKET) * BUCKET
    if real == count * longest < tokens:
        longest += BUCKET  # the tokens of no sequence need a place of no token
    here = torch.arange(longest)
    present = here < sizes[:, None]
    rows = torch.where(present, segments.first[:, None] + here, 0).view(-1)
    places = present.view(-1).nonzero().view(-1)
    if tokens > real:
        nowhere = (~present).view(-1).nonzero()[0]
        places = torch.cat([places, nowhere.expand(tokens - real)])
    return Group(0, tokens, count, longest, rows, places, ~present)


def static_batch(batch: Batch, sequences: int) -> Batch:
    """`batch`, on the CPU, in the form of `static_group`; itself if not packed or not whole."""
    part = batch.parts[0]
    if part.segments is None or batch.samples != sequences:
        return batch
    group = static_group(part.segments, part.inputs["input_ids"].shape[1])
    return replace(batch, parts=(replace(part, segments=replace(part.segments, groups=(group,))),))


def shape_of(batch: Batch, sequences: int) -> Shape | None:
    """The shape of a batch of `static_batch`; None where it has no static form. Never waits."""
    part = batch.parts[0]
    if part.segments is None or batch.samples != sequences:
        return None
    group, *others = part.segments.groups
    tokens = part.inputs["input_ids"].shape[1]
    fits = not others and group.rows is not None and group.end == tokens
    return Shape(tokens, group.longest, group.count) if fits else None


def fill(static: Part, part: Part) -> None:
    """Copy everything in `part` to where `static`, of the same `Shape`, has it."""
    to, given = _tensors(static), _tensors(part)
    torch._foreach_copy_(to[:-1], given[:-1])  # of one dtype, so that it is one launch
    to[-1].copy_(given[-1])


def _tensors(part: Part) -> list[torch.Tensor]:
    """int64 all of them, but for the last, bool."""
    assert part.segments is not None
    (group,) = part.segments.groups
    segments = (part.segments.first, part.segments.last, group.rows, group.places, group.absent)
    return [*part.inputs.values(), part.labels, *(t for t in segments if t is not None)]


def clipped_step(optimizer: torch.optim.Optimizer, limit: float) -> None:
    """Clip the gradients' norm to `limit` and step, without a look at either on the host."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    with annotate.op("grad_clip"):
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        # The fused optimizer divides by this in passing; clip_grad_norm_ is a pass of its own.
        factor = ((norm + CLIP_EPSILON) / limit).clamp_(min=1.0)
    vars(optimizer).update(grad_scale=factor, found_inf=norm.new_zeros(()))
    optimizer.step()
    vars(optimizer).update(grad_scale=None, found_inf=None)  # of this step alone


def body(trainee: "Trainee", part: Part, samples: int) -> torch.Tensor:
    """What is captured: one optimiser step, with no gradients before it; its loss []."""
    loss = trainee._learn(part, samples)
    clipped_step(trainee.optimizer, trainee.config.max_grad_norm)
    return loss


@contextlib.contextmanager
def rate_from(rate: torch.Tensor, optimizer: Any, capturable: bool) -> Iterator[None]:
    """Inside, the optimizer reads its learning rate from `rate`, fp32 [] on the device.

    Outside it is a number, as ever, and not `capturable`, of which eager steps would warn.
    """
    before = [(group, group["lr"], group["capturable"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=rate, capturable=capturable)
    try:
        yield
    finally:
        for group, lr, former in before:
            group.update(lr=lr, capturable=former)


@dataclass
class _Kept:
    """One shape's inputs, and from its capture on its graph and where that leaves the loss."""

    part: Part
    graph: Any = None
    loss: torch.Tensor | None = None


class GraphedStep:
    """A trainee's steps on batches of `static_batch`, replayed where a shape comes often enough.

    `mode` "auto" keeps graphs only if `observe` shows them to be faster, "on" in any case.
    A checkpoint is loaded before: graphs hold the addresses of the optimiser's state.
    """

    def __init__(self, trainee: "Trainee", mode: str = "auto") -> None:
        self.record = GraphRecord(False, "no shape of a batch came often enough", None, None, 0)
        self._trainee = trainee
        self._decided, self._stopped = mode == "on", False
        self._because = "asked for" if mode == "on" else "the run was too short to compare"
        self._kept: dict[Shape, _Kept] = {}
        self._uses: Counter[Shape] = Counter()
        self._ns: defaultdict[Shape, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
        self._unobserved: dict[int, tuple[Shape, bool]] = {}  # steps, and whether replayed
        self._stream: Any = None  # this and what follows when first needed, on the device
        self._pool: Any = None
        self._rate = torch.empty(0)

    def step(self, number: int, batch: Batch) -> torch.Tensor | None:
        """The loss [] of step `number`; None: nothing has been done, do it eagerly."""
        shape = shape_of(batch, self._trainee.config.batch_size)
        if shape is None or self._stopped:
            return None
        if shape not in self._kept and not self._due(shape):
            self._uses[shape] += 1
            self._unobserved[number] = shape, False
            return None
        with torch.cuda.device(self._trainee.device):
            return self._graphed(number, batch, shape)

    def _due(self, shape: Shape) -> bool:
        tried = len(self._ns[shape][False]) >= TRIAL
        enough = self._uses[shape] >= EAGER_USES if self._decided else tried
        return enough and len(self._kept) < MOST_GRAPHS

    def observe(self, number: int, ns: int) -> None:
        """Step `number`, no warm-up step, lasted `ns`. Call it when the device is waited for."""
        shape, replayed = self._unobserved.pop(number, (None, False))
        if shape is None or self._decided or self._stopped:
            return
        self._ns[shape][replayed].append(ns)
        eager, graphed = self._ns[shape]
        if len(graphed) >= TRIAL:
            self._decided, self._because = True, "replayed steps were faster than eager ones"
            self.record = replace(self.record, why=self._because, eager_ms=median(eager) / 1e6)
            self.record = replace(self.record, graphed_ms=median(graphed) / 1e6)
            if not choose(eager, graphed):
                self._stop("replayed steps were not faster than eager ones")

    def _graphed(self, number: int, batch: Batch, shape: Shape) -> torch.Tensor | None:
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
            self._rate = torch.zeros((), device=self._trainee.device)
        self._rate.fill_(self._trainee.rate(number))
        kept = self._kept.get(shape)
        if kept is None:
            kept = self._kept[shape] = _Kept(copy.deepcopy(batch.parts[0]))
            return self._beside(kept, batch.samples)
        fill(kept.part, batch.parts[0])
        if kept.graph is not None:
            self._unobserved[number] = shape, True
        elif not self._capture(kept, batch.samples):
            return None
        kept.graph.replay()
        assert kept.loss is not None
        return kept.loss.clone()

    def _beside(self, kept: _Kept, samples: int) -> torch.Tensor:
        """A real step by the function that will be captured, on the stream that will capture."""
        before, current = torch.get_rng_state(), torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), rate_from(self._rate, self._trainee.optimizer, False):
            loss = body(self._trainee, kept.part, samples)
        current.wait_stream(self._stream)
        self._forget_gradients()
        loss = loss.clone()  # into memory of the stream that reads it
        if not torch.equal(before, torch.get_rng_state()):
            self._stop("the step draws random numbers on the host: a graph would repeat them")
        return loss

    def _capture(self, kept: _Kept, samples: int) -> bool:
        """Capture the step; nothing is executed. False, and no graphs from then on, on failure."""
        graph = torch.cuda.CUDAGraph()
        self._forget_gradients()
        gc.collect()  # no garbage freed while capturing, no old backward graph held
        try:
            with (
                torch.cuda.stream(torch.cuda.current_stream()),  # again, if capturing fails
                rate_from(self._rate, self._trainee.optimizer, capturable=True),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream),
            ):
                kept.loss = body(self._trainee, kept.part, samples)
            adapters.check_gradients(self._trainee.model)
        except RuntimeError as error:  # out of memory is one
            with contextlib.suppress(RuntimeError):  # torch may leave the pool open, or not
                torch._C._cuda_endAllocateToPool(self._rate.device.index, self._pool)
            self._stop(f"the step could not be captured: {one_line(error)}")
            return False
        finally:
            self._forget_gradients()
        kept.graph = graph
        more = self.record.shapes + 1
        self.record = replace(self.record, used=True, why=self._because, shapes=more)
        return True

    def _forget_gradients(self) -> None:
        """Drop what the step leaves; in the pool it is memory for the next capture."""
        self._trainee.optimizer.zero_grad(set_to_none=True)
        vars(self._trainee.optimizer).update(grad_scale=None, found_inf=None)

    def _stop(self, why: str) -> None:
        """No graphs from here on."""
        self._stopped = True
        self.record = replace(self.record, used=False, why=why)
        if self._stream is not None:
            torch.cuda.synchronize(self._trainee.device)  # before what may be running is freed
        self._kept.clear()
