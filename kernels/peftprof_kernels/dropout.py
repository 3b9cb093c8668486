"""Dropout masks that are a function of a seed: made again in backward, never stored.

Two random streams, by who draws. Triton kernels use Philox (``philox.py``): an element's
mask needs its row, its column and the seed, so any tile of it can be made anywhere.
Library code on a whole tensor, here, uses torch's generator of the device. Both keep an
element with the same probability, from a 16-bit draw.
"""

from typing import Final

import torch
from torch import Tensor

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
    """How many of the 2^16 values of a draw keep an element; all of them: no dropout."""
    return round((1.0 - p) * 2**16)


def rounded(p: float) -> float:
    """The probability that masks of p really have, a multiple of 2^-16."""
    return 1.0 - kept_draws(p) / 2**16


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
