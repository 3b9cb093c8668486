"""NF4 weights to test with: random bytes and scales, or a quantiser's; and where they lie."""

from typing import Any

import torch
from torch import Tensor

from peftprof_kernels import NF4Weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def examples(interpreted: int) -> int:
    """How many hypothesis draws: on a GPU fewer, since most of them compile kernels anew."""
    return interpreted if DEVICE.type == "cpu" else interpreted // 5


CODE = torch.tensor(
    [
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
    ]
)


def random_weight(
    N: int,
    K: int,
    *,
    blocksize: int = 64,
    nested: bool = False,
    storage: torch.dtype = torch.uint8,
    seed: int = 0,
) -> NF4Weight:
    """Any bytes and any scales: a dequantiser may assume nothing about them."""
    generator = torch.Generator().manual_seed(seed)
    n_bytes = (N * K + 1) // 2
    itemsize = storage.itemsize
    stored = -(-n_bytes // itemsize) * itemsize
    packed = torch.randint(256, (stored,), dtype=torch.uint8, generator=generator)
    blocks = -(-N * K // blocksize)
    scales: dict[str, Any] = {"absmax": torch.rand(blocks, generator=generator) + 0.01}
    if nested:
        scales = {
            "absmax": torch.randint(256, (blocks,), dtype=torch.uint8, generator=generator),
            "absmax2": torch.rand(-(-blocks // 256), generator=generator) / 4,
            "code2": torch.randn(256, generator=generator),
            "offset": torch.rand((), generator=generator) + 1,
        }
    return NF4Weight(
        packed=packed.view(storage).view(-1, 1).to(DEVICE),
        shape=(N, K),
        blocksize=blocksize,
        code=CODE.to(DEVICE),
        **{name: tensor.to(DEVICE) for name, tensor in scales.items()},
    )


def from_quant_state(packed: Tensor, state: Any) -> NF4Weight:
    """What bitsandbytes' quantize_4bit returned, as the kernels take it."""
    nested = {}
    if state.nested:
        nested = {
            "absmax2": state.state2.absmax,
            "code2": state.state2.code,
            "offset": state.offset,
            "blocksize2": state.state2.blocksize,
        }
    return NF4Weight(
        packed=packed.data,
        shape=tuple(state.shape),
        blocksize=state.blocksize,
        absmax=state.absmax,
        code=state.code,
        **nested,
    )
