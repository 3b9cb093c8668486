"""The keep mask of a tile from a seed, in Triton; ``reference.philox_mask`` in plain words."""

import triton
import triton.language as tl

# Rounds of Philox4x32. Seven is the fewest that Salmon et al., "Parallel random numbers:
# as easy as 1, 2, 3" (SC 2011), table 2, found to pass all of BigCrush.
PHILOX_ROUNDS = tl.constexpr(7)


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
