"""NF4 GEMM in Triton for few rows: the weight is read packed and unpacked in registers.

At few rows a product is as fast as its weight can be read, and packed it is a quarter of
the size. At many rows every block of rows would unpack the weight again, and dequantising
once for a library GEMM wins: ``crossover.py`` holds where.

Two codes of a byte are neighbours in a row, so a tile is unpacked into its even and its
odd columns, and the product is the sum of two. That needs rows that start on a byte: an
even K. Sums are split over programs into fp32 parts, added in a fixed order; no atomics.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftprof_kernels.device import has_tensor_cores, split
from peftprof_kernels.lora_launch import sum_parts
from peftprof_kernels.nf4 import NF4Weight
from peftprof_kernels.nf4_dequantize import _block_scale, scale_pointers
from peftprof_kernels.numerics import dot, round_to
from peftprof_kernels.variant import TARGETS, Variant


@triton.jit
def _unpacked(
    packed_ptr,  # uint8 [N, K / 2]
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    code,  # fp32 [16]
    n,  # int32 [BLOCK_N]
    k0,  # even
    N,
    K,
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    ROW_SCALE: tl.constexpr,  # the tile's columns of a row lie in one quantisation block
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    dtype: tl.constexpr,
):
    """Even and odd columns of W[n, k0 : k0 + BLOCK_K], each [BLOCK_N, BLOCK_K // 2]."""
    byte = k0 // 2 + tl.arange(0, BLOCK_K // 2)
    row = n.to(tl.int64)[:, None]
    mask = (n < N)[:, None] & (byte < K // 2)[None, :]
    packed = tl.load(packed_ptr + row * (K // 2) + byte[None, :], mask=mask, other=0).to(tl.int32)
    if ROW_SCALE:
        block = (row * K + k0) // BLOCKSIZE
        scale_mask = (n < N)[:, None]
    else:
        block = (row * K + 2 * byte[None, :]) // BLOCKSIZE
        scale_mask = mask
    scale = _block_scale(
        block, scale_mask, absmax_ptr, absmax2_ptr, code2_ptr, offset_ptr, BLOCKSIZE2
    )
    flat = tl.reshape(packed, (BLOCK_N * (BLOCK_K // 2),))
    even = tl.reshape(tl.gather(code, flat >> 4, 0), (BLOCK_N, BLOCK_K // 2))
    odd = tl.reshape(tl.gather(code, flat & 0xF, 0), (BLOCK_N, BLOCK_K // 2))
    return round_to(even * scale, dtype), round_to(odd * scale, dtype)


@triton.jit(do_not_specialize=["M"])
def _nf4_linear_kernel(
    x_ptr,  # [M, K]
    packed_ptr,  # uint8 [N, K / 2]
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    code_ptr,  # fp32 [16]
    bias_ptr,  # [N] or None
    out_ptr,  # Y [M, N], or fp32 parts [splits, M, N]
    M,
    N,
    K,
    stride_xm,
    k_per_split,  # a multiple of BLOCK_K
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    code = tl.load(code_ptr + tl.arange(0, 16))
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = m < M
    x_row_ptr = x_ptr + m.to(tl.int64)[:, None] * stride_xm
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    start = tl.program_id(2) * k_per_split
    # Y^T, so that the many rows of W are the tensor cores' rows.
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        x = tl.load(x_row_ptr + k[None, :], mask=mask_m[:, None] & (k < K)[None, :], other=0.0)
        x_even, x_odd = tl.split(tl.reshape(x, (BLOCK_M, BLOCK_K // 2, 2)))
        even, odd = _unpacked(
            packed_ptr,
            absmax_ptr,
            absmax2_ptr,
            code2_ptr,
            offset_ptr,
            code,
            n,
            k0,
            N,
            K,
            BLOCKSIZE,
            BLOCKSIZE2,
            ROW_SCALE,
            BLOCK_N,
            BLOCK_K,
            dtype,
        )
        acc = dot(even, tl.trans(x_even), acc)
        acc = dot(odd, tl.trans(x_odd), acc)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    part = tl.program_id(2).to(tl.int64) * M
    out = out_ptr + (part + m.to(tl.int64)[None, :]) * N + n[:, None]
    mask = (n < N)[:, None] & mask_m[None, :]
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def _nf4_linear_dx_kernel(
    dy_ptr,  # [M, N]
    packed_ptr,  # uint8 [N, K / 2]
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    code_ptr,  # fp32 [16]
    out_ptr,  # dX [M, K], or fp32 parts [splits, M, K]
    M,
    N,
    K,
    stride_dym,
    n_per_split,  # a multiple of BLOCK_N
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    ROW_SCALE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    code = tl.load(code_ptr + tl.arange(0, 16))
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    k0 = tl.program_id(0) * BLOCK_K
    mask_m = m < M
    m64 = m.to(tl.int64)[:, None]
    dtype: tl.constexpr = dy_ptr.dtype.element_ty
    start = tl.program_id(2) * n_per_split
    acc_even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    acc_odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    for n0 in range(start, tl.minimum(start + n_per_split, N), BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        mask = mask_m[:, None] & (n < N)[None, :]
        dy = tl.load(dy_ptr + m64 * stride_dym + n[None, :], mask=mask, other=0.0)
        even, odd = _unpacked(
            packed_ptr,
            absmax_ptr,
            absmax2_ptr,
            code2_ptr,
            offset_ptr,
            code,
            n,
            k0,
            N,
            K,
            BLOCKSIZE,
            BLOCKSIZE2,
            ROW_SCALE,
            BLOCK_N,
            BLOCK_K,
            dtype,
        )
        acc_even = dot(dy, even, acc_even)
        acc_odd = dot(dy, odd, acc_odd)
    acc = tl.reshape(tl.join(acc_even, acc_odd), (BLOCK_M, BLOCK_K))
    k = k0 + tl.arange(0, BLOCK_K)
    out = out_ptr + (tl.program_id(2).to(tl.int64) * M + m64) * K + k[None, :]
    mask = mask_m[:, None] & (k < K)[None, :]
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Tiles:
    """Rows of x or dy, columns of the result, and the summed dimension, for one launch."""

    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


def tiles(M: int, tensor_cores: bool) -> Tiles:
    """Tiles for ``M`` rows; n is along N and k along K, whichever of them is summed."""
    if not tensor_cores:
        return Tiles(16, 32, 32, 4, 2)
    # Padding rows costs nothing while a weight's bytes are what is waited for.
    return Tiles(16, 64, 64, 4, 3) if M <= 16 else Tiles(64, 64, 64, 8, 3)


def supports(weight: NF4Weight) -> bool:
    """Whether these kernels can read ``weight``: its rows must start on whole bytes."""
    return weight.shape[1] % 2 == 0


def nf4_linear_forward(x: Tensor, weight: NF4Weight, bias: Tensor | None) -> Tensor:
    """X W^T + bias, [M, K] -> [M, N] in x's dtype: bf16, fp16 or fp32.

    x has unit column stride. W is rounded to x's dtype, as a dequantised one would be.
    Raises ValueError when K is odd.
    """
    _check(weight)
    (M, K), N = x.shape, weight.shape[0]
    t = tiles(M, has_tensor_cores(x.device, x.dtype))
    grid = triton.cdiv(N, t.n), triton.cdiv(M, t.m)
    splits, k_per_split = split(K, t.k, grid[0] * grid[1], x.device)
    bias = None if bias is None else bias.contiguous()
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    out = y if splits == 1 else y.new_empty(splits, M, N, dtype=torch.float32)
    _nf4_linear_kernel[(*grid, splits)](
        x,
        weight.packed,
        *scale_pointers(weight),
        weight.code,
        bias if splits == 1 else None,
        out,
        M,
        N,
        K,
        x.stride(0),
        k_per_split,
        **_options(weight, t),
    )
    return y if splits == 1 else sum_parts(out, y, bias=bias)


def nf4_linear_dx(dy: Tensor, weight: NF4Weight) -> Tensor:
    """dY W, [M, N] -> [M, K] in dy's dtype: bf16, fp16 or fp32; W is not transposed.

    dy has unit column stride. Raises ValueError when K is odd.
    """
    _check(weight)
    (M, N), K = dy.shape, weight.shape[1]
    t = tiles(M, has_tensor_cores(dy.device, dy.dtype))
    grid = triton.cdiv(K, t.k), triton.cdiv(M, t.m)
    splits, n_per_split = split(N, t.n, grid[0] * grid[1], dy.device)
    dx = torch.empty(M, K, dtype=dy.dtype, device=dy.device)
    out = dx if splits == 1 else dx.new_empty(splits, M, K, dtype=torch.float32)
    _nf4_linear_dx_kernel[(*grid, splits)](
        dy,
        weight.packed,
        *scale_pointers(weight),
        weight.code,
        out,
        M,
        N,
        K,
        dy.stride(0),
        n_per_split,
        **_options(weight, t),
    )
    return dx if splits == 1 else sum_parts(out, dx)


def _constants(t: Tiles, blocksize: int, blocksize2: int, row_scale: bool) -> dict[str, Any]:
    return {
        "BLOCKSIZE": blocksize,
        "BLOCKSIZE2": blocksize2,
        "ROW_SCALE": row_scale,
        "BLOCK_M": t.m,
        "BLOCK_N": t.n,
        "BLOCK_K": t.k,
    }


def _launch(t: Tiles) -> dict[str, Any]:
    return {
        "num_warps": t.num_warps,
        "num_stages": t.num_stages,
        "enable_fp_fusion": False,  # nested scales: ``_block_scale``
    }


def _options(weight: NF4Weight, t: Tiles) -> dict[str, Any]:
    row_scale = weight.shape[1] % weight.blocksize == 0 and weight.blocksize % t.k == 0
    return _constants(t, weight.blocksize, weight.blocksize2, row_scale) | _launch(t)


def _check(weight: NF4Weight) -> None:
    if not supports(weight):
        raise ValueError(f"K must be even, got a weight of shape {weight.shape}")


def variants() -> list[Variant]:
    """By rows and dtype; scales one for each row of a tile, or looked up for each byte."""
    made = []
    for kernel in (_nf4_linear_kernel, _nf4_linear_dx_kernel):
        for M, row_scale in ((16, True), (16, False), (64, True), (64, False)):
            made.append(_variant(kernel, "bf16", M, row_scale, True, TARGETS[1:]))
        made += [
            _variant(kernel, "fp16", 16, True, True, TARGETS[1:], nested=False),
            _variant(kernel, "fp32", 16, True, False, TARGETS),
            _variant(kernel, "fp32", 16, False, False, TARGETS),
            _variant(kernel, "fp16", 16, True, False, TARGETS[:1]),
        ]
    return made


def _variant(
    kernel: Any,
    dtype: str,
    M: int,
    row_scale: bool,
    tensor_cores: bool,
    targets: tuple[int, ...],
    nested: bool = True,
) -> Variant:
    forward = kernel is _nf4_linear_kernel
    t = tiles(M, tensor_cores)
    extras = ("absmax2_ptr", "code2_ptr", "offset_ptr")
    summed = "k_per_split" if forward else "n_per_split"
    stride = "stride_xm" if forward else "stride_dym"
    name = [dtype, f"m{t.m}", "" if nested else "plain", "" if row_scale else "scattered"]
    return Variant(
        name="-".join(part for part in name if part),
        kernel=kernel,
        signature={
            "x_ptr" if forward else "dy_ptr": f"*{dtype}",
            "packed_ptr": "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            **(dict.fromkeys(extras, "*fp32") if nested else {}),
            "code_ptr": "*fp32",
            **({"bias_ptr": f"*{dtype}"} if forward else {}),
            "out_ptr": "*fp32",
            **dict.fromkeys(("M", "N", "K", stride, summed), "i32"),
        },
        constexprs=({} if nested else dict.fromkeys(extras)) | _constants(t, 64, 256, row_scale),
        outputs=t.m * (t.n if forward else t.k),
        kind="gemm",
        options=_launch(t),
        aligned=("N", "K", stride, summed),
        tensor_cores=tensor_cores,
        targets=targets,
    )
