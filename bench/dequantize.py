"""How fast is an NF4 weight turned into a dense one?

    python -m bench.dequantize [--device cpu|cuda] [--quick] [--shapes minilm,4096x4096]

Every provider gives the whole weight [N, K] in the compute dtype. Right is what differs
from the exact values by no more than one unit in the last place: bitsandbytes' CPU code
rounds differently from its CUDA code. torchao keeps scales of its own format, so its
weight is another one and only near.
"""

from typing import Any

import torch
from torch import Tensor

from bench import work
from bench.command import Benchmark, finish, main
from bench.harness import AbsentError, Case, Prepared, Provider, WrongError, relative_error
from bench.options import Setup
from bench.problems import Quantised, imported, quantised
from bench.providers import LIGER, need_gpu_for_triton, unsloth_kernels
from peftprof_kernels import dequantize

# One unit in the last place, relative; in fp32 a fused multiply-add of the nested scales
# moves a few of them.
ULP = {torch.float32: 2.0**-20, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
# torchao's scales of scales have another format: its weight differs by about 1/256 of them.
TORCHAO_ALLOWED = 0.02


def plan(setup: Setup) -> list[dict[str, Any]]:
    return [layer._asdict() for layer in setup.layers]


def build(setup: Setup, key: dict[str, Any]) -> Case:
    N, K = key["N"], key["K"]
    problem = quantised(N, K, setup.device, setup.dtype)
    return Case(
        {"layer": key["name"], "N": N, "K": K},
        work.dequantize(N, K, setup.dtype.itemsize),
        [
            Provider("bitsandbytes", lambda: _bitsandbytes(setup, problem)),
            Provider("ours-torch", lambda: _ours(setup, problem, "torch")),
            Provider("ours-triton", lambda: _ours(setup, problem, "triton")),
            Provider("torchao", lambda: _torchao(setup, problem)),
            Provider("Unsloth", lambda: _unsloth(setup, problem)),
            LIGER,
        ],
    )


def _bitsandbytes(setup: Setup, problem: Quantised) -> Prepared:
    packed, state = problem.packed_and_state
    import bitsandbytes as bnb

    return _compared(lambda: bnb.functional.dequantize_4bit(packed, state), setup, problem)


def _ours(setup: Setup, problem: Quantised, backend: str) -> Prepared:
    need_gpu_for_triton(setup, backend)
    return _compared(
        lambda: dequantize(problem.weight, setup.dtype, backend=backend), setup, problem
    )


def _unsloth(setup: Setup, problem: Quantised) -> Prepared:
    kernels = unsloth_kernels(setup)
    packed, state = problem.packed_and_state
    return _compared(lambda: kernels.fast_dequantize(packed, state), setup, problem)


def _torchao(setup: Setup, problem: Quantised) -> Prepared:
    to_nf4 = imported("torchao.quantization").to_nf4
    if problem.weight.numel % (work.BLOCKSIZE * work.BLOCKSIZE2):
        raise AbsentError("takes only whole groups of 256 blocks")
    theirs = to_nf4(problem.exact.to(setup.dtype))

    def run() -> Tensor:
        return theirs.get_original_weight()  # type: ignore[no-any-return]

    def check() -> float:
        error = relative_error(run(), problem.exact)
        if not error <= TORCHAO_ALLOWED:
            raise WrongError(f"the weight is off by {error:.2g} of its size")
        return error

    return Prepared(run, check)


def _compared(run: Any, setup: Setup, problem: Quantised) -> Prepared:
    def check() -> float:
        """Element by element: the norm of a large weight hides a wrong row."""
        weight, exact = run(), problem.exact
        if weight.shape != exact.shape or weight.dtype != setup.dtype:
            raise WrongError(f"the result is {weight.dtype} {(*weight.shape,)}")
        near = torch.isclose(weight.double(), exact, rtol=ULP[setup.dtype], atol=1e-6)
        if not bool(near.all()):
            raise WrongError(f"{100 * float((~near).double().mean()):.2g} % of the weights")
        return relative_error(weight, exact)

    def notes() -> dict[str, Any]:
        equal = run() == problem.exact.to(setup.dtype)
        return {"bits_equal": "all" if bool(equal.all()) else f"{float(equal.double().mean()):.3%}"}

    return Prepared(run, check, notes)


BENCHMARK = Benchmark(
    name="dequantize",
    question="How fast is an NF4 weight turned into a dense one?",
    plan=plan,
    build=build,
    shapes={
        ("cpu", True): "minilm",
        ("cpu", False): "minilm,distilbert,llama-1b",
        ("cuda", True): "minilm,distilbert,llama-8b",
        ("cuda", False): "all",
    },
    tokens=dict.fromkeys([("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)], ""),
)

if __name__ == "__main__":
    finish(BENCHMARK.name, lambda: main(BENCHMARK))
