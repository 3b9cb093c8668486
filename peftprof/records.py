"""What a run leaves behind: `RunRecord`, the content of its folder's `run.json`; no torch here.

A record turns into plain JSON with `encode`; `decode` is its inverse.
Times are nanoseconds (`*_ns`) or seconds (`*_s`), memory is bytes (`*_bytes`).
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from peftprof.breakdowns import Ceilings
from peftprof.errors import FolderError

T = TypeVar("T")


@dataclass(frozen=True)
class ModelInfo:
    """The model of a run: `fingerprint` is SHA-256 over its weight files."""

    name: str
    source: str
    family: str
    fingerprint: str
    parameters: int
    layers: int


@dataclass(frozen=True)
class DataInfo:
    """The data of a run: `fingerprint` is SHA-256 over texts and labels of both splits."""

    name: str
    source: str
    split: str
    fingerprint: str
    train_examples: int
    validation_examples: int
    labels: tuple[str, ...]


@dataclass(frozen=True)
class Trainable:
    """Trainable parameters: `live` got a gradient, `nominal` ask for one, `packed` as stored.

    `total` counts every parameter of the model at its unpacked size; `packed_total` counts
    4-bit weights as the bytes they are stored in, the figure many tools print by mistake.
    """

    live: int
    nominal: int
    total: int
    packed_total: int


@dataclass(frozen=True)
class Memory:
    """Peaks of the timed pass in bytes; None with its reason in `absent` when not measurable.

    `loading_bytes` is the most that the host's process had resident before the pass, files
    that are read through memory included. Of a run over several processes each is the largest
    that one of them had.
    """

    allocated_bytes: int | None
    reserved_bytes: int | None
    nvml_bytes: int | None
    rss_bytes: int | None
    absent: dict[str, str] = field(default_factory=dict)
    loading_bytes: int | None = None


@dataclass(frozen=True)
class Energy:
    """Energy of the timed steps in joules by counter; `absent` says why one is missing.

    Of a run over several processes it is the sum over GPUs and machines.
    """

    joules: dict[str, float]
    absent: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Accuracy:
    """Validation accuracy with its 95 % Wilson interval (Wilson 1927)."""

    correct: int
    examples: int
    accuracy: float
    low: float
    high: float
    loss: float


@dataclass(frozen=True)
class Timed:
    """The unprofiled pass. Warm-up steps, evaluation and checkpoints are outside every figure.

    Of a run over several processes, samples and tokens are all of theirs, times the first's.
    """

    steps: int
    warmup_steps: int
    seconds: float
    samples_per_s: float
    real_tokens_per_s: float
    padded_tokens_per_s: float
    real_tokens_per_step: float
    padded_tokens_per_step: float
    step_p50_ms: float
    step_p95_ms: float
    step_p99_ms: float
    first_loss: float
    last_loss: float


@dataclass(frozen=True)
class Profiled:
    """The short profiled pass, whose times are never mixed into the timed results.

    `overhead` is the profiled steps' time over that of the same batches run again right
    after without a profiler. `same_losses` says whether its losses equalled the timed
    pass's bit by bit over the steps both ran, `loss_difference` the largest relative
    difference between them.
    """

    profiler: str
    trace: str | None
    active_steps: int
    step_p50_ms: float
    overhead: float
    same_losses: bool | None
    loss_difference: float | None


@dataclass(frozen=True)
class Held:
    """What one part (`breakdowns.MEMORY_PARTS`) held when the memory step began.

    `storages` gives the bytes of each storage by its address in hexadecimal, as the trace's
    allocations name it; tensors that share a storage are there once.
    """

    part: str
    storages: dict[str, int]

    @property
    def bytes(self) -> int:
        """Bytes of all its storages."""
        return sum(self.storages.values())


@dataclass(frozen=True)
class MemoryStep:
    """The one step whose allocations were recorded, in a trace of its own; times mean nothing.

    `step` is the number of the batch, of those of the timed pass that had the most padded
    tokens. `inventory` is what the run's tensors on `device` held when it began.
    """

    trace: str
    step: int
    device: str
    inventory: tuple[Held, ...]


@dataclass(frozen=True)
class Computed:
    """What goes through the model at once: examples, and tokens with their padding."""

    examples: int
    tokens: int


@dataclass(frozen=True)
class GraphRecord:
    """Whether steps were replayed, why or why not, and what was measured for one shape."""

    used: bool
    why: str
    eager_ms: float | None
    graphed_ms: float | None
    shapes: int


@dataclass(frozen=True)
class Execution:
    """How the steps were computed, where there was a choice; `config` has the rest.

    `padding` is packed, split or pad; packed tokens were rounded up to a multiple of
    `token_multiple`. `frozen_dtype` is what frozen dense weights are stored in, None where
    none is. `native_dequantise` says whether compiled code of bitsandbytes dequantised on
    the CPU. `tf32` is what torch was told of fp32 products on a GPU; `cuda_graphs` is known
    when the timed pass is over. `processes` is how many devices each batch was shared out
    to, and `backend` (nccl, gloo) what added up their gradients.
    """

    padding: str
    token_multiple: int
    optimizer: str
    frozen_dtype: str | None
    native_dequantise: bool
    tf32: bool
    threads: int
    cuda_graphs: GraphRecord | None = None
    processes: int = 1
    backend: str | None = None


@dataclass(frozen=True)
class RunRecord:
    """Everything needed to understand a run years later: the content of `run.json`."""

    version: int
    name: str
    state: str  # "running" or "complete"
    created: str  # ISO 8601, with its offset
    command: tuple[str, ...]
    config: dict[str, Any]
    environment: dict[str, Any]
    model: ModelInfo | None = None
    data: DataInfo | None = None
    target_modules: tuple[str, ...] = ()
    head_modules: tuple[str, ...] = ()
    trainable: Trainable | None = None
    execution: Execution | None = None
    base_sha256: str | None = None  # frozen weights, the same before and after; None: none is
    timed: Timed | None = None
    accuracy: Accuracy | None = None
    memory: Memory | None = None
    energy: Energy | None = None
    profiled: Profiled | None = None
    memory_step: MemoryStep | None = None
    ceilings: Ceilings | None = None
    evaluated: Computed | None = None  # the most of an evaluation


def read_record(folder: Path) -> RunRecord:
    """The record of the run in `folder`. Raises FolderError when it is damaged."""
    path = folder / "run.json"
    try:
        return decode(RunRecord, json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise FolderError(f"{path} is damaged ({error}); name another run") from error


def encode(record: Any) -> Any:
    """A record as plain JSON values."""
    return dataclasses.asdict(record)


def decode(kind: type[T], value: Any) -> T:
    """The record of type `kind` in `value`, as `encode` wrote it.

    Fields that `kind` does not know are passed over, so an older reader opens a newer file.
    Raises KeyError, TypeError or ValueError where `value` is not such a record.
    """
    return typing.cast(T, _decode(kind, value))


def _decode(kind: Any, value: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _decode(next(a for a in args if a is not type(None)), value)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        required = {
            f.name
            for f in dataclasses.fields(kind)
            if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
        }
        if not isinstance(value, dict) or required - value.keys():
            raise ValueError(f"not a {getattr(kind, '__name__', kind)}: {str(value)[:80]}")
        return typing.cast(Any, kind)(
            **{k: _decode(hints[k], v) for k, v in value.items() if k in hints}
        )
    if origin in (tuple, dict) and not isinstance(value, dict if origin is dict else list):
        raise ValueError(f"{value!r:.80} is no {'table' if origin is dict else 'list'}")
    if origin is tuple:
        return tuple(_decode(args[0], v) for v in value)
    if origin is dict:
        return {k: _decode(args[1], v) for k, v in value.items()}
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(kind, type) and not isinstance(value, kind):
        raise ValueError(f"{value!r:.80} is not {kind.__name__}")
    return value
