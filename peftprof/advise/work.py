"""What the operators of a traced step take: operations, bytes, and seconds on a device.

Operations and bytes are counted as the breakdown counts them (docs/work-and-ceilings.md);
seconds are a calibration's, an operator at a time (docs/devices.md).
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from peftprof.advise import growth
from peftprof.advise.growth import Floats, Markers
from peftprof.advise.tracker import BACKWARD, FORWARD, Operator
from peftprof.calibrations import Calibration, moved

NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

_OPERATORS = {
    "copy": """
        _to_copy clone copy_ cat index_select embedding zeros fill_ zero_ new_zeros repeat
    """,
    "transcendental": "gelu gelu_backward silu silu_backward",
    "softmax": "_softmax exp tanh tanh_backward sigmoid rsqrt pow cos sin",
    "normalisation": "native_layer_norm native_layer_norm_backward mean _fused_rms_norm",
    "free": """
        view _unsafe_view _reshape_alias t transpose permute expand as_strided slice select split
        split_with_sizes unbind squeeze unsqueeze alias detach empty empty_like empty_strided
        new_empty new_empty_strided lift_fresh set_ arange
    """,
}
_KINDS = {name: kind for kind, names in _OPERATORS.items() for name in names.split()}

# glibc gives blocks larger than this back when they are freed, and their pages are new each time.
FRESH = 32 << 20
Tensor = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Call:
    """One call's cost: `rows` is M of a product [M, K] x [K, N], 0 elsewhere."""

    kind: str
    dtype: str
    flops: int
    tensors: tuple[Tensor, ...]  # whose bytes are moved
    rows: int = 0
    elements: int = 0  # of what is dequantised, drawn
    made: tuple[Tensor, ...] = ()  # in memory that is new


def calls(operator: Operator) -> Iterator[Call]:
    """What one operator does on the device; nothing for views."""
    name = operator.name.partition("::")[2]
    if _KINDS.get(name) == "free" or not operator.writes:
        return
    every = operator.reads + operator.writes
    if name in ("mm", "addmm", "bmm", "baddbmm"):
        a, b = operator.reads[-2:] if name in ("mm", "bmm") else operator.reads[1:3]
        *batch, M, K = a[1]
        flops = 2 * math.prod(batch) * M * K * b[1][-1]
        made = operator.writes
        yield Call("bmm" if batch else "gemm", _dtype(a), flops, every, M, made=made)
    elif name in ("nf4_linear", "nf4_linear_dx"):
        x, y = operator.reads[0], operator.writes[0]
        weight = x[1][1] * y[1][1]
        yield Call("dequant", _dtype(x), 0, (), elements=weight)
        dense: Tensor = (x[0], (y[1][1], x[1][1]))
        yield Call("gemm", _dtype(x), 2 * x[1][0] * weight, (x, dense, y), x[1][0])
    elif name == "nf4_dequantize":
        out = operator.writes[0]
        yield Call("dequant", _dtype(out), 0, (), elements=math.prod(out[1]))
    elif name == "dropout_mask":
        out = operator.writes[0]
        yield Call("dropout", _dtype(out, "int8"), 0, (), elements=math.prod(out[1]))
    elif name.startswith("_scaled_dot_product"):
        yield _attention(name, operator)
    else:
        if name == "native_dropout":
            x = operator.reads[0]
            yield Call("dropout", _dtype(x), 0, (), elements=math.prod(x[1]))
        widest = max(every, key=lambda tensor: math.prod(tensor[1]))
        made = () if name.endswith("_") else operator.writes
        yield Call(_KINDS.get(name, "elementwise"), _dtype(widest), 0, every, made=made)


def _attention(name: str, operator: Operator) -> Call:
    backward = name.endswith("_backward")
    first = 1 if backward else 0
    q, k = operator.reads[first : first + 2]
    scores = math.prod(q[1][:3]) * k[1][2]
    flops = 2 * scores * q[1][3] * (5 if backward else 2)
    kind = "attention_backward" if backward else "attention"
    return Call(kind, _dtype(q), flops, operator.reads[:4] + operator.writes[:3])


