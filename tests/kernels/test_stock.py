"""Parity with the stock layers: PEFT's LoRA over torch's Linear and bitsandbytes'."""

from typing import Any

import bitsandbytes
import peft
import pytest
import torch
from torch import Tensor, nn

from peftprof_kernels import lora_linear, nf4_linear
from tests.kernels.nf4_weights import from_quant_state
from tests.tolerances import BF16_REORDERED, FP32_REORDERED, relative_error

K, N, R = 384, 256, 8


def _with_lora(layer: nn.Module) -> Any:
    """The layer as PEFT wraps it, with a B that is not zero."""
    config = peft.LoraConfig(r=R, lora_alpha=20, target_modules=["0"], lora_dropout=0.0)
    wrapped: Any = peft.get_peft_model(nn.Sequential(layer), config).base_model.model[0]
    nn.init.normal_(wrapped.lora_B["default"].weight)
    return wrapped


def _adapter(wrapped: Any) -> tuple[Tensor, Tensor, float]:
    A, B = wrapped.lora_A["default"].weight, wrapped.lora_B["default"].weight
    return A, B, wrapped.scaling["default"]


def _linear4bit(compute: torch.dtype, nested: bool, bias: bool) -> Any:
    layer: Any = bitsandbytes.nn.Linear4bit(
        K, N, bias=bias, compute_dtype=compute, compress_statistics=nested, quant_type="nf4"
    )
    layer.to("cpu")  # quantises
    # Else the first evaluation without gradients would repack the weight for good, in a
    # layout that carries none.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _compare(ours: Tensor, stock: Tensor, leaves: list[Tensor], limit: float) -> None:
    """The results, and the gradients of every leaf through each of them."""
    assert ours.dtype == stock.dtype
    assert relative_error(ours.detach(), stock.detach()) < limit
    dy = torch.randn_like(stock)
    pairs = zip(
        torch.autograd.grad(ours, leaves, dy), torch.autograd.grad(stock, leaves, dy), strict=True
    )
    for mine, theirs in pairs:
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) < limit


@pytest.mark.parametrize("bias", [False, True])
def test_peft_over_linear_in_float32(bias: bool) -> None:
    wrapped = _with_lora(nn.Linear(K, N, bias=bias))
    base = wrapped.base_layer
    A, B, scaling = _adapter(wrapped)
    x = torch.randn(2, 19, K, requires_grad=True)
    ours = lora_linear(x, base.weight, base.bias, A, B, scaling, training=True)
    _compare(ours, wrapped(x), [x, A, B], FP32_REORDERED)


def test_peft_over_linear_under_autocast() -> None:
    wrapped = _with_lora(nn.Linear(K, N))
    base = wrapped.base_layer
    A, B, scaling = _adapter(wrapped)
    x = torch.randn(2, 19, K, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        stock = wrapped(x)
        ours = lora_linear(x, base.weight, base.bias, A, B, scaling, compute_dtype=torch.bfloat16)
    _compare(ours, stock, [x, A, B], BF16_REORDERED)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(
    ("x_dtype", "compute", "limit"),
    [
        (torch.float32, torch.float32, FP32_REORDERED),
        (torch.float32, torch.bfloat16, BF16_REORDERED),
        (torch.bfloat16, torch.bfloat16, BF16_REORDERED),
    ],
)
def test_peft_over_linear4bit(
    x_dtype: torch.dtype, compute: torch.dtype, limit: float, nested: bool, bias: bool
) -> None:
    layer = _linear4bit(compute, nested, bias)
    weight = from_quant_state(layer.weight, layer.weight.quant_state)
    x = torch.randn(2, 19, K, dtype=x_dtype, requires_grad=True)
    _compare(nf4_linear(x, weight, layer.bias, compute), layer(x), [x], limit)

    wrapped = _with_lora(layer)
    A, B, scaling = _adapter(wrapped)
    ours = lora_linear(x, weight, layer.bias, A, B, scaling, 0.0, True, compute)
    _compare(ours, wrapped(x), [x, A, B], limit)
