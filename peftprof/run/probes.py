"""The calls that a calibration times: what a fine-tuning step is made of, in many sizes.

`ladders` are the curves' points. `held_out` are other shapes and other operators of the same
kinds, that the curves are held against; none of them is in a curve.
"""

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional

from peftprof.calibrations import BYTES, FLOPS, ITEMSIZE, NARROW, NARROW_SIDE, moved
from peftprof.run.ceilings import NAMES, dtypes
from peftprof_kernels.backends import dequantize
from peftprof_kernels.dropout import draw_mask, draw_seed
from peftprof_kernels.nf4 import NF4Weight, block_scales

DTYPES: Final = {name: dtype for dtype, name in NAMES.items()}
# Operands are views of one flat tensor a dtype. Weights, and what forward saved for backward,
# are taken from all along it, so that they come from memory as in a step; what the call before
# would have left in a cache is always at its beginning.
_POOL_BYTES: Final = {"cpu": 1 << 27, "cuda": 1 << 29}
_MOST_BYTES: Final = {"cpu": 3 << 25, "cuda": 1 << 30}
_PLACES: Final = 256
_WIDTH: Final = 384  # of the rows that normalisation takes


@dataclass(frozen=True)
class Probe:
    """One call: its work as `trace/formulas.py` counts it, and what it is called in a table."""

    kind: str
    dtype: str
    per: str
    flops: float
    bytes: float
    rows: float | None
    label: str
    call: Callable[[], object]

    @property
    def size(self) -> float:
        """Its place on the curve."""
        return self.bytes if self.per == BYTES else self.flops


