"""The adapter's half of a LoRA linear in Triton: each kernel reads the large tensor once.

    _lora_down_kernel           X -> S                     (dropout in passing)
    _lora_up_backward_kernel    dY -> dS and dB            (one read of dY for both)
    _lora_down_backward_kernel  X, dX -> dA, dX            (one mask for both)

The base product and Y += S B^T stay the library's: an addmm reads and writes Y once, which
is all there is to win. No atomics: where programs share a sum, each writes its part in fp32
and ``_lora_sum_kernel`` adds the parts in a fixed order, so results repeat bit by bit.

r is padded to R, a power of two of at least 16, because tensor cores take no less. Numbers
that change from call to call or layer to layer (alpha, p, sizes) are run-time arguments:
as constants each value would compile anew. r is a constant, for a model has one or two,
and rows of 8 are read 128 bits at a time only where the compiler knows that they are 8.
"""

import triton
import triton.language as tl

from peftprof_kernels.numerics import dot, round_to
from peftprof_kernels.philox import keep_tile


@triton.jit(do_not_specialize=["M", "kept"])
def _lora_down_kernel(
    x_ptr,  # [M, K]
    A_ptr,  # [r, K], any floating dtype
    seed_ptr,  # int64 [], None without dropout
    out_ptr,  # S [M, r], or fp32 parts [splits, M, r]
    M,
    K,
    stride_xm,
    k_per_split,  # a multiple of BLOCK_K
    kept,
    r: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, R)
    mask_m = row < M
    mask_r = rank < r
    x_row_ptr = x_ptr + row.to(tl.int64)[:, None] * stride_xm
    dtype = x_ptr.dtype.element_ty
    start = tl.program_id(1) * k_per_split
    acc = tl.zeros((BLOCK_M, R), tl.float32)
    for k0 in range(start, tl.minimum(start + k_per_split, K), BLOCK_K):
        column = k0 + tl.arange(0, BLOCK_K)
        mask_k = column < K
        x = tl.load(x_row_ptr + column[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
        if seed_ptr is not None:
            column8 = k0 // 8 + tl.arange(0, BLOCK_K // 8)
            keep = keep_tile(tl.load(seed_ptr), row, column8, kept, BLOCK_M, BLOCK_K)
            x = tl.where(keep, x, 0.0).to(dtype)
        A = tl.load(
            A_ptr + rank[:, None] * K + column[None, :],
            mask=mask_r[:, None] & mask_k[None, :],
            other=0.0,
        )
        acc = dot(x, tl.trans(round_to(A.to(tl.float32), dtype)), acc)
    part = tl.program_id(1).to(tl.int64) * M
    out = out_ptr + (part + row.to(tl.int64)[:, None]) * r + rank[None, :]
    tl.store(out, round_to(acc, out_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_r[None, :])


@triton.jit(do_not_specialize=["M"])
def _lora_up_backward_kernel(
    dy_ptr,  # [M, N]
    B_ptr,  # [N, r], any floating dtype
    S_ptr,  # [M, r] in dy's dtype, row stride stride_sm; None: no dB
    dS_ptr,  # fp32 parts [splits of N, M, r]; None: no dS
    dB_ptr,  # fp32 parts [blocks of M, N, r]; None: no dB
    M,
    N,
    stride_dym,
    n_per_split,  # a multiple of BLOCK_N
    r: tl.constexpr,
    stride_sm: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    rank = tl.arange(0, R)
    mask_m = row < M
    mask_r = rank < r
    mask_mr = mask_m[:, None] & mask_r[None, :]
    row64 = row.to(tl.int64)[:, None]
    dtype = dy_ptr.dtype.element_ty
    if dB_ptr is not None:
        S = tl.load(S_ptr + row64 * stride_sm + rank[None, :], mask=mask_mr, other=0.0)
        dB_part = dB_ptr + tl.program_id(0).to(tl.int64) * N * r
    start = tl.program_id(1) * n_per_split
    dS = tl.zeros((BLOCK_M, R), tl.float32)
    for n0 in range(start, tl.minimum(start + n_per_split, N), BLOCK_N):
        column = n0 + tl.arange(0, BLOCK_N)
        mask_n = column < N
        mask_nr = mask_n[:, None] & mask_r[None, :]
        at_nr = column[:, None] * r + rank[None, :]
        dy = tl.load(
            dy_ptr + row64 * stride_dym + column[None, :],
            mask=mask_m[:, None] & mask_n[None, :],
            other=0.0,
        )
        if dS_ptr is not None:
            B = tl.load(B_ptr + at_nr, mask=mask_nr, other=0.0)
            dS = dot(dy, round_to(B.to(tl.float32), dtype), dS)
        if dB_ptr is not None:
            dB = dot(tl.trans(dy), S, tl.zeros((BLOCK_N, R), tl.float32))
            tl.store(dB_part + at_nr, dB, mask=mask_nr)
    if dS_ptr is not None:
        dS_part = dS_ptr + tl.program_id(1).to(tl.int64) * M * r
        tl.store(dS_part + row64 * r + rank[None, :], dS, mask=mask_mr)


@triton.jit(do_not_specialize=["M", "kept"])
def _lora_down_backward_kernel(
    x_ptr,  # [M, K]; None: no dA
    dS_ptr,  # [M, r] in the compute dtype, without alpha
    A_ptr,  # [r, K], any floating dtype
    seed_ptr,  # int64 [], None without dropout
    dA_ptr,  # fp32 parts [splits of M, r, K]; None: no dA
    dx_ptr,  # [M, K], contiguous: added to in place; None: no dX
    M,
    K,
    stride_xm,
    m_per_split,  # a multiple of BLOCK_M
    alpha,
    kept,
    r: tl.constexpr,
    R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    column = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column8 = tl.program_id(0) * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
    rank = tl.arange(0, R)
    mask_k = column < K
    mask_r = rank < r
    mask_rk = mask_r[:, None] & mask_k[None, :]
    at_rk = rank[:, None] * K + column[None, :]
    dtype = dS_ptr.dtype.element_ty
    if dx_ptr is not None:
        A = round_to(tl.load(A_ptr + at_rk, mask=mask_rk, other=0.0).to(tl.float32), dtype)
    start = tl.program_id(1) * m_per_split
    dA = tl.zeros((R, BLOCK_K), tl.float32)
    for m0 in range(start, tl.minimum(start + m_per_split, M), BLOCK_M):
        row = m0 + tl.arange(0, BLOCK_M)
        row64 = row.to(tl.int64)[:, None]
        mask_m = row < M
        mask_mk = mask_m[:, None] & mask_k[None, :]
        dS = tl.load(
            dS_ptr + row64 * r + rank[None, :], mask=mask_m[:, None] & mask_r[None, :], other=0.0
        )
        if seed_ptr is not None:
            keep = keep_tile(tl.load(seed_ptr), row, column8, kept, BLOCK_M, BLOCK_K)
        if dA_ptr is not None:
            x = tl.load(x_ptr + row64 * stride_xm + column[None, :], mask=mask_mk, other=0.0)
            if seed_ptr is not None:
                x = tl.where(keep, x, 0.0).to(dtype)
            dA = dot(tl.trans(dS), x, dA)
        if dx_ptr is not None:
            through = dot(dS, A, tl.zeros((BLOCK_M, BLOCK_K), tl.float32))
            # alpha is fp64 when Inductor launches: a product with it would be too.
            through = through * tl.cast(alpha, tl.float32)
            if seed_ptr is not None:
                through = tl.where(keep, through, 0.0)
            at_mk = dx_ptr + row64 * K + column[None, :]
            dx = tl.load(at_mk, mask=mask_mk, other=0.0).to(tl.float32) + through
            tl.store(at_mk, round_to(dx, dtype), mask=mask_mk)
    if dA_ptr is not None:
        dA_part = dA_ptr + tl.program_id(1).to(tl.int64) * r * K
        tl.store(dA_part + at_rk, dA, mask=mask_rk)


@triton.jit(do_not_specialize=["parts"])
def _lora_sum_kernel(
    parts_ptr,  # fp32 [parts, size]
    bias_ptr,  # [columns], None: none
    out_ptr,  # [size], rows of ``columns``
    parts,
    size,
    columns,
    alpha,
    BLOCK: tl.constexpr,
):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < size
    total = tl.zeros((BLOCK,), tl.float32)
    part_ptr = parts_ptr + element
    for _ in range(parts):
        total += tl.load(part_ptr, mask=mask, other=0.0)
        part_ptr += size
    total = total * tl.cast(alpha, tl.float32)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + element % columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + element, round_to(total, out_ptr.dtype.element_ty), mask=mask)
