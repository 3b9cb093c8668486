"""Adapters on a base model, and the kernel backend that computes them.

The one place that knows PEFT's modules, bitsandbytes' QuantState and `peftprof_kernels`
together. A backend is swapped into the PEFT model in place: parameters, their names and
what is saved stay PEFT's, so any adapter trained here loads in stock PEFT.

| backend | base | adapter |
|---|---|---|
| `bnb` | stock bitsandbytes / nn.Linear | stock PEFT |
| `torch` | NF4 dequantised by `peftprof_kernels`, library GEMM | one autograd op with it |
| `triton` | NF4 kernels of `peftprof_kernels`, GEMM of the library | the same op, in Triton |
"""

import hashlib
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.errors import ConfigError, DeviceError, InputError, TrainingError
from peftprof.records import Trainable
from peftprof.run import crossovers, narrow
from peftprof.run.model import DTYPES, Family, unpacked_size
from peftprof_kernels import (
    NF4Weight,
    block_scales,
    dequantize,
    lora_linear_group,
    nf4_linear,
    set_native_dequantize,
)

OWN_WEIGHT = "peftprof_weight"  # where a Linear4bit keeps its weight as our kernels take it
# Linears of one module that read one input, as the families name them.
SHARE_INPUT = (
    *narrow.PROJECTIONS,
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
)


def attach(model: torch.nn.Module, config: RunConfig, family: Family) -> torch.nn.Module:
    """`model` ready to train by `config.method`: everything, or a PEFT adapter and the head.

    Raises ConfigError when no module bears a target name or the rank does not fit the
    layers, DeviceError when the backend would compute wrong numbers on this device.
    """
    if config.method == "full":
        return model.requires_grad_(True)
    from peft import LoraConfig, TaskType, get_peft_model

    check_targets(model, config.model, family, config.rank)
    adapted: torch.nn.Module = get_peft_model(
        model,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.rank,
            lora_alpha=config.scaling * config.rank,
            lora_dropout=config.dropout,
            target_modules=list(family.targets),
            modules_to_save=list(family.head),
        ),
    )
    for module in linear_4bit(adapted):
        make_faithful(module, config)
    if config.kernels == "triton":
        crossovers.use_stored(torch.device(config.device))
    if config.kernels != "bnb":
        apart = narrow.attention(model, family) if config.padding == "packed" else None
        use_our_kernels(adapted, config, apart)
    return adapted


def check_targets(model: torch.nn.Module, name: str, family: Family, rank: int = 1) -> int:
    """The largest rank that fits every module that bears a target name, of the model `name`.

    Raises ConfigError when none bears it, one is no linear layer, or `rank` is larger.
    """
    # The head is trained whole, so it is nothing to adapt.
    base = {n: m for n, m in model.named_modules() if n.split(".")[0] not in family.head}
    largest: dict[str, int] = {}
    for target in family.targets:
        named = [m for n, m in base.items() if n == target or n.endswith("." + target)]
        if not named:
            leaves = sorted({n.rpartition(".")[2] for n, m in base.items() if _is_linear(m)})
            raise ConfigError(
                f"no module of {name!r} before its head is called {target!r}; its linear layers "
                f"are {', '.join(leaves)}"
            )
        if not all(map(_is_linear, named)):
            raise ConfigError(f"--target-modules {target} of {name!r} is no linear layer")
        linears: list[Any] = named
        largest[target] = min(min(m.in_features, m.out_features) for m in linears)
        if rank > largest[target]:
            raise ConfigError(
                f"--rank {rank} is more than {largest[target]}, the smaller side of {target!r}"
            )
    return min(largest.values())


def _is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def linear_4bit(model: torch.nn.Module) -> Iterator[Any]:
    """The bitsandbytes Linear4bit modules of `model`."""
    import bitsandbytes as bnb

    return (m for m in model.modules() if isinstance(m, bnb.nn.Linear4bit))


def make_faithful(module: Any, config: RunConfig) -> None:
    """Keep bitsandbytes from changing what it computes or stores while it runs.

    On CPUs with AVX512-BF16 its first forward without gradients repacks the weight in
    place, re-quantises the statistics and from then on carries no gradient (0.50.2). Its
    first forward on any device rounds the bias to the compute dtype in place. The first
    is switched off; the second is done here, before anything is fingerprinted.
    """
    module.support_avx512bf16_for_cpu = False
    if config.kernels == "bnb" and module.bias is not None:
        module.bias.data = module.bias.data.to(module.compute_dtype)
    if config.kernels == "bnb" and module.weight.device.type == "cpu":
        _check_dequantise(module)


