"""The operators as PyTorch knows them, `torch.ops.peftprof.*`: schemas, shapes, FLOPs.

Registered, they are seen by torch.compile (one graph, no break), FakeTensor, FlopCounter,
CUDA graphs and the profiler. None is differentiable by itself: ``lora_linear.py`` builds
the differentiable layers from them.

An NF4 weight goes in as ``Tensor[] weight, int[] layout`` (``NF4Weight.tensors`` and
``.layout``). ``backend`` is "torch" or "triton". Library.define, not custom_op: a call
costs 5 microseconds of host time instead of 13 (2 cores, AMD EPYC, torch 2.13), and small
models wait for the host. Triton is imported when it is first used, so that the rest works
where it does not exist.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils.flop_counter import register_flop_formula

from peftprof_kernels import dropout
from peftprof_kernels.crossover import DEFAULT_MAX_M, lookup
from peftprof_kernels.device import current, has_tensor_cores
from peftprof_kernels.nf4 import NF4Weight, dequantize_torch
from peftprof_kernels.spans import BASE_GEMM, DEQUANT, span

_library: Final = torch.library.Library("peftprof", "DEF")


def _register(schema: str, implementation: Any, fake: Any, flops: Any = None) -> None:
    name = schema.partition("(")[0]
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _where_they_lie(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"peftprof::{name}", fake, lib=_library)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.peftprof, name))(flops)


def _where_they_lie(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """The implementation on its tensors' device, which need not be the current one."""

    def run(*arguments: Any) -> Any:
        for argument in arguments:
            first = argument[0] if isinstance(argument, list) else argument
            if isinstance(first, Tensor):
                with current(first.device):
                    return implementation(*arguments)
        raise AssertionError("an operator without tensors")

    return run


