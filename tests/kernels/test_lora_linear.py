from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from peftprof_kernels import (
    NF4Weight,
    dequantize,
    dropout_mask,
    lora_linear,
    lora_linear_group,
    nf4_linear,
)
from peftprof_kernels.dropout import rounded
from peftprof_kernels.reference import (
    dequantize_reference,
    lora_linear_backward_reference,
    lora_linear_reference,
    nf4_linear_reference,
)
from tests.kernels.cases import BACKENDS, Case, cases, coarsest, keep_mask, small_layer
from tests.kernels.nf4_weights import DEVICE, examples, random_weight
from tests.tolerances import ADAPTER_GRAD, GEMM, relative_error

on_both = pytest.mark.parametrize("backend", BACKENDS)


@settings(deadline=None, max_examples=examples(200))
@given(case=cases())
def test_forward_and_gradients_against_float64(case: Case) -> None:
    x, base, bias, A, B = case.tensors()
    torch.manual_seed(case.seed)
    y = lora_linear(x, base, bias, A, B, case.scaling, case.p, True, case.compute, case.backend)
    assert y.dtype == (case.x_dtype if case.nf4 else case.compute)

    # The truth starts from the same rounded inputs: inputs are not what is tested.
    W = dequantize_reference(base, case.compute) if isinstance(base, NF4Weight) else base
    x64, W64, A64, B64 = (t.detach().to(case.compute).double() for t in (x, W, A, B))
    bias64 = None if bias is None else bias.detach().to(case.compute).double()
    keep = _mask_of(case, x)
    p = rounded(case.p)
    rest = (case.scaling, keep, p)
    truth = lora_linear_reference(x64, W64, bias64, A64, B64, *rest)
    x2, W2, A2, B2 = (t.square() for t in (x64, W64, A64, B64))
    bias2 = None if bias64 is None else bias64.square()
    rest2 = (case.scaling**2, keep, 1 - (1 - p) ** 2)
    squares = lora_linear_reference(x2, W2, bias2, A2, B2, *rest2)
    assert y.shape == truth.shape
    limit = GEMM[coarsest(case.compute, y.dtype)]
    assert relative_error(y.detach(), truth, squares) < limit, "Y"

    if not y.requires_grad:
        return
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed)).to(y)
    y.backward(dy)
    dy64 = dy.to(case.compute).double()
    grads = lora_linear_backward_reference(dy64, x64, W64, A64, B64, *rest)
    grads2 = lora_linear_backward_reference(dy64.square(), x2, W2, A2, B2, *rest2)
    for name, expected, squares, leaf in zip(
        grads._fields, grads, grads2, (x, A, B, bias), strict=True
    ):
        if leaf is None or not leaf.requires_grad:
            continue
        assert leaf.grad is not None, name
        assert leaf.grad.dtype == leaf.dtype, name
        limits = ADAPTER_GRAD if name in "AB" else GEMM
        limit = limits[coarsest(case.compute, leaf.dtype)]
        assert relative_error(leaf.grad, expected, squares) < limit, name