class Pool:
    """Random operands in each dtype, without an allocation for each probe."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flat: dict[str, Tensor] = {}
        generator = torch.Generator(device).manual_seed(0)
        size = _POOL_BYTES[device.type] // 4
        values = torch.randn(size, device=device, generator=generator)
        for dtype in dtypes(device):
            self._flat[NAMES[dtype]] = torch.cat([values.to(dtype)] * (4 // dtype.itemsize))

    def near(self, dtype: str, *shape: int, after: int = 0) -> Tensor:
        """A tensor that is always in the same place, `after` elements from the start."""
        count = _count(shape)
        return self._flat[dtype][after : after + count].view(shape)

    def far(self, dtype: str, *shape: int) -> Callable[[], Tensor]:
        """Tensors all along the pool, one after the other at each call."""
        count, flat = _count(shape), self._flat[dtype]
        places = max(min(flat.numel() // count, _PLACES), 1)
        apart = (flat.numel() - count) // places // 64 * 64
        views = [flat[i * apart : i * apart + count].view(shape) for i in range(places)]
        return itertools.cycle(views).__next__


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def ladders(device: torch.device, pool: Pool, most: float = 1.0) -> Iterator[list[Probe]]:
    """The points of each curve, from small to large; `most` makes the largest smaller."""
    limit = int(_MOST_BYTES[device.type] * most)
    for name in (NAMES[dtype] for dtype in dtypes(device)):
        sides = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
        largest = (8192 if device.type == "cuda" else 4096) * most  # operands are in the pool
        yield [product(pool, name, n, n, n) for n in sides if n <= largest]
        yield [
            _thin(pool, name, n)
            for n in (64, 128, 256, 384, 512, 768, 1024, 2048, 4096, 8192)
            if n * n * ITEMSIZE[name] <= limit / 4
        ]
        rows = [M for M in (8, 32, 128, 512, 2048, 8192) if 8192 * most >= M]
        yield [probe for M in rows for probe in _adapter(pool, name, M)]
        batches = (1, 4, 16, 64, 256, 1024)
        yield [batched(pool, name, b, 64, 64) for b in batches]
        yield [batched(pool, name, b, 16, 32, BYTES) for b in (4, 16, 64, 256, 1024, 4096)]
        for backward in (False, True):
            yield [
                attention(pool, name, b, heads, length, 64, backward)
                for b, heads, length in (
                    (1, 1, 64),
                    (1, 4, 64),
                    (1, 12, 64),
                    (1, 12, 128),
                    (4, 12, 128),
                    (8, 12, 256),
                )
            ]
            yield [
                attention(pool, name, b, 12, 16, 32, backward, BYTES) for b in (1, 4, 16, 64, 256)
            ]
        for kind, operators in CURVES.items():
            yield [
                dataclasses.replace(move(pool, name, kind, operator, size), bytes=float(size))
                for size in (1 << 12 << 2 * i for i in range(9))
                for operator in operators
                if size <= limit
            ]
        if name != "fp32" or device.type == "cpu":
            yield [unpack(device, name, n, n) for n in (64, 128, 256, 512, 1024, 2048)]
    for name in ("int8", *(NAMES[dtype] for dtype in dtypes(device))):
        yield [mask(device, name, 1 << i) for i in range(10, 23, 2)]
    yield [adamw(device, 1 << i) for i in range(8, 23, 2)]


def held_out(device: torch.device, pool: Pool) -> list[Probe]:
    """Shapes of transformers, forward and backward, and operators that no curve is made of."""
    found: list[Probe] = []
    for name in (NAMES[dtype] for dtype in dtypes(device)):
        shapes = [(M, N, K) for M in (32, 160, 448) for N, K in ((384, 384), (1536, 384), (64, 64))]
        shapes += [(448, 384, 1536), (2048, 384, 384), (128, 768, 768), (128, 3072, 768)]
        if device.type == "cuda":
            shapes += [(M, 4096, 4096) for M in (128, 2048, 8192)] + [(2048, 11008, 4096)]
        for M, N, K in shapes:
            found += [product(pool, name, M, N, K, form) for form in FORMS]
        found += [probe for M in (160, 448, 1200) for probe in _adapter(pool, name, M)]
        found += [batched(pool, name, b, n, 32) for b, n in ((192, 24), (192, 40), (96, 128))]
        for backward in (False, True):
            found += [attention(pool, name, b, 12, n, 32, backward) for b, n in ((16, 32), (8, 96))]
        for operator, kind in OPERATORS.items():
            found += [move(pool, name, kind, operator, size) for size in (300_000, 3_000_000)]
        if name != "fp32" or device.type == "cpu":
            found += [unpack(device, name, 384, 384), unpack(device, name, 1536, 384)]
        found += [mask(device, name, 448 * 384)]
    found += [mask(device, "int8", 448 * 384), adamw(device, 147_456), adamw(device, 589_824)]
    return found


# --- Products

FORMS: Final = ("XW", "dYW", "dYX")


def product(pool: Pool, dtype: str, M: int, N: int, K: int, form: str = "XW") -> Probe:
    """X W^T [M, K] [N, K]; dY W, the gradient of X; dY^T X, the gradient of W."""
    if form == "dYX":
        dY, X = pool.near(dtype, M, N), pool.far(dtype, M, K)

        def call() -> Tensor:
            return dY.t() @ X()
    else:
        first, W = pool.near(dtype, M, K if form == "XW" else N), pool.far(dtype, N, K)

        def call() -> Tensor:
            return functional.linear(first, W()) if form == "XW" else first @ W()

    moved = ITEMSIZE[dtype] * (M * K + N * K + M * N)
    return Probe("gemm", dtype, FLOPS, 2 * M * N * K, moved, M, f"{form} {M}x{N}x{K}", call)


def _thin(pool: Pool, dtype: str, n: int) -> Probe:
    """Eight rows against a weight [n, n] from memory; its size is the weight's bytes."""
    whole = product(pool, dtype, 8, n, n)
    weight = ITEMSIZE[dtype] * n * n
    return Probe("gemm", dtype, BYTES, whole.flops, weight, None, f"weight {n}x{n}", whole.call)


def _adapter(pool: Pool, dtype: str, M: int) -> Iterator[Probe]:
    """The six products of an adapter of rank 8 on 384 features, forward and backward."""
    for sides in ((NARROW_SIDE, _WIDTH), (_WIDTH, NARROW_SIDE)):
        for form in FORMS:
            yield dataclasses.replace(product(pool, dtype, M, *sides, form), per=NARROW)


