"""From a model's shape, a device and settings to memory and time of a step."""

import dataclasses
from dataclasses import dataclass, field

from peftprof.advice import Choice, Prediction
from peftprof.advise import kept
from peftprof.advise.blueprint import Facts
from peftprof.advise.lessons import Lessons
from peftprof.advise.profile import Peak, Profile
from peftprof.advise.shapes import Shape
from peftprof.calibrations import Calibration
from peftprof.config import RunConfig
from peftprof.run import packing
from peftprof.run.loop import EVALUATED

# A tensor of AdamW's two moments beside every trained one, both fp32.
STATES = 2
# What the allocator holds beside the blocks in use. On a CPU glibc's heap keeps holes, between
# blocks of ever other lengths: a share of all that comes and goes but for gradients, which come
# once; and what was fp32 while the model was loaded, of which a share is touched again later.
# Both measured, by the runs of docs/advice.md. On a GPU a share that is assumed.
HOLES, LOADED = 0.48, 0.33
CUDA_SLACK = 0.08
SEGMENT = 2 << 20  # bytes that PyTorch's allocator asks a GPU for, at least
# Expected within these shares of the prediction; docs/advice.md has the errors.
MEMORY_INTERVAL = 0.05


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
            self._while_loading(),
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
        changed = held.base_weights if choice.method == "full" else held.lora + held.head
        moments = {
            "backward": one.training.peak(trained.examples, rank, trained.tokens, cuda),
            "optimizer": Peak(changed, {"gradients": changed}),
        }
        if evaluated is not None:
            moments["evaluation"] = one.evaluation.peak(
                evaluated.examples, rank, evaluated.tokens, cuda
            )
        moment = max(moments, key=lambda name: moments[name].total)
        peak = moments[moment]
        terms = {
            "base_weights": held.base_weights,
            "quantisation_state": held.quantisation_state,
            "adapters": held.lora + held.head,
            "gradients": peak.parts.get("gradients", 0),
            "optimizer_state": STATES * changed,
            "activations": peak.parts.get("activations", 0),
            "dequant_workspace": peak.parts.get("dequant_workspace", 0),
            "other": held.other + peak.parts.get("other", 0),
        }
        if cuda:
            terms["allocator"] = round(CUDA_SLACK * peak.total) + SEGMENT
            terms["process"] = device.context_bytes
        else:
            moving = peak.total - terms["gradients"]
            terms["allocator"] = round(HOLES * moving + LOADED * self._loaded(choice))
            terms["process"] = self.subject.learnt.process_bytes(choice)[0]
        return terms, moment

    def _while_loading(self) -> int:
        """Of a CPU's process: the file that is read through memory, and fp32 weights made of it.

        They are rounded or quantised only once all are there.
        """
        subject, device = self.subject, self.subject.device
        if device.kind == "cuda":
            return 0
        return device.process_bytes + (subject.shape.stored_bytes + 4) * subject.facts.parameters

    def _loaded(self, choice: Choice) -> int:
        """Bytes of fp32 weights that are loaded, and then held in another form."""
        rounded = choice.method == "lora" and choice.precision != "fp32"
        return 4 * self.subject.facts.parameters if rounded or choice.method == "qlora" else 0

    def _seconds(self, one: Profile, choice: Choice, trained: Size) -> tuple[float | None, ...]:
        subject, device = self.subject, self.subject.device
        if choice.precision not in device.dtypes:
            return (None,) * 6
        held = one.holds(choice.rank)
        changed = held.base_weights if choice.method == "full" else held.lora + held.head
        factor, off, _ = subject.learnt.step(choice)
        spent = factor * one.work.seconds(
            device, trained.examples, choice.rank, trained.tokens, changed / 4
        )
        total = float(spent.sum())
        return (*map(float, spent), total / (1 + off), total * (1 + off), factor)