def _check_dequantise(module: Any) -> None:
    import bitsandbytes as bnb

    theirs = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    ours = dequantize(nf4_weight(module), theirs.dtype)
    # bitsandbytes' CPU code rounds the product differently by at most one unit in the last place.
    wrong = ~torch.isclose(theirs, ours, rtol=2.0**-7, atol=1e-6)
    if bool(wrong.any()):
        raise DeviceError(
            f"bitsandbytes dequantises {100 * float(wrong.float().mean()):.0f} % of a "
            f"{module.out_features} x {module.in_features} weight wrongly on this CPU; use "
            "--kernels torch"
        )


def nf4_weight(module: Any) -> NF4Weight:
    """The weight of a bitsandbytes Linear4bit as `peftprof_kernels` takes it, no copy made."""
    state = module.weight.quant_state
    nested = state.state2
    return NF4Weight(
        packed=module.weight.data,
        shape=tuple(state.shape),
        blocksize=state.blocksize,
        absmax=state.absmax,
        code=state.code,
        absmax2=nested.absmax if nested else None,
        code2=nested.code if nested else None,
        offset=state.offset,
        blocksize2=nested.blocksize if nested else 256,
    )


def dequantized(module: Any) -> torch.Tensor:
    """The fp32 weight [N, K] that a Linear4bit stands for."""
    return dequantize(nf4_weight(module), torch.float32)