def batched(pool: Pool, dtype: str, batch: int, n: int, width: int, per: str = FLOPS) -> Probe:
    """Q K^T of `batch` heads of n tokens."""
    q = pool.near(dtype, batch, n, width)
    k = pool.near(dtype, batch, n, width, after=q.numel())

    def call() -> Tensor:
        return torch.bmm(q, k.transpose(1, 2))

    moved = ITEMSIZE[dtype] * batch * (2 * n * width + n * n)
    label = f"{batch} of {n}x{n}x{width}"
    return Probe("bmm", dtype, per, 2 * batch * n * n * width, moved, None, label, call)


def attention(
    pool: Pool,
    dtype: str,
    batch: int,
    heads: int,
    length: int,
    width: int,
    backward: bool,
    per: str = FLOPS,
) -> Probe:
    """scaled_dot_product_attention without mask or dropout, or its backward."""
    shape = (batch, heads, length, width)
    count = _count(shape)
    q, k, v = (pool.near(dtype, *shape, after=i * count).detach() for i in range(3))
    products, tensors = (5, 4) if backward else (2, 3)
    label = f"{'backward ' if backward else ''}{batch}x{heads} of {length}x{width}"
    flops = products * 2 * batch * heads * length * length * width
    # As the formulas count: operands, and results like Q, K, V (backward) or like Q (forward).
    bytes_ = ITEMSIZE[dtype] * count * (tensors + 2 + 3 if backward else tensors + 1)
    kind = "attention_backward" if backward else "attention"
    if not backward:

        def call() -> object:
            return functional.scaled_dot_product_attention(q, k, v)
    else:
        leaves = (q.requires_grad_(), k.requires_grad_(), v.requires_grad_())
        with torch.enable_grad():
            out = functional.scaled_dot_product_attention(q, k, v)
        gradient = pool.near(dtype, *shape, after=3 * count)

        def call() -> object:
            return torch.autograd.grad(out, leaves, gradient, retain_graph=True)

    return Probe(kind, dtype, per, flops, bytes_, None, label, call)


# --- What moves

# Several operators of a kind are one curve, of their mean time.
CURVES: Final = {
    "copy": ("copy", "cast"),
    "elementwise": ("add",),
    "transcendental": ("gelu", "gelu backward"),
    "softmax": ("softmax",),
    "normalisation": ("layer_norm", "layer_norm backward"),
}
OPERATORS: Final = {
    "look-up": "copy",
    "mul": "elementwise",
    "sum": "elementwise",
    "softmax backward": "elementwise",
    "silu": "transcendental",
    "tanh": "softmax",
    "rms_norm": "normalisation",
}
BACKWARDS: Final = ("gelu backward", "softmax backward", "layer_norm backward")


