"""The training loop: one optimiser step, the timed pass, evaluation, checkpoints."""

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch.nn.functional import cross_entropy

from peftprof import annotate
from peftprof.config import RunConfig
from peftprof.errors import FolderError, TrainingError
from peftprof.records import Accuracy, Energy, GraphRecord, Memory, Trainable, decode, encode
from peftprof.run import adapters, distributed, graphs, packing
from peftprof.run.batches import Batch, Batches, Part
from peftprof.run.checkpoint import load_checkpoint, save_checkpoint
from peftprof.run.folder import Evaluation, RunFolder, Step
from peftprof.run.meters import (
    EnergyMeter,
    PeakMemory,
    StepClock,
    added,
    energy_of_all,
    give_back,
    together,
)
from peftprof.run.model import DTYPES
from peftprof.run.statistics import wilson
from peftprof.watcher import Watcher

WARMUP_STEPS = 5  # excluded from the figures after every start: allocators and caches fill
GIVE_BACK_EVERY = 25  # steps between returns of a CPU's free memory; each slows the next step
EVALUATED = 2  # an evaluation's batches are so many times as large; nothing is kept for backward
FLUSH_EVERY = 10  # steps between two readings of the losses, each a wait for the device


@dataclass
class Trainee:
    """A model with all that one optimiser step changes or needs."""

    config: RunConfig
    model: torch.nn.Module
    optimizer: torch.optim.AdamW
    scaler: torch.amp.GradScaler
    train: Batches
    validation: Batches
    total_steps: int
    _ready: dict[int, Batch] = field(default_factory=dict)  # on the device before its step
    graphed: graphs.GraphedStep | None = None  # where steps may be replayed

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.config.device)

    def autocast(self) -> torch.autocast:
        """The run's precision: reduced inside the forward, fp32 master weights outside."""
        dtype = DTYPES[self.config.precision]
        on = dtype != torch.float32
        return torch.autocast(self.device.type, dtype if on else None, enabled=on)

    def step(self, number: int, eager: bool = False) -> tuple[torch.Tensor, Batch]:
        """Optimiser step `number` (from 0): its loss, still on the device, and its batch.

        Of several processes each gives its share of both: losses add up to the step's.
        `eager`: not as a CUDA graph, which leaves no gradients to look at.
        """
        if number % GIVE_BACK_EVERY == 0 and self.device.type == "cpu":
            give_back()
        with annotate.step(number):
            with annotate.phase("data"):
                batch = self._batch(number)
            loss = None
            if self.graphed is not None and not eager:
                loss = self.graphed.step(number, batch)
            if loss is None:
                # Of the parts' sums, not means, so that every example counts the same.
                losses = [self._learn(part, batch.whole) for part in batch.parts]
                loss = losses[0] if len(losses) == 1 else self._total(losses)
                if distributed.size() > 1:
                    with annotate.phase("backward"):
                        distributed.add_up_gradients(self._parameters(), bool(losses))
                with annotate.phase("optimizer"):
                    self._update(number)
            if self.device.type == "cuda":
                with annotate.phase("data"):  # while the GPU still works on this step
                    self._ready = {number + 1: self._load(number + 1)}
        return loss, batch

    def _batch(self, number: int) -> Batch:
        ready = self._ready.pop(number, None)
        return self._load(number) if ready is None else ready

    def _load(self, number: int) -> Batch:
        batch = self.train.at(number)
        if graphs.possible(self.config) is None:  # eager steps too, so that all are alike
            batch = graphs.static_batch(batch, self.config.batch_size)
        return batch.to(self.device)

    def _learn(self, part: Part, samples: int) -> torch.Tensor:
        """Forward and backward of one part of a batch: its share of the batch's mean loss."""
        with annotate.phase("forward"), self.autocast():
            logits = packing.logits(self.model, part)
            with annotate.op("loss"):
                loss = cross_entropy(logits.float(), part.labels, reduction="sum") / samples
        with annotate.phase("backward"):
            self.scaler.scale(loss).backward()
        return loss.detach()

    def _total(self, losses: list[torch.Tensor]) -> torch.Tensor:
        if losses:
            return torch.stack(losses).sum()
        # A process without an example. The scaler begins with the first loss it is given.
        nothing = torch.zeros((), device=self.device)
        self.scaler.scale(nothing)
        return nothing

    def _parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _update(self, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        limit = self.config.max_grad_norm
        if self.scaler.is_enabled():
            self.scaler.unscale_(self.optimizer)
            with annotate.op("grad_clip"):
                torch.nn.utils.clip_grad_norm_(self._parameters(), limit)
            self.scaler.step(self.optimizer)
            self.scaler.update()
            return
        graphs.clipped_step(self.optimizer, limit)

    def rate(self, number: int) -> float:
        """Learning rate of step `number`: linear warm-up from 0, then linear to 0."""
        warmup = math.ceil(self.total_steps * self.config.warmup_ratio)
        if number < warmup:
            return self.config.learning_rate * number / warmup
        left = (self.total_steps - number) / max(1, self.total_steps - warmup)
        return self.config.learning_rate * max(0.0, left)

    @torch.inference_mode()
    def predict(self) -> tuple[tuple[int, ...], float]:
        """The class of every validation example, and their mean loss; draws no random number."""
        self.model.eval()
        predicted, own_loss = [0] * len(self.validation.labels), 0.0
        found: dict[int, int] = {}
        with annotate.phase("eval"):
            for numbers, batch in self.validation.in_order(EVALUATED * self.config.batch_size):
                if self.device.type == "cpu":
                    give_back()  # each batch is of another size, and finds no place in the last's
                classes: list[int] = []
                for part in batch.to(self.device).parts:
                    with self.autocast():
                        logits = packing.logits(self.model, part).float()
                    own_loss += float(cross_entropy(logits, part.labels, reduction="sum"))
                    classes += logits.argmax(-1).tolist()
                found |= dict(zip(numbers, classes, strict=True))
            loss = 0.0
            for theirs, their_loss in distributed.gathered((found, own_loss)):
                loss += their_loss
                for number, label in theirs.items():
                    predicted[number] = label
        self.model.train()
        return tuple(predicted), loss / len(predicted)

    def evaluate(self) -> Accuracy:
        """Accuracy and mean loss on the validation split."""
        return self.accuracy(*self.predict())

    def accuracy(self, predicted: Sequence[int], loss: float) -> Accuracy:
        """The accuracy of these classes of the validation examples."""
        examples = len(predicted)
        correct = sum(map(operator.eq, predicted, self.validation.labels))
        low, high = wilson(correct, examples)
        return Accuracy(correct, examples, correct / examples, low, high, loss)


def make_trainee(
    config: RunConfig, model: torch.nn.Module, train: Batches, validation: Batches
) -> Trainee:
    """A trainee at step 0, its random numbers started from the seed.

    Weight decay spares biases and normalisation weights, as transformers' Trainer does.
    """
    parameters = [p for _, p in adapters.trainable(model)]
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        [g for g in groups if g["params"]], lr=config.learning_rate, fused=True
    )
    scaler = torch.amp.GradScaler(
        torch.device(config.device).type, enabled=config.precision == "fp16"
    )
    total = config.max_steps or math.ceil(config.epochs * train.per_epoch)
    model.train()
    # Each process drops out of other examples, so it must drop out other numbers.
    torch.manual_seed(distributed.seed(config.seed))
    return Trainee(config, model, optimizer, scaler, train, validation, total)


