"""Launchers of the kernels in ``lora_kernels.py``: tiles, grids, parts and their sums.

Everything here takes what the kernels need as it is: 2-D, the last dimension contiguous,
x and dy in the compute dtype (bf16, fp16 or fp32), A and B in any floating dtype.
"""

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
from torch import Tensor

from peftprof_kernels.device import has_tensor_cores, split
from peftprof_kernels.dropout import kept_draws
from peftprof_kernels.lora_kernels import (
    _lora_down_backward_kernel,
    _lora_down_kernel,
    _lora_sum_kernel,
    _lora_up_backward_kernel,
)

# The most of r that one launch takes; more goes in pieces.
_MOST: Final = 256


@dataclass(frozen=True)
class Tiles:
    """How a product with r columns is cut, and launched."""

    rank: int  # R: r padded, or the most of r that one launch takes
    rows: int
    columns: int
    num_warps: int
    num_stages: int


# Chosen as the largest tiles that spill on no target from sm_80 to sm_120 at any rank
# (`python -m bench.codegen`); on a GPU, `python -m bench.lora_linear` times them.
def down_tiles(rank: int, tensor_cores: bool) -> Tiles:
    """Tiles [rows, K columns] of the product X A^T."""
    if not tensor_cores:
        return Tiles(_padded(min(rank, 32)), 32, 32, 4, 2)
    R = _padded(min(rank, _MOST))
    return Tiles(R, 64, 64 if R <= 64 else 32, 8, 3)


def up_backward_tiles(rank: int, tensor_cores: bool) -> Tiles | None:
    """Tiles [rows, N columns] of dS and dB; None where two library products read less.

    The parts of dB, fp32, are written and read once for each block of rows: 8 r / rows
    bytes for each element of dY, against the element's own second read.
    """
    R = _padded(rank)
    if not tensor_cores:
        return Tiles(R, 64, 32, 4, 2) if R <= 16 else None
    if R <= 16:
        return Tiles(R, 128, 64, 8, 3)
    return Tiles(R, 256, 32, 8, 3) if R <= 32 else None


def down_backward_tiles(rank: int, tensor_cores: bool) -> Tiles:
    """Tiles [rows, K columns] of dA and dX."""
    if not tensor_cores:
        return Tiles(_padded(min(rank, 32)), 16, 32, 8, 2)
    R = _padded(min(rank, _MOST))
    return Tiles(R, 32, 64, 8, 2) if R <= 128 else Tiles(R, 64, 32, 8, 2)


def _padded(rank: int) -> int:
    return max(16, int(triton.next_power_of_2(rank)))


