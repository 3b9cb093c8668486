"""From a model's shape, a device and settings to memory and time of a step."""

import dataclasses
from dataclasses import dataclass, field

from peftprof.advice import Choice, Prediction
from peftprof.advise import kept
from peftprof.advise.blueprint import Facts, Held
from peftprof.advise.lessons import Lessons
from peftprof.advise.profile import Profile
from peftprof.advise.shapes import Shape
from peftprof.calibrations import Calibration
from peftprof.config import RunConfig
from peftprof.run import packing
from peftprof.run.loop import EVALUATED

# A tensor of AdamW's two moments beside every trained one, both fp32.
STATES = 2
# What the allocator holds beside the blocks in use, as a share of those that come and go. On a
# CPU the holes in glibc's heap: gradients, which come once, leave none; evaluations are each of
# another size. Measured, by the runs of docs/advice.md. On a GPU an assumption.
HOLES = {"backward": 0.6, "evaluation": 1.0}
CUDA_HOLES = 0.08
SEGMENT = 2 << 20  # bytes that PyTorch's allocator asks a GPU for, at least
# Expected within this share of the prediction; docs/advice.md has the errors.
MEMORY_INTERVAL = 0.08


@dataclass(frozen=True)
class Subject:
    """What stays the same over all choices: a model, a device, and examples of `tokens` tokens."""

    shape: Shape
    facts: Facts
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


@dataclass(frozen=True)
class Size:
    """Examples that are computed at once, of `tokens` tokens each; a part of one may be meant."""

    examples: float
    tokens: float


@dataclass
class Predictor:
    """Predictions for one subject. A step is traced once for all batches, ranks and lengths."""

    subject: Subject
    _traced: dict[Choice, Profile] = field(default_factory=dict)

    def predict(
        self, choice: Choice, trained: Size | None = None, evaluated: Size | None = None
    ) -> Prediction:
        """What a step of `choice` takes, and the evaluation that follows.

        `trained` and `evaluated` are the largest batches of each, if they are not what
        `choice` makes of the subject. Raises ConfigError where the choice does not fit the model.
        """
        one = self._trace(choice)
        if trained is None:
            trained = self._size(choice, choice.batch_size)
            evaluated = self._size(choice, EVALUATED * choice.batch_size)
        terms, moment = self._terms(one, choice, trained, evaluated)
        peak = sum(terms.values())
        seconds = self._seconds(one, choice, trained)
        return Prediction(
            choice,
            terms,
            peak,
            round(peak * (1 - MEMORY_INTERVAL)),
            round(peak * (1 + MEMORY_INTERVAL)),
            moment,
            self._while_loading(choice),
            *seconds,
        )

    @staticmethod
    def way(choice: Choice) -> Choice:
        """What choices that need the same trace have in common."""
        return dataclasses.replace(choice, rank=1, batch_size=1)

    def _trace(self, choice: Choice) -> Profile:
        key = self.way(choice)
        if key not in self._traced:
            self._traced[key] = kept.profile_of(self.subject.shape, self.subject.config(choice))
        return self._traced[key]

    def _size(self, choice: Choice, examples: int) -> Size:
        """What is computed, what packed tokens are rounded up by included."""
        tokens = self.subject.tokens
        if self.subject.padding != "packed":
            return Size(examples, tokens)
        step = packing.multiple(self.subject.config(choice))
        return Size(-(-examples * tokens // step) * step / tokens, tokens)

    def _terms(
        self, one: Profile, choice: Choice, trained: Size, evaluated: Size | None
    ) -> tuple[dict[str, int], str]:
        """Bytes by TERMS at the peak, and when it is, one of MOMENTS."""
        device, rank = self.subject.device, choice.rank
        cuda = device.kind == "cuda"
        held = one.holds(rank)
        changed = _changed(held, choice)
        moments = {
            "backward": one.training.peak(trained.examples, rank, trained.tokens, cuda),
        }
        if evaluated is not None:
            moments["evaluation"] = one.evaluation.peak(
                evaluated.examples, rank, evaluated.tokens, cuda
            )
        free = {
            name: (CUDA_HOLES if cuda else HOLES[name])
            * (peak.total - (0 if cuda else peak.parts["gradients"]))
            for name, peak in moments.items()
        }
        moment = max(moments, key=lambda name: moments[name].total + free[name])
        peak = moments[moment]
        terms = {
            "base_weights": held.base_weights,
            "quantisation_state": held.quantisation_state,
            "adapters": held.lora + held.head,
            "gradients": peak.parts["gradients"],
            "optimizer_state": STATES * changed,
            "activations": peak.parts["activations"],
            "dequant_workspace": peak.parts["dequant_workspace"],
            "other": held.other + peak.parts["other"],
        }
        terms["allocator"] = round(free[moment]) + (SEGMENT if cuda else 0)
        terms["process"] = self.subject.learnt.process_bytes(choice)[0]
        return terms, moment

    def _while_loading(self, choice: Choice) -> int:
        """Of a CPU's process: the file that is read through memory, and fp32 weights made of it.

        Those that are adapted are looked at, and rounded or quantised, once all are there; those
        that are all trained come page by page, when training does.
        """
        subject, device = self.subject, self.subject.device
        if device.kind == "cuda" or choice.method == "full":
            return 0
        return device.process_bytes + (subject.shape.stored_bytes + 4) * subject.facts.parameters

    def _seconds(self, one: Profile, choice: Choice, trained: Size) -> tuple[float | None, ...]:
        subject, device = self.subject, self.subject.device
        if choice.precision not in device.dtypes:
            return (None,) * 6
        held = one.holds(choice.rank)
        changed = _changed(held, choice)
        factor, off, _ = subject.learnt.step(choice)
        spent = factor * one.work.seconds(
            device, trained.examples, choice.rank, trained.tokens, changed / 4
        )
        total = float(spent.sum())
        return (*map(float, spent), total / (1 + off), total * (1 + off), factor)


def _changed(held: Held, choice: Choice) -> int:
    """Bytes of what is trained."""
    return held.base_weights if choice.method == "full" else held.lora + held.head
