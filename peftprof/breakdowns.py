"""Frozen results of reading a trace; what the report formats and the JSON holds.

Times are nanoseconds (`*_ns`) of one step unless the name says otherwise, memory is bytes,
shares are of the median step. None means not known, never zero.
"""

from dataclasses import dataclass, field

PHASES = ("data", "forward", "backward", "optimizer", "other")
CATEGORIES = (
    "dequant",
    "base_gemm",
    "adapter_gemm",
    "attention",
    "elementwise",
    "embedding",
    "head_loss",
    "optimizer",
    "memcpy",
    "communication",
)
# Why a device had nothing to do: the CPU had not launched its next work; the CPU was
# loading data; the CPU had waited for the device and begun anew; the work was launched,
# but waited for other work or for its start (or its launch is not in the trace).
IDLE_CAUSES = ("launch", "data", "sync", "queued")
MEMORY_PARTS = (
    "base_weights",
    "quantisation_state",
    "adapters",
    "gradients",
    "optimizer_state",
    "activations",
    "dequant_workspace",
    "other",
)


@dataclass(frozen=True)
class Spread:
    """Median, smallest and largest of a quantity over the steps it was seen in."""

    median: float
    min: float
    max: float


@dataclass(frozen=True)
class Placed:
    """A rule and the share of a time (0 to 1) that it placed in its category."""

    rule: str
    share: float


@dataclass(frozen=True)
class Row:
    """One phase x category of a breakdown, per step.

    `ns` is the median over steps, `min_ns` and `max_ns` the extremes, all times the one
    factor that makes rows, idle and unattributed add up to the median step.
    `count` is the median number of operators or kernels in a step. `rules` says which rules
    put the row's time there, the largest share first.
    """

    phase: str
    category: str
    ns: float
    share: float
    count: float
    min_ns: float
    max_ns: float
    rules: tuple[Placed, ...] = ()


@dataclass(frozen=True)
class Operator:
    """One operator or kernel name: self time and calls per step (mean over steps).

    `mean_ns` is of one call, None where it was seen running but not beginning; `rule` is
    the one that placed most of its time.
    """

    name: str
    category: str
    ns: float
    share: float
    count: float
    mean_ns: float | None = None
    rule: str = ""


@dataclass(frozen=True)
class Layer:
    """Time of one layer by its module path: mean over steps, forward and backward apart."""

    path: str
    forward_ns: float
    backward_ns: float
    share: float


@dataclass(frozen=True)
class Communication:
    """Collectives: what other work hid and what it did not, by the factor of the rows.

    `exposed_ns` is the sum of their rows, `hidden_ns` the median over steps, total both.
    """

    total_ns: float
    hidden_ns: float
    exposed_ns: float


@dataclass(frozen=True)
class Totals:
    """The whole trace, not only its steps: unions of device time from first to last event.

    busy + idle = span. compute, communication (kernels of collectives, by their own names)
    and memory (copies and fills) are each a union of their own, so where they overlap they
    add up to more than busy.
    On a CPU trace the device is the stepping thread and all work is compute.
    """

    span_ns: float
    busy_ns: float
    idle_ns: float
    compute_ns: float
    communication_ns: float
    memory_ns: float


@dataclass(frozen=True)
class Ceilings:
    """What a device was measured to reach: products in FLOP/s by dtype, copies in bytes/s.

    `source` says where and when it was measured.
    """

    source: str
    flops_per_s: dict[str, float]
    bytes_per_s: float


@dataclass(frozen=True)
class Work:
    """Floating point operations and bytes of a category in a step, from operand shapes.

    `bytes` is each operand read and each result written once, a lower bound of the traffic.
    `known` is the share of the category's time whose operands the trace tells. The shares
    are of the measured ceilings, over the time that is known; `bound` is `compute`,
    `memory`, or `overhead` where neither ceiling is near; None without ceilings.
    """

    category: str
    ns: float
    known: float
    flops: float
    bytes: float
    dtype: str
    flops_share: float | None = None
    bytes_share: float | None = None
    bound: str | None = None


@dataclass(frozen=True)
class MemoryPart:
    """Bytes of one kind (MEMORY_PARTS) at the peak, and in how many blocks."""

    part: str
    bytes: int
    blocks: int


@dataclass(frozen=True)
class MemoryPeak:
    """The allocator's peak in the memory step, split; `parts` add up to `peak_bytes`.

    `phase` and `layer` say where the peak was. `reserved_bytes` and `process_bytes` (NVML
    on a GPU, resident memory on a CPU) are of the run's timed pass, with `allocated_bytes`
    the peak there; `notes` say what could not be told.
    """

    source: str
    device: str
    peak_bytes: int
    parts: tuple[MemoryPart, ...]
    phase: str
    layer: str
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    process_bytes: int | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Breakdown:
    """Where one run's median step went. `rows` + idle + unattributed = `step_ns.median`.

    `operators` and `unattributed_operators` are the longest 200 of each, not all.
    `steps_by` names the ranges that were taken for steps, or is `whole trace`. `if_free` says
    of categories and of idle how many times as fast a step would be if their own time were
    nothing, the most first: over the steps, an upper bound (what they hid would show).
    """

    name: str
    source: str
    device: str
    steps: int
    step_ns: Spread
    rows: tuple[Row, ...]
    unattributed_ns: float
    idle_ns: float
    idle_by_phase_ns: dict[str, float]
    overlap_ns: float
    operators: tuple[Operator, ...]
    unattributed_operators: tuple[Operator, ...]
    idle_by_cause_ns: dict[str, float] = field(default_factory=dict)
    steps_by: str = ""
    rank: int | None = None
    rules: tuple[Placed, ...] = ()
    layers: tuple[Layer, ...] = ()
    communication: Communication | None = None
    totals: Totals | None = None
    work: tuple[Work, ...] = ()
    ceilings: Ceilings | None = None
    memory: MemoryPeak | None = None
    if_free: dict[str, Spread] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bar:
    """One bar of a waterfall: what a category adds to (or takes from) the step, in ns."""

    category: str
    ns: float


@dataclass(frozen=True)
class Comparison:
    """Run `other` against run `base` (numbers in the order given).

    `bars`, idle and unattributed among them, sum exactly to `step_ns`, the difference of
    the median profiled steps. `speedup` is base's step over other's, `timed_speedup` the
    same of the timed pass without a profiler; both None where refused or not known.
    """

    base: int
    other: int
    step_ns: float
    bars: tuple[Bar, ...]
    speedup: float | None
    timed_speedup: float | None


@dataclass(frozen=True)
class Span:
    """A stretch on a lane of a timeline, ns since the step began."""

    start_ns: int
    end_ns: int
    category: str
    phase: str
    name: str


@dataclass(frozen=True)
class Lane:
    """A CPU thread or a stream, its spans in order and apart from each other."""

    name: str
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Timeline:
    """One step drawn out: the one nearest to the median. `left_out` short spans are not in it."""

    step: int
    length_ns: int
    lanes: tuple[Lane, ...]
    left_out: int
