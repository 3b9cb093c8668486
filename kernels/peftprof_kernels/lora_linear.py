"""A frozen linear layer, dense or NF4, and its LoRA adapter as one autograd function.

Library GEMMs on any device. The equations are in ``reference.py``; what is different here
is what is kept between forward and backward: x in the compute dtype, A, B, S [M, r] and a
seed. No dequantised weight, no dropout mask, no second copy of x.

S is saved, not recomputed: it is r / K of x's size, and recomputing it would read all of
x, and remake the dropout mask where only B trains.

Scalars (the scaling, and the 1 / (1 - p) of dropout) multiply where they are free: as
the alpha of a GEMM, or on a gradient of A's or B's size, never in a pass over [M, K].
"""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from peftprof_kernels.nf4 import NF4Weight, dequantize
from peftprof_kernels.spans import (
    BASE_GEMM,
    DEQUANT,
    LORA_A,
    LORA_B,
    LORA_DA,
    LORA_DB,
    LORA_DX,
    span,
)

Base = Tensor | NF4Weight

# Mask elements drawn at a time: 2 bytes each of working memory. A GPU pays for launches.
_MASK_CHUNK_CPU: Final = 1 << 19
_MASK_CHUNK_OTHER: Final = 1 << 24


def draw_seed() -> int:
    """A seed from torch's default CPU generator: `torch.manual_seed` controls it.

    The CPU generator whatever the device, because reading a number back from a GPU would
    wait for it. Checkpointing restores this generator, so its second forward draws the
    same mask.
    """
    return int(torch.randint(2**63 - 1, (), device="cpu"))