def _mask_of(case: Case, x: Tensor) -> Tensor | None:
    """The keep mask that the call drew, from the seed it drew."""
    if case.p == 0:
        return None
    torch.manual_seed(case.seed)
    return keep_mask(case.backend, (x.numel() // case.K, case.K), case.p).view(x.shape)


@on_both
def test_a_wrong_scaling_is_caught(backend: str) -> None:
    # The control: an error of one part in fifty in the adapter alone must not pass, or
    # the tolerances above would prove nothing.
    x, W, A, B = (torch.randn(s, device=DEVICE) for s in ((33, 48), (40, 48), (4, 48), (40, 4)))
    doubles = [t.double() for t in (x, W)]
    y = lora_linear(x, W, None, A, B, 2.0 * 1.02, backend=backend)
    truth = lora_linear_reference(*doubles, None, A.double(), B.double(), 2.0)
    assert relative_error(y, truth) > GEMM[torch.bfloat16]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_by_finite_differences(nf4: bool, p: float) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    W = random_weight(5, 6) if nf4 else torch.randn(5, 6, dtype=torch.float64, device=DEVICE)

    def forward(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every evaluation
        return lora_linear(x, W, bias, A, B, 0.8, p, True)

    assert torch.autograd.gradcheck(forward, (leaf(2, 3, 6), leaf(2, 6), leaf(5, 2), leaf(5)))


@settings(deadline=None, max_examples=examples(60))
@given(case=cases())
def test_nf4_linear_against_float64(case: Case) -> None:
    x, _, bias, *_ = case.tensors()
    weight = random_weight(case.N, case.K, blocksize=case.blocksize, seed=case.seed)
    y = nf4_linear(x, weight, bias, case.compute, case.backend)
    assert y.dtype == x.dtype
    limit = GEMM[coarsest(case.compute, x.dtype)]
    W64 = dequantize_reference(weight, case.compute).double()
    x64 = x.detach().to(case.compute).double()
    bias64 = 0 if bias is None else bias.detach().to(case.compute).double()
    squares = x64.square() @ W64.T.square() + bias64**2
    assert relative_error(y.detach(), x64 @ W64.T + bias64, squares) < limit
    if x.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed)).to(y)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.dtype == x.dtype
        dy64 = dy.to(case.compute).double()
        assert relative_error(dx, dy64 @ W64, dy64.square() @ W64.square()) < limit


def test_nf4_linear_is_the_reference_in_float32() -> None:
    weight = random_weight(20, 30)
    x, bias = torch.randn(7, 30, device=DEVICE), torch.randn(20, device=DEVICE)
    expected = nf4_linear_reference(x, weight, bias)
    assert relative_error(nf4_linear(x, weight, bias), expected) < GEMM[torch.float32]


@on_both
def test_the_mask_is_the_same_in_backward(backend: str) -> None:
    # Where the adapter alone reaches x (W = 0), dX is zero exactly where x was dropped;
    # and A's gradient has a column of zeros exactly where a lone token was dropped.
    x = torch.ones(1, 500, device=DEVICE, requires_grad=True)
    A = torch.ones(1, 500, device=DEVICE, requires_grad=True)
    B = torch.ones(3, 1, device=DEVICE)
    W = torch.zeros(3, 500, device=DEVICE)
    torch.manual_seed(11)
    y = lora_linear(x, W, None, A, B, 1.0, 0.3, True, backend=backend)
    y.sum().backward()
    torch.manual_seed(11)
    mask = keep_mask(backend, (1, 500), 0.3)
    assert 0 < mask.sum() < 500
    assert x.grad is not None
    assert A.grad is not None
    assert torch.equal(x.grad != 0, mask == 1)
    assert torch.equal(A.grad != 0, mask == 1)
    assert relative_error(y, (mask.sum() / 0.7).expand(1, 3)) < GEMM[torch.float32]


@on_both
@pytest.mark.parametrize("p", [0.05, 0.5, 1.0])
def test_the_mask_keeps_the_share_it_should(backend: str, p: float) -> None:
    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return keep_mask(backend, (1001, 701), p)  # more than one chunk, and odd

    mask = drawn(5)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.mean().item() - (1 - p)) <= 5 * deviation
    assert torch.equal(mask, drawn(5))
    if p < 1:
        assert not torch.equal(mask, drawn(6))


def test_a_mask_is_one_in_any_dtype() -> None:
    seed = torch.tensor(3)
    masks = [dropout_mask((9, 33), 0.3, seed, t, DEVICE) for t in (torch.float32, torch.bfloat16)]
    assert torch.equal(masks[0], masks[1].float())


@on_both
def test_the_random_state_of_the_run_controls_the_mask(backend: str) -> None:
    x, W, A, B = small_layer(9)

    def drop() -> Tensor:
        return lora_linear(x, W, None, A, B, 1.0, 0.5, True, backend=backend)

    torch.manual_seed(1)
    first, second = drop(), drop()
    torch.manual_seed(1)
    assert torch.equal(drop(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(x, W, None, A, B, 1.0, 0.5, training=False, backend=backend)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


@on_both
def test_checkpointing_recomputes_the_same_mask(backend: str) -> None:
    x, W, A, B = small_layer(9)
    x.requires_grad_()

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x * 1, W, None, A.requires_grad_(), B, 1.0, 0.5, True, backend=backend)

    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), A)
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(y.square().sum(), A)
    assert torch.equal(plain, recomputed)


@on_both
@pytest.mark.parametrize("nf4", [False, True])
def test_no_tokens_at_all(nf4: bool, backend: str) -> None:
    shapes = ((2, 0, 32), (2, 32), (8, 2))
    x, A, B = (torch.randn(s, device=DEVICE, requires_grad=True) for s in shapes)
    base = random_weight(8, 32) if nf4 else torch.randn(8, 32, device=DEVICE)
    y = lora_linear(x, base, None, A, B, 1.0, 0.1, True, backend=backend)
    assert y.shape == (2, 0, 8)
    y.sum().backward()
    for tensor in (x, A, B):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    if isinstance(base, NF4Weight):
        assert nf4_linear(x, base, backend=backend).shape == (2, 0, 8)


@on_both
def test_autocast_changes_nothing_inside(backend: str) -> None:
    x, W, A, B = small_layer(6)
    for leaf in (x, A, B):
        leaf.requires_grad_()
    expected = lora_linear(x, W, None, A, B, 1.0, backend=backend)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = lora_linear(x, W, None, A, B, 1.0, compute_dtype=torch.float32, backend=backend)
        y.sum().backward()
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_a_rank_beyond_one_launch_goes_in_pieces() -> None:
    x, W = torch.randn(5, 24, device=DEVICE), torch.randn(16, 24, device=DEVICE)
    A = torch.randn(300, 24, device=DEVICE, requires_grad=True)
    B = torch.randn(16, 300, device=DEVICE, requires_grad=True)
    ys = [lora_linear(x, W, None, A, B, 0.1, backend=backend) for backend in BACKENDS]
    assert relative_error(ys[1], ys[0]) < GEMM[torch.float32]
    grads = [torch.autograd.grad(y.square().sum(), (A, B)) for y in ys]
    for mine, other in zip(*grads, strict=True):
        assert relative_error(mine, other) < ADAPTER_GRAD[torch.float32]