def _dtype(tensor: Tensor, other: str = "fp32") -> str:
    return NAMES.get(tensor[0], other)


@dataclass(frozen=True)
class Work:
    """All calls of a step of one kind and dtype, in columns; quantities are coefficients of
    what they grow with (`growth`), [calls, TERMS].
    """

    kind: str
    dtype: str
    phase: str
    counts: Floats
    flops: Floats
    bytes: Floats
    rows: Floats
    made: Floats  # bytes in memory that is new


@dataclass(frozen=True)
class StepWork:
    """What a step does: its work, and how many operators the host calls for it."""

    work: tuple[Work, ...]
    forward_calls: int
    backward_calls: int
    autocast: bool

    def seconds(
        self, device: Calibration, batch: float, rank: int, tokens: float, trained: float
    ) -> Floats:
        """Seconds on `device` of forward, backward and optimizer.

        For `batch` examples of `tokens` tokens each, and `trained` parameters.
        """
        spent = {FORWARD: 0.0, BACKWARD: 0.0}
        grown = growth.products(batch, rank, tokens)
        for work in self.work:
            times = device.seconds(
                work.kind,
                work.dtype,
                work.flops @ grown,
                work.bytes @ grown,
                work.rows @ grown if work.kind == "gemm" else None,
            )
            if device.kind == "cpu":
                new = work.made @ grown
                times = times + np.where(new > FRESH, new, 0) * device.overheads.fresh_s
            spent[work.phase] += float(work.counts @ times)
        moves = moved("optimizer", "fp32", trained)
        optimizer = float(device.seconds("optimizer", "fp32", 0.0, moves)[0])
        on_device = np.array([spent[FORWARD], spent[BACKWARD], optimizer])
        over = device.overheads
        forward = self.forward_calls * (over.record_s + self.autocast * over.autocast_s)
        host = np.array([forward, self.backward_calls * over.node_s, 0.0])
        if device.kind == "cpu":  # where a call's own time is in the curves
            added: Floats = on_device + host
            return added
        host += over.call_s * np.array([self.forward_calls, self.backward_calls, 4])
        # The host runs ahead of the device, through a whole step: the slower of them counts.
        return on_device if on_device.sum() >= host.sum() else host


def of(
    operators: Iterable[tuple[int, Sequence[Operator]]], markers: Markers, autocast: bool
) -> StepWork:
    """The work of a traced step: operators, and how often each of a sequence is called."""
    found: Counter[Operator] = Counter()
    for times, called in operators:
        for operator in called:
            found[operator] += times
    groups: dict[tuple[str, str, str], list[tuple[int, Call]]] = {}
    calling = Counter[str]()
    for operator, count in found.items():
        for call in calls(operator):
            groups.setdefault((call.kind, call.dtype, operator.phase), []).append((count, call))
        if _KINDS.get(operator.name.partition("::")[2]) != "free":
            calling[operator.phase] += count
    return StepWork(
        tuple(_columns(markers, *key, found=rows) for key, rows in groups.items()),
        calling[FORWARD],
        calling[BACKWARD],
        autocast,
    )


def _columns(
    markers: Markers, kind: str, dtype: str, phase: str, found: list[tuple[int, Call]]
) -> Work:
    def size(tensors: tuple[Tensor, ...]) -> list[float]:
        return markers.spread(of.itemsize * math.prod(shape) for of, shape in tensors)

    per = float(moved(kind, dtype, 1)[0]) if any(call.elements for _, call in found) else 0.0

    def moves(call: Call) -> list[float]:
        if call.elements:
            return [per * amount for amount in markers.spread([call.elements])]
        return size(call.tensors)

    return Work(
        kind,
        dtype,
        phase,
        np.array([count for count, _ in found], np.float64),
        np.array([markers.spread([call.flops]) for _, call in found]),
        np.array([moves(call) for _, call in found]),
        np.array([markers.spread([call.rows]) for _, call in found]),
        np.array([size(call.made) for _, call in found]),
    )
