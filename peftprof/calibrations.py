"""What devices need for the operators of a fine-tuning step: measured here, or from data sheets.

A `Calibration` is a set of curves, seconds of one call against its size, and a few constants.
`python -m peftprof calibrate` measures one; `devices.py` keeps it, and makes rough ones of data
sheets. docs/devices.md has the model of time and its errors.

    kind                size     what was measured
    gemm                flops    products X W^T; bytes: those whose weights take longer to read;
                                 narrow: those of an adapter of rank 8, the mean of all forms
    bmm                 flops    batched products of short sides; and bytes
    attention           flops    F.scaled_dot_product_attention; and bytes: short sequences
    attention_backward  flops    its backward
    copy                bytes    clone and casts; look-ups, fills, cat
    elementwise         bytes    add; mul, masks, comparisons, sums, softmax's backward
    transcendental      bytes    gelu and its backward; silu
    softmax             bytes    softmax of short rows, as attention's; exp, tanh
    normalisation       bytes    layer_norm and its backward; rms_norm
    dequant             bytes    NF4 to the dtype named, as the run would do it
    dropout             bytes    drawing a mask of the dtype named: the mask's bytes alone
    optimizer           bytes    a step of fused AdamW over fp32 parameters, 28 bytes each

Operations and bytes are those of `trace/formulas.py`: each operand read once, each result
written once. `moved` gives the bytes of the last three for a number of elements.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from peftprof.breakdowns import Ceilings

Floats = NDArray[np.float64]

VERSION: Final = 1
FLOPS, BYTES = "flops", "bytes"
# Of gemm besides: per flops, products one side of which is `NARROW_SIDE` long.
NARROW: Final = "narrow"
NARROW_SIDE, WIDE_SIDE = 8, 64
PRODUCTS: Final = ("gemm", "bmm", "attention", "attention_backward")
MOVES: Final = ("copy", "elementwise", "transcendental", "softmax", "normalisation")
KINDS: Final = (*PRODUCTS, *MOVES, "dequant", "dropout", "optimizer")
ITEMSIZE: Final = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
# The two costs of a product, arithmetic and traffic, overlap in part: they are joined as
# (a^p + b^p)^(1/p). 1 is no overlap, infinity complete; docs/devices.md has the errors.
OVERLAP: Final = 3.0
# More disturbed calls than this are not the system's own small doings.
BUSY: Final = 0.1


@dataclass(frozen=True)
class Curve:
    """Seconds of one call against its size; `per` is flops, bytes or narrow (flops, too).

    `best_s` is the fastest of all repeats and what `at` goes by, made to never fall with
    size; `median_s` and `spread`, (p75 - p25) / median, say how disturbed each point was.
    """

    kind: str
    dtype: str
    per: str
    sizes: tuple[float, ...]
    best_s: tuple[float, ...]
    median_s: tuple[float, ...]
    spread: tuple[float, ...]

    def __post_init__(self) -> None:
        """Raises ValueError where the numbers cannot be a curve."""
        sizes, best = np.asarray(self.sizes, float), np.asarray(self.best_s, float)
        lengths = {len(self.sizes), len(self.best_s), len(self.median_s), len(self.spread)}
        if self.per not in (FLOPS, BYTES, NARROW) or len(lengths) != 1 or not len(sizes):
            raise ValueError(f"no curve of {self.kind}: per {self.per!r}, lengths {lengths}")
        if not (np.isfinite(sizes).all() and np.isfinite(best).all()):
            raise ValueError(f"the curve of {self.kind} has numbers that are not finite")
        if (
            sizes[0] <= 0
            or best[0] <= 0
            or (np.diff(sizes) <= 0).any()
            or (np.diff(best) < 0).any()
        ):
            raise ValueError(f"the curve of {self.kind} must be positive and must not fall")

    def at(self, sizes: Floats) -> Floats:
        """Seconds at `sizes`: linear between the logarithms of neighbours.

        Below the first point its time, which is what a call costs whatever its size; above
        the last in proportion to the size.
        """
        x, y = np.log(self.sizes), np.log(self.best_s)
        wanted = np.log(np.maximum(sizes, self.sizes[0]))
        found: Floats = np.exp(np.interp(wanted, x, y) + np.maximum(wanted - x[-1], 0.0))
        return found

    @property
    def floor_s(self) -> float:
        """Seconds of the smallest call."""
        return self.best_s[0]

    @property
    def rate(self) -> float:
        """The most that was reached, in `per` a second."""
        return max(size / s for size, s in zip(self.sizes, self.best_s, strict=True))


@dataclass(frozen=True)
class Overheads:
    """Host seconds beside the work itself, measured over hundreds of tiny operators.

    `call_s`, of an operator without autograd, is in every curve of a CPU already; on a GPU
    it is what launching takes, and `kernel_s` the shortest time of a kernel on the device.
    `record_s` is what autograd adds to an operator in forward, `node_s` to the operators of a
    node in backward, `module_s` a call of an nn.Module, `autocast_s` autocast to an operator.
    `fresh_s` is what each byte of a large result costs besides on a CPU: above 32 MiB glibc
    gives memory back and gets new pages every time.
    """

    call_s: float
    record_s: float
    node_s: float
    module_s: float
    autocast_s: float
    kernel_s: float
    fresh_s: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """What is known of one device. `basis` is `measured` or `datasheet`.

    `interval` is the relative error to expect of a call's time: of nine of ten held-out
    calls where it was measured, of a step on a data sheet's device. `process_bytes` is the
    resident memory of a process that has imported all that a run imports, `context_bytes`
    what a CUDA context takes of the device, 0 on a CPU. `disturbed` is the share of the timed
    calls that something else disturbed; above `BUSY` the machine was busy.
    """

    version: int
    basis: str
    source: str
    device: str
    kind: str  # "cpu" or "cuda"
    memory_bytes: int
    threads: int
    created: str  # ISO 8601
    versions: dict[str, str]
    ceilings: Ceilings
    curves: tuple[Curve, ...]
    overheads: Overheads
    process_bytes: int
    context_bytes: int
    interval: float
    disturbed: float = 0.0
    notes: tuple[str, ...] = ()
    aliases: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError where a number is missing that every device has."""
        if self.basis not in ("measured", "datasheet") or self.kind not in ("cpu", "cuda"):
            raise ValueError(f"no calibration: basis {self.basis!r}, kind {self.kind!r}")
        if self.memory_bytes <= 0 or self.threads <= 0 or not 0 < self.interval < 10:
            raise ValueError("a calibration with impossible memory, threads or interval")
        needed = [("elementwise", "fp32", BYTES)]
        needed += [("gemm", dtype, per) for dtype in self.dtypes for per in (FLOPS, BYTES)]
        if missing := [name for name in needed if name not in self._named]:
            raise ValueError(f"a calibration without {missing[0]}")

    @cached_property
    def _named(self) -> dict[tuple[str, str, str], Curve]:
        return {(c.kind, c.dtype, c.per): c for c in self.curves}

    @property
    def key(self) -> str:
        """What it is kept under: device, threads and torch."""
        return key_of(self.device, self.threads, self.versions.get("torch", ""))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes whose products are known."""
        return tuple(
            d for d in ITEMSIZE if any(c.kind == "gemm" and c.dtype == d for c in self.curves)
        )

    @property
    def busy(self) -> bool:
        """Whether it was measured while something else was at work on the machine."""
        return self.disturbed > BUSY

    def curve(self, kind: str, dtype: str, per: str = BYTES) -> Curve | None:
        """The curve of `kind` in `dtype`; None where none was measured."""
        return self._named.get((kind, dtype, per))

    def seconds(
        self,
        kind: str,
        dtype: str,
        flops: Any,
        bytes: Any,
        rows: Any = None,
    ) -> Floats:
        """Seconds of each of some calls, undisturbed: arrays of one length, or numbers.

        `rows` of a product X [M, K] W [N, K]^T, or of its backward, is M: with it N and K
        follow from operations and bytes. Then the bytes of the weight, which come from
        memory, are told from those of activations, which the call before left in a cache,
        and products with a side below 64 go towards those of an adapter. Without it every
        byte counts as the weight's. An unknown
        kind moves its bytes as `elementwise` does; so does a known one in a dtype that was
        not measured, by its own fp32 curve. Attention that was not measured goes by `bmm`.
        Raises ValueError for products in a dtype that has no rate here.
        """
        flops, moved = (
            np.atleast_1d(np.asarray(flops, float)),
            np.atleast_1d(np.asarray(bytes, float)),
        )
        if kind not in PRODUCTS:
            return self._moving(kind, dtype).at(moved)
        by_flops, by_bytes = self._product(kind, dtype, FLOPS), self._product(kind, dtype, BYTES)
        floor = min(by_flops.floor_s, by_bytes.floor_s)
        if kind != "gemm" or rows is None:
            return _joined(floor, by_flops.at(flops), by_bytes.at(moved))
        M = np.maximum(_column(rows), 1.0)
        weight = np.minimum(flops / (2 * M) * ITEMSIZE[dtype], moved)
        near = self._moving("copy", dtype)
        traffic = by_bytes.at(weight) + near.at(moved - weight) - near.floor_s
        wide = _joined(floor, by_flops.at(flops), traffic)
        narrow = self.curve("gemm", dtype, NARROW)
        if narrow is None:
            return wide
        side = _short_side(flops / (2 * M), (moved - weight) / (M * ITEMSIZE[dtype]))
        thin = narrow.at(flops * np.maximum(NARROW_SIDE / side, 1.0))
        share = np.log(np.clip(side, NARROW_SIDE, WIDE_SIDE) / NARROW_SIDE)
        share /= np.log(WIDE_SIDE / NARROW_SIDE)
        between: Floats = np.exp(
            (1 - share) * np.log(np.maximum(thin, wide)) + share * np.log(wide)
        )
        return between

    def _product(self, kind: str, dtype: str, per: str) -> Curve:
        for name in (kind, "bmm", "gemm"):
            if found := self.curve(name, dtype, per):
                return found
        raise ValueError(f"{self.device} has no rate of {kind} in {dtype}; it has {self.dtypes}")

    def _moving(self, kind: str, dtype: str) -> Curve:
        for name, of in ((kind, dtype), (kind, "fp32"), ("elementwise", dtype)):
            if found := self.curve(name, of):
                return found
        return self._named["elementwise", "fp32", BYTES]


@dataclass(frozen=True)
class Checked:
    """A call that is in no curve: seconds that the curves give it, and what it took at best."""

    kind: str
    dtype: str
    label: str
    predicted_s: float
    measured_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus one."""
        return self.predicted_s / self.measured_s - 1


