"""How fast is a LoRA linear layer, forward and backward, and what does it keep in between?

    python -m bench.lora_linear [--device cpu|cuda] [--quick] [--tokens 512,4096]

As in training with automatic mixed precision: x and dy in the compute dtype, A and B in
fp32, rank 16, an NF4 or a dense base without bias; PEFT's own modules for stock. Verified
are y and the gradients of x, A and B.

Dropout makes every provider's result another one. So the mask is read off the provider
itself: over a base of zeros, dX = c (m * (dS A)) is zero exactly where the mask is, and
with that mask the reference must give the provider's y, dX, dA and dB. The base product is
verified without dropout. Then the layer with both is timed.
"""

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import work
from bench.command import Benchmark, finish, main
from bench.harness import AbsentError, Case, Prepared, Provider, WrongError, verify
from bench.options import Setup
from bench.problems import ADAPTER_GRAD, GEMM, Quantised, imported, quantised, randn
from bench.providers import LIGER, need_gpu_for_triton, unsloth_kernels
from peftprof_kernels import lora_linear
from peftprof_kernels.reference import lora_linear_backward_reference, lora_linear_reference

RANK = 16
SCALING = 2.0
DROPOUTS = (0.0, 0.1)
PHASES = ("forward", "backward", "forward+backward")


class Layer(NamedTuple):
    """A layer as a provider builds it: its forward, and the adapter it trains."""

    forward: Callable[[Tensor], Tensor]
    A: Tensor  # [r, K]
    B: Tensor  # [N, r]


class Problem(NamedTuple):
    """A base and an adapter, and what goes through them."""

    base: Quantised | Tensor
    exact: Tensor  # [N, K], float64
    x: Tensor  # [M, K]
    dy: Tensor  # [M, N]
    A: Tensor
    B: Tensor

    def adapter(self) -> tuple[Tensor, Tensor]:
        """A and B, copied to be trained."""
        return self.A.clone().requires_grad_(), self.B.clone().requires_grad_()


Maker = Callable[[Setup, Problem, float], Layer]


def plan(setup: Setup) -> list[dict[str, Any]]:
    dense = str(setup.dtype).removeprefix("torch.")
    return [
        {**layer._asdict(), "M": M, "base": base, "p": p, "phase": phase}
        for layer in setup.layers
        for M in setup.tokens
        for base in ("nf4", dense)
        for p in DROPOUTS
        for phase in PHASES
    ]


def build(setup: Setup, key: dict[str, Any]) -> Case:
    M, N, K, base = key["M"], key["N"], key["K"], key["base"]
    sizes = (M, N, K, RANK, base, setup.dtype.itemsize, 4)
    forward, backward = work.lora_forward(*sizes), work.lora_backward(*sizes)
    least = {"forward": forward, "backward": backward, "forward+backward": forward + backward}
    problem = functools.partial(make_problem, setup, M, N, K, base)
    makers: dict[str, Maker] = {
        "PEFT": _peft,
        "ours-torch": functools.partial(_ours, "torch"),
        "ours-triton": functools.partial(_ours, "triton"),
        "Unsloth": _unsloth,
    }
    providers = [
        Provider(name, functools.partial(_prepare, maker, setup, problem, key["p"], key["phase"]))
        for name, maker in makers.items()
    ]
    case = {name: key[name] for name in ("N", "K", "M", "base", "p", "phase")}
    return Case({"layer": key["name"], **case}, least[key["phase"]], [*providers, LIGER])


@functools.lru_cache(maxsize=2)  # the cases of one size come one after the other
def make_problem(setup: Setup, M: int, N: int, K: int, base: str, zero: bool = False) -> Problem:
    """Tensors of one size; with `zero` the base is nothing but zeros."""
    device, dtype = setup.device, setup.dtype
    weight: Quantised | Tensor = quantised(N, K, device, dtype, zero=zero)
    assert isinstance(weight, Quantised)
    exact = weight.exact
    if base != "nf4":
        weight = exact.to(dtype)
        exact = weight.double()
    make = functools.partial(randn, device=device)
    return Problem(
        base=weight,
        exact=exact,
        x=make(M, K, dtype=dtype, seed=1).requires_grad_(),
        dy=make(M, N, dtype=dtype, seed=2),
        A=make(RANK, K, dtype=torch.float32, seed=3) * K**-0.5,
        B=make(N, RANK, dtype=torch.float32, seed=4) * RANK**-0.5,
    )


# --- Providers


def _ours(backend: str, setup: Setup, problem: Problem, p: float) -> Layer:
    need_gpu_for_triton(setup, backend)
    A, B = problem.adapter()
    base = problem.base.weight if isinstance(problem.base, Quantised) else problem.base

    def forward(x: Tensor) -> Tensor:
        return lora_linear(
            x, base, None, A, B, SCALING, p, True, compute_dtype=setup.dtype, backend=backend
        )

    return Layer(forward, A, B)


def _peft(setup: Setup, problem: Problem, p: float) -> Layer:
    peft = imported("peft")
    if isinstance(problem.base, Quantised):
        imported("bitsandbytes")
        layer = problem.base.layer
    else:
        N, K = problem.base.shape
        layer = torch.nn.Linear(K, N, bias=False, device="meta")
        layer.weight = torch.nn.Parameter(problem.base, requires_grad=False)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"], lora_dropout=p
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped: Any = peft.get_peft_model(torch.nn.Sequential(layer), config)
    module = wrapped.base_model.model[0].train()
    for mine, theirs in ((problem.A, module.lora_A), (problem.B, module.lora_B)):
        theirs["default"].weight.data.copy_(mine)
    return Layer(module, module.lora_A["default"].weight, module.lora_B["default"].weight)


