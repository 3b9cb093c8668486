"""Who computes: the torch backend (library GEMMs) and the triton backend, one interface.

``lora_linear.py`` holds the calculus and is the same for both; a backend is the six pieces
it is made of. All tensors are 2-D and in the compute dtype, A and B in their own.
"""

from typing import Any, Final, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from peftprof_kernels import ops as _registered  # noqa: F401  defines torch.ops.peftprof
from peftprof_kernels.nf4 import NF4Weight, block_scales, native_dequantize
from peftprof_kernels.spans import BASE_GEMM, DEQUANT, LORA_A, LORA_DA, LORA_DB, LORA_DX, span

Base = Tensor | NF4Weight

_ops: Final[Any] = torch.ops.peftprof


class Backend(Protocol):
    """The pieces of a LoRA linear layer; M rows, a base weight [N, K], rank r."""

    name: str

    def seed_device(self, device: torch.device) -> torch.device:
        """Where the seed of a dropout mask on ``device`` must lie."""
        ...

    def flat(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [..., K] as [M, K] in ``dtype``, in a layout that the pieces take."""
        ...

    def down(self, x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
        """S [M, r] = (m * X) A^T, m the keep mask of ``seed``, 1 without one."""
        ...

    def up_backward(
        self, dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """dS [M, r] = dY B where needed, and dB [N, r] = alpha dY^T S where S is given."""
        ...

    def down_backward(
        self,
        x: Tensor | None,
        dS: Tensor,
        A: Tensor,
        dx: Tensor | None,
        seed: Tensor | None,
        p: float,
        alpha: float,
    ) -> Tensor | None:
        """dA [r, K] = alpha dS^T (m * X) where x is given; dx += alpha m * (dS A) in place."""
        ...


class TorchBackend:
    """Library GEMMs on any device, in any floating dtype."""

    name = "torch"

    def seed_device(self, device: torch.device) -> torch.device:
        """The CPU: the generator is seeded with a number, and reading one waits for a GPU."""
        return torch.device("cpu")

    def flat(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x itself where nothing has to change."""
        return x.reshape(-1, x.shape[-1]).to(dtype)

    def down(self, x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
        """A mask, a pass over x and a GEMM."""
        # In no range: dropout is not the adapter's product.
        x_hat = x if seed is None else _mask(x.shape[0], x.shape[1], p, seed, x).mul_(x)
        with span(LORA_A):
            return x_hat @ A.to(x.dtype).t()

    def up_backward(
        self, dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """A GEMM each."""
        dS = dB = None
        if S is not None:
            with span(LORA_DB):
                dB = _grad((S.t() @ dy).t(), B, alpha)
        if need_dS:
            with span(LORA_DA):
                dS = dy @ B.to(dy.dtype)
        return dS, dB

    def down_backward(
        self,
        x: Tensor | None,
        dS: Tensor,
        A: Tensor,
        dx: Tensor | None,
        seed: Tensor | None,
        p: float,
        alpha: float,
    ) -> Tensor | None:
        """One mask for both, and a GEMM each."""
        dA = None
        mask = None if seed is None else _mask(dS.shape[0], A.shape[1], p, seed, dS)
        if x is not None:
            x_hat = x if mask is None else mask * x
            with span(LORA_DA):
                dA = _grad(dS.t() @ x_hat, A, alpha)
            del x_hat
        if dx is not None:
            with span(LORA_DX):
                A = A.to(dS.dtype)
                if mask is None:
                    torch.addmm(dx, dS, A, alpha=alpha, out=dx)
                else:
                    dx.addcmul_(dS @ A, mask, value=alpha)
        return dA


class TritonBackend:
    """Triton kernels that pass once over each large tensor; bf16, fp16 and fp32."""

    name = "triton"

    def seed_device(self, device: torch.device) -> torch.device:
        """The device: kernels read the seed there, and a CUDA graph makes a new one there."""
        return device

    def flat(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy only where the dtype differs or neighbours in a row are not adjacent."""
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        return x if x.stride(-1) == 1 else x.contiguous()

    def down(self, x: Tensor, A: Tensor, seed: Tensor | None, p: float) -> Tensor:
        """One read of x, dropout in passing."""
        with span(LORA_A):
            S: Tensor = _ops.lora_down(x, A.contiguous(), seed, p)
            return S

    def up_backward(
        self, dy: Tensor, B: Tensor, S: Tensor | None, alpha: float, need_dS: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """One read of dy for both up to rank 32, a GEMM each above."""
        with span(LORA_DB):
            dS, dB = _ops.lora_up_backward(dy, B.contiguous(), S, alpha, need_dS)
        return dS if need_dS else None, None if S is None else dB

    def down_backward(
        self,
        x: Tensor | None,
        dS: Tensor,
        A: Tensor,
        dx: Tensor | None,
        seed: Tensor | None,
        p: float,
        alpha: float,
    ) -> Tensor | None:
        """One mask, and one pass over x and dx, for both."""
        with span(LORA_DA):
            dA: Tensor = _ops.lora_down_backward(x, dS, A.contiguous(), dx, seed, p, alpha)
        return None if x is None else dA


BACKENDS: Final[dict[str, Backend]] = {"torch": TorchBackend(), "triton": TritonBackend()}
TRITON_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)


def get_backend(name: str, x: Tensor, dtype: torch.dtype) -> Backend:
    """The backend for products of x in ``dtype``.

    Raises ValueError for an unknown name, TypeError for a dtype the triton backend has no
    kernel for, RuntimeError where Triton cannot run on x's device.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"the dtype to compute in must be a floating point one, got {dtype}")
    if name == "triton":
        if dtype not in TRITON_DTYPES:
            raise TypeError(f"the triton backend computes in bf16, fp16 or fp32, not {dtype}")
        # A FakeTensor is of a shape alone, and nothing is launched for it.
        if x.device.type != "cuda" and not _interpreted() and not hasattr(x, "fake_mode"):
            raise RuntimeError(
                f"the triton backend needs a GPU, x is on {x.device}; on a CPU Triton only "
                "interprets, for checking numbers (TRITON_INTERPRET=1 before it is imported)"
            )
        if x.numel() == 0:
            name = "torch"  # no rows are no grid
    return BACKENDS[name]


def base_forward(x: Tensor, base: Base, bias: Tensor | None, backend: Backend) -> Tensor:
    """X W^T + bias, [M, K] -> [M, N] in x's dtype."""
    if isinstance(base, NF4Weight) and not _at_once(x, backend):
        y: Tensor = _ops.nf4_linear(x, base.tensors(), base.layout(), bias, backend.name)
        return y
    weight = _dense(base, x.dtype)
    with span(BASE_GEMM):
        return linear(x, weight, None if bias is None else bias.to(x.dtype))


def base_backward(dy: Tensor, base: Base, backend: Backend) -> Tensor:
    """dY W, [M, N] -> [M, K] in dy's dtype."""
    if isinstance(base, NF4Weight) and not _at_once(dy, backend):
        dx: Tensor = _ops.nf4_linear_dx(dy, base.tensors(), base.layout(), backend.name)
        return dx
    weight = _dense(base, dy.dtype)
    with span(BASE_GEMM):
        return dy @ weight


def _at_once(x: Tensor, backend: Backend) -> bool:
    """Whether an NF4 product is made here of its two steps, and not as one operator.

    On a CPU, where nothing needs to know it as one, a call of an operator is time in which
    nothing is computed.
    """
    eager = not torch.compiler.is_compiling()
    return eager and backend.name == "torch" and x.device.type == "cpu"


def _dense(base: Base, dtype: torch.dtype) -> Tensor:
    if isinstance(base, Tensor):
        return base.to(dtype)
    native = native_dequantize()
    if native is None or base.shape[1] % base.blocksize:
        return dequantize(base, dtype)
    with span(DEQUANT):
        return native(base, block_scales(base), dtype)


def dequantize(weight: NF4Weight, dtype: torch.dtype, backend: str = "torch") -> Tensor:
    """The weight [N, K] in ``dtype``: fp32 code times fp32 scale, rounded once.

    Raises TypeError for a dtype that is no floating one, or not one of the backend's.
    """
    if not isinstance(weight, NF4Weight):
        raise TypeError(f"weight must be an NF4Weight, got {type(weight).__name__}")
    if not dtype.is_floating_point:
        raise TypeError(f"dtype must be a floating point type, got {dtype}")
    who = get_backend(backend, weight.packed, dtype)
    dense: Tensor = _ops.nf4_dequantize(weight.tensors(), weight.layout(), dtype, who.name)
    return dense


def _interpreted() -> bool:
    from peftprof_kernels.numerics import INTERPRETED

    return bool(INTERPRETED.value)


def _mask(M: int, K: int, p: float, seed: Tensor, like: Tensor) -> Tensor:
    mask: Tensor = _ops.dropout_mask(like, M, K, p, seed)
    return mask


def _grad(grad: Tensor, like: Tensor, alpha: float) -> Tensor:
    """A gradient in the parameter's dtype and layout, times alpha."""
    return grad.to(like.dtype).contiguous().mul_(alpha)
