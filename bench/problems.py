"""The tensors of a case: an NF4 weight as bitsandbytes stores it, its exact values, inputs."""

import functools
import importlib
import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.harness import AbsentError
from bench.work import BLOCKSIZE, BLOCKSIZE2
from peftprof.run import adapters
from peftprof_kernels import NF4Weight
from peftprof_kernels.reference import dequantize_reference

# Allowed relative errors of one matrix product: those of tests/tolerances.py, with the same
# reasons. A gradient of A or B sums over tokens that cancel, after a product already rounded.
GEMM = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 1e-3}
ADAPTER_GRAD = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 2e-3}

# The codes of NF4 (Dettmers et al. 2023, appendix E).
NF4_CODE = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def installed(package: str) -> bool:
    """Whether the import `package` would be found."""
    return importlib.util.find_spec(package) is not None


def imported(module: str) -> Any:
    """A module of another package. Raises AbsentError where that is not installed."""
    if not installed(module.partition(".")[0]):
        raise AbsentError("not installed")
    return importlib.import_module(module)


def randn(*shape: int, device: torch.device, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal values from a seed of their own."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, device=device, generator=generator).to(dtype)


@dataclass(frozen=True, eq=False)
class Quantised:
    """An NF4 weight [N, K] with nested scales, blocksize 64.

    `layer` is the bitsandbytes Linear4bit that holds the same bytes; None without
    bitsandbytes, where the codes and scales are random: a kernel cannot tell.
    """

    weight: NF4Weight
    layer: Any

    @property
    def packed_and_state(self) -> tuple[Tensor, Any]:
        """As bitsandbytes' functions take it. Raises AbsentError without bitsandbytes."""
        imported("bitsandbytes")
        return self.layer.weight.data, self.layer.weight.quant_state

    @functools.cached_property
    def exact(self) -> Tensor:
        """The values [N, K] that the bytes stand for, in float64."""
        return dequantize_reference(self.weight, torch.float64)


@functools.lru_cache(maxsize=2)  # a layer's cases come one after the other
def quantised(
    N: int, K: int, device: torch.device, dtype: torch.dtype, *, zero: bool = False
) -> Quantised:
    """A weight of variance 1 / K, or all zeros; bitsandbytes gives it back in `dtype`."""
    if not installed("bitsandbytes"):
        return Quantised(_random(N, K, device, zero), None)
    dense = randn(N, K, device=device, dtype=torch.float32, seed=0) * (0 if zero else K**-0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of packages that it could use as well
        import bitsandbytes as bnb
    layer = bnb.nn.Linear4bit(
        K, N, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        dense.to(dtype).cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4"
    )
    layer.to(device)  # quantises
    # Else a first forward in evaluation repacks the weight for good, as others cannot read it.
    layer.support_avx512bf16_for_cpu = False
    return Quantised(adapters.nf4_weight(layer), layer)


def _random(N: int, K: int, device: torch.device, zero: bool) -> NF4Weight:
    generator = torch.Generator().manual_seed(0)
    blocks = -(-N * K // BLOCKSIZE)
    groups = -(-blocks // BLOCKSIZE2)
    size = 0.0 if zero else 2 * K**-0.5  # about the largest of 64 normal values
    tensors = {
        "packed": torch.randint(256, ((N * K + 1) // 2,), dtype=torch.uint8, generator=generator),
        "absmax": torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
        "code": torch.tensor(NF4_CODE),
        "absmax2": torch.full((groups,), size / 4),
        "code2": torch.linspace(-1, 1, 256),
        "offset": torch.tensor(size),
    }
    on_device: dict[str, Any] = {name: t.to(device) for name, t in tensors.items()}
    return NF4Weight(shape=(N, K), blocksize=BLOCKSIZE, blocksize2=BLOCKSIZE2, **on_device)