def _unsloth(setup: Setup, problem: Problem, p: float) -> Layer:
    unsloth_kernels(setup)
    if p > 0:
        raise AbsentError("its fused layer has no dropout")
    fused = imported("unsloth.kernels.fast_lora").LoRA_W
    A, B = problem.adapter()
    base = problem.base
    W, state = base.packed_and_state if isinstance(base, Quantised) else (base, None)

    def forward(x: Tensor) -> Tensor:  # it wants a batch and a sequence
        return fused.apply(x[None], W, state, A, B, SCALING)[0]  # type: ignore[no-any-return]

    return Layer(forward, A, B)


# --- Verifying and timing


def _prepare(
    maker: Maker, setup: Setup, problem_of: Callable[..., Problem], p: float, phase: str
) -> Prepared:
    problem = problem_of()
    layer = maker(setup, problem, p)
    mixed = _autocast(setup)

    def forward() -> Tensor:
        with mixed():
            return layer.forward(problem.x)

    def both() -> None:
        torch.autograd.grad(forward(), (problem.x, layer.A, layer.B), problem.dy)

    def check() -> float:
        error = _check(maker(setup, problem, 0.0), setup, problem, None)
        if p > 0:
            zero = problem_of(zero=True)
            error = max(error, _check(maker(setup, zero, p), setup, zero, p))
        return error

    runs: dict[str, Callable[[], object]] = {"forward": forward, "forward+backward": both}
    if phase == "backward":
        y = forward()
        leaves = (problem.x, layer.A, layer.B)
        runs["backward"] = lambda: torch.autograd.grad(y, leaves, problem.dy, retain_graph=True)

    def notes() -> dict[str, Any]:
        if phase != "forward+backward":
            return {}
        known = {"saved_bytes": saved_bytes(forward, [layer.A, layer.B, *_weights(problem)])}
        return known | ({"peak_bytes": _peak(both)} if setup.device.type == "cuda" else {})

    return Prepared(runs[phase], check, notes)


def _check(layer: Layer, setup: Setup, problem: Problem, p: float | None) -> float:
    """The layer against the reference; with a `p`, under the mask that its own dX shows."""
    with _autocast(setup)():
        y = layer.forward(problem.x)
    grads = torch.autograd.grad(y, (problem.x, layer.A, layer.B), problem.dy)
    mask = None
    if p is not None:
        mask = grads[0] != 0
        kept, n = mask.double().mean().item(), mask.numel()
        # Five standard deviations, and the rounding of p to a multiple of 2^-16.
        if abs(kept - (1 - p)) > 5 * (p * (1 - p) / n) ** 0.5 + 2.0**-16:
            raise WrongError(f"dropout of {p} keeps {kept:.4f} of the elements")
    x, dy, A, B = (t.detach().double() for t in (problem.x, problem.dy, problem.A, problem.B))
    dropped: dict[str, Any] = {"mask": mask, "p": p or 0.0}
    base = problem.exact
    expected = lora_linear_backward_reference(dy, x, base, A, B, SCALING, **dropped)
    wanted = {"y": lora_linear_reference(x, base, None, A, B, SCALING, **dropped)}
    wanted |= {"dx": expected.x, "dA": expected.A, "dB": expected.B}
    dtype = setup.dtype
    allowed = {"y": GEMM[dtype], "dx": GEMM[dtype]}
    allowed |= {"dA": ADAPTER_GRAD[dtype], "dB": ADAPTER_GRAD[dtype]}
    return verify(dict(zip(wanted, (y, *grads), strict=True)), wanted, allowed)


def _autocast(setup: Setup) -> Callable[[], AbstractContextManager[object]]:
    if setup.dtype == torch.float32:
        return contextlib.nullcontext
    return functools.partial(torch.autocast, setup.device.type, dtype=setup.dtype)


def _weights(problem: Problem) -> list[Tensor]:
    base = problem.base
    return [base.weight.packed] if isinstance(base, Quantised) else [base]


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Bytes of memory that a forward's graph keeps for backward, parameters not counted.

    Each piece of memory once, however many tensors look at it.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in parameters}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # alive, so that no two of its tensors had the same memory
    del y
    return sum(kept.values())


def _peak(run: Callable[[], object]) -> int:
    """The most memory that one call had in use, over what was in use before it."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


KINDS = [("cpu", True), ("cpu", False), ("cuda", True), ("cuda", False)]
SHAPES = ("384x384", "minilm,distilbert", "768x768,4096x4096", "distilbert,llama-1b,llama-8b")
TOKENS = ("128", "512,2048", "512,4096", "512,2048,8192")
BENCHMARK = Benchmark(
    name="lora_linear",
    question="How fast is a LoRA linear layer, and what does it keep for backward?",
    plan=plan,
    build=build,
    shapes=dict(zip(KINDS, SHAPES, strict=True)),
    tokens=dict(zip(KINDS, TOKENS, strict=True)),
)

if __name__ == "__main__":
    finish(BENCHMARK.name, lambda: main(BENCHMARK))
