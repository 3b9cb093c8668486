"""The same modules, less work: what a model does more often than its mathematics asks for."""

import types
from collections.abc import Iterator

import torch

from peftprof.config import RunConfig
from peftprof.records import Execution
from peftprof.run import packing
from peftprof.run.model import DTYPES
from peftprof_kernels import dropout, native_dequantize


def prepare(model: torch.nn.Module, config: RunConfig) -> None:
    """Change how `model` computes, in place; what it computes stays as it is.

    Frozen dense weights are rounded to the run's precision once, where autocast would round
    them in every step. On a CPU, dropout draws 8 random bits an element and keeps a byte,
    where torch's draws more and keeps a mask of the input's size.
    """
    if config.method == "lora" and config.precision != "fp32":
        _round_frozen(model, DTYPES[config.precision])
    if config.device == "cpu":
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout) and module.p:
                module.forward = types.MethodType(_dropout, module)  # type: ignore[method-assign]


def describe(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: RunConfig
) -> Execution:
    """What is recorded of how `model` computes."""
    fused = " fused" if optimizer.defaults.get("fused") else ""
    frozen = {str(linear.weight.dtype).removeprefix("torch.") for linear in _frozen(model)}
    return Execution(
        padding=config.padding,
        token_multiple=packing.multiple(config) if config.padding == "packed" else 1,
        optimizer=type(optimizer).__name__ + fused,
        frozen_dtype=", ".join(sorted(frozen)) or None,
        native_dequantise=native_dequantize() is not None and config.method == "qlora",
        tf32=torch.get_float32_matmul_precision() != "highest",
        threads=torch.get_num_threads(),
    )


def _frozen(model: torch.nn.Module) -> Iterator[torch.nn.Linear]:
    """Dense linears that are frozen, but for PEFT's copy of the head as it was."""
    for name, module in model.named_modules():
        dense = type(module) is torch.nn.Linear and not module.weight.requires_grad
        if dense and "original_module" not in name.split("."):
            yield module


def _round_frozen(model: torch.nn.Module, dtype: torch.dtype) -> None:
    for linear in _frozen(model):
        for parameter in linear.parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)


def _dropout(module: torch.nn.Dropout, x: torch.Tensor) -> torch.Tensor:
    return dropout(x, module.p, module.training)
