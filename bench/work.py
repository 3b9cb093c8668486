"""The least work a case takes, counted from its shapes, and what the device can do at most.

Bytes are those that must cross between memory and chip if every operand is read once and
every result is written once; FLOPs are the multiplications and additions of the matrix
products. The speed of light of a case is the longer of bytes over the copy bandwidth and
FLOPs over the GEMM peak, both measured on the same device in the same process, not taken
from a data sheet. A share above 1 means that the operands lay in a cache.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

Sample = Callable[[Callable[[], object], float, float], list[float]]

BLOCKSIZE = 64  # of the NF4 weights that the benchmarks make
BLOCKSIZE2 = 256


@dataclass(frozen=True)
class Work:
    """Bytes over the memory bus and floating point operations, at the least."""

    bytes: int
    flops: int

    def __add__(self, other: "Work") -> "Work":
        return Work(self.bytes + other.bytes, self.flops + other.flops)


def nf4_bytes(N: int, K: int) -> int:
    """A nested NF4 weight [N, K]: codes, their scales, the scales' scales, both tables."""
    blocks = -(-N * K // BLOCKSIZE)
    packed = (N * K + 1) // 2
    return packed + blocks + 4 * -(-blocks // BLOCKSIZE2) + 4 * 256 + 4 + 4 * 16


def weight_bytes(N: int, K: int, base: str, itemsize: int) -> int:
    """A base weight as it is stored: nf4, or dense with `itemsize` bytes an element."""
    return nf4_bytes(N, K) if base == "nf4" else N * K * itemsize


def dequantize(N: int, K: int, itemsize: int) -> Work:
    """Read the weight, write it dense. Its N K products count for nothing: no GEMM unit."""
    return Work(nf4_bytes(N, K) + N * K * itemsize, 0)


def linear(M: int, N: int, K: int, base: str, itemsize: int) -> Work:
    """Y = X W^T, and as well dX = dY W: the weight once, X [M, K] and Y [M, N] once."""
    return Work(weight_bytes(N, K, base, itemsize) + M * (N + K) * itemsize, 2 * M * N * K)


def lora_forward(
    M: int, N: int, K: int, r: int, base: str, itemsize: int, adapter_itemsize: int
) -> Work:
    """The base product and the adapter's two: A [r, K] and B [N, r] are read, S stays on chip."""
    adapter = Work(r * (N + K) * adapter_itemsize, 2 * M * r * (N + K))
    return linear(M, N, K, base, itemsize) + adapter


def lora_backward(
    M: int, N: int, K: int, r: int, base: str, itemsize: int, adapter_itemsize: int
) -> Work:
    """dX, dA and dB: dY, X, W, A, B and S are read; dX, dA and dB are written.

    dS and dB are products over N, dA and dS A over K: four of them, 2 M r each.
    """
    adapter = Work(M * (K + r) * itemsize + 2 * r * (N + K) * adapter_itemsize, 4 * M * r * (N + K))
    return linear(M, N, K, base, itemsize) + adapter


@dataclass(frozen=True)
class Ceilings:
    """What one device did at most: a large copy, and a large GEMM in `dtype`."""

    copy_bytes_per_s: float
    gemm_flops_per_s: float
    dtype: str

    def least_ms(self, work: Work) -> float:
        """The speed of light: no faster on a device with these ceilings."""
        seconds = max(work.bytes / self.copy_bytes_per_s, work.flops / self.gemm_flops_per_s)
        return seconds * 1e3

    def to_json(self) -> dict[str, object]:
        """Plain values."""
        return asdict(self)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, sampler: Sample, quick: bool
) -> Ceilings:
    """The fastest of the calls made in half a second each (a tenth when `quick`).

    The copy counts bytes read and bytes written. Sizes are far beyond a cache: 1 GiB on a
    GPU, 128 MiB on a CPU; a GEMM of side 8192 on a GPU, 1024 on a CPU.
    """
    on_gpu = device.type == "cuda"
    size, side = (1 << 30, 8192) if on_gpu else (1 << 27, 1024)
    if quick:
        size, side = size // 4, side // 2
    effort = (20.0, 100.0) if quick else (100.0, 500.0)
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copy_ms = min(sampler(functools.partial(target.copy_, source), *effort))
    # Random values: on zeros a GPU draws less power and clocks higher.
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(side, side, device=device, generator=generator).to(dtype)
    gemm_ms = min(sampler(functools.partial(torch.matmul, a, a), *effort))
    return Ceilings(
        copy_bytes_per_s=2 * size / copy_ms * 1e3,
        gemm_flops_per_s=2 * side**3 / gemm_ms * 1e3,
        dtype=str(dtype).removeprefix("torch."),
    )
