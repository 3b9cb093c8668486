"""From a model's shape, a device and settings to memory and time of a step."""

import dataclasses
from dataclasses import dataclass, field

from peftprof.advice import Choice, Prediction
from peftprof.advise import profile, work
from peftprof.advise.lessons import Lessons
from peftprof.advise.profile import Profile
from peftprof.advise.shapes import Shape
from peftprof.advise.work import StepWork
from peftprof.calibrations import Calibration
from peftprof.config import RunConfig
from peftprof.run import packing

# A tensor of AdamW's two moments beside every trained one, both fp32.
MOMENTS = 2
# What the allocator holds beside the blocks in use, as a share of what comes and goes in a
# step. On a CPU measured (docs/advice.md): padded batches are of ever other lengths, and leave
# holes that no later block fits into. On a GPU an assumption, until it has been measured.
SLACK = {"cpu": {"packed": 0.10, "split": 0.25, "pad": 0.30}, "cuda": {}}
CUDA_SLACK = 0.08
SEGMENT = 2 << 20  # bytes that PyTorch's allocator asks a GPU for, at least
# Expected within these shares of the prediction; docs/advice.md has the errors.
MEMORY_INTERVAL = 0.05


@dataclass(frozen=True)
class Subject:
    """What stays the same over all choices: a model, a device, and examples of `tokens` tokens."""

    shape: Shape
    device: Calibration
    tokens: int
    padding: str
    dropout: float = 0.1
    target_modules: tuple[str, ...] = ()
    lessons: Lessons | None = None  # what runs on this device have taught; None: not read

    @property
    def learnt(self) -> Lessons:
        """What predictions are corrected by."""
        return self.lessons or Lessons(self.device)

    def config(self, choice: Choice) -> RunConfig:
        """The choice as the configuration of a run."""
        return RunConfig(
            method=choice.method,
            model=self.shape.name,
            dataset="none",
            learning_rate=1e-4,
            rank=choice.rank,
            dropout=self.dropout,
            target_modules=self.target_modules or self.shape.family.targets,
            kernels="torch" if choice.method == "full" else choice.kernels,
            batch_size=choice.batch_size,
            max_length=self.tokens,
            precision=choice.precision,
            padding=self.padding,
            device=self.device.kind,
            checkpointing=choice.checkpointing,
        )


@dataclass
class Predictor:
    """Predictions for one subject. A step is traced once for all its batches and ranks."""

    subject: Subject
    _traced: dict[Choice, tuple[Profile, StepWork]] = field(default_factory=dict)

    def predict(self, choice: Choice, sequences: float | None = None) -> Prediction:
        """What a step of `choice` takes; `sequences` in its largest batch, if not all of it.

        Raises ConfigError where the choice does not fit the model.
        """
        one, does = self._trace(choice)
        batch = self._computed(choice) if sequences is None else sequences
        terms = self._terms(one, choice, batch)
        peak = sum(terms.values())
        seconds = self._seconds(does, choice, batch, one)
        return Prediction(
            choice,
            terms,
            peak,
            round(peak * (1 - MEMORY_INTERVAL)),
            round(peak * (1 + MEMORY_INTERVAL)),
            *seconds,
        )

    @staticmethod
    def way(choice: Choice) -> Choice:
        """What choices that need the same trace have in common."""
        return dataclasses.replace(choice, rank=1, batch_size=1)

    def _trace(self, choice: Choice) -> tuple[Profile, StepWork]:
        key = self.way(choice)
        if key not in self._traced:
            made = profile.make(
                self.subject.shape, self.subject.config(choice), self.subject.tokens
            )
            self._traced[key] = made, work.of(made)
        return self._traced[key]

    def _computed(self, choice: Choice) -> float:
        """Sequences that are computed, what packed tokens are rounded up by included."""
        if self.subject.padding != "packed":
            return choice.batch_size
        step = packing.multiple(self.subject.config(choice))
        tokens = choice.batch_size * self.subject.tokens
        return -(-tokens // step) * step / self.subject.tokens

    def _terms(self, one: Profile, choice: Choice, batch: float) -> dict[str, int]:
        device = self.subject.device
        cuda = device.kind == "cuda"
        held, peak = one.holds(choice.rank), one.peak(batch, choice.rank, rounded=cuda)
        full = choice.method == "full"
        trained = held.base_weights if full else held.lora + held.head
        terms = {
            "base_weights": held.base_weights,
            "quantisation_state": held.quantisation_state,
            "adapters": held.lora + held.head,
            "gradients": peak.parts["gradients"],
            "optimizer_state": MOMENTS * trained,
            "activations": peak.parts["activations"],
            "dequant_workspace": peak.parts["dequant_workspace"],
            "other": held.other + peak.parts["other"],
        }
        if peak.total < trained:  # then the peak is where the optimizer steps
            terms |= {"gradients": trained, "activations": 0, "dequant_workspace": 0}
            terms["other"] = held.other
        moving = max(peak.total, trained)
        if cuda:
            terms["allocator"] = round(CUDA_SLACK * moving) + SEGMENT
            terms["process"] = device.context_bytes
        else:
            terms["allocator"] = round(SLACK["cpu"][self.subject.padding] * moving)
            terms["process"] = self.subject.learnt.process_bytes(choice)[0]
        return terms

    def _seconds(
        self, does: StepWork, choice: Choice, batch: float, one: Profile
    ) -> tuple[float | None, ...]:
        device, subject = self.subject.device, self.subject
        if choice.precision not in device.dtypes:
            return (None,) * 6
        held = one.holds(choice.rank)
        trained = held.base_weights if choice.method == "full" else held.lora + held.head
        factor, off, _ = subject.learnt.step(choice)
        spent = factor * does.seconds(device, batch, choice.rank, trained / 4)
        total = float(spent.sum())
        return (*map(float, spent), total / (1 + off), total * (1 + off), factor)