@on_both
def test_outputs_can_be_changed_in_place(backend: str) -> None:
    x, W, A, B = small_layer(9)
    A.requires_grad_()
    y = lora_linear(x, W, None, A, B, 1.0, backend=backend)
    y += x.sum()
    z = nf4_linear(x.requires_grad_(), random_weight(8, 16), backend=backend)
    z *= 2
    (y + z).sum().backward()
    assert A.grad is not None


@on_both
def test_the_factor_is_that_of_the_share_which_is_kept(backend: str) -> None:
    # At p = 0.9999 masks keep 7 of 2^16, 6.8 % more than 1 - p: 1 / (1 - p) would be biased.
    p = 0.9999
    x, W = torch.ones(300, 300, device=DEVICE), torch.zeros(1, 300, device=DEVICE)
    A = torch.ones(1, 300, device=DEVICE)
    torch.manual_seed(3)
    y = lora_linear(x, W, None, A, A.new_ones(1, 1), 1.0, p, True, backend=backend)
    torch.manual_seed(3)
    kept = keep_mask(backend, (300, 300), p).sum()
    assert kept > 0
    assert relative_error(y.double().sum(), kept * 2**16 / 7) < GEMM[torch.float32]


@on_both
def test_strided_biases_and_statistics_are_read_right(backend: str) -> None:
    weight = random_weight(24, 64)
    bias = torch.randn(24, 2, device=DEVICE)[:, 0]
    x = torch.randn(3, 64, device=DEVICE)
    strided = torch.stack([weight.absmax, -weight.absmax], dim=1)[:, 0]
    y = nf4_linear(x, replace(weight, absmax=strided), bias, backend=backend)
    assert relative_error(y, nf4_linear_reference(x, weight, bias)) < GEMM[torch.float32]


@on_both
def test_gradients_repeat_bit_by_bit(backend: str) -> None:
    x = torch.randn(500, 64, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    A = torch.randn(4, 64, device=DEVICE, requires_grad=True)
    B = torch.randn(40, 4, device=DEVICE, requires_grad=True)
    weight = random_weight(40, 64)

    def once() -> tuple[Tensor, ...]:
        torch.manual_seed(2)
        y = lora_linear(x, weight, None, A, B, 1.0, 0.1, True, backend=backend)
        return torch.autograd.grad(y.float().square().sum(), (x, A, B))

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


def test_calls_that_cannot_be_right_are_refused() -> None:
    x, W, A, B = small_layer(3)
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 16\] .*got \(3, 15\)"):
        lora_linear(x[:, 1:], W, None, A, B, 1.0)
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(8, 3\)"):
        lora_linear(x, W, None, A, B.new_ones(8, 3), 1.0)
    with pytest.raises(ValueError, match="base must be frozen"):
        lora_linear(x, W.requires_grad_(), None, A, B, 1.0)
    W = W.detach()
    with pytest.raises(ValueError, match=r"p must be a probability, got 1\.5"):
        lora_linear(x, W, None, A, B, 1.0, p=1.5)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \(7,\)"):
        nf4_linear(x, random_weight(8, 16), x.new_zeros(7))
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        nf4_linear(x.long(), random_weight(8, 16))
    with pytest.raises(ValueError, match="backend must be one of torch, triton, got 'cuda'"):
        lora_linear(x, W, None, A, B, 1.0, backend="cuda")
    with pytest.raises(TypeError, match=r"bf16, fp16 or fp32, not torch\.float64"):
        lora_linear(x.double(), W, None, A, B, 1.0, backend="triton")
    with pytest.raises(ValueError, match=r"base must be \[N, K\], got \(8,\)"):
        lora_linear(x, W[:, 0], None, A, B, 1.0)
    with pytest.raises(TypeError, match=r"A must be floating point, got torch\.int64"):
        lora_linear(x, W, None, A.long(), B, 1.0)
    with pytest.raises(TypeError, match="dtype to compute in must be a floating point one, got"):
        lora_linear(x, W, None, A, B, 1.0, compute_dtype=torch.int32)
    with pytest.raises(TypeError, match="weight must be an NF4Weight, got Tensor"):
        dequantize(W, torch.float32)
    with pytest.raises(ValueError, match="A is on meta, x is on"):
        lora_linear(x, W, None, A.to("meta"), B, 1.0)
    with pytest.raises(ValueError, match="equally many"):
        lora_linear_group(x, [W, W], [None], [A], [B], [1.0])
    with pytest.raises(ValueError, match="all dense or all NF4"):
        A, B, nf4 = x.new_ones(2, 16), x.new_ones(8, 2), random_weight(8, 16)
        lora_linear_group(x, [W, nf4], [None] * 2, [A, A], [B, B], [1.0, 1.0])
