"""Layers that share one x."""

import pytest
import torch

from peftprof_kernels import lora_linear, lora_linear_group
from peftprof_kernels.dropout import rounded
from peftprof_kernels.reference import dequantize_reference, lora_linear_reference
from tests.kernels.cases import BACKENDS, keep_mask, small_layer
from tests.kernels.nf4_weights import DEVICE, random_weight
from tests.tolerances import ADAPTER_GRAD, GEMM, relative_error

on_both = pytest.mark.parametrize("backend", BACKENDS)
K = 64


@on_both
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_a_group_is_its_layers_apart(p: float, nf4: bool, backend: str) -> None:
    # With the group's one mask put into x by hand, and no other dropout.
    sizes, scalings, r = (24, 40, 17), (1.0, 0.5, 2.0), (4, 3, 5)
    x = torch.randn(2, 9, K, device=DEVICE, requires_grad=True)
    bases = [
        random_weight(n, K, seed=n) if nf4 else torch.randn(n, K, device=DEVICE) for n in sizes
    ]
    biases = [torch.randn(24, device=DEVICE), None, torch.randn(17, device=DEVICE)]
    As = [torch.randn(i, K, device=DEVICE, requires_grad=True) for i in r]
    Bs = [
        torch.randn(n, i, device=DEVICE, requires_grad=True) for n, i in zip(sizes, r, strict=True)
    ]
    leaves = [x, *As, *Bs]
    torch.manual_seed(7)
    ys = lora_linear_group(x, bases, biases, As, Bs, scalings, p, True, backend=backend)
    torch.manual_seed(7)
    mask = keep_mask(backend, (18, K), p).view(x.shape) if p else torch.ones_like(x)
    truths = [
        lora_linear_reference(
            x.double(),
            dequantize_reference(base, x.dtype).double() if nf4 else base.double(),
            None if bias is None else bias.double(),
            A.double(),
            B.double(),
            scaling,
            mask,
            rounded(p),
        )
        for base, bias, A, B, scaling in zip(bases, biases, As, Bs, scalings, strict=True)
    ]
    dys = [torch.randn_like(y) for y in ys]
    for y, truth in zip(ys, truths, strict=True):
        assert relative_error(y, truth) < GEMM[torch.float32]
    got = torch.autograd.grad(ys, leaves, dys)
    expected = torch.autograd.grad(truths, leaves, [dy.double() for dy in dys])
    for mine, true in zip(got, expected, strict=True):
        assert relative_error(mine, true) < ADAPTER_GRAD[torch.float32]


@on_both
@pytest.mark.parametrize("scalings", [(0.0, 1.0), (1e-4, 2.0), (0.0, 0.0)])
def test_a_group_of_very_different_scalings(scalings: tuple[float, float], backend: str) -> None:
    x, W, A, B = small_layer(9)
    leaves = [leaf.requires_grad_() for leaf in (x, A, B)]
    other, dy = W + 1, torch.randn(9, 8, device=DEVICE)
    ys = lora_linear_group(x, [W, other], [None] * 2, [A, A], [B, B], scalings, backend=backend)
    together = torch.autograd.grad(ys, leaves, [dy, 2 * dy])
    first = lora_linear(x, W, None, A, B, scalings[0], backend=backend)
    second = lora_linear(x, other, None, A, B, scalings[1], backend=backend)
    apart = torch.autograd.grad([first, second], leaves, [dy, 2 * dy])
    for mine, true in zip(together, apart, strict=True):
        assert relative_error(mine, true) < ADAPTER_GRAD[torch.float32]


@on_both
def test_an_output_of_a_group_may_go_unused(backend: str) -> None:
    x, W, A, B = small_layer(9)
    leaves = [leaf.requires_grad_() for leaf in (x, A, B)]
    alone = torch.autograd.grad(lora_linear(x, W, None, A, B, 0.5, backend=backend).sum(), leaves)
    other = torch.randn(8, 2, device=DEVICE, requires_grad=True)
    _, y = lora_linear_group(
        x, [W, W], [None] * 2, [A.detach(), A], [other, B], [1.0, 0.5], backend=backend
    )
    together = torch.autograd.grad(y.sum(), leaves)
    for a, b in zip(alone, together, strict=True):
        assert relative_error(b, a) < GEMM[torch.float32]
