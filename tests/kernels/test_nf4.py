from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof_kernels import NF4Weight, block_scales, dequantize, nf4
from peftprof_kernels.reference import dequantize_reference
from tests.kernels.nf4_weights import DEVICE, from_quant_state, random_weight
from tests.tolerances import NF4_HALF_GAP

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
STORAGES = (torch.uint8, torch.bfloat16, torch.float16, torch.float32)

# Shapes with an odd number of elements, a partial last block, and blocks across rows
# come up on their own: most K here are no multiple of any blocksize.
weights = st.builds(
    random_weight,
    st.integers(1, 70),
    st.integers(1, 300),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    nested=st.booleans(),
    storage=st.sampled_from(STORAGES),
    seed=st.integers(0, 2**16),
)


@settings(deadline=None, max_examples=150)
@given(weight=weights, dtype=st.sampled_from(DTYPES))
def test_dequantize_is_bit_equal_to_the_reference(weight: NF4Weight, dtype: torch.dtype) -> None:
    actual = dequantize(weight, dtype)
    assert actual.dtype == dtype
    assert actual.shape == weight.shape
    assert torch.equal(actual, dequantize_reference(weight, dtype))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("K", [64, 4096, 4097, 10001])
def test_chunks_join_without_a_seam(monkeypatch: pytest.MonkeyPatch, K: int, threads: int) -> None:
    monkeypatch.setattr(nf4, "_CHUNK_BYTES_CPU", 2048)  # the largest block: 4096 elements
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    # Uninitialised memory is NaN while this holds: an element nobody wrote would show.
    torch.use_deterministic_algorithms(True)
    try:
        for blocksize in (32, 4096):
            weight = random_weight(3, K, blocksize=blocksize, nested=True)
            assert torch.equal(
                dequantize(weight, torch.bfloat16), dequantize_reference(weight, torch.bfloat16)
            )
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=25)
@given(
    weight=st.builds(
        random_weight,
        st.integers(1, 5),
        st.integers(1, 41),
        blocksize=st.just(32),
        nested=st.booleans(),
        seed=st.integers(0, 2**16),
    )
)
def test_the_reference_agrees_with_one_element_at_a_time(weight: NF4Weight) -> None:
    N, K = weight.shape
    packed, code = weight.packed.tolist(), weight.code.cpu().numpy()
    expected = np.empty((N, K), dtype=np.float32)
    for n in range(N):
        for k in range(K):
            element = n * K + k
            byte = packed[element // 2]
            nibble = byte // 16 if element % 2 == 0 else byte % 16
            expected[n, k] = code[nibble] * _scale(weight, element // weight.blocksize)
    np.testing.assert_array_equal(
        dequantize_reference(weight, torch.float32).cpu().numpy(), expected
    )


def _scale(weight: NF4Weight, block: int) -> np.float32:
    stored = weight.absmax.cpu().numpy()[block]
    if weight.absmax2 is None or weight.code2 is None or weight.offset is None:
        return np.float32(stored)
    product = np.float32(
        weight.code2.cpu().numpy()[stored] * weight.absmax2.cpu().numpy()[block // 256]
    )
    return np.float32(product + weight.offset.cpu().numpy()[()])


def test_nested_scales_cross_their_own_blocks() -> None:
    weight = random_weight(130, 257, blocksize=64, nested=True)  # 523 blocks: 256 + 256 + 11
    assert weight.blocks == 523
    assert weight.absmax2 is not None
    assert weight.code2 is not None
    assert weight.offset is not None
    q = weight.absmax.long()
    absmax2 = weight.absmax2.repeat_interleave(256)[:523]
    assert torch.equal(block_scales(weight), weight.code2[q] * absmax2 + weight.offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("shape", "blocksize", "storage"),
    [
        ((384, 384), 64, torch.uint8),
        ((30, 128), 32, torch.bfloat16),
        ((7, 256), 128, torch.float32),
        ((3, 4096), 4096, torch.uint8),  # bitsandbytes falls back to PyTorch here
    ],
)
def test_bit_equal_to_bitsandbytes_where_rows_are_whole_blocks(
    shape: tuple[int, int], blocksize: int, storage: torch.dtype, nested: bool, dtype: torch.dtype
) -> None:
    packed, state = _quantize(torch.randn(shape, dtype=dtype), blocksize, nested, storage)
    ours = dequantize(from_quant_state(packed, state), dtype)
    assert torch.equal(ours, bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("shape", [(48, 96), (31, 33), (5, 7)])
def test_right_where_blocks_cross_rows(shape: tuple[int, int]) -> None:
    # bitsandbytes 0.50.2 itself is wrong here on AVX-512 (it starts a block with each
    # row), so the judge is what was quantised: no weight may be farther from its value
    # than half of the widest gap between codes.
    original = torch.randn(shape)
    packed, state = _quantize(original, 64, False, torch.uint8)
    weight = from_quant_state(packed, state)
    scale = block_scales(weight).repeat_interleave(64)[: original.numel()].view(shape)
    distance = (dequantize(weight, torch.float32) - original).abs() / scale
    assert distance.max() <= NF4_HALF_GAP


def _quantize(weight: torch.Tensor, blocksize: int, nested: bool, storage: torch.dtype) -> Any:
    return bnb.quantize_4bit(
        weight,
        blocksize=blocksize,
        compress_statistics=nested,
        quant_type="nf4",
        quant_storage=storage,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocksize": 48}, "blocksize must be one of .*got 48"),
        ({"shape": (0, 64)}, r"at least 1, got \(0, 64\)"),
        ({"shape": (8, 64)}, "packed holds 128 bytes, .* needs 256"),
        ({"absmax": torch.ones(3)}, "absmax must have 4 elements .*, got 3"),
        ({"code": torch.ones(15)}, "code must have 16 elements .*, got 15"),
        ({"offset": torch.ones(())}, "nested quantisation needs absmax2, code2 too"),
    ],
)
def test_wrong_sizes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(random_weight(4, 64), **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"absmax": torch.ones(4, dtype=torch.float64)}, "absmax must be torch.float32, got"),
        ({"code": torch.ones(16, dtype=torch.bfloat16)}, "code must be torch.float32, got"),
    ],
)
def test_wrong_dtypes_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        replace(random_weight(4, 64), **change)


def test_dequantizes_to_floats_only() -> None:
    with pytest.raises(TypeError, match=r"floating point type, got torch\.int8"):
        dequantize(random_weight(4, 64), torch.int8)


def test_the_packed_bytes_are_shared_not_copied() -> None:
    packed = torch.zeros(128, 1, dtype=torch.uint8, device=DEVICE)
    weight = replace(random_weight(4, 64), packed=packed)
    assert weight.packed.data_ptr() == packed.data_ptr()
