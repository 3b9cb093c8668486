"""How fast is a product with an NF4 weight when there are few rows, and from where on not?

    python -m bench.nf4_linear [--device cpu|cuda] [--quick] [--tokens 1,16,256]

Forward is Y = X W^T without a graph, as in generation; dX is dY W, what backward asks of a
frozen layer: for whoever has no function for it, their own autograd backward. `ours-fused`
is the small-M kernel by itself, `ours-two-step` a Triton dequantise and a library GEMM, and
`ours-triton` what a user calls, which chooses between the two. `dense` is a library GEMM
with the weight dequantised before the clock starts: what quantisation costs.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench import work
from bench.command import Benchmark, finish, main
from bench.harness import AbsentError, Case, Prepared, Provider, verify
from bench.options import Setup
from bench.problems import GEMM, Quantised, imported, quantised, randn
from bench.providers import LIGER, need_gpu_for_triton, unsloth_kernels
from peftprof_kernels import dequantize, nf4_linear

DIRECTIONS = ("forward", "dX")


def plan(setup: Setup) -> list[dict[str, Any]]:
    return [
        {**layer._asdict(), "M": M, "direction": direction}
        for layer in setup.layers
        for M in setup.tokens
        for direction in DIRECTIONS
    ]


def build(setup: Setup, key: dict[str, Any]) -> Case:
    M, N, K, forward = key["M"], key["N"], key["K"], key["direction"] == "forward"
    problem = quantised(N, K, setup.device, setup.dtype)
    given = randn(M, K if forward else N, device=setup.device, dtype=setup.dtype, seed=1)
    make = _forward if forward else _dx
    return Case(
        {"layer": key["name"], "N": N, "K": K, "M": M, "direction": key["direction"]},
        work.linear(M, N, K, "nf4", setup.dtype.itemsize),
        [*make(setup, problem, given), LIGER],
    )


def _forward(setup: Setup, problem: Quantised, x: Tensor) -> list[Provider]:
    weight, dtype = problem.weight, setup.dtype

    def expected() -> Tensor:
        return x.double() @ problem.exact.T

    def bitsandbytes() -> Callable[[], Tensor]:
        packed, state = problem.packed_and_state
        import bitsandbytes as bnb

        return lambda: bnb.matmul_4bit(x, packed, quant_state=state)

    def gemv() -> Callable[[], Tensor]:
        if x.shape[0] != 1:
            raise AbsentError("one row only")
        if setup.device.type == "cpu":
            raise AbsentError("on a CPU it takes only weights repacked for it")
        packed, state = problem.packed_and_state
        import bitsandbytes as bnb

        return lambda: bnb.functional.gemv_4bit(x, packed, state=state)

    def ours(backend: str) -> Callable[[], Tensor]:
        need_gpu_for_triton(setup, backend)
        return lambda: nf4_linear(x, weight, backend=backend)

    def fused() -> Callable[[], Tensor]:
        need_gpu_for_triton(setup)
        _need_even(problem)
        from peftprof_kernels.nf4_linear_kernels import nf4_linear_forward

        return lambda: nf4_linear_forward(x, weight, None)

    def two_step() -> Callable[[], Tensor]:
        need_gpu_for_triton(setup)
        return lambda: linear(x, dequantize(weight, dtype, backend="triton"))

    def torchao() -> Callable[[], Tensor]:
        theirs = _torchao(problem, dtype)
        return lambda: linear(x, theirs)

    def unsloth() -> Callable[[], Tensor]:
        kernels = unsloth_kernels(setup)
        packed, state = problem.packed_and_state
        return lambda: kernels.matmul_lora(x, packed, state, None, None, None)

    def dense() -> Callable[[], Tensor]:
        ready = problem.exact.to(dtype)
        return lambda: linear(x, ready)

    made = {
        "bitsandbytes": bitsandbytes,
        "bitsandbytes gemv": gemv,
        "ours-torch": lambda: ours("torch"),
        "ours-triton": lambda: ours("triton"),
        "ours-fused": fused,
        "ours-two-step": two_step,
        "torchao": torchao,
        "Unsloth": unsloth,
        "dense": dense,
    }
    return [_provider(name, make, expected, dtype, False) for name, make in made.items()]


def _dx(setup: Setup, problem: Quantised, dy: Tensor) -> list[Provider]:
    weight, dtype = problem.weight, setup.dtype

    def expected() -> Tensor:
        return dy.double() @ problem.exact

    def backward_of(forward: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        shape = (dy.shape[0], weight.shape[1])
        x = torch.zeros(shape, dtype=dtype, device=dy.device, requires_grad=True)
        with torch.enable_grad():
            y = forward(x)
        return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]

    def bitsandbytes() -> Callable[[], Tensor]:
        packed, state = problem.packed_and_state
        import bitsandbytes as bnb

        return backward_of(lambda x: bnb.matmul_4bit(x, packed, quant_state=state))

    def ours(backend: str) -> Callable[[], Tensor]:
        need_gpu_for_triton(setup, backend)
        return backward_of(lambda x: nf4_linear(x, weight, backend=backend))

    def fused() -> Callable[[], Tensor]:
        need_gpu_for_triton(setup)
        _need_even(problem)
        from peftprof_kernels.nf4_linear_kernels import nf4_linear_dx

        return lambda: nf4_linear_dx(dy, weight)

    def two_step() -> Callable[[], Tensor]:
        need_gpu_for_triton(setup)
        return lambda: dy @ dequantize(weight, dtype, backend="triton")

    def torchao() -> Callable[[], Tensor]:
        theirs = _torchao(problem, dtype)
        return backward_of(lambda x: linear(x, theirs))

    def dense() -> Callable[[], Tensor]:
        ready = problem.exact.to(dtype)
        return lambda: dy @ ready

    made = {
        "bitsandbytes": bitsandbytes,
        "ours-torch": lambda: ours("torch"),
        "ours-triton": lambda: ours("triton"),
        "ours-fused": fused,
        "ours-two-step": two_step,
        "torchao": torchao,
        "dense": dense,
    }
    return [_provider(name, make, expected, dtype, True) for name, make in made.items()]


def _need_even(problem: Quantised) -> None:
    if problem.weight.shape[1] % 2:
        raise AbsentError("K is odd: two columns share a byte")


def _torchao(problem: Quantised, dtype: torch.dtype) -> Any:
    to_nf4 = imported("torchao.quantization").to_nf4
    if problem.weight.numel % (work.BLOCKSIZE * work.BLOCKSIZE2):
        raise AbsentError("takes only whole groups of 256 blocks")
    return to_nf4(problem.exact.to(dtype))


def _provider(
    name: str,
    make: Callable[[], Callable[[], Tensor]],
    expected: Callable[[], Tensor],
    dtype: torch.dtype,
    graph: bool,
) -> Provider:
    # torchao's weight is another one, by its scales of scales: near is all it can be.
    allowed = 0.02 if name == "torchao" else GEMM[dtype]

    def prepare() -> Prepared:
        run = make() if graph else torch.no_grad()(make())
        return Prepared(run, lambda: verify({"y": run()}, {"y": expected()}, {"y": allowed}))

    return Provider(name, prepare)


KINDS = [("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)]
SHAPES = ("minilm", "minilm,distilbert", "768x768,4096x4096,14336x4096", "all")
TOKENS = ("1,16", "1,4,16,64,256", "1,4,16,64,256", "1,2,4,8,16,32,64,128,256,512")
BENCHMARK = Benchmark(
    name="nf4_linear",
    question="How fast is a product with an NF4 weight, by the number of rows M?",
    plan=plan,
    build=build,
    shapes=dict(zip(KINDS, SHAPES, strict=True)),
    tokens=dict(zip(KINDS, TOKENS, strict=True)),
)

if __name__ == "__main__":
    finish(BENCHMARK.name, lambda: main(BENCHMARK))
