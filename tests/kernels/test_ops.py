"""The operators as PyTorch's own tools see them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from peftprof_kernels import NF4Weight, lora_linear, lora_linear_group, nf4_linear
from tests.kernels.cases import BACKENDS
from tests.kernels.nf4_weights import DEVICE, random_weight
from tests.tolerances import FP32_REORDERED, relative_error

ops = torch.ops.peftprof


@pytest.fixture(autouse=True)
def _compiled_by_no_other_test() -> None:
    torch._dynamo.reset()


on_both = pytest.mark.parametrize("backend", BACKENDS)
M, N, K, R = 20, 24, 64, 3


def _normal(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = False) -> Tensor:
    return torch.randn(shape, dtype=dtype, device=DEVICE, requires_grad=grad)


def _calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operator with arguments of every kind it takes."""
    nested, plain = random_weight(N, K, nested=True), random_weight(N, K - 1)
    weights = {"nested": nested, "plain": plain}
    x, dy, A, B = _normal(M, K), _normal(M, N), _normal(R, K), _normal(N, R)
    S, dS, seed = _normal(M, R), _normal(M, R), torch.tensor(5, device=DEVICE)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "mask": (ops.dropout_mask, (x, M, K, 0.3, torch.tensor(5))),
        "down": (ops.lora_down, (x, A, None, 0.0)),
        "down-dropout": (ops.lora_down, (x, A, seed, 0.3)),
        "up": (ops.lora_up_backward, (dy, B, S, 0.5, True)),
        "up-dB": (ops.lora_up_backward, (dy, B, S, 0.5, False)),
        "up-dS": (ops.lora_up_backward, (dy, B, None, 0.5, True)),
        "back": (ops.lora_down_backward, (x, dS, A, x.clone(), None, 0.0, 0.5)),
        "back-dA": (ops.lora_down_backward, (x, dS, A, None, seed, 0.3, 0.5)),
        "back-dX": (ops.lora_down_backward, (None, dS, A, x.clone(), seed, 0.3, 0.5)),
    }
    for name, weight in weights.items():
        for backend in BACKENDS:
            flat = (weight.tensors(), weight.layout())
            key = f"{name}-{backend}"
            calls |= {
                f"dequantize-{key}": (ops.nf4_dequantize, (*flat, torch.bfloat16, backend)),
                f"linear-{key}": (
                    ops.nf4_linear,
                    (_normal(M, weight.shape[1]), *flat, _normal(N), backend),
                ),
                f"dx-{key}": (ops.nf4_linear_dx, (dy, *flat, backend)),
            }
    return calls


CALLS = _calls()


def test_every_operator_is_called_here() -> None:
    called = {str(op) for op, _ in CALLS.values()}
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("peftprof::")
    }
    assert {name.replace("::", ".") for name in registered} == called


@pytest.mark.parametrize("name", sorted(CALLS))
def test_opcheck(name: str) -> None:
    op, arguments = CALLS[name]
    torch.library.opcheck(op.default, arguments)


@on_both
def test_flops_are_counted(backend: str) -> None:
    base_product, adapter = 2 * M * N * K, 2 * M * R * (N + K)
    x, A, B = _normal(M, K, grad=True), _normal(R, K, grad=True), _normal(N, R, grad=True)
    with FlopCounterMode(display=False) as counter:
        y = lora_linear(x, random_weight(N, K), None, A, B, 1.0, 0.1, True, backend=backend)
    assert counter.get_total_flops() == base_product + adapter
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    # W is frozen, so no weight gradient; dS, dB, dA and the adapter's part of dX.
    assert counter.get_total_flops() == base_product + 2 * adapter
    x = x.detach()
    y = lora_linear(x, random_weight(N, K), None, A, B, 1.0, 0.1, True, backend=backend)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * M * R * (2 * N + K)  # dS, dB, dA


