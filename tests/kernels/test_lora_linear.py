from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from peftprof_kernels import NF4Weight, draw_seed, dropout_mask, lora_linear, nf4_linear
from peftprof_kernels.reference import (
    dequantize_reference,
    lora_linear_backward_reference,
    lora_linear_reference,
    nf4_linear_reference,
)
from tests.kernels.nf4_weights import random_weight
from tests.tolerances import ADAPTER_GRAD, GEMM, relative_error

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Case:
    """One LoRA linear; everything random follows from the seed."""

    leading: tuple[int, ...]
    N: int
    K: int
    r: int
    compute: torch.dtype
    x_dtype: torch.dtype
    adapter: torch.dtype
    nf4: bool
    nested: bool
    blocksize: int
    bias: bool
    p: float
    scaling: float
    strided: bool
    needs: tuple[bool, bool, bool, bool]  # x, A, B, bias
    seed: int

    def tensors(self) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        need_x, need_A, need_B, need_bias = self.needs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        x = normal(*self.leading, 2 * self.K)[..., ::2] if self.strided else None
        x = normal(*self.leading, self.K) if x is None else x
        base: Tensor | NF4Weight = normal(self.N, self.K).to(self.compute)
        if self.nf4:
            base = random_weight(
                self.N, self.K, blocksize=self.blocksize, nested=self.nested, seed=self.seed
            )
        bias = normal(self.N).requires_grad_(need_bias) if self.bias else None
        A = normal(self.r, self.K).to(self.adapter).requires_grad_(need_A)
        B = normal(self.N, self.r).to(self.adapter).requires_grad_(need_B)
        return x.to(self.x_dtype).requires_grad_(need_x), base, bias, A, B


@st.composite
def cases(draw: st.DrawFn) -> Case:
    compute = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    # GEMM's half precision bounds are for norms of many elements: one alone may be at three
    # times the mean.
    half = compute in (torch.bfloat16, torch.float16)
    smallest = 16 if half else 1
    leading = [(17,), (2, 9), (3, 1, 5)] + ([] if half else [(), (1,)])
    return Case(
        leading=draw(st.sampled_from(leading)),
        N=draw(st.integers(smallest, 90)),
        K=draw(st.integers(smallest, 90)),
        r=draw(st.integers(1, 64)),
        compute=compute,
        x_dtype=draw(st.sampled_from([compute, torch.float32])),
        adapter=draw(st.sampled_from([compute, torch.float32])),
        nf4=draw(st.booleans()),
        nested=draw(st.booleans()),
        blocksize=draw(st.sampled_from([32, 64, 256])),
        bias=draw(st.booleans()),
        p=draw(st.sampled_from([0.0, 0.1, 0.5, 1.0])),
        scaling=draw(st.sampled_from([1.0, 0.25, 2.7])),
        strided=draw(st.booleans()),
        needs=draw(st.tuples(*[st.booleans()] * 4)),
        seed=draw(st.integers(0, 2**16)),
    )


@settings(deadline=None, max_examples=150)
@given(case=cases())
def test_forward_and_gradients_against_float64(case: Case) -> None:
    x, base, bias, A, B = case.tensors()
    torch.manual_seed(case.seed)
    y = lora_linear(x, base, bias, A, B, case.scaling, case.p, True, case.compute)
    assert y.dtype == (case.x_dtype if case.nf4 else case.compute)

    # The truth starts from the same rounded inputs: inputs are not what is tested.
    W = dequantize_reference(base, case.compute) if isinstance(base, NF4Weight) else base
    x64, W64, A64, B64 = (t.detach().to(case.compute).double() for t in (x, W, A, B))
    bias64 = None if bias is None else bias.detach().to(case.compute).double()
    keep = _mask_of(case, x)
    rest = (case.scaling, keep, case.p)
    truth = lora_linear_reference(x64, W64, bias64, A64, B64, *rest)
    x2, W2, A2, B2 = (t.square() for t in (x64, W64, A64, B64))
    bias2 = None if bias64 is None else bias64.square()
    rest2 = (case.scaling**2, keep, 1 - (1 - case.p) ** 2)
    squares = lora_linear_reference(x2, W2, bias2, A2, B2, *rest2)
    assert y.shape == truth.shape
    limit = GEMM[_coarsest(case.compute, y.dtype)]
    assert relative_error(y.detach(), truth, squares) < limit, "Y"

    if not y.requires_grad:
        return
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed)).to(y.dtype)
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
        limit = limits[_coarsest(case.compute, leaf.dtype)]
        assert relative_error(leaf.grad, expected, squares) < limit, name


def _mask_of(case: Case, x: Tensor) -> Tensor | None:
    """The keep mask that the call drew, from the seed it drew."""
    if case.p == 0:
        return None
    torch.manual_seed(case.seed)
    M = x.numel() // case.K
    mask = dropout_mask((M, case.K), case.p, draw_seed(), torch.float64, CPU)
    return mask.view(x.shape)