def _nf4_dequantize(
    weight: list[Tensor], layout: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    return _dequantized(NF4Weight.rebuilt(weight, layout), dtype, backend)


def _dequantized(weight: NF4Weight, dtype: torch.dtype, backend: str) -> Tensor:
    with span(DEQUANT):
        if backend == "torch":
            return dequantize_torch(weight, dtype)
        from peftprof_kernels.nf4_dequantize import dequantize_triton

        return dequantize_triton(weight, dtype)


def _nf4_dequantize_fake(
    weight: list[Tensor], layout: list[int], dtype: torch.dtype, backend: str
) -> Tensor:
    return weight[0].new_empty(layout[:2], dtype=dtype)


_register(
    "nf4_dequantize(Tensor[] weight, SymInt[] layout, ScalarType dtype, str backend) -> Tensor",
    _nf4_dequantize,
    _nf4_dequantize_fake,
)


def _most_rows(x: Tensor, measured: int) -> int:
    # Measured in half precision; scalar code loses to a library GEMM earlier.
    return measured if has_tensor_cores(x.device, x.dtype) else min(measured, DEFAULT_MAX_M)


def _nf4_linear(
    x: Tensor, weight: list[Tensor], layout: list[int], bias: Tensor | None, backend: str
) -> Tensor:
    """X W^T + bias, [M, K] -> [M, N] in x's dtype; W is rounded to it."""
    nf4 = NF4Weight.rebuilt(weight, layout)
    if backend == "triton" and x.shape[0] <= _most_rows(x, lookup(*nf4.shape).forward_max_m):
        from peftprof_kernels import nf4_linear_kernels

        if nf4_linear_kernels.supports(nf4):
            with span(BASE_GEMM):  # dequantising is inside, and is no step of its own
                return nf4_linear_kernels.nf4_linear_forward(x, nf4, bias)
    dense = _dequantized(nf4, x.dtype, backend)
    with span(BASE_GEMM):
        return linear(x, dense, None if bias is None else bias.to(x.dtype))


def _nf4_linear_fake(
    x: Tensor, weight: list[Tensor], layout: list[int], bias: Tensor | None, backend: str
) -> Tensor:
    return x.new_empty(x.shape[0], layout[0])


def _nf4_linear_flops(
    x: list[int], weight: Any, layout: list[int], *args: Any, out_shape: Any = None, **kw: Any
) -> int:
    return 2 * x[0] * layout[0] * layout[1]


_register(
    "nf4_linear(Tensor x, Tensor[] weight, SymInt[] layout, Tensor? bias, str backend) -> Tensor",
    _nf4_linear,
    _nf4_linear_fake,
    _nf4_linear_flops,
)


def _nf4_linear_dx(dy: Tensor, weight: list[Tensor], layout: list[int], backend: str) -> Tensor:
    """dY W, [M, N] -> [M, K] in dy's dtype."""
    nf4 = NF4Weight.rebuilt(weight, layout)
    if backend == "triton" and dy.shape[0] <= _most_rows(dy, lookup(*nf4.shape).dx_max_m):
        from peftprof_kernels import nf4_linear_kernels

        if nf4_linear_kernels.supports(nf4):
            with span(BASE_GEMM):
                return nf4_linear_kernels.nf4_linear_dx(dy, nf4)
    dense = _dequantized(nf4, dy.dtype, backend)
    with span(BASE_GEMM):
        return dy @ dense


def _nf4_linear_dx_fake(
    dy: Tensor, weight: list[Tensor], layout: list[int], backend: str
) -> Tensor:
    return dy.new_empty(dy.shape[0], layout[1])


_register(
    "nf4_linear_dx(Tensor dy, Tensor[] weight, SymInt[] layout, str backend) -> Tensor",
    _nf4_linear_dx,
    _nf4_linear_dx_fake,
    _nf4_linear_flops,
)


def _dropout_mask(like: Tensor, M: int, K: int, p: float, seed: Tensor) -> Tensor:
    """The keep mask [M, K] of the torch backend, in like's dtype and on its device."""
    return dropout.dropout_mask((M, K), p, seed, like.dtype, like.device)


_register(
    "dropout_mask(Tensor like, SymInt M, SymInt K, float p, Tensor seed) -> Tensor",
    _dropout_mask,
    lambda like, M, K, p, seed: like.new_empty(M, K),
)


def _lora_down(x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
    from peftprof_kernels.lora_launch import lora_down

    return lora_down(x, A, seed, p)


def _down_flops(x: list[int], A: list[int], *args: Any, out_shape: Any = None, **kw: Any) -> int:
    return 2 * x[0] * A[0] * A[1]


_register(
    "lora_down(Tensor x, Tensor A, Tensor? seed, float p) -> Tensor",
    _lora_down,
    lambda x, A, seed, p: x.new_empty(x.shape[0], A.shape[0]),
    _down_flops,
)


def _lora_up_backward(
    dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
) -> tuple[Tensor, Tensor]:
    from peftprof_kernels.lora_launch import lora_up_backward

    dS, dB = lora_up_backward(dy, B, S, alpha, need_dS)
    return _given(dS, dy), _given(dB, B)


def _lora_up_backward_fake(
    dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
) -> tuple[Tensor, Tensor]:
    dS = dy.new_empty(dy.shape[0], B.shape[1]) if need_dS else None
    return _given(dS, dy), _given(None if S is None else torch.empty_like(B), B)


def _up_backward_flops(
    dy: list[int],
    B: list[int],
    S: list[int] | None,
    alpha: float,
    need_dS: bool,
    out_shape: Any = None,
    **kw: Any,
) -> int:
    return 2 * dy[0] * B[0] * B[1] * ((S is not None) + need_dS)


_register(
    "lora_up_backward(Tensor dy, Tensor B, Tensor? S, float alpha, bool need_dS) "
    "-> (Tensor, Tensor)",
    _lora_up_backward,
    _lora_up_backward_fake,
    _up_backward_flops,
)


def _lora_down_backward(
    x: Tensor | None,
    dS: Tensor,
    A: Tensor,
    dx: Tensor | None,
    seed: Tensor | None,
    p: float,
    alpha: float,
) -> Tensor:
    from peftprof_kernels.lora_launch import lora_down_backward

    return _given(lora_down_backward(x, dS, A, dx, seed, p, alpha), A)


def _lora_down_backward_fake(
    x: Tensor | None,
    dS: Tensor,
    A: Tensor,
    dx: Tensor | None,
    seed: Tensor | None,
    p: float,
    alpha: float,
) -> Tensor:
    return _given(None if x is None else torch.empty_like(A), A)


def _down_backward_flops(
    x: list[int] | None,
    dS: list[int],
    A: list[int],
    dx: list[int] | None,
    *args: Any,
    out_shape: Any = None,
    **kw: Any,
) -> int:
    return 2 * dS[0] * A[0] * A[1] * ((x is not None) + (dx is not None))


_register(
    "lora_down_backward(Tensor? x, Tensor dS, Tensor A, Tensor(a!)? dx, Tensor? seed, float p, "
    "float alpha) -> Tensor",
    _lora_down_backward,
    _lora_down_backward_fake,
    _down_backward_flops,
)


def _given(result: Tensor | None, like: Tensor) -> Tensor:
    """An operator returns no None: what was not asked for is an empty tensor."""
    return like.new_empty(0) if result is None else result
