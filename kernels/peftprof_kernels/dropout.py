"""Dropout: masks that are a function of a seed, and a dropout that keeps its mask in bytes.

A LoRA linear makes its mask again in backward and stores none: `dropout_mask`. Elsewhere
on a CPU drawing costs more than a byte of memory: `dropout` draws once and keeps the mask.

Random streams, by who draws. Triton kernels use Philox (``philox.py``): an element's mask
needs its row, its column and the seed, so any tile of it can be made anywhere. Library code
on a whole tensor, here, draws one stream for the tensor, numpy's on a CPU. All keep an
element with the same probability, p rounded to a multiple of 2^-16. Every seed is drawn from
torch's generator.
"""

import math
from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Mask elements drawn at a time: 2 bytes each of working memory. A GPU pays for launches.
_CHUNK_CPU: Final = 1 << 19
_CHUNK_OTHER: Final = 1 << 24
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
    if hasattr(seed, "fake_mode"):  # a FakeTensor has no value to draw from: a shape alone
        like = torch.empty((), dtype=dtype, device=device)
        made: Tensor = torch.ops.peftprof.dropout_mask(like, 1, math.prod(shape), p, seed)
        return made.view(*shape)
    mask = torch.empty(shape, dtype=dtype, device=device)
    fill = _fill_on_cpu if device.type == "cpu" else _fill
    fill(mask.view(-1), kept, int(seed))
    return mask


def _fill(mask: Tensor, kept: int, seed: int) -> None:
    """Write 1 with probability kept / 2^16 and else 0, each from 16 bits."""
    generator = torch.Generator(mask.device).manual_seed(seed)
    for start in range(0, mask.numel(), _CHUNK_OTHER):
        part = mask[start : start + _CHUNK_OTHER]
        words = torch.empty((part.numel() + 3) // 4, dtype=torch.int64, device=mask.device)
        draws = words.random_(-(2**63), None, generator=generator).view(torch.int16)
        part.copy_(draws[: part.numel()] <= kept - 1 - 2**15)


def _fill_on_cpu(mask: Tensor, kept: int, seed: int) -> None:
    """The same from 8 bits each: on a CPU random bits are what a mask costs.

    A byte keeps with the next larger probability that bytes have, c / 2^8. Then points are
    thrown at the mask, Poisson(rate n) of them, each anywhere in its n elements, and what is
    hit is dropped. So every element is missed with probability exp(-rate), independent of
    the others, which is what is left of kept / 2^16: two or three hits in a thousand for
    p = 0.1. The generator is numpy's: torch's takes two to three times as long for the bits.
    """
    coarse = -(-kept // 2**8)
    rate = math.log(coarse * 2**8 / kept)
    bits = np.random.SFC64(_Seed(seed))  # type: ignore[arg-type]  # stubs know fewer seeds
    further = np.random.Generator(bits)
    for start in range(0, mask.numel(), _CHUNK_CPU):
        part = mask[start : start + _CHUNK_CPU]
        n = part.numel()
        # numpy compares bytes with vector instructions, torch does not.
        keep = random_bytes(bits, n) <= coarse - 1 - 2**7
        if rate:
            keep[further.integers(0, n, further.poisson(rate * n))] = False
        part.copy_(torch.from_numpy(keep.view(np.int8)))


class _Seed(np.random.bit_generator.ISeedSequence):
    """A random seed as it is: numpy's own way of mixing it takes 0.15 ms, a third of a mask.

    All three words alike, as the author of SFC64 seeds it with one; 12 draws are thrown away.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> Any:
        return np.full(n_words, self.seed, dtype)


def random_bytes(bits: Any, n: int) -> Any:
    """n random int8 of a numpy bit generator."""
    return bits.random_raw((n + 7) // 8).view(np.int8)[:n]