@on_both
@pytest.mark.parametrize("nf4", [False, True])
def test_fake_tensors_have_the_shapes_of_real_ones(nf4: bool, backend: str) -> None:
    weight = random_weight(N, K, nested=True)

    def call() -> tuple[Any, ...]:
        base: Any = weight if nf4 else _normal(N, K)
        x = _normal(2, 10, K, dtype=torch.bfloat16, grad=True)
        A, B = _normal(R, K, grad=True), _normal(N, R, grad=True)
        y = lora_linear(x, base, _normal(N), A, B, 1.0, 0.1, True, backend=backend)
        return y, *torch.autograd.grad(y.sum(), (x, A, B))

    def described(tensors: tuple[Any, ...]) -> list[Any]:
        return [(t.shape, t.dtype, t.stride()) for t in tensors]

    real = described(call())
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert described(call()) == real


def _steps(backend: str, nf4: bool, p: float) -> tuple[Callable[..., Any], list[Tensor]]:
    """A small network of our layers as a function of its leaves, and those."""
    weight = random_weight(N, K, nested=True)
    base: NF4Weight | Tensor = weight if nf4 else _normal(N, K)
    other: NF4Weight | Tensor = random_weight(N, K) if nf4 else _normal(N, K)
    second = random_weight(K, N)
    bias = _normal(N)
    leaves = [_normal(2, 9, K, grad=True), _normal(R, K, grad=True), _normal(N, R, grad=True)]
    leaves += [_normal(2, K, grad=True), _normal(N, 2, grad=True)]

    def step(x: Tensor, A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> Tensor:
        y = lora_linear(x, base, bias, A, B, 0.5, p, True, backend=backend)
        x = x + nf4_linear(torch.relu(y), second, backend=backend)
        k, v = lora_linear_group(
            x, [base, other], [bias, None], [A, A2], [B, B2], [0.5, 2.0], backend=backend
        )
        return (k * v).square().mean()

    return step, leaves


@on_both
@pytest.mark.parametrize("nf4", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.2])
def test_torch_compile_makes_one_graph(p: float, nf4: bool, backend: str) -> None:
    step, leaves = _steps(backend, nf4, p)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.manual_seed(4)
    expected = step(*leaves)
    expected_grads = torch.autograd.grad(expected, leaves)
    torch.manual_seed(4)
    loss = compiled(*leaves)
    assert relative_error(loss, expected) < FP32_REORDERED
    for a, b in zip(torch.autograd.grad(loss, leaves), expected_grads, strict=True):
        assert relative_error(a, b) < FP32_REORDERED
    if p:  # a mask is no constant of the graph
        assert not torch.equal(compiled(*leaves), compiled(*leaves))


@on_both
def test_one_graph_serves_other_scalings_and_rates(backend: str) -> None:
    # From its second value on torch.compile traces a number as a symbol.
    base, x = random_weight(N, K), _normal(M, K, grad=True)
    A, B = _normal(R, K, grad=True), _normal(N, R, grad=True)

    def layer(scaling: float, p: float) -> Tensor:
        return lora_linear(x, base, None, A, B, scaling, p, True, backend=backend)

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for scaling, p in ((2.0, 0.0), (3.0, 0.0), (-4.0, 0.1), (4.0, 0.2)):
        ys = []
        for run in (compiled, layer):
            torch.manual_seed(1)
            ys.append(run(scaling, p))
        assert relative_error(ys[0], ys[1]) < FP32_REORDERED
        grads = [torch.autograd.grad(y.sum(), (x, A, B)) for y in ys]
        for mine, other in zip(*grads, strict=True):
            assert relative_error(mine, other) < FP32_REORDERED


@pytest.mark.slow
@on_both
def test_inductor_compiles_it(backend: str) -> None:
    step, leaves = _steps(backend, True, 0.0)
    compiled = torch.compile(step, fullgraph=True)
    loss, expected = compiled(*leaves), step(*leaves)
    assert relative_error(loss, expected) < FP32_REORDERED
    grads = torch.autograd.grad(loss, leaves)
    for a, b in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
        assert relative_error(a, b) < FP32_REORDERED


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
def test_a_cuda_graph_draws_a_new_mask_at_each_replay() -> None:
    x, A, B = _normal(M, K), _normal(R, K), _normal(N, R)
    weight = random_weight(N, K)

    def call() -> Tensor:
        return lora_linear(x, weight, None, A, B, 1.0, 0.5, True, backend="triton")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)
