"""Dropout: masks that are a function of a seed, and a dropout that keeps its mask in bytes.

A LoRA linear makes its mask again in backward and stores none: `dropout_mask`. Elsewhere
on a CPU drawing costs more than a byte of memory: `dropout` draws once and keeps the mask.

Two random streams, by who draws. Triton kernels use Philox (``philox.py``): an element's
mask needs its row, its column and the seed, so any tile of it can be made anywhere.
Library code on a whole tensor, here, draws one stream for the tensor. Both keep an element
with the same probability, from a 16-bit draw. Every seed is drawn from torch's generator.
"""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Mask elements drawn at a time: 2 bytes each of working memory. A GPU pays for launches.
_MASK_CHUNK_CPU: Final = 1 << 19
_MASK_CHUNK_OTHER: Final = 1 << 24
_CPU: Final = torch.device("cpu")


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
    return draw_mask(shape, p, dtype, seed, device)


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with each element kept with probability 1 - p, p rounded to a multiple of 2^-16.

    What is kept is divided by 1 - p, as in torch.nn.functional.dropout, in x's dtype. One
    byte an element is saved for backward. The draws are from torch's default generator of
    x's device. Raises ValueError for a p that is no probability.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a probability, got {p}")
    if not training or not rounded(p):
        return x
    if torch.compiler.is_compiling():
        return torch.nn.functional.dropout(x, p)  # numpy's generator is in no graph
    return _Dropout.apply(x, p)  # type: ignore[no-any-return, no-untyped-call]


class _Dropout(torch.autograd.Function):
    """Y = m * X / (1 - p), and dX = m * dY / (1 - p)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        mask = draw_mask(x.shape, p, torch.int8, draw_seed(), x.device)
        ctx.save_for_backward(mask)
        ctx.scale = keep_scale(p)
        return _scaled(mask, x, ctx.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        (mask,) = ctx.saved_tensors
        return _scaled(mask, dy, ctx.scale), None


def _scaled(mask: Tensor, x: Tensor, scale: float) -> Tensor:
    return mask.to(x.dtype).mul_(x).mul_(scale)


def keep_scale(p: float) -> float:
    """What a kept element is multiplied by, 1 / (1 - p); 0 where none is kept."""
    return 1.0 / (1.0 - rounded(p)) if kept_draws(p) else 0.0


def draw_mask(
    shape: Sequence[int],
    p: float,
    dtype: torch.dtype,
    seed: Tensor,
    device: torch.device = _CPU,
) -> Tensor:
    """A keep mask of any shape and dtype: see `dropout_mask`."""
    kept = kept_draws(p)
    if kept in (0, 2**16):
        return torch.full(shape, 1 if kept else 0, dtype=dtype, device=device)
    largest = kept - 1 - 2**15
    mask = torch.empty(shape, dtype=dtype, device=device)
    flat = mask.view(-1)
    limit = _MASK_CHUNK_CPU if device.type == "cpu" else _MASK_CHUNK_OTHER
    bits = _Bits(int(seed), device)
    for start in range(0, flat.numel(), limit):
        part = flat[start : start + limit]
        draws = bits.draw(part.numel())
        # 1 where a draw is at most `largest`, in 16-bit arithmetic and a conversion: on a
        # CPU a comparison, and whatever reads its booleans, is not vectorised (2.5 ms
        # against 0.6 for 866 x 384 in fp32; 2 cores, AMD EPYC, torch 2.13).
        part.copy_(draws.clamp_(largest, largest + 1).neg_().add_(largest + 1))
    return mask


class _Bits:
    """Random 16-bit integers of a seed.

    On a CPU from numpy's PCG64: random bits are what a mask costs, and torch's generator
    takes twice as long for them (0.39 ms against 0.18 for 866 x 384).
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self.device = device
        if device.type == "cpu":
            self.pcg = np.random.PCG64DXSM(seed)
        else:
            self.generator = torch.Generator(device).manual_seed(seed)

    def draw(self, count: int) -> Tensor:
        """`count` draws, int16, each in memory of its own."""
        words = (count + 3) // 4
        if self.device.type == "cpu":
            drawn = torch.from_numpy(self.pcg.random_raw(words).view(np.int16))
        else:
            drawn = torch.empty(words, dtype=torch.int64, device=self.device)
            drawn = drawn.random_(-(2**63), None, generator=self.generator).view(torch.int16)
        return drawn[:count]
