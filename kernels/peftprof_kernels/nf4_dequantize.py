"""NF4 -> bf16, fp16 or fp32 in one Triton launch, bit equal to ``reference.py``.

Each program turns BLOCK packed words into 8 * BLOCK weights. What it reads: 4 bytes for
each 8 weights, one scale for each ``blocksize`` of them (nested scales are put together
in registers, so no absmax tensor exists in memory) and the 16 codes. What it writes: the
weights, 16 bytes of them at a time.

Memory is flat, so rows, blocks that cross rows and a partial last block need no thought;
only the end does. Layout and names: ``kernels/README.md``.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftprof_kernels.nf4 import NF4Weight
from peftprof_kernels.numerics import INTERPRETED, round_to
from peftprof_kernels.variant import Variant

OUT_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)

# 32 weights a thread. On sm_90 that is 8.0 SASS instructions a weight with nested scales and
# 9 programs on a multiprocessor; 16 a thread cost 10.0, 64 cost 7.2 and almost twice the
# registers (`python -m bench.codegen`).
BLOCK: Final = 512
NUM_WARPS: Final = 4
# The interpreter takes milliseconds for a program of any size.
_INTERPRETED_BLOCK: Final = 8192


@triton.jit
def _block_scale(
    block,  # [...] int: which quantisation block
    mask,
    absmax_ptr,  # fp32 [blocks], or uint8 [blocks] where absmax2_ptr is given
    absmax2_ptr,  # fp32 [ceil(blocks / BLOCKSIZE2)] or None
    code2_ptr,  # fp32 [256] or None
    offset_ptr,  # fp32 [] or None
    BLOCKSIZE2: tl.constexpr,
):
    """The fp32 scale of each block. Needs enable_fp_fusion=False: two roundings, not one."""
    if absmax2_ptr is None:
        scale = tl.load(absmax_ptr + block, mask=mask, other=0.0)
    else:
        q = tl.load(absmax_ptr + block, mask=mask, other=0).to(tl.int32)
        absmax2 = tl.load(absmax2_ptr + block // BLOCKSIZE2, mask=mask, other=0.0)
        scale = tl.load(code2_ptr + q) * absmax2 + tl.load(offset_ptr)
    return scale


@triton.jit
def _nf4_dequant_kernel(
    packed_ptr,  # int32 [ceil(numel / 8)] where WHOLE_WORDS, else uint8 [ceil(numel / 2)]
    absmax_ptr,
    absmax2_ptr,
    code2_ptr,
    offset_ptr,
    code_ptr,  # fp32 [16]
    out_ptr,  # [numel], flat [N, K]
    numel,
    n_words,  # ceil(numel / 8)
    BLOCKSIZE: tl.constexpr,
    BLOCKSIZE2: tl.constexpr,
    WHOLE_WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    code = tl.load(code_ptr + tl.arange(0, 16))
    word = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    element = word[:, None] * 8 + tl.arange(0, 8)[None, :]  # [BLOCK, 8]
    # Byte i of a word holds elements 2i (high nibble) and 2i + 1 (low nibble).
    shift = (tl.arange(0, 8) * 4) ^ 4
    mask_word = word < n_words
    if WHOLE_WORDS:
        packed = tl.load(packed_ptr + word, mask=mask_word, other=0)
        nibble = (packed[:, None] >> shift[None, :]) & 0xF
        mask = mask_word[:, None]  # a word is written whole or not at all: 16-byte stores
    else:
        mask = element < numel
        packed = tl.load(packed_ptr + element // 2, mask=mask, other=0).to(tl.int32)
        nibble = (packed >> (shift % 8)[None, :]) & 0xF
    scale = _block_scale(
        word // (BLOCKSIZE // 8),  # a word lies in one block: 8 divides every blocksize
        mask_word,
        absmax_ptr,
        absmax2_ptr,
        code2_ptr,
        offset_ptr,
        BLOCKSIZE2,
    )
    # The table lies in 16 banks of shared memory, so a lookup has no conflicts.
    value = tl.reshape(tl.gather(code, tl.reshape(nibble, (BLOCK * 8,)), 0), (BLOCK, 8))
    weight = value * scale[:, None]
    tl.store(out_ptr + element, round_to(weight, out_ptr.dtype.element_ty), mask=mask)


def dequantize_triton(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [N, K] in ``dtype``: fp32 code times fp32 scale, rounded once.

    Raises TypeError for a dtype that is not bf16, fp16 or fp32.
    """
    if dtype not in OUT_DTYPES:
        raise TypeError(f"dtype must be bfloat16, float16 or float32, got {dtype}")
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    whole_words = weight.numel % 8 == 0 and weight.packed.data_ptr() % 4 == 0
    packed = weight.packed
    if whole_words:
        packed = packed[: weight.numel // 2].view(torch.int32)
    block = _INTERPRETED_BLOCK if INTERPRETED.value else BLOCK
    _nf4_dequant_kernel[(triton.cdiv(weight.numel, 8 * block),)](
        packed,
        *scale_pointers(weight),
        weight.code,
        out,
        weight.numel,
        triton.cdiv(weight.numel, 8),
        BLOCKSIZE=weight.blocksize,
        BLOCKSIZE2=weight.blocksize2,
        WHOLE_WORDS=whole_words,
        BLOCK=block,
        num_warps=NUM_WARPS,
        enable_fp_fusion=False,  # the product of a nested scale is rounded before the sum
    )
    return out


def scale_pointers(weight: NF4Weight) -> tuple[Any, ...]:
    """absmax, absmax2, code2 and offset in the order that kernels take them."""
    return weight.absmax, weight.absmax2, weight.code2, weight.offset


def variants() -> list[Variant]:
    """What ``dequantize_triton`` can launch, at the usual blocksize of 64."""
    whole = [
        _variant(nested, out, whole_words=True)
        for nested in (True, False)
        for out in ("bf16", "fp16", "fp32")
    ]
    return [*whole, *(_variant(nested, "bf16", whole_words=False) for nested in (True, False))]


def _variant(nested: bool, out: str, whole_words: bool) -> Variant:
    extras = ("absmax2_ptr", "code2_ptr", "offset_ptr")
    return Variant(
        name=f"{'nested' if nested else 'plain'}-{out}{'' if whole_words else '-odd'}",
        kernel=_nf4_dequant_kernel,
        signature={
            "packed_ptr": "*i32" if whole_words else "*u8",
            "absmax_ptr": "*u8" if nested else "*fp32",
            **(dict.fromkeys(extras, "*fp32") if nested else {}),
            "code_ptr": "*fp32",
            "out_ptr": f"*{out}",
            "numel": "i32",
            "n_words": "i32",
        },
        constexprs={
            **({} if nested else dict.fromkeys(extras)),
            "BLOCKSIZE": 64,
            "BLOCKSIZE2": 256,
            "WHOLE_WORDS": whole_words,
            "BLOCK": BLOCK,
        },
        outputs=8 * BLOCK,
        kind="stream",
        options={"num_warps": NUM_WARPS, "enable_fp_fusion": False},
        aligned=("numel", "n_words") if whole_words else (),
        wide=whole_words,
    )