def lora_down(x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """S [M, r] = (m * X) A^T in x's dtype, without the 1 / (1 - p) of dropout.

    x [M, K] with unit column stride, A [r, K] contiguous, seed int64 [] or None for p = 0.
    """
    (M, K), r = x.shape, A.shape[0]
    tiles = down_tiles(r, has_tensor_cores(x.device, x.dtype))
    if r > tiles.rank:
        parts = [lora_down(x, part, seed, p) for part in A.split(tiles.rank)]
        return torch.cat(parts, dim=1)
    rows = triton.cdiv(M, tiles.rows)
    splits, k_per_split = split(K, tiles.columns, rows, x.device)
    S = torch.empty(M, r, dtype=x.dtype, device=x.device)
    out = S if splits == 1 else _parts(splits, M, r, x.device)
    _lora_down_kernel[(rows, splits)](
        x,
        A,
        seed,
        out,
        M,
        K,
        x.stride(0),
        k_per_split,
        kept_draws(p),
        r=r,
        R=tiles.rank,
        BLOCK_M=tiles.rows,
        BLOCK_K=tiles.columns,
        **launch_options(tiles),
    )
    return S if splits == 1 else sum_parts(out, S)


def lora_up_backward(
    dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
) -> tuple[Tensor | None, Tensor | None]:
    """dS [M, r] = dY B in dy's dtype, without alpha, and dB [N, r] = alpha dY^T S in B's.

    dy [M, N] and S [M, r] have unit column stride, B [N, r] is contiguous. Only what is
    asked for: dS where ``need_dS``, dB where S is given.
    """
    (M, N), r = dy.shape, B.shape[1]
    tiles = up_backward_tiles(r, has_tensor_cores(dy.device, dy.dtype))
    if tiles is None or S is None or not need_dS:  # one product alone: nothing is shared
        dS = dy @ B.to(dy.dtype) if need_dS else None
        return dS, None if S is None else _scaled((S.t() @ dy).t(), alpha, B)
    rows = triton.cdiv(M, tiles.rows)
    splits, n_per_split = split(N, tiles.columns, rows, dy.device)
    dS_parts = _parts(splits, M, r, dy.device)
    dB_parts = _parts(rows, N, r, dy.device)
    _lora_up_backward_kernel[(rows, splits)](
        dy,
        B,
        S,
        dS_parts,
        dB_parts,
        M,
        N,
        dy.stride(0),
        n_per_split,
        r=r,
        stride_sm=S.stride(0),
        R=tiles.rank,
        BLOCK_M=tiles.rows,
        BLOCK_N=tiles.columns,
        **launch_options(tiles),
    )
    dS = torch.empty(M, r, dtype=dy.dtype, device=dy.device)
    return sum_parts(dS_parts, dS), sum_parts(dB_parts, torch.empty_like(B), alpha)


def lora_down_backward(
    x: Tensor | None,
    dS: Tensor,
    A: Tensor,
    dx: Tensor | None,
    seed: Tensor | None,
    p: float,
    alpha: float,
) -> Tensor | None:
    """dA [r, K] = alpha dS^T (m * X) in A's dtype, and dx += alpha m * (dS A) in place.

    x [M, K] with unit column stride, or None for no dA; dS [M, r], A [r, K] and dx [M, K]
    are contiguous, dx None for no dX; seed int64 [] or None for p = 0.
    """
    M, (r, K) = dS.shape[0], A.shape
    if dx is not None and not dx.is_contiguous():
        raise ValueError(f"dx must be contiguous, got strides {dx.stride()}")
    tiles = down_backward_tiles(r, has_tensor_cores(dS.device, dS.dtype))
    if r > tiles.rank:
        pairs = zip(dS.split(tiles.rank, dim=1), A.split(tiles.rank), strict=True)
        parts = [lora_down_backward(x, s.contiguous(), a, dx, seed, p, alpha) for s, a in pairs]
        return None if x is None else torch.cat([part for part in parts if part is not None])
    columns = triton.cdiv(K, tiles.columns)
    splits, m_per_split = split(M, tiles.rows, columns, dS.device)
    dA_parts = None if x is None else _parts(splits, r, K, dS.device)
    _lora_down_backward_kernel[(columns, splits)](
        x,
        dS,
        A,
        seed,
        dA_parts,
        dx,
        M,
        K,
        0 if x is None else x.stride(0),
        m_per_split,
        float(alpha),
        kept_draws(p),
        r=r,
        R=tiles.rank,
        BLOCK_M=tiles.rows,
        BLOCK_K=tiles.columns,
        **launch_options(tiles),
    )
    return None if dA_parts is None else sum_parts(dA_parts, torch.empty_like(A), alpha)


SUM_BLOCK: Final = 1024


def sum_parts(parts: Tensor, out: Tensor, alpha: float = 1.0, bias: Tensor | None = None) -> Tensor:
    """out [...] = alpha * sum of parts fp32 [n, ...] + bias along the last dimension."""
    size = out.numel()
    _lora_sum_kernel[(triton.cdiv(size, SUM_BLOCK),)](
        parts,
        bias,
        out,
        parts.shape[0],
        size,
        out.shape[-1],
        float(alpha),
        BLOCK=SUM_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out


def _parts(n: int, rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.empty(n, rows, columns, dtype=torch.float32, device=device)


def _scaled(grad: Tensor, alpha: float, like: Tensor) -> Tensor:
    return grad.to(like.dtype).contiguous().mul_(alpha)


def launch_options(tiles: Tiles) -> dict[str, Any]:
    """The launch's own arguments, beside the kernel's."""
    return {
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": True,
    }
