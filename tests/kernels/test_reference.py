import pytest
import torch
from torch import Tensor

from peftprof_kernels.reference import (
    dequantize_reference,
    lora_linear_backward_reference,
    lora_linear_reference,
    nf4_linear_reference,
    philox_mask,
)
from tests.kernels.nf4_weights import random_weight
from tests.tolerances import GEMM, relative_error


def _double(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
def test_the_written_gradients_are_the_ones_autograd_finds(p: float) -> None:
    x, A, B, bias = _double(2, 5, 7), _double(3, 7), _double(11, 3), _double(11)
    base = torch.randn(11, 7, dtype=torch.float64)
    mask = (torch.rand(x.shape) >= p).double() if p else None
    y = lora_linear_reference(x, base, bias, A, B, 0.7, mask, p)
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, (x, A, B, bias), dy)
    written = lora_linear_backward_reference(dy, x, base, A, B, 0.7, mask, p)
    for name, a, b in zip(written._fields, written, found, strict=True):
        assert relative_error(a.detach(), b) < GEMM[torch.float64], name


def test_gradients_by_finite_differences() -> None:
    base = torch.randn(4, 5, dtype=torch.float64)
    mask = (torch.rand(3, 5) < 0.6).double()
    inputs = (_double(3, 5), _double(2, 5), _double(4, 2), _double(4))

    def forward(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        return lora_linear_reference(x, base, bias, A, B, 1.5, mask, 0.4)

    assert torch.autograd.gradcheck(forward, inputs)


def test_without_an_adapter_it_is_a_linear_layer() -> None:
    weight = random_weight(6, 10)
    x, bias = torch.randn(3, 10), torch.randn(6)
    expected = torch.nn.functional.linear(x, dequantize_reference(weight, x.dtype), bias)
    assert relative_error(nf4_linear_reference(x, weight, bias), expected) < GEMM[torch.float32]
    without = nf4_linear_reference(x, weight, None)
    assert relative_error(without + bias, expected) < GEMM[torch.float32]


def test_philox_gives_its_published_words() -> None:
    # Random123's known answers: philox4x32, 7 rounds, counter and key zero.
    words = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    halves = [half for word in words for half in (word & 0xFFFF, word >> 16)]
    for element, half in enumerate(halves):
        assert philox_mask((1, 8), half + 1, 0)[0, element]
        assert not philox_mask((1, 8), half, 0)[0, element]