def _column(values: Any) -> Floats:
    return np.atleast_1d(np.asarray(values, np.float64))


def _joined(floor: float, work: Floats, traffic: Floats) -> Floats:
    """Arithmetic and traffic of a product, which overlap in part, on what a call costs."""
    both = np.maximum(work - floor, 0) ** OVERLAP + np.maximum(traffic - floor, 0) ** OVERLAP
    joined: Floats = floor + both ** (1 / OVERLAP)
    return joined


def _short_side(area: Floats, perimeter: Floats) -> Floats:
    """The smaller of N and K, from N K and N + K; at least 1."""
    root = np.sqrt(np.maximum(perimeter**2 - 4 * area, 0.0))
    side: Floats = np.maximum((perimeter - root) / 2, 1.0)
    return side


def moved(kind: str, dtype: str, elements: Any) -> Floats:
    """Bytes that `seconds` wants for a number of elements of dequant, dropout or optimizer.

    NF4 with fp32 scales in blocks of 64: half a byte and 1/16 byte read, the weight written.
    A mask: its own size. AdamW on fp32: parameter and two moments read and written, the
    gradient read. Any other kind: read and written once.
    """
    n, item = _column(elements), ITEMSIZE[dtype]
    per = {"dequant": 0.5 + 4 / 64 + item, "dropout": item, "optimizer": 7 * 4}.get(kind, 2 * item)
    result: Floats = n * per
    return result


def key_of(device: str, threads: int, torch: str) -> str:
    """The name of a calibration: letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", f"{device} {threads} threads torch {torch}".lower()).strip(
        "-"
    )
