"""Modules that stand for PEFT's and bitsandbytes', whose import takes longer than an answer may.

They allocate what theirs do; a test holds them to that.
"""

import types
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.run import adapters
from peftprof.run.model import DTYPES
from peftprof_kernels import NF4Weight

BLOCKSIZE, BLOCKSIZE2 = 64, 256  # bitsandbytes' own, which a run leaves as they are
ADAPTER = "default"


class Quantised(torch.nn.Linear):
    """Stands for bitsandbytes' Linear4bit: NF4 with nested statistics."""

    def __init__(self, dense: torch.nn.Linear, config: RunConfig) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = dense.in_features, dense.out_features
        self.compute_dtype = DTYPES[config.precision]
        shape = (dense.out_features, dense.in_features)
        blocks = -(-shape[0] * shape[1] // BLOCKSIZE)
        packed = torch.empty((shape[0] * shape[1] + 1) // 2, 1, dtype=torch.uint8)
        self.weight = torch.nn.Parameter(packed, requires_grad=False)
        nested = types.SimpleNamespace(
            absmax=torch.empty(-(-blocks // BLOCKSIZE2)),
            code=torch.empty(256),
            blocksize=BLOCKSIZE2,
        )
        state = types.SimpleNamespace(
            shape=torch.Size(shape),
            blocksize=BLOCKSIZE,
            absmax=torch.empty(blocks, dtype=torch.uint8),
            code=torch.empty(16),
            offset=torch.empty(()),
            state2=nested,
        )
        vars(self.weight)["quant_state"] = state
        self._stock = adapters.nf4_weight(self) if config.kernels == "bnb" else None
        self.bias = dense.bias
        if config.kernels == "bnb" and dense.bias is not None:
            self.bias.data = dense.bias.data.to(self.compute_dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As bitsandbytes does: the product in the compute dtype, the result in x's."""
        y = _StockNF4.apply(x.to(self.compute_dtype), self.bias, self._stock)  # type: ignore[no-untyped-call]
        return y.to(x.dtype)  # type: ignore[no-any-return]


class _StockNF4(torch.autograd.Function):
    """bitsandbytes' MatMul4Bit: nothing saved, the weight dequantised again in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bias: Any, weight: NF4Weight) -> torch.Tensor:
        ctx.weight = weight
        flat = x.reshape(-1, x.shape[-1])
        y = torch.ops.peftprof.nf4_linear(flat, weight.tensors(), weight.layout(), bias, "torch")
        return y.view(*x.shape[:-1], y.shape[-1])  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *dys: torch.Tensor) -> Any:
        (dy,), weight = dys, ctx.weight
        dense = torch.ops.peftprof.nf4_dequantize(
            weight.tensors(), weight.layout(), dy.dtype, "torch"
        )
        return dy @ dense, None, None


class Adapted(torch.nn.Module):
    """Stands for PEFT's LoRA layer over a dense or a quantised linear."""

    disable_adapters = merged = False
    active_adapters = (ADAPTER,)

    def __init__(self, base: torch.nn.Linear, config: RunConfig) -> None:
        super().__init__()
        rank = config.rank
        self.base_layer = base
        self.lora_A = _by_name(torch.nn.Linear(base.in_features, rank, bias=False))
        self.lora_B = _by_name(torch.nn.Linear(rank, base.out_features, bias=False))
        self.lora_dropout = _by_name(
            torch.nn.Dropout(config.dropout) if config.dropout else torch.nn.Identity()
        )
        self.scaling = {ADAPTER: config.scaling}

    def get_base_layer(self) -> torch.nn.Module:
        """The linear that is adapted."""
        return self.base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As PEFT 0.21 does over nn.Linear, and over Linear4bit."""
        quantised = isinstance(self.base_layer, Quantised)
        y: torch.Tensor = self.base_layer(x)
        dtype = y.dtype
        A: Any = self.lora_A[ADAPTER]
        B: Any = self.lora_B[ADAPTER]
        if quantised:
            y = y.clone()
        if not quantised or not torch.is_autocast_enabled("cpu"):
            x = x.to(A.weight.dtype)
        further = B(A(self.lora_dropout[ADAPTER](x))) * self.scaling[ADAPTER]
        result: torch.Tensor = y + further.to(dtype) if quantised else (y + further).to(dtype)
        return result


def _by_name(module: torch.nn.Module) -> torch.nn.ModuleDict:
    return torch.nn.ModuleDict({ADAPTER: module})
