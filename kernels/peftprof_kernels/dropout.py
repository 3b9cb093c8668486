"""Dropout masks that are a function of a seed: made again in backward, never stored.

Two random streams, by who draws. Kernels in Triton use Philox: the mask of one element
needs its row, its column and the seed, so any tile of it can be made anywhere. Library
code on a whole tensor uses torch's generator of the device, which on a CPU is a tenth of
the work. Both keep an element with the same probability, from a 16-bit draw.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

# Rounds of Philox4x32. Seven is the fewest that Salmon et al., "Parallel random numbers:
# as easy as 1, 2, 3" (SC 2011), table 2, found to pass all of BigCrush.
PHILOX_ROUNDS = tl.constexpr(7)

# Mask elements drawn at a time: 2 bytes each of working memory. A GPU pays for launches.
_MASK_CHUNK_CPU: Final = 1 << 19
_MASK_CHUNK_OTHER: Final = 1 << 24


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A seed, int64 [], from torch's default generator of ``device``.

    `torch.manual_seed` controls it, checkpointing restores it, a CUDA graph draws another
    at each replay, and nothing waits for a GPU to tell its value.
    """
    return torch.randint(2**63 - 1, (), device=device)


def kept_draws(p: float) -> int:
    """How many of the 2^16 values of a draw keep an element."""
    return round((1.0 - p) * 2**16)


def dropout_mask(
    shape: tuple[int, int], p: float, seed: Tensor, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The keep mask, 1 with probability 1 - p and else 0, that ``seed`` stands for.

    A function of its arguments and the kind of device alone: backward calls it again
    instead of keeping the mask. p is rounded to a multiple of 2^-16.
    """
    # Raw 64-bit draws compared as four 16-bit integers: on a CPU the generator is serial
    # and its bits are what a mask costs; bernoulli_ draws 32 or more for each element.
    generator = torch.Generator(device).manual_seed(int(seed))
    kept = kept_draws(p)
    if not kept:
        return torch.zeros(shape, dtype=dtype, device=device)
    largest = kept - 1 - 2**15
    mask = torch.empty(shape, dtype=dtype, device=device)
    flat = mask.view(-1)
    limit = _MASK_CHUNK_CPU if device.type == "cpu" else _MASK_CHUNK_OTHER
    chunk = min(limit, flat.numel())
    bits = torch.empty((chunk + 3) // 4, dtype=torch.int64, device=device)
    for start in range(0, flat.numel(), limit):
        part = flat[start : start + limit]
        drawn = bits[: (part.numel() + 3) // 4].random_(-(2**63), None, generator=generator)
        torch.le(drawn.view(torch.int16)[: part.numel()], largest, out=part)
    return mask


@triton.jit
def keep_tile(
    seed,  # int64
    row,  # int32 [BLOCK_M]
    column8,  # int32 [BLOCK_K // 8]: columns in eights
    kept,  # int: draws below it keep
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The keep mask of a tile, int1 [BLOCK_M, BLOCK_K]; reference: ``philox_mask``.

    One Philox call, four 32-bit words, for eight columns: draw 2i is the low half of word
    i, draw 2i + 1 the high half. The eight bits pass the change of shape as one number.
    """
    # In the high half a comparison of whole words is one of the halves: low bits decide
    # nothing, as the limit has none.
    limit = tl.cast(kept, tl.uint32) << 16
    zero = tl.zeros((BLOCK_M, BLOCK_K // 8), tl.uint32)
    word0, word1, word2, word3 = tl.philox(
        seed,
        zero + column8[None, :].to(tl.uint32),
        zero + row[:, None].to(tl.uint32),
        zero,
        zero,
        PHILOX_ROUNDS,
    )
    bits = _keep_bits(word0, limit) | (_keep_bits(word1, limit) << 2)
    bits |= (_keep_bits(word2, limit) << 4) | (_keep_bits(word3, limit) << 6)
    spread = (bits[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(spread, (BLOCK_M, BLOCK_K)) != 0


@triton.jit
def _keep_bits(word, limit):
    low = ((word << 16) < limit).to(tl.int32)
    high = (word < limit).to(tl.int32)
    return low | (high << 1)