def dropout_mask(
    shape: tuple[int, int], p: float, seed: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The keep mask, 1 with probability 1 - p and else 0, that ``seed`` stands for.

    A function of its arguments and the kind of device alone: backward calls it again
    instead of keeping the mask. p is rounded to a multiple of 2^-16.
    """
    # Raw 64-bit draws compared as four 16-bit integers: on a CPU the generator is serial
    # and its bits are what a mask costs; bernoulli_ draws 32 or more for each element.
    generator = torch.Generator(device).manual_seed(seed)
    kept = round((1.0 - p) * 2**16)  # of the 2^16 values of a draw
    if not kept:
        return torch.zeros(shape, dtype=dtype, device=device)
    largest = kept - 1 - 2**15
    mask = torch.empty(shape, dtype=dtype, device=device)
    flat = mask.view(-1)
    limit = _MASK_CHUNK_CPU if device.type == "cpu" else _MASK_CHUNK_OTHER
    chunk = min(limit, flat.numel())
    bits = torch.empty((chunk + 3) // 4, dtype=torch.int64, device=device)
    for start in range(0, flat.numel(), limit):
        part = flat[start : start + limit]
        drawn = bits[: (part.numel() + 3) // 4].random_(-(2**63), None, generator=generator)
        torch.le(drawn.view(torch.int16)[: part.numel()], largest, out=part)
    return mask


@dataclass(frozen=True)
class _Plan:
    """What the functions need besides tensors."""

    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    nf4: NF4Weight | None  # the base weight, unless it is a dense tensor
    scaling: float = 0.0
    p: float = 0.0
    seed: int = 0

    @property
    def alpha(self) -> float:
        """The factor of every product with one S or dS in it: scaling / (1 - p)."""
        return self.scaling / (1.0 - self.p) if self.p < 1.0 else 0.0

    def weight(self, dense: Tensor | None) -> Tensor:
        """The base weight [N, K] in the compute dtype."""
        if self.nf4 is not None:
            with span(DEQUANT):
                return dequantize(self.nf4, self.compute_dtype)
        assert dense is not None
        return dense.to(self.compute_dtype)

    def mask(self, M: int, K: int, device: torch.device) -> Tensor:
        return dropout_mask((M, K), self.p, self.seed, self.compute_dtype, device)


class _NF4Linear(torch.autograd.Function):
    """Y = X W^T + bias, W dequantised in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        ctx.plan, ctx.x_dtype = plan, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _no_autocast(x.device):
            y = _base_forward(_flat(x, plan), None, bias, plan)
            return y.to(plan.out_dtype).view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        plan: _Plan = ctx.plan
        with _no_autocast(dy.device):
            dy2d = _flat(dy, plan)
            dbias = _bias_grad(dy2d, ctx.bias_dtype) if ctx.needs_input_grad[1] else None
            dx = None
            if ctx.needs_input_grad[0]:
                dx = _base_backward(dy2d, None, plan)
                dx = dx.to(ctx.x_dtype).view(*dy.shape[:-1], dx.shape[1])
            return dx, dbias, None


class _LoraLinear(torch.autograd.Function):
    """Y = X W^T + bias + scaling * dropout(X) A^T B^T."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., K]
        A: Tensor,  # [r, K]
        B: Tensor,  # [N, r]
        bias: Tensor | None,  # [N]
        dense: Tensor | None,  # [N, K], None where plan.nf4 is the base
        plan: _Plan,
    ) -> Tensor:
        need_x, need_A, need_B, *_ = ctx.needs_input_grad
        with _no_autocast(x.device):
            x2d = _flat(x, plan)  # [M, K]
            y = _base_forward(x2d, dense, bias, plan)
            x_hat = x2d
            if plan.p > 0:  # in no range: dropout is not the adapter's product
                x_hat = plan.mask(x2d.shape[0], x2d.shape[1], x2d.device).mul_(x2d)
            with span(LORA_A):
                S = x_hat @ A.to(plan.compute_dtype).t()  # [M, r]
            del x_hat
            with span(LORA_B):
                # Onto the fresh Y, so that the sum is no pass of its own.
                y.addmm_(S, B.to(plan.compute_dtype).t(), alpha=plan.alpha)
        ctx.save_for_backward(
            x2d if need_A else None,
            S if need_B else None,
            A if need_x else None,
            B if need_x or need_A else None,
            dense if need_x else None,
        )
        ctx.plan, ctx.K, ctx.x_dtype = plan, x.shape[-1], x.dtype
        ctx.dtypes = A.dtype, B.dtype, None if bias is None else bias.dtype
        return y.to(plan.out_dtype).view(*x.shape[:-1], y.shape[1])

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, None, None]:
        plan: _Plan = ctx.plan
        need_x, need_A, need_B, need_bias, *_ = ctx.needs_input_grad
        x2d, S, A, B, dense = ctx.saved_tensors
        A_dtype, B_dtype, bias_dtype = ctx.dtypes
        dx = dA = dB = dS = mask = None
        with _no_autocast(dy.device):
            dy2d = _flat(dy, plan)  # [M, N]
            dbias = _bias_grad(dy2d, bias_dtype) if need_bias else None
            if need_B:
                with span(LORA_DB):
                    dB = _adapter_grad((S.t() @ dy2d).t(), B_dtype, plan)  # [N, r]
            if need_A or need_x:
                with span(LORA_DA if need_A else LORA_DX):
                    dS = dy2d @ B.to(plan.compute_dtype)  # [M, r], without alpha
                if plan.p > 0:
                    mask = plan.mask(dy2d.shape[0], ctx.K, dy.device)  # [M, K]
            if need_A:
                assert dS is not None
                x_hat = x2d if mask is None else mask * x2d
                with span(LORA_DA):
                    dA = _adapter_grad(dS.t() @ x_hat, A_dtype, plan)  # [r, K]
                del x_hat
            if need_x:
                assert dS is not None
                dx = _base_backward(dy2d, dense, plan)  # [M, K]
                with span(LORA_DX):
                    A = A.to(plan.compute_dtype)
                    if mask is None:
                        dx.addmm_(dS, A, alpha=plan.alpha)
                    else:
                        dx.addcmul_(dS @ A, mask, value=plan.alpha)
                dx = dx.to(ctx.x_dtype).view(*dy.shape[:-1], ctx.K)
        return dx, dA, dB, dbias, None, None


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """X W^T + bias, [..., K] -> [..., N], in x's dtype as bitsandbytes' Linear4bit.

    The product is made in ``compute_dtype`` (x's dtype if None). Nothing is saved for
    backward but the packed weight, which dequantises it again.
    """
    _check_input(x, weight, bias)
    return _NF4Linear.apply(x, bias, _Plan(compute_dtype or x.dtype, x.dtype, weight))  # type: ignore[no-untyped-call, no-any-return]


def lora_linear(
    x: Tensor,
    base: Base,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    p: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """X W^T + bias + scaling * dropout(X) A^T B^T, [..., K] -> [..., N].

    base  the frozen weight W [N, K]: dense, or NF4 and then dequantised in passing
    A, B  [r, K] and [N, r], in any dtype; their gradients come back in it
    p     dropout's probability, in force only while ``training``

    All products are made in ``compute_dtype`` (x's dtype if None), also under autocast.
    The result is in the dtype the stock layer gives: x's over an NF4 base (bitsandbytes
    casts back), the compute dtype over a dense one.
    """
    _check_input(x, base, bias)
    _check_adapter(base, A, B, p)
    compute_dtype = compute_dtype or x.dtype
    nf4 = base if isinstance(base, NF4Weight) else None
    p = p if training else 0.0
    plan = _Plan(
        compute_dtype=compute_dtype,
        out_dtype=compute_dtype if nf4 is None else x.dtype,
        nf4=nf4,
        scaling=scaling,
        p=p,
        seed=draw_seed() if p > 0 else 0,
    )
    dense = base if isinstance(base, Tensor) else None
    return _LoraLinear.apply(x, A, B, bias, dense, plan)  # type: ignore[no-untyped-call, no-any-return]


def _flat(x: Tensor, plan: _Plan) -> Tensor:
    """x [..., K] as [M, K] in the compute dtype: x itself where nothing has to change."""
    return x.reshape(-1, x.shape[-1]).to(plan.compute_dtype)


def _base_forward(x2d: Tensor, dense: Tensor | None, bias: Tensor | None, plan: _Plan) -> Tensor:
    weight = plan.weight(dense)
    with span(BASE_GEMM):
        return linear(x2d, weight, None if bias is None else bias.to(plan.compute_dtype))


def _base_backward(dy2d: Tensor, dense: Tensor | None, plan: _Plan) -> Tensor:
    weight = plan.weight(dense)
    with span(BASE_GEMM):
        return dy2d @ weight


def _adapter_grad(grad: Tensor, dtype: torch.dtype, plan: _Plan) -> Tensor:
    """A gradient in the parameter's dtype and layout, times alpha."""
    return grad.to(dtype, memory_format=torch.contiguous_format).mul_(plan.alpha)


def _bias_grad(dy2d: Tensor, dtype: torch.dtype) -> Tensor:
    return dy2d.sum(0, dtype=dtype)


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, operations run in the dtypes they are written in."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_input(x: Tensor, base: Base, bias: Tensor | None) -> None:
    N, K = base.shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for a base of shape ({N}, {K}), got {(*x.shape,)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if isinstance(base, Tensor) and base.requires_grad:
        raise ValueError("base must be frozen: it requires a gradient, and none is computed")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [{N}], got {(*bias.shape,)}")


def _check_adapter(base: Base, A: Tensor, B: Tensor, p: float) -> None:
    N, K = base.shape
    r = A.shape[0]
    if A.shape != (r, K) or B.shape != (N, r):
        raise ValueError(
            f"A must be [r, {K}] and B [{N}, r] with one r, got {(*A.shape,)} and {(*B.shape,)}"
        )
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a probability, got {p}")
