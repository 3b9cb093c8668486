"""A frozen linear layer, dense or NF4, and its LoRA adapter as one autograd function.

The equations are in ``reference.py``; what is different here is what is kept between
forward and backward: x in the compute dtype, A, B, S [M, r] and a seed. No dequantised
weight, no dropout mask, no second copy of x. ``backends.py`` does the products.

S is saved, not recomputed: it is r / K of x's size, and recomputing it would read all of
x, and remake the dropout mask where only B trains.

Scalars (the scaling, and the 1 / (1 - p) of dropout) multiply where they are free: as
the alpha of a GEMM, or on a gradient of A's or B's size, never in a pass over [M, K].
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from peftprof_kernels.backends import (
    Backend,
    Base,
    base_backward,
    base_forward,
    get_backend,
)
from peftprof_kernels.dropout import draw_seed, rounded
from peftprof_kernels.nf4 import NF4Weight
from peftprof_kernels.spans import LORA_B, span


@dataclass(frozen=True)
class _Plan:
    """What the functions need besides tensors."""

    compute_dtype: torch.dtype
    out_dtype: torch.dtype
    backend: Backend
    nf4: tuple[NF4Weight | None, ...]  # the base weights, but for those that are dense tensors
    alphas: tuple[float, ...] = ()  # scaling / (1 - p), on every product with one S in it
    p: float = 0.0

    def base(self, index: int, dense: Tensor | None) -> Base:
        """The base weight [N, K] of layer ``index``."""
        nf4 = self.nf4[index]
        if nf4 is not None:
            return nf4
        assert dense is not None
        return dense


class _NF4Linear(torch.autograd.Function):
    """Y = X W^T + bias, W dequantised in forward and again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, plan: _Plan) -> Tensor:
        ctx.plan, ctx.x_dtype = plan, x.dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        with _no_autocast(x.device):
            x2d = plan.backend.flat(x, plan.compute_dtype)
            y = base_forward(x2d, plan.base(0, None), bias, plan.backend)
            return _shaped(y.to(plan.out_dtype), x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        plan: _Plan = ctx.plan
        with _no_autocast(dy.device):
            dy2d = plan.backend.flat(dy, plan.compute_dtype)
            dbias = dy2d.sum(0, dtype=ctx.bias_dtype) if ctx.needs_input_grad[1] else None
            dx = None
            if ctx.needs_input_grad[0]:
                dx = base_backward(dy2d, plan.base(0, None), plan.backend)
                dx = dx.to(ctx.x_dtype).view(*dy.shape[:-1], dx.shape[1])
            return dx, dbias, None


# The tensors of one layer among a function's arguments, in this order.
_A, _B, _BIAS, _DENSE, _EACH = 0, 1, 2, 3, 4


class _LoraLinears(torch.autograd.Function):
    """Y = X W^T + bias + scaling * dropout(X) A^T B^T for layers that share one X.

    The adapters' A stand on top of each other, so that X, its mask and dX are passed over
    once for all of them; base products and dB are each layer's own.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # [..., K]
        seed: Tensor | None,  # int64 [], None without dropout
        plan: _Plan,
        *layers: Tensor | None,  # A [r, K], B [N, r], bias [N], dense [N, K] of each
    ) -> tuple[Tensor, ...]:
        need_x, need_A = ctx.needs_input_grad[0], _needs(ctx, _A)
        need_B = _needs(ctx, _B)
        As, Bs, biases, denses = (layers[i::_EACH] for i in range(_EACH))
        ranks = [A.shape[0] for A in As if A is not None]
        ys = []
        with _no_autocast(x.device):
            x2d = plan.backend.flat(x, plan.compute_dtype)  # [M, K]
            for i, (bias, dense) in enumerate(zip(biases, denses, strict=True)):
                ys.append(base_forward(x2d, plan.base(i, dense), bias, plan.backend))
            S = plan.backend.down(x2d, _stacked(As), seed, plan.p)  # [M, sum of ranks]
            with span(LORA_B):
                for y, B, part, alpha in zip(ys, Bs, _split(S, ranks, 1), plan.alphas, strict=True):
                    assert B is not None
                    # Onto the fresh Y, so that the sum is no pass of its own. With out= and
                    # not addmm_, whose FLOPs torch's counter does not know.
                    torch.addmm(y, part, B.to(plan.compute_dtype).t(), alpha=alpha, out=y)
        ctx.save_for_backward(
            seed,
            x2d if any(need_A) else None,
            S if any(need_B) else None,
            *(A if need_x or any(need_A) else None for A in As),
            *(
                B if need_x or any(need_A) or need else None
                for B, need in zip(Bs, need_B, strict=True)
            ),
            *(dense if need_x else None for dense in denses),
        )
        ctx.set_materialize_grads(False)
        ctx.plan, ctx.x_shape, ctx.x_dtype, ctx.ranks = plan, x.shape, x.dtype, ranks
        ctx.bias_dtypes = [None if bias is None else bias.dtype for bias in biases]
        return tuple(_shaped(y.to(plan.out_dtype), x.shape) for y in ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        count = len(dys)
        need_x, need_A = ctx.needs_input_grad[0], _needs(ctx, _A)
        need_B, need_bias = _needs(ctx, _B), _needs(ctx, _BIAS)
        seed, x2d, S, *saved = ctx.saved_tensors
        As, Bs, denses = saved[:count], saved[count : 2 * count], saved[2 * count :]
        Ss = [None] * count if S is None else _split(S, ctx.ranks, 1)
        need_dS = need_x or any(need_A)
        dx: Tensor | None = None
        dSs: list[Tensor | None] = [None] * count
        dA: Tensor | None = None
        grads: list[Tensor | None] = [None] * (_EACH * count)
        device = next((dy.device for dy in dys if dy is not None), None)
        if device is None:
            return (None, None, None, *grads)
        with _no_autocast(device):
            for i, dy in enumerate(dys):
                if dy is None:  # this output reached no loss
                    continue
                dy2d = plan.backend.flat(dy, plan.compute_dtype)  # [M, N]
                if need_bias[i]:
                    grads[_EACH * i + _BIAS] = dy2d.sum(0, dtype=ctx.bias_dtypes[i])
                if need_dS or need_B[i]:
                    dSs[i], grads[_EACH * i + _B] = plan.backend.up_backward(
                        dy2d, Bs[i], Ss[i] if need_B[i] else None, plan.alphas[i], need_dS
                    )
                if need_x:
                    through = base_backward(dy2d, plan.base(i, denses[i]), plan.backend)
                    dx = through if dx is None else dx.add_(through)
            if need_dS:
                unit = _unit(plan.alphas)
                dA = plan.backend.down_backward(
                    x2d if any(need_A) else None,
                    _beside(dSs, ctx.ranks, plan.alphas, unit),
                    _stacked(As),
                    dx,
                    seed,
                    plan.p,
                    unit,
                )
        if dA is not None:
            for i, part in enumerate(_split(dA, ctx.ranks, 0)):
                if need_A[i]:
                    grads[_EACH * i + _A] = part.to(As[i].dtype)
        if dx is not None:
            dx = dx.to(ctx.x_dtype).view(ctx.x_shape)
        return (dx, None, None, *grads)


def _shaped(y: Tensor, like: torch.Size) -> Tensor:
    """y [M, N] as [..., N]. Not a view to autograd, so that `y += 1` works as on a Linear's.

    For x [M, K] too: y was written by an ``out=``, and compiled by torch 2.11 such an
    output silently gets no gradient unless something new is made of it.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(y, [*like[:-1], y.shape[1]])
    return shaped


def _needs(ctx: Any, which: int) -> tuple[bool, ...]:
    """Whether a gradient is wanted for A, B or the bias of each layer."""
    return tuple(ctx.needs_input_grad[3 + which :: _EACH])


def _unit(alphas: Sequence[float]) -> float:
    """What the stacked dS are measured in: the largest alpha, 1 where all are zero."""
    if len(alphas) == 1:
        return alphas[0]
    unit = alphas[0]
    for alpha in alphas:  # not max(key=abs), which torch.compile cannot trace
        if abs(alpha) > abs(unit):
            unit = alpha
    return unit if unit != 0 else 1.0


def _split(tensor: Tensor, sizes: Sequence[int], dim: int) -> Sequence[Tensor]:
    # Tensor.split takes 7 microseconds even where there is one piece, the usual case.
    return (tensor,) if len(sizes) == 1 else tensor.split(sizes, dim=dim)


def _stacked(As: Sequence[Tensor | None]) -> Tensor:
    given = [A for A in As if A is not None]
    return given[0] if len(given) == 1 else torch.cat(given)


def _beside(
    dSs: Sequence[Tensor | None], ranks: Sequence[int], alphas: Sequence[float], unit: float
) -> Tensor:
    """The dS of all layers [M, sum of ranks], in units of ``unit``, the largest alpha."""
    if len(dSs) == 1:
        assert dSs[0] is not None
        return dSs[0]
    known = next(dS for dS in dSs if dS is not None)
    parts = []
    for dS, rank, alpha in zip(dSs, ranks, alphas, strict=True):
        if dS is None:
            dS = known.new_zeros(known.shape[0], rank)
        elif alpha != unit:
            dS = dS * (alpha / unit)
        parts.append(dS)
    return torch.cat(parts, dim=1)


def nf4_linear(
    x: Tensor,
    weight: NF4Weight,
    bias: Tensor | None = None,
    compute_dtype: torch.dtype | None = None,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """X W^T + bias, [..., K] -> [..., N], in x's dtype as bitsandbytes' Linear4bit.

    ``out_dtype`` asks for another, such as the compute dtype, that of a dense layer under
    autocast. The product is made in ``compute_dtype`` (x's dtype if None). Nothing is saved for
    backward but the packed weight, which is unpacked again. Raises as ``lora_linear``.
    """
    _check_input(x, weight, bias)
    dtype = compute_dtype or x.dtype
    plan = _Plan(dtype, out_dtype or x.dtype, get_backend(backend, x, dtype), (weight,))
    return _NF4Linear.apply(x, bias, plan)  # type: ignore[no-untyped-call, no-any-return]


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
    backend: str = "torch",
) -> Tensor:
    """X W^T + bias + scaling * dropout(X) A^T B^T, [..., K] -> [..., N].

    base     the frozen weight W [N, K]: dense, or NF4 and then dequantised in passing
    A, B     [r, K] and [N, r], in any dtype; their gradients come back in it
    p        dropout's probability, to a multiple of 2^-16; in force only while ``training``
    backend  "torch": library GEMMs; "triton": bf16, fp16 and fp32 on a GPU

    All products are made in ``compute_dtype`` (x's dtype if None), also under autocast.
    The result is in the dtype the stock layer gives: x's over an NF4 base (bitsandbytes
    casts back), the compute dtype over a dense one.

    Raises ValueError for shapes that do not fit, tensors on several devices, a p that is no
    probability and an unknown backend, TypeError for a dtype the backend does not compute
    in, RuntimeError where Triton cannot run.
    """
    (y,) = lora_linear_group(
        x, [base], [bias], [A], [B], [scaling], p, training, compute_dtype, backend
    )
    return y


def lora_linear_group(
    x: Tensor,
    bases: Sequence[Base],
    biases: Sequence[Tensor | None],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    scalings: Sequence[float],
    p: float = 0.0,
    training: bool = False,
    compute_dtype: torch.dtype | None = None,
    backend: str = "torch",
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, ...]:
    """Several LoRA linears of one x, such as q, k and v: ``lora_linear`` of each.

    x, its dropout mask and dX are passed over once for all adapters. So one mask serves
    them all, where layers apart draw one each: the same expectation, other numbers.
    Bases are all dense or all NF4. ``out_dtype`` is the results', None as in ``lora_linear``.
    """
    if not bases or len({len(seq) for seq in (bases, biases, As, Bs, scalings)}) != 1:
        raise ValueError("bases, biases, As, Bs and scalings must be equally many, one or more")
    for base, bias, A, B in zip(bases, biases, As, Bs, strict=True):
        _check_input(x, base, bias)
        _check_adapter(base, A, B, p)
        _check_device(x, "A", A.device)
        _check_device(x, "B", B.device)
    nf4 = tuple(base if isinstance(base, NF4Weight) else None for base in bases)
    if len({weight is None for weight in nf4}) != 1:
        raise ValueError("bases must be all dense or all NF4")
    compute_dtype = compute_dtype or x.dtype
    who = get_backend(backend, x, compute_dtype)
    p = rounded(p) if training else 0.0
    plan = _Plan(
        compute_dtype=compute_dtype,
        out_dtype=out_dtype or (compute_dtype if nf4[0] is None else x.dtype),
        backend=who,
        nf4=nf4,
        alphas=tuple(scaling / (1.0 - p) if p < 1.0 else 0.0 for scaling in scalings),
        p=p,
    )
    seed = draw_seed(who.seed_device(x.device)) if p > 0 else None
    layers: list[Tensor | None] = []
    for base, bias, A, B in zip(bases, biases, As, Bs, strict=True):
        layers += [A, B, bias, base if isinstance(base, Tensor) else None]
    return _LoraLinears.apply(x, seed, plan, *layers)  # type: ignore[no-untyped-call, no-any-return]


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Inside, operations run in the dtypes they are written in."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _check_input(x: Tensor, base: Base, bias: Tensor | None) -> None:
    if len(base.shape) != 2:
        raise ValueError(f"base must be [N, K], got {(*base.shape,)}")
    N, K = base.shape
    if x.ndim < 1 or x.shape[-1] != K:
        raise ValueError(f"x must be [..., {K}] for a base of shape ({N}, {K}), got {(*x.shape,)}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"x must be floating point, got {x.dtype}")
    if isinstance(base, Tensor) and base.requires_grad:
        raise ValueError("base must be frozen: it requires a gradient, and none is computed")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"bias must be [{N}], got {(*bias.shape,)}")
    _check_device(x, "base", base.device)
    if bias is not None:
        _check_device(x, "bias", bias.device)


def _check_device(x: Tensor, name: str, device: torch.device) -> None:
    if device != x.device:
        raise ValueError(f"{name} is on {device}, x is on {x.device}")


def _check_adapter(base: Base, A: Tensor, B: Tensor, p: float) -> None:
    N, K = base.shape
    r = A.shape[0] if A.ndim else 0
    if A.shape != (r, K) or B.shape != (N, r):
        raise ValueError(
            f"A must be [r, {K}] and B [{N}, r] with one r, got {(*A.shape,)} and {(*B.shape,)}"
        )
    for name, tensor in (("A", A), ("B", B)):
        if not tensor.dtype.is_floating_point:
            raise TypeError(f"{name} must be floating point, got {tensor.dtype}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p must be a probability, got {p}")
