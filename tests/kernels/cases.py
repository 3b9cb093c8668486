"""LoRA linears to test with, drawn at random, and what a call of a backend should give."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from peftprof_kernels import NF4Weight, draw_seed, dropout_mask, set_listener
from peftprof_kernels.dropout import kept_draws
from peftprof_kernels.reference import philox_mask
from tests.kernels.nf4_weights import DEVICE, random_weight

BACKENDS = ("torch", "triton")


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
    backend: str

    def tensors(self) -> tuple[Tensor, Tensor | NF4Weight, Tensor | None, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        need_x, need_A, need_B, need_bias = self.needs

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

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
    """Shapes around and across the tiles; ranks no power of two; every mix of dtypes."""
    backend = draw(st.sampled_from(["torch", "triton"]))
    exact = [torch.float64] if backend == "torch" else []
    compute = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, *exact]))
    # GEMM's half precision bounds are for norms of many elements: one alone may be at three
    # times the mean.
    half = compute in (torch.bfloat16, torch.float16)
    smallest = 16 if half else 1
    leading = [(17,), (2, 9), (3, 1, 5), (2, 70)] + ([] if half else [(), (1,)])
    return Case(
        leading=draw(st.sampled_from(leading)),
        N=draw(st.integers(smallest, 140)),
        K=draw(st.integers(smallest, 140)),
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
        backend=backend,
    )


def keep_mask(backend: str, shape: tuple[int, int], p: float) -> Tensor:
    """The mask, float64, that a call of ``backend`` makes from the next seed drawn."""
    if backend == "torch":
        return dropout_mask(shape, p, draw_seed(), torch.float64, DEVICE)
    return philox_mask(shape, kept_draws(p), int(draw_seed(DEVICE))).double().to(DEVICE)


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The one with the largest rounding."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def small_layer(rows: int) -> tuple[Tensor, ...]:
    """x, W, A and B, fp32, rank 2."""
    shapes = ((rows, 16), (8, 16), (2, 16), (8, 2))
    return tuple(torch.randn(shape, device=DEVICE) for shape in shapes)


@contextmanager
def heard() -> Iterator[list[str]]:
    """The names of the ranges that our operations open meanwhile."""
    names: list[str] = []

    def listener(name: str) -> nullcontext[None]:
        names.append(name)
        return nullcontext()

    before = set_listener(listener)
    try:
        yield names
    finally:
        set_listener(before)
