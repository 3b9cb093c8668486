"""The Triton kernels one by one against float64; interpreted where there is no GPU."""

import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftprof_kernels import NF4Weight, nf4
from peftprof_kernels.device import split
from peftprof_kernels.dropout import kept_draws
from peftprof_kernels.lora_launch import lora_down, lora_down_backward, lora_up_backward
from peftprof_kernels.nf4_dequantize import dequantize_triton
from peftprof_kernels.nf4_linear_kernels import nf4_linear_dx, nf4_linear_forward
from peftprof_kernels.reference import dequantize_reference, philox_mask
from tests.kernels.nf4_weights import DEVICE, examples, random_weight
from tests.tolerances import GEMM, relative_error

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
dtypes = st.sampled_from(DTYPES)


@settings(deadline=None, max_examples=examples(100))
@given(
    weight=st.builds(
        random_weight,
        st.integers(1, 90),
        st.integers(1, 300),
        blocksize=st.sampled_from(nf4.BLOCKSIZES),
        nested=st.booleans(),
        storage=st.sampled_from([torch.uint8, *DTYPES]),
        seed=st.integers(0, 2**16),
    ),
    dtype=dtypes,
)
def test_dequantize_is_bit_equal_to_the_reference(weight: NF4Weight, dtype: torch.dtype) -> None:
    actual = dequantize_triton(weight, dtype)
    assert actual.dtype == dtype
    assert actual.shape == weight.shape
    assert torch.equal(actual, dequantize_reference(weight, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("N", "K"),
    [
        (520, 512),  # several programs, all full
        (299, 1001),  # several, the last of them partial, an odd count
        (128, 2056),  # whole words, blocks that cross rows, a partial last block
    ],
)
def test_programs_join_without_a_seam(N: int, K: int, nested: bool) -> None:
    weight = random_weight(N, K, blocksize=4096, nested=nested)
    # Uninitialised memory is NaN while this holds: an element nobody wrote would show.
    torch.use_deterministic_algorithms(True)
    try:
        actual = dequantize_triton(weight, torch.bfloat16)
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(actual, dequantize_reference(weight, torch.bfloat16))


def test_a_packed_weight_that_starts_off_a_word_is_read_right() -> None:
    weight = random_weight(16, 64, nested=True)
    shifted = torch.empty(weight.packed.numel() + 1, dtype=torch.uint8, device=DEVICE)[1:]
    shifted.copy_(weight.packed)
    tensors = [shifted, *weight.tensors()[1:]]
    moved = NF4Weight.rebuilt(tensors, weight.layout())
    assert shifted.data_ptr() % 4
    assert torch.equal(
        dequantize_triton(moved, torch.float16), dequantize_reference(weight, torch.float16)
    )


@settings(deadline=None, max_examples=examples(60))
@given(
    M=st.sampled_from([1, 2, 3, 15, 16, 17, 65, 257]),
    N=st.integers(1, 200),
    half_K=st.integers(1, 150),
    blocksize=st.sampled_from(nf4.BLOCKSIZES),
    nested=st.booleans(),
    dtype=dtypes,
    bias=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_small_products_against_float64(
    M: int,
    N: int,
    half_K: int,
    blocksize: int,
    nested: bool,
    dtype: torch.dtype,
    bias: bool,
    strided: bool,
    seed: int,
) -> None:
    K = 2 * half_K
    weight = random_weight(N, K, blocksize=blocksize, nested=nested, seed=seed)
    generator = torch.Generator().manual_seed(seed)

    def rows(columns: int) -> Tensor:
        wide = torch.randn(M, columns + 5 * strided, generator=generator).to(DEVICE, dtype)
        return wide[:, :columns]

    x, dy = rows(K), rows(N)
    b = torch.randn(N, generator=generator).to(DEVICE) if bias else None
    W = dequantize_reference(weight, dtype).double()
    y = nf4_linear_forward(x, weight, b)
    truth = x.double() @ W.T + (0 if b is None else b.double())
    squares = x.double().square() @ W.T.square() + (0 if b is None else b.double().square())
    assert y.dtype == dtype
    # One element alone may be at three times the mean rounding.
    limit = GEMM[dtype] * (3 if y.numel() < 64 else 1)
    assert relative_error(y, truth, squares) < limit
    dx = nf4_linear_dx(dy, weight)
    limit = GEMM[dtype] * (3 if dx.numel() < 64 else 1)
    squares = dy.double().square() @ W.square()
    assert relative_error(dx, dy.double() @ W, squares) < limit


def test_rows_that_start_inside_a_byte_are_refused() -> None:
    weight = random_weight(8, 33)
    with pytest.raises(ValueError, match=r"K must be even, got a weight of shape \(8, 33\)"):
        nf4_linear_forward(torch.zeros(1, 33, device=DEVICE), weight, None)
    with pytest.raises(ValueError, match="K must be even"):
        nf4_linear_dx(torch.zeros(1, 8, device=DEVICE), weight)


@settings(deadline=None, max_examples=examples(60))
@given(
    M=st.sampled_from([1, 3, 31, 33, 65, 129, 300]),
    N=st.integers(1, 150),
    K=st.integers(1, 150),
    r=st.sampled_from([1, 2, 7, 8, 16, 17, 32, 33, 64, 100, 256]),
    dtype=dtypes,
    adapter=st.sampled_from([torch.float32, torch.bfloat16]),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    alpha=st.sampled_from([1.0, 0.3]),
    seed=st.integers(0, 2**40),
)
def test_the_adapters_kernels_against_float64(
    M: int,
    N: int,
    K: int,
    r: int,
    dtype: torch.dtype,
    adapter: torch.dtype,
    p: float,
    alpha: float,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE)

    x, dy, dx = (normal(M, n).to(dtype) for n in (K, N, K))
    A, B = normal(r, K).to(adapter), normal(N, r).to(adapter)
    key = torch.tensor(seed, device=DEVICE) if p else None
    mask = torch.ones(M, K, dtype=torch.float64, device=DEVICE)
    if p:
        mask = philox_mask((M, K), kept_draws(p), seed).double().to(DEVICE)
    # What is tested is the kernel: its inputs as it sees them, rounded to the dtype.
    A64, B64 = A.to(dtype).double(), B.to(dtype).double()
    x_hat, dy64 = mask * x.double(), dy.double()

    S = lora_down(x, A, key, p)
    _close(S, x_hat @ A64.T, x_hat.square() @ A64.T.square(), "S")
    dS, dB = lora_up_backward(dy, B, S, alpha, need_dS=True)
    assert dS is not None
    assert dB is not None
    _close(dS, dy64 @ B64, dy64.square() @ B64.square(), "dS")
    S64 = S.double()
    _close(dB, alpha * dy64.T @ S64, alpha**2 * dy64.T.square() @ S64.square(), "dB", dtype)
    dS64 = dS.double()
    true_dx = dx.double() + alpha * mask * (dS64 @ A64)
    squares_dx = dx.double().square() + alpha**2 * mask * (dS64.square() @ A64.square())
    dA = lora_down_backward(x, dS, A, dx, key, p, alpha)
    assert dA is not None
    _close(dx, true_dx, squares_dx, "dX")
    squares_dA = alpha**2 * dS64.T.square() @ x_hat.square()
    _close(dA, alpha * dS64.T @ x_hat, squares_dA, "dA", dtype)
    assert dA.dtype == adapter
    assert dB.dtype == adapter


def _close(
    actual: Tensor, truth: Tensor, squares: Tensor, name: str, dtype: torch.dtype | None = None
) -> None:
    worst = max(actual.dtype, dtype or actual.dtype, key=lambda t: torch.finfo(t).eps)
    limit = GEMM[worst] * (3 if actual.numel() < 64 else 1)
    assert relative_error(actual, truth, squares) < limit, name


def test_a_dx_that_is_no_plain_matrix_is_refused() -> None:
    dS, A = torch.ones(5, 2, device=DEVICE), torch.ones(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"dx must be contiguous, got strides \(1, 5\)"):
        lora_down_backward(None, dS, A, torch.ones(8, 5, device=DEVICE).t(), None, 0.0, 1.0)


def test_using_a_kernel_hides_no_function() -> None:
    # A file named as a function would take its place in the package once imported.
    import peftprof_kernels

    weight = random_weight(4, 64)
    peftprof_kernels.dequantize(weight, torch.float32, "triton")
    for name in peftprof_kernels.__all__:
        assert not isinstance(getattr(peftprof_kernels, name), types.ModuleType), name


def test_only_what_is_asked_for_is_made() -> None:
    x, dS, A = (torch.ones(shape, device=DEVICE) for shape in ((5, 8), (5, 2), (2, 8)))
    assert lora_down_backward(None, dS, A, x, None, 0.0, 1.0) is None
    assert torch.equal(x, torch.full_like(x, 3.0))
    dA = lora_down_backward(x, dS, A, None, None, 0.0, 1.0)
    assert dA is not None
    assert torch.equal(dA, torch.full_like(A, 15.0))
    dS_only, none = lora_up_backward(x, torch.ones(8, 2, device=DEVICE), None, 1.0, True)
    assert none is None
    assert dS_only is not None
    none, dB = lora_up_backward(x, torch.ones(8, 2, device=DEVICE), dS, 1.0, False)
    assert none is None
    assert dB is not None


def test_the_poison_of_dropped_elements_does_not_spread() -> None:
    # 0 * inf is NaN: a mask must choose, not multiply.
    x = torch.full((40, 64), float("inf"), device=DEVICE)
    seed = torch.tensor(1, device=DEVICE)
    S = lora_down(x, torch.ones(3, 64, device=DEVICE), seed, 1.0)
    assert torch.equal(S, torch.zeros_like(S))


@pytest.mark.parametrize("size", [1, 15, 64, 1000])
@pytest.mark.parametrize("programs", [1, 3, 1000])
def test_parts_cover_a_sum_once(size: int, programs: int) -> None:
    parts, part = split(size, 16, programs, DEVICE)
    assert part % 16 == 0
    assert (parts - 1) * part < size <= parts * part


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_masks_look_random(p: float) -> None:
    """Elements, rows, columns and seeds are independent, as far as pairs can tell."""
    M, K = 256, 512
    keep = philox_mask((M, K), kept_draws(p), 11).double() - (1 - p)
    others = [keep.roll(1, 0), keep.roll(1, 1), keep.roll(8, 1), keep.roll((1, 8), (0, 1))]
    others.append(philox_mask((M, K), kept_draws(p), 12).double() - (1 - p))
    others.append(philox_mask((M, K), kept_draws(p), 11 + 2**32).double() - (1 - p))
    for other in others:
        correlation = (keep * other).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / (M * K) ** 0.5
