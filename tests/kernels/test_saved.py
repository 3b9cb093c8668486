"""What a layer keeps between forward and backward."""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from peftprof_kernels import lora_linear
from tests.kernels.cases import BACKENDS, small_layer
from tests.kernels.nf4_weights import DEVICE, random_weight

on_both = pytest.mark.parametrize("backend", BACKENDS)

M, N, K, R = 24, 40, 64, 4


def _saved(base: Any, needs: str, compute: torch.dtype, p: float, backend: str) -> list[Tensor]:
    """What autograd keeps."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, M // 2, K, device=DEVICE, requires_grad="x" in needs)
    A = torch.randn(R, K, device=DEVICE, requires_grad="A" in needs)
    B = torch.randn(N, R, device=DEVICE, requires_grad="B" in needs)
    bias = torch.zeros(N, device=DEVICE)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, base, bias, A, B, 1.0, p, True, compute, backend)
    return saved


@on_both
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_x_is_saved_once_and_nothing_else_of_its_size(compute: torch.dtype, backend: str) -> None:
    saved = _saved(random_weight(N, K), "xAB", compute, 0.1, backend)
    sizes = sorted(tensor.numel() for tensor in saved)
    assert sizes == sorted([1, M * K, M * R, R * K, N * R])  # 1: the seed
    (x,) = (tensor for tensor in saved if tensor.numel() == M * K)
    assert x.dtype == compute


@on_both
@pytest.mark.parametrize(
    ("needs", "shapes"),
    [
        ("x", [(R, K), (N, R), (N, K)]),  # frozen adapter
        ("AB", [(M, K), (M, R), (R, K), (N, R)]),  # first layer: its input needs no gradient
        ("B", [(M, R), (N, R)]),
        ("A", [(M, K), (R, K), (N, R)]),
    ],
)
def test_only_what_backward_reads_is_saved(
    needs: str, shapes: list[tuple[int, int]], backend: str
) -> None:
    base = torch.randn(N, K, device=DEVICE)
    saved = _saved(base, needs, torch.float32, 0.0, backend)
    assert sorted(tuple(t.shape) for t in saved) == sorted(shapes)


@on_both
def test_x_itself_is_saved_where_it_has_the_compute_dtype(backend: str) -> None:
    x, W, A, B = small_layer(15)
    pointers: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pointers.append(t.data_ptr()) or t, lambda t: t
    ):
        lora_linear(x.view(3, 5, 16), W, None, A.requires_grad_(), B, 1.0, backend=backend)
    assert x.data_ptr() in pointers


def test_stock_peft_keeps_two_tensors_of_xs_size() -> None:
    # The dropped-out x and dropout's mask, where the layers above keep x alone.
    config = peft.LoraConfig(r=R, target_modules=["0"], lora_dropout=0.1)
    stock = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(K, N)), config).train()
    layer = stock.base_model.model[0].to(DEVICE)
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    x = torch.randn(M, K, device=DEVICE, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x * 1)
    assert y.requires_grad
    assert [size for size in kept.values() if size == M * K] == [M * K] * 2
