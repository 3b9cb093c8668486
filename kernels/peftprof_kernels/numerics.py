"""Rounding and products that give the same numbers compiled and under Triton's interpreter.

The interpreter (3.6 to 3.9 at least) truncates fp32 to bf16 instead of rounding, and
multiplies the bit patterns of bf16 operands as if they were integers. Compiled, both
functions here are the plain operation.
"""

import triton
import triton.language as tl

# Read when Triton itself reads it: as its decorators decide what a kernel becomes.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def round_to(x, dtype: tl.constexpr):
    """fp32 x in ``dtype``, rounded once, to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc):
    """acc + a b, accumulated in fp32; fp32 operands are not shortened to tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
