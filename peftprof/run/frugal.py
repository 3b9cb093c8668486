"""The same modules, less work: what a model does more often than its mathematics asks for."""

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from peftprof.config import RunConfig
from peftprof.records import Execution
from peftprof.run import distributed, narrow, packing
from peftprof.run.model import DTYPES, Family
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


def checkpoint_activations(model: Any, family: Family) -> None:
    """Keep of each layer its input alone, and compute it anew in backward, in place.

    Chen et al. 2016, Training Deep Nets with Sublinear Memory Cost. `model` is a
    transformers classifier, or PEFT's of one. A last layer that is narrowed keeps what it
    has, which is little.
    """
    classifier = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in classifier.get_submodule(family.layers):
        if not any(hasattr(module, narrow.HOLDER) for module in layer.modules()):
            # To the layer's end, so that ranges and caches in it are left as they were found.
            layer.forward = functools.partial(
                checkpoint, layer.forward, use_reentrant=False, early_stop=False
            )


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
        processes=distributed.size(),
        backend=distributed.backend(config.device),
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