def quantisation_state(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    """What dequantising needs beside the packed weights: statistics, code books, offsets."""
    for module in linear_4bit(model):
        weight = nf4_weight(module)
        parts = (weight.absmax, weight.code, weight.absmax2, weight.code2, weight.offset)
        yield from (part for part in parts if part is not None)
        if (own := getattr(module, OWN_WEIGHT, None)) is not None:
            yield from own.tensors()[1:]  # the first are the packed weights themselves


def use_our_kernels(model: torch.nn.Module, config: RunConfig, apart: Any = None) -> None:
    """Give every adapted and every NF4 linear of `model` our forward, in place.

    `apart` is a module whose linears do not get one input, though they bear such names.
    """
    if config.device == "cpu" and config.method == "qlora":
        _use_native_dequantise(model)
    use_our_forwards(model, config, apart, _is_adapted, linear_4bit(model))


def use_our_forwards(
    model: torch.nn.Module,
    config: RunConfig,
    apart: Any,
    is_adapted: Callable[[Any], bool],
    quantised: Iterable[Any],
) -> None:
    """`use_our_kernels` for whatever stands for PEFT's layers and for Linear4bit."""
    inside: set[Any] = set()
    for parent in model.modules():
        adapted: dict[str, Any] = {
            name: layer for name, layer in parent.named_children() if is_adapted(layer)
        }
        inside.update(layer.get_base_layer() for layer in adapted.values())
        for names in SHARE_INPUT if parent is not apart else ():
            if len(together := [adapted.pop(name) for name in names if name in adapted]):
                _Siblings(together, config)
        for layer in adapted.values():
            _Siblings([layer], config)
    for module in quantised:
        if module not in inside:
            module.forward = types.MethodType(_nf4_forward(module, config), module)


def _is_adapted(layer: Any) -> bool:
    import bitsandbytes as bnb
    from peft.tuners.lora.layer import Linear as LoraLinear
    from peft.tuners.lora.layer import LoraLayer

    if not isinstance(layer, LoraLayer) or not _is_linear(base := layer.get_base_layer()):
        return False
    return isinstance(layer, LoraLinear) or isinstance(base, bnb.nn.Linear4bit)


def _use_native_dequantise(model: torch.nn.Module) -> None:
    """Have bitsandbytes' compiled code dequantise on this CPU if it is right for `model`."""
    set_native_dequantize(None)
    if not hasattr(torch.ops.bitsandbytes, "dequantize_4bit"):
        return
    shapes: dict[tuple[int, ...], Any] = {}
    for module in linear_4bit(model):
        shapes.setdefault(tuple(module.weight.quant_state.shape), module)
    for shape, module in shapes.items():
        weight = nf4_weight(module)
        if shape[1] % weight.blocksize:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            ours = dequantize(weight, dtype)
            if not torch.equal(ours, _native_dequantise(weight, block_scales(weight), dtype)):
                return
    set_native_dequantize(_native_dequantise)


def _native_dequantise(weight: NF4Weight, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    dense: torch.Tensor = torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed, scales, weight.blocksize, "nf4", list(weight.shape), dtype
    )
    return dense


def _unnested(weight: NF4Weight) -> NF4Weight:
    """The same weight with its block scales as fp32 numbers: 1/16 byte a weight, and no
    arithmetic on statistics whenever it is dequantised."""
    scales = block_scales(weight)
    return NF4Weight(weight.packed, weight.shape, weight.blocksize, scales, weight.code)


def _frozen(module: Any, config: RunConfig) -> NF4Weight:
    weight = nf4_weight(module)
    if config.device == "cpu":
        weight = _unnested(weight)
    setattr(module, OWN_WEIGHT, weight)
    return weight


class _Siblings:
    """Adapted linears that are given one x, one after the other: computed as a group.

    The first that is called with an x computes them all, and the others find theirs ready.
    """

    def __init__(self, layers: list[Any], config: RunConfig) -> None:
        self.layers = layers
        self.stock: list[Any] = [layer.forward for layer in layers]
        self.config = config
        self.bases: list[Any] = [layer.get_base_layer() for layer in layers]
        self.frozen = [
            _frozen(base, config) if hasattr(base, "compute_dtype") else None for base in self.bases
        ]
        self.x: torch.Tensor | None = None
        self.ready: dict[int, torch.Tensor] = {}
        for index, layer in enumerate(layers):
            layer.forward = types.MethodType(self._forward(index), layer)

    def _forward(self, index: int) -> Any:
        def forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            names = layer.active_adapters
            if args or kwargs or layer.disable_adapters or layer.merged or len(names) != 1:
                stock: torch.Tensor = self.stock[index](x, *args, **kwargs)
                return stock
            if x is not self.x or index not in self.ready:
                self.x, self.ready = x, dict(enumerate(self._compute(x, names[0])))
            y = self.ready.pop(index)
            if not self.ready:
                self.x = None
            return y

        return forward

    def _compute(self, x: torch.Tensor, name: str) -> tuple[torch.Tensor, ...]:
        pairs = zip(self.bases, self.frozen, strict=True)
        return lora_linear_group(
            x,
            [base.weight if frozen is None else frozen for base, frozen in pairs],
            [base.bias for base in self.bases],
            [layer.lora_A[name].weight for layer in self.layers],
            [layer.lora_B[name].weight for layer in self.layers],
            [layer.scaling[name] for layer in self.layers],
            p=self.config.dropout,
            training=self.layers[0].training,
            compute_dtype=DTYPES[self.config.precision],
            backend=self.config.kernels,
            out_dtype=DTYPES[self.config.precision],
        )


def _nf4_forward(module: Any, config: RunConfig) -> Any:
    weight = _frozen(module, config)
    dtype = DTYPES[config.precision]

    def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
        # In the dtype of a dense layer under autocast, so that both methods go on alike;
        # bitsandbytes casts back to x's.
        return nf4_linear(x, weight, layer.bias, dtype, config.kernels, dtype)

    return forward


def ranges(model: torch.nn.Module, family: Family, config: RunConfig) -> dict[torch.nn.Module, str]:
    """Modules and the profiling ranges that go round their forward.

    Layers and head in every method; the adapters' own linears where stock PEFT runs them.
    Raises InputError when the model has no list of layers where its family keeps it.
    """
    found: dict[torch.nn.Module, str] = {}
    for path, module in model.named_modules():
        clean = path.removeprefix("base_model.model.")
        parent, _, index = clean.rpartition(".")
        if parent == family.layers and index.isdigit():
            found[module] = f"layer:{clean}"
        elif clean in family.head:
            found[module] = f"layer:head.{clean}"
        elif config.kernels == "bnb" and clean.endswith((".lora_A.default", ".lora_B.default")):
            found[module] = f"op:{clean.split('.')[-2]}"
    if not any(name.startswith("layer:") and "head." not in name for name in found.values()):
        raise InputError(f"model {config.model!r} has no layers at {family.layers!r}")
    return found


def frozen_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over the stored bytes of everything frozen: packed weights, statistics, biases."""
    return _sha256(model, trained=False)


def trained_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over the stored bytes of everything that is trained."""
    return _sha256(model, trained=True)


def _sha256(model: torch.nn.Module, trained: bool) -> str:
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        if parameter.requires_grad != trained:
            continue
        tensors = [parameter.data]
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code]
            tensors += (
                [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
            )
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        for tensor in tensors:
            raw = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """The parameters that ask for a gradient, with their names."""
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def check_gradients(model: torch.nn.Module) -> None:
    """Raise TrainingError, with a name, when a trainable tensor got no gradient."""
    without = [name for name, p in trainable(model) if p.grad is None]
    if without:
        raise TrainingError(
            f"{len(without)} of {len(trainable(model))} trainable tensors got no gradient, "
            f"{without[0]} first; the run would silently train less than it says"
        )


def count(model: torch.nn.Module) -> Trainable:
    """Trainable parameters after a backward pass; see `records.Trainable`."""
    parameters = list(model.parameters())
    asking = [p for p in parameters if p.requires_grad]
    return Trainable(
        live=sum(p.numel() for p in asking if p.grad is not None),
        nominal=sum(p.numel() for p in asking),
        total=sum(map(unpacked_size, parameters)),
        packed_total=sum(p.numel() for p in parameters),
    )
