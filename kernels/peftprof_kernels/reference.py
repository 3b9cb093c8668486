r"""The mathematics in its plainest form: what every faster implementation must equal.

With s the scaling, m the dropout's keep mask (0 or 1), c = 1 / (1 - p), and ``*`` between
a mask and a matrix element by element:

    X^ = c (m * X)                     [M, K]
    S  = X^ A^T                        [M, r]
    Y  = X W^T + bias + s S B^T        [M, N]

and for a gradient dY [M, N]:

    dS = s dY B                        [M, r]
    dB = s dY^T S                      [N, r]
    dA = dS^T X^                       [r, K]
    dX = dY W + c (m * (dS A))         [M, K]
    dbias = column sums of dY          [N]

W is frozen and has no gradient. Everything is written for any floating dtype, so that in
float64 it is an oracle.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from peftprof_kernels.nf4 import NF4Weight


def dequantize_reference(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K], one whole-tensor step at a time."""
    numel = weight.shape[0] * weight.shape[1]
    high = weight.packed >> 4
    low = weight.packed & 0xF
    codes = torch.stack([high, low], dim=1).reshape(-1)[:numel]  # [N * K]
    element = torch.arange(numel, device=weight.device)
    block = element // weight.blocksize
    absmax = _absmax_reference(weight)
    product = weight.code[codes.long()] * absmax[block]
    return product.to(dtype).reshape(weight.shape)


def _absmax_reference(weight: NF4Weight) -> Tensor:
    if weight.absmax2 is None or weight.code2 is None or weight.offset is None:
        return weight.absmax
    block = torch.arange(weight.absmax.numel(), device=weight.device)
    product = weight.code2[weight.absmax.long()] * weight.absmax2[block // weight.blocksize2]
    return product + weight.offset


def nf4_linear_reference(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """X W^T + bias with W dequantised to x's dtype; x is [..., K], the result [..., N]."""
    y = x @ dequantize_reference(weight, x.dtype).T
    return y if bias is None else y + bias


def lora_linear_reference(
    x: Tensor,
    base: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> Tensor:
    """Y of the module's docstring; x [..., K], base [N, K], A [r, K], B [N, r].

    ``mask`` is the keep mask (1 keeps), of x's shape; None means no dropout. Autograd
    through this function is the backward's specification.
    """
    y = x @ base.T
    if bias is not None:
        y = y + bias
    return y + scaling * (_dropped(x, mask, p) @ A.T @ B.T)


class LoraGrads(NamedTuple):
    """Gradients of one LoRA linear; x as given, A [r, K], B [N, r], bias [N]."""

    x: Tensor
    A: Tensor
    B: Tensor
    bias: Tensor


def lora_linear_backward_reference(
    dy: Tensor,
    x: Tensor,
    base: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    mask: Tensor | None = None,
    p: float = 0.0,
) -> LoraGrads:
    """The gradients of the module's docstring, written out."""
    N, K = base.shape
    dy2d = dy.reshape(-1, N)
    x_hat = _dropped(x, mask, p).reshape(-1, K)
    S = x_hat @ A.T
    dS = scaling * (dy2d @ B)
    through_adapter = _dropped((dS @ A).reshape(x.shape), mask, p)
    return LoraGrads(
        x=(dy2d @ base).reshape(x.shape) + through_adapter,
        A=dS.T @ x_hat,
        B=scaling * (dy2d.T @ S),
        bias=dy2d.sum(0),
    )


def _dropped(x: Tensor, mask: Tensor | None, p: float) -> Tensor:
    if mask is None:
        return x
    keep = 1.0 - p
    return x * mask.to(x.dtype) / keep if keep > 0 else torch.zeros_like(x)


def philox_mask(shape: tuple[int, int], kept: int, seed: int) -> Tensor:
    """The keep mask [M, K] of the Triton kernels, bool: Philox4x32 with seven rounds.

    Counter (k // 8, m, 0, 0) and the seed as key give four 32-bit words for the elements
    (m, 8 (k // 8) ... + 7); element 2i of the eight has the low half of word i, element
    2i + 1 the high half; it is kept where that half is below ``kept``. Philox: Salmon et
    al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
    """
    M, K = shape
    eights = -(-K // 8)
    c0 = torch.arange(eights).expand(M, eights)
    c1 = torch.arange(M)[:, None].expand(M, eights)
    c2 = c3 = torch.zeros_like(c0)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(7):
        high0, low0 = _multiply(0xD2511F53, c0)
        high1, low1 = _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & _LOW, (key1 + 0xBB67AE85) & _LOW
    halves = [half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)]
    return (torch.stack(halves, dim=-1).reshape(M, 8 * eights) < kept)[:, :K]


_LOW = 2**32 - 1


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a 64-bit product, in int64 that would overflow as a whole."""
    low = (constant & 0xFFFF) * word
    high = (constant >> 16) * word + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