@dataclass
class TimedPass:
    """What the timed pass gathers on its way."""

    steps: list[Step]
    evaluations: list[Evaluation]
    trainable: Trainable | None = None


class TimedLoop:
    """The unprofiled pass from the last checkpoint to the last step.

    Only the optimiser steps are inside the clock and the energy meter; evaluation,
    checkpoints and the display are outside.
    """

    def __init__(self, trainee: Trainee, folder: RunFolder, watcher: Watcher) -> None:
        self.trainee = trainee
        self.folder = folder
        self.watcher = watcher
        self.clock = StepClock(trainee.device)
        self.energy = EnergyMeter(trainee.device)
        self.memory = PeakMemory(trainee.device)
        self.passed = TimedPass([], [])
        self._memory_before: Memory | None = None
        self._energy_before: Energy | None = None
        self._fresh = True  # the next gradient is to be looked at
        self._waiting: list[tuple[int, torch.Tensor, Batch]] = []

    def run(self) -> TimedPass:
        """Train to the end."""
        start = self._resume()
        trainee = self.trainee
        if graphs.possible(trainee.config) is None:
            trainee.graphed = graphs.GraphedStep(trainee, trainee.config.cuda_graphs)
        self.watcher.begin("training", trainee.total_steps, start)
        self.memory.start()
        for number in range(start, trainee.total_steps):
            self._step(number, warmup=number < start + WARMUP_STEPS)
            done = number + 1
            at_end = done == trainee.total_steps
            epoch_ends = done % trainee.train.per_epoch == 0
            # After the warm-up too, so that none of its work is still queued when the
            # energy meter starts.
            if done % FLUSH_EVERY == 0 or at_end or done == start + WARMUP_STEPS:
                self._flush(start)
            if epoch_ends or at_end:
                self._flush(start)
                self._evaluate(done)
            if done % trainee.config.checkpoint_every == 0 or epoch_ends or at_end:
                self._flush(start)
                self._save(done)
        return self.passed

    def _step(self, number: int, warmup: bool) -> None:
        if not warmup:
            self.energy.resume()
        self.clock.start()
        loss, batch = self.trainee.step(number, eager=self._fresh)
        if self._fresh:
            # Backward has run; the gradients are still there.
            adapters.check_gradients(self.trainee.model)
            self.passed.trainable = adapters.count(self.trainee.model)
            self._fresh = False
        self.trainee.optimizer.zero_grad(set_to_none=True)
        self.clock.stop()
        self._waiting.append((number, loss, batch))

    def _flush(self, start: int) -> None:
        if not self._waiting:
            return
        durations = self.clock.durations_ns()  # waits for the device
        self.energy.pause()
        self.memory.sample()
        losses = distributed.summed(torch.stack([loss for _, loss, _ in self._waiting])).tolist()
        shares = [[b.samples, b.real_tokens, b.padded_tokens] for _, _, b in self._waiting]
        counts = distributed.summed(torch.tensor(shares)).tolist()
        numbers = [number for number, _, _ in self._waiting]
        for number, loss, count, ns in zip(numbers, losses, counts, durations, strict=True):
            if not math.isfinite(loss):
                raise TrainingError(f"the loss of step {number} is {loss}; lower --lr")
            if self.trainee.graphed is not None and number >= start + WARMUP_STEPS:
                self.trainee.graphed.observe(number, ns)
            samples, real, padded = count
            warm = number < start + WARMUP_STEPS
            rate = self.trainee.rate(number)
            self.passed.steps.append(Step(number, loss, rate, ns, samples, real, padded, warm))
        recent = self.passed.steps[-len(self._waiting) :]
        self._waiting.clear()
        seconds = sum(s.ns for s in recent) / 1e9
        rate = sum(s.samples for s in recent) / seconds if seconds else 0.0
        self.watcher.steps(
            self.passed.steps[-1].step + 1, losses[-1], rate, self.memory.current_bytes()
        )

    def _evaluate(self, done: int) -> None:
        predicted, loss = self.trainee.predict()
        accuracy = self.trainee.accuracy(predicted, loss)
        if not math.isfinite(accuracy.loss):
            raise TrainingError(f"the validation loss at step {done} is not finite; lower --lr")
        self.passed.evaluations.append(Evaluation(done, accuracy, predicted))
        self.watcher.say(
            f"step {done}: validation accuracy {100 * accuracy.accuracy:.2f} %, "
            f"loss {accuracy.loss:.4f}"
        )
        self._fresh = True

    def _save(self, done: int) -> None:
        self.folder.write_steps(self.passed.steps)
        self.folder.write_evaluations(self.passed.evaluations)
        state = {
            "trainable": encode(self.passed.trainable),
            "memory": encode(self.peaks()),
            "energy": encode(self.joules()),
        }
        save_checkpoint(self.folder, self.trainee, done, state)

    def peaks(self) -> Memory:
        """Peak memory of the pass so far, what was before a resume included.

        Of several processes it is the largest one's. All must ask.
        """
        now = functools.reduce(together, distributed.gathered(self.memory.result()))
        return together(self._memory_before, now)

    def cuda_graphs(self) -> GraphRecord:
        """Whether steps were replayed as CUDA graphs, and why or why not."""
        if self.trainee.graphed is not None:
            return self.trainee.graphed.record
        why = graphs.possible(self.trainee.config) or "no step was run"
        return GraphRecord(False, why, None, None, 0)

    def joules(self) -> Energy:
        """Energy of the timed steps so far, what was before a resume included.

        Of several processes it is the sum. All must ask.
        """
        now = energy_of_all(distributed.gathered((self.energy.result(), distributed.local_first())))
        return added(self._energy_before, now)

    def _resume(self) -> int:
        if not distributed.from_first(self.folder.checkpoint.exists()):
            return 0
        step, state = load_checkpoint(self.folder, self.trainee)
        self.passed.steps = [s for s in self.folder.read_steps() if s.step < step]
        self.passed.evaluations = [e for e in self.folder.read_evaluations() if e.step <= step]
        evaluated = [e.step for e in self.passed.evaluations]
        if [s.step for s in self.passed.steps] != list(range(step)) or (
            step == self.trainee.total_steps and step not in evaluated
        ):
            raise FolderError(
                f"{self.folder.path} has lost steps before its checkpoint; start a new run"
            )
        self.passed.trainable = decode(Trainable, state["trainable"])
        self._memory_before = decode(Memory, state["memory"])
        self._energy_before = decode(Energy, state["energy"])
        return step
