"""Frozen results of a prediction: what a run will take, and what is advised.

Memory is bytes, times are seconds of one optimiser step. A prediction says on what it stands
(`basis`) and within what it is expected to be.
"""

from dataclasses import dataclass, field
from typing import Final

from peftprof.breakdowns import MEMORY_PARTS

# Parts of a prediction, in the order they are shown: those of the breakdown's memory
# attribution, and what the process or the device holds beside PyTorch's tensors.
TERMS: Final = (*MEMORY_PARTS, "allocator", "process")
TENSORS: Final = MEMORY_PARTS
# When a run's peak may be: where forward and backward have the most, the optimizer's step with all
# gradients included, or where batches twice as large are evaluated.
MOMENTS: Final = ("backward", "evaluation")
OBJECTIVES: Final = ("throughput", "memory", "accuracy")


@dataclass(frozen=True)
class Choice:
    """Settings of a run that cost memory and time. `kernels` is none of the choices in `full`."""

    method: str
    rank: int
    batch_size: int
    precision: str
    checkpointing: bool
    kernels: str


@dataclass(frozen=True)
class Prediction:
    """What a step of `choice` is predicted to take.

    `terms` are bytes at the peak by TERMS and add up to `peak_bytes`; `low_bytes` and
    `high_bytes` are within what it is expected, `moment` is when, one of MOMENTS. Seconds are
    of forward, backward and optimizer; None where the device's speed is not known.
    `loading_bytes` is what a CPU's process has resident while the model is loaded.
    """

    choice: Choice
    terms: dict[str, int]
    peak_bytes: int
    low_bytes: int
    high_bytes: int
    moment: str
    loading_bytes: int = 0
    forward_s: float | None = None
    backward_s: float | None = None
    optimizer_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    factor: float | None = None  # on the seconds of the operators alone, in all of these

    @property
    def tensor_bytes(self) -> int:
        """What PyTorch's tensors take at the peak."""
        return sum(self.terms[term] for term in TENSORS)

    @property
    def needed_bytes(self) -> int:
        """What must be there for the run to be safe."""
        return max(self.high_bytes, self.loading_bytes)

    @property
    def step_s(self) -> float | None:
        """Seconds of a step."""
        if self.forward_s is None or self.backward_s is None or self.optimizer_s is None:
            return None
        return self.forward_s + self.backward_s + self.optimizer_s

    @property
    def samples_per_s(self) -> float | None:
        """Examples a second."""
        step = self.step_s
        return None if not step else self.choice.batch_size / step


@dataclass(frozen=True)
class Advice:
    """The answer: every prediction, the best that fits first, and why.

    `command` trains the first; empty where nothing fits, and then `instead` says what would.
    """

    version: int
    model: str
    model_basis: str
    parameters: int
    layers: int
    device: str
    device_basis: str
    memory_bytes: int
    tokens: int
    objective: str
    predictions: tuple[Prediction, ...]
    fitting: int
    reason: str
    command: str
    instead: tuple[str, ...] = ()
    basis: tuple[str, ...] = ()


@dataclass(frozen=True)
class CheckedRun:
    """A run's prediction beside what was measured of it; None where one is not known.

    `measured_bytes` is the peak of a process on a CPU, and PyTorch's allocator's on a GPU: then
    the context is left out of `predicted_bytes`. `allocated_bytes` is what the tensors of it took.
    """

    name: str
    created: str
    model: str
    choice: Choice
    predicted_bytes: int
    measured_bytes: int | None
    predicted_process_bytes: int
    predicted_s: float | None
    operators_s: float | None  # before any correction by runs
    measured_s: float | None
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)  # predicted, measured
    predicted_tensor_bytes: int | None = None
    predicted_loading_bytes: int | None = None
    loading_bytes: int | None = None
    allocated_bytes: int | None = None

    @property
    def run_id(self) -> str:
        """What tells a run from all others."""
        return f"{self.created} {self.name}"

    @property
    def rest_bytes(self) -> int | None:
        """What the process held beside what was predicted of its tensors."""
        if self.measured_bytes is None:
            return None
        return self.measured_bytes - (self.predicted_bytes - self.predicted_process_bytes)

    @property
    def factor(self) -> float | None:
        """Measured seconds of a step over those of its operators alone."""
        return self.measured_s / self.operators_s if self.measured_s and self.operators_s else None

    @property
    def memory_error(self) -> float | None:
        """Predicted over measured peak, minus one."""
        return self.predicted_bytes / self.measured_bytes - 1 if self.measured_bytes else None

    @property
    def time_error(self) -> float | None:
        """Predicted over measured step, minus one."""
        if self.predicted_s is None or not self.measured_s:
            return None
        return self.predicted_s / self.measured_s - 1