def _coarsest(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def test_a_wrong_scaling_is_caught() -> None:
    # The control: an error of one part in fifty in the adapter alone must not pass, or
    # the tolerances above would prove nothing.
    x, W, A, B = (torch.randn(s) for s in ((33, 48), (40, 48), (4, 48), (40, 4)))
    doubles = [t.double() for t in (x, W)]
    y = lora_linear(x, W, None, A, B, 2.0 * 1.02)
    truth = lora_linear_reference(*doubles, None, A.double(), B.double(), 2.0)
    assert relative_error(y, truth) > GEMM[torch.bfloat16]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("nf4", [False, True])
def test_gradients_by_finite_differences(nf4: bool, p: float) -> None:
    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    W = random_weight(5, 6) if nf4 else torch.randn(5, 6, dtype=torch.float64)

    def forward(x: Tensor, A: Tensor, B: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(3)  # the same mask at every evaluation
        return lora_linear(x, W, bias, A, B, 0.8, p, True)

    assert torch.autograd.gradcheck(forward, (leaf(2, 3, 6), leaf(2, 6), leaf(5, 2), leaf(5)))


@settings(deadline=None, max_examples=60)
@given(case=cases())
def test_nf4_linear_against_float64(case: Case) -> None:
    x, _, bias, *_ = case.tensors()
    weight = random_weight(case.N, case.K, blocksize=case.blocksize, seed=case.seed)
    y = nf4_linear(x, weight, bias, case.compute)
    assert y.dtype == x.dtype
    limit = GEMM[_coarsest(case.compute, x.dtype)]
    W64 = dequantize_reference(weight, case.compute).double()
    x64 = x.detach().to(case.compute).double()
    bias64 = 0 if bias is None else bias.detach().to(case.compute).double()
    squares = x64.square() @ W64.T.square() + bias64**2
    assert relative_error(y.detach(), x64 @ W64.T + bias64, squares) < limit
    if x.requires_grad:
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(case.seed)).to(y.dtype)
        (dx,) = torch.autograd.grad(y, x, dy)
        assert dx.dtype == x.dtype
        dy64 = dy.to(case.compute).double()
        assert relative_error(dx, dy64 @ W64, dy64.square() @ W64.square()) < limit


def test_nf4_linear_is_the_reference_in_float32() -> None:
    weight, x, bias = random_weight(20, 30), torch.randn(7, 30), torch.randn(20)
    expected = nf4_linear_reference(x, weight, bias)
    assert relative_error(nf4_linear(x, weight, bias), expected) < GEMM[torch.float32]


def test_the_mask_is_the_same_in_backward() -> None:
    # Where the adapter alone reaches x (W = 0), dX is zero exactly where x was dropped;
    # and A's gradient has a column of zeros exactly where a lone token was dropped.
    x = torch.ones(1, 500, requires_grad=True)
    A = torch.ones(1, 500, requires_grad=True)
    B = torch.ones(3, 1)
    torch.manual_seed(11)
    y = lora_linear(x, torch.zeros(3, 500), None, A, B, 1.0, 0.3, True)
    y.sum().backward()
    torch.manual_seed(11)
    mask = dropout_mask((1, 500), 0.3, draw_seed(), torch.float32, CPU)
    assert 0 < mask.sum() < 500
    assert x.grad is not None
    assert A.grad is not None
    assert torch.equal(x.grad != 0, mask == 1)
    assert torch.equal(A.grad != 0, mask == 1)
    assert relative_error(y, (mask.sum() / 0.7).expand(1, 3)) < GEMM[torch.float32]


@pytest.mark.parametrize("p", [0.0, 0.05, 0.5, 1.0])
def test_the_mask_keeps_the_share_it_should(p: float) -> None:
    # More than one chunk, and an odd number of elements.
    mask = dropout_mask((1001, 701), p, 5, torch.bfloat16, CPU)
    assert set(mask.unique().tolist()) <= {0.0, 1.0}
    deviation = (p * (1 - p) / mask.numel()) ** 0.5
    assert abs(mask.double().mean().item() - (1 - p)) <= 5 * deviation
    assert torch.equal(mask, dropout_mask((1001, 701), p, 5, torch.bfloat16, CPU))
    if 0 < p < 1:
        assert not torch.equal(mask, dropout_mask((1001, 701), p, 6, torch.bfloat16, CPU))


def test_the_random_state_of_the_run_controls_the_mask() -> None:
    x, W, A, B = (torch.randn(s) for s in ((9, 16), (8, 16), (2, 16), (8, 2)))

    def drop() -> Tensor:
        return lora_linear(x, W, None, A, B, 1.0, 0.5, True)

    torch.manual_seed(1)
    first, second = drop(), drop()
    torch.manual_seed(1)
    assert torch.equal(drop(), first)
    assert not torch.equal(first, second)
    state = torch.get_rng_state()
    lora_linear(x, W, None, A, B, 1.0, 0.5, training=False)
    assert torch.equal(torch.get_rng_state(), state)  # evaluation draws nothing


def test_checkpointing_recomputes_the_same_mask() -> None:
    x = torch.randn(9, 16, requires_grad=True)
    W, A, B = (torch.randn(s) for s in ((8, 16), (2, 16), (8, 2)))

    def layer(x: Tensor) -> Tensor:
        return lora_linear(x * 1, W, None, A.requires_grad_(), B, 1.0, 0.5, True)

    torch.manual_seed(1)
    (plain,) = torch.autograd.grad(layer(x).square().sum(), A)
    torch.manual_seed(1)
    y = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(y.square().sum(), A)
    assert torch.equal(plain, recomputed)


M, N, K, R = 24, 40, 64, 4


def _saved(base: Any, needs: str, compute: torch.dtype, p: float = 0.1) -> list[Tensor]:
    """What autograd keeps, as (dtype, shape) of each tensor."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(2, M // 2, K, requires_grad="x" in needs)
    A = torch.randn(R, K, requires_grad="A" in needs)
    B = torch.randn(N, R, requires_grad="B" in needs)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lora_linear(x, base, torch.zeros(N), A, B, 1.0, p, True, compute)
    return saved


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_x_is_saved_once_and_nothing_else_of_its_size(compute: torch.dtype) -> None:
    saved = _saved(random_weight(N, K), "xAB", compute)
    sizes = sorted(tensor.numel() for tensor in saved)
    assert sizes == sorted([M * K, M * R, R * K, N * R])
    (x,) = (tensor for tensor in saved if tensor.numel() == M * K)
    assert x.dtype == compute


@pytest.mark.parametrize(
    ("needs", "shapes"),
    [
        ("x", [(R, K), (N, R), (N, K)]),  # frozen adapter
        ("AB", [(M, K), (M, R), (N, R)]),  # first layer: its input needs no gradient
        ("B", [(M, R)]),
        ("A", [(M, K), (N, R)]),
    ],
)
def test_only_what_backward_reads_is_saved(needs: str, shapes: list[tuple[int, int]]) -> None:
    saved = _saved(torch.randn(N, K), needs, torch.float32)
    assert sorted(tuple(t.shape) for t in saved) == sorted(shapes)


def test_x_itself_is_saved_where_it_has_the_compute_dtype() -> None:
    x = torch.randn(3, 5, 16)
    A = torch.randn(2, 16, requires_grad=True)
    pointers: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: pointers.append(t.data_ptr()) or t, lambda t: t
    ):
        lora_linear(x, torch.randn(8, 16), None, A, torch.randn(8, 2), 1.0)
    assert x.data_ptr() in pointers


@pytest.mark.parametrize("nf4", [False, True])
def test_no_tokens_at_all(nf4: bool) -> None:
    x = torch.empty(2, 0, 32, requires_grad=True)
    A, B = torch.randn(2, 32, requires_grad=True), torch.randn(8, 2, requires_grad=True)
    base = random_weight(8, 32) if nf4 else torch.randn(8, 32)
    y = lora_linear(x, base, None, A, B, 1.0, 0.1, True)
    assert y.shape == (2, 0, 8)
    y.sum().backward()
    for tensor in (x, A, B):
        assert tensor.grad is not None
        assert torch.equal(tensor.grad, torch.zeros_like(tensor))
    if isinstance(base, NF4Weight):
        assert nf4_linear(x, base).shape == (2, 0, 8)


def test_autocast_changes_nothing_inside() -> None:
    x, A, B = (torch.randn(s, requires_grad=True) for s in ((6, 16), (2, 16), (8, 2)))
    W = torch.randn(8, 16)
    expected = lora_linear(x, W, None, A, B, 1.0)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(x, W, None, A, B, 1.0, compute_dtype=torch.float32)
        y.sum().backward()
    assert y.dtype == torch.float32
    assert torch.equal(y, expected)


def test_calls_that_cannot_be_right_are_refused() -> None:
    x, W, A, B = (torch.randn(s) for s in ((3, 16), (8, 16), (2, 16), (8, 2)))
    with pytest.raises(ValueError, match=r"x must be \[\.\.\., 16\] .*got \(3, 15\)"):
        lora_linear(x[:, 1:], W, None, A, B, 1.0)
    with pytest.raises(ValueError, match=r"got \(2, 16\) and \(8, 3\)"):
        lora_linear(x, W, None, A, torch.randn(8, 3), 1.0)
    with pytest.raises(ValueError, match="base must be frozen"):
        lora_linear(x, W.requires_grad_(), None, A, B, 1.0)
    with pytest.raises(ValueError, match=r"p must be a probability, got 1\.5"):
        lora_linear(x, W.detach(), None, A, B, 1.0, p=1.5)
    with pytest.raises(ValueError, match=r"bias must be \[8\], got \(7,\)"):
        nf4_linear(x, random_weight(8, 16), torch.zeros(7))
    with pytest.raises(TypeError, match=r"floating point, got torch\.int64"):
        nf4_linear(x.long(), random_weight(8, 16))