def move(pool: Pool, dtype: str, kind: str, operator: str, size: int) -> Probe:
    """An operator that reads and writes about `size` bytes."""
    item = ITEMSIZE[dtype]
    tensors = {"add": 3, "mul": 3, "sum": 1} | dict.fromkeys(BACKWARDS, 3)
    width = 32 if operator.startswith("softmax") else min(_WIDTH, max(size // 64, 8))
    each = size // (item * tensors.get(operator, 2))
    if operator == "cast":  # to the other of fp32 and a half precision, or to bf16
        each = size // (item + (4 if dtype != "fp32" else 2))
    rows = max(each // width, 1)
    x = pool.near(dtype, rows, width)
    if operator in ("add", "mul"):  # residuals and scalings are of what was just made
        y = pool.near(dtype, rows, width, after=rows * width)
        call: Callable[[], object] = (lambda: x + y) if operator == "add" else (lambda: x * y)
    else:
        call = _operator(operator, dtype, x, pool.far(dtype, rows, width), width)
    elements = rows * width
    bytes_: float = elements * item * tensors.get(operator, 2)
    if operator == "cast":
        bytes_ = elements * (item + (4 if dtype != "fp32" else 2))
    elif operator == "look-up":
        bytes_ += rows * 8
    return Probe(kind, dtype, BYTES, 0, bytes_, None, f"{operator} {bytes_ / 1e6:.3g} MB", call)


def _operator(
    operator: str, dtype: str, x: Tensor, far: Callable[[], Tensor], width: int
) -> Callable[[], object]:
    """x is what the operator before made; `far` gives what was made, or loaded, long ago."""
    weight, bias = x[0].clone(), x[0].clone()
    if operator == "look-up":
        index = torch.randperm(x.shape[0]).to(x.device)
        return lambda: far().index_select(0, index)
    if operator == "cast":
        other = torch.float32 if dtype != "fp32" else torch.bfloat16
        return lambda: far().to(other)
    if operator == "layer_norm backward":
        _, mean, rstd = torch.native_layer_norm(x, [width], weight, bias, 1e-5)
        backward = torch.ops.aten.native_layer_norm_backward
        wanted = [True, False, False]
        return lambda: backward(x, far(), [width], mean, rstd, weight, bias, wanted)
    made: dict[str, Callable[[], object]] = {
        "copy": lambda: far().clone(),
        "gelu": lambda: functional.gelu(x),
        "softmax": lambda: x.softmax(-1),
        "silu": lambda: functional.silu(x),
        "tanh": x.tanh,
        "softmax backward": lambda: torch._softmax_backward_data(x, far(), -1, x.dtype),
        "gelu backward": lambda: torch.ops.aten.gelu_backward(x, far()),
        "layer_norm": lambda: functional.layer_norm(x, (width,), weight, bias),
        "rms_norm": lambda: functional.rms_norm(x, (width,), weight),
        "sum": lambda: x.sum(0),
    }
    return made[operator]


# --- Our own


def unpack(device: torch.device, dtype: str, N: int, K: int) -> Probe:
    """NF4 to dense, by what a run would use here."""
    get_4bit_type = _bitsandbytes().functional.get_4bit_type
    packed = torch.randint(0, 256, (N * K // 2,), dtype=torch.uint8, device=device)
    absmax = torch.rand(-(-N * K // 64), device=device)
    weight = NF4Weight(packed, (N, K), 64, absmax, get_4bit_type("nf4", device=device))
    target = DTYPES[dtype]
    bytes_ = float(moved("dequant", dtype, N * K)[0])

    def ours() -> Tensor:
        return dequantize(weight, target)

    def native() -> Any:
        return torch.ops.bitsandbytes.dequantize_4bit(
            weight.packed, block_scales(weight), 64, "nf4", [N, K], target
        )

    call = native if hasattr(torch.ops.bitsandbytes, "dequantize_4bit") else ours
    # As run/adapters.py: compiled code only where its numbers are right.
    if call is native and (K % 64 or not torch.equal(native(), ours())):
        call = ours
    return Probe("dequant", dtype, BYTES, 0, bytes_, None, f"NF4 {N}x{K}", call)


def _bitsandbytes() -> Any:
    """The package; on some CPUs its import advises another that peftprof does not use."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
    finally:
        logger.setLevel(level)
    return bitsandbytes


def mask(device: torch.device, dtype: str, n: int) -> Probe:
    """Drawing a keep mask with p = 0.1."""
    target = torch.int8 if dtype == "int8" else DTYPES[dtype]
    bytes_ = float(moved("dropout", dtype, n)[0])

    def call() -> Tensor:
        return draw_mask((n,), 0.1, target, draw_seed(), device)

    return Probe("dropout", dtype, BYTES, 0, bytes_, None, f"mask {n}", call)


def adamw(device: torch.device, n: int) -> Probe:
    """A step of fused AdamW over one fp32 parameter."""
    parameter = torch.nn.Parameter(torch.zeros(n, device=device))
    parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer = torch.optim.AdamW([parameter], lr=1e-6, fused=True)
    bytes_ = float(moved("optimizer", "fp32", n)[0])
    return Probe("optimizer", "fp32", BYTES, 0, bytes_, None, f"AdamW {n}", optimizer.step)
