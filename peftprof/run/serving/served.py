"""What is served, and the four ways of serving it.

| variant | base weights | adapter |
|---|---|---|
| `base` | dense | none |
| `merged` | dense, the adapter added into them in fp32 | none left |
| `unmerged` | dense | computed apart, by the kernel backend |
| `nf4` | NF4, nested statistics | computed apart, by the kernel backend |

Everything that is dense is rounded to the precision once, as a server loads it; there is no
autocast. What trained the head of a classifier is in all four. Of a run that was trained over
NF4 weights the dense weights are those, dequantised: what its adapter was trained against.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.run import adapters, crossovers
from peftprof.run import model as models
from peftprof.run.model import DTYPES, Family
from peftprof.run.serving.adapter import Adapter
from peftprof.run.source import Source, load_tokenizer, locate, one_line

CLASSIFY, GENERATE = "classify", "generate"
PHASES = {CLASSIFY: ("forward",), GENERATE: ("prefill", "decode")}
APART = ("unmerged", "nf4")  # whose adapter is computed apart


@dataclass(frozen=True)
class Plan:
    """What is served, as plain values: another process builds the same from it.

    `config` is resolved and of the method lora. `dequantised` says that the dense weights are
    the NF4 ones. `adapter` is its folder; None where there is none, or none was saved yet.
    """

    config: RunConfig
    task: str
    labels: tuple[str, ...]
    dequantised: bool = False
    adapter: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""
        return {**vars(self), "config": self.config.to_json(), "labels": list(self.labels)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Plan":
        """The plan in `values`."""
        config = RunConfig.from_json(values["config"])
        return cls(**{**values, "config": config, "labels": tuple(values["labels"])})


@dataclass(frozen=True)
class Served:
    """A plan with its files found and its adapter read."""

    plan: Plan
    source: Source
    family: Family
    tokenizer: Any
    adapter: Adapter | None

    @classmethod
    def of(cls, plan: Plan) -> "Served":
        """Find what `plan` names. Raises as `source`, `model` and `Adapter.read`."""
        source = locate(plan.config.model)
        family = models.family_of(source, plan.config)
        return cls(plan, source, family, load_tokenizer(source), None).by(plan)

    def by(self, plan: Plan) -> "Served":
        """The same model served by another `plan`. Raises as `Adapter.read`."""
        family = self.family
        if plan.task == GENERATE:
            family = dataclasses.replace(family, head=("lm_head",))
        adapter = None if plan.adapter is None else Adapter.read(Path(plan.adapter))
        if adapter is not None and plan.task == GENERATE:
            adapter = adapter.without_head()
        return dataclasses.replace(self, plan=plan, family=family, adapter=adapter)

    @property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return self.plan.config

    def config_of(self, variant: str) -> RunConfig:
        """The configuration that training has for the weights of `variant`."""
        return dataclasses.replace(self.config, method="qlora" if variant == "nf4" else "lora")

    def load(self, nf4: bool) -> Any:
        """The base model on its device, without an adapter: fp32, or NF4. Raises InputError."""
        config = self.config_of("nf4" if nf4 else "base")
        if self.plan.task == GENERATE:
            return _language_model(self.source, config, self.family)
        pad = self.tokenizer.pad_token_id
        return models.load_model(self.source, config, self.family, self.plan.labels, pad)

    def stock(self, variant: str) -> Any:
        """`variant` as stock PEFT and bitsandbytes have it, dense weights in fp32."""
        model = self.load(nf4=variant == "nf4")
        if self.plan.dequantised and variant != "nf4":
            _take_nf4_values(model, self.load(nf4=True))
        if self.adapter is None:
            return model
        adapted = self.adapter.on(model, self.config.model)
        if variant == "base":
            return adapted.unload()
        if variant != "merged":
            return adapted
        try:
            return adapted.merge_and_unload(safe_merge=True)
        except ValueError as error:  # it looks for NaN
            raise InputError(f"the adapter cannot be merged ({one_line(error)})") from error

    def ready(self, model: Any, variant: str) -> Any:
        """`stock(variant)` made ready to serve, in place: the transformers model to call.

        Raises DeviceError when the backend would compute wrong numbers on this device.
        """
        config = self.config_of(variant)
        for module in adapters.linear_4bit(model):
            adapters.make_faithful(module, config)
        _round(model, DTYPES[config.precision])
        model.requires_grad_(False).eval()
        if variant in APART and config.kernels != "bnb":
            if config.kernels == "triton":
                crossovers.use_stored(torch.device(config.device))
            adapters.use_our_kernels(model, config)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def build(self, variant: str) -> Any:
        """`variant`, ready to serve."""
        return self.ready(self.stock(variant), variant)


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`, in memory of their own, where a file's are mapped.

    Buffers stay as they are: rotary frequencies in bf16 would be other positions.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype, copy=True)


def _take_nf4_values(dense: torch.nn.Module, packed: torch.nn.Module) -> None:
    """Have the linears of `dense` hold what the NF4 weights of `packed` stand for."""
    import bitsandbytes as bnb

    linears = dict(dense.named_modules())
    for name, module in packed.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            linears[name].weight.data = adapters.dequantized(module)


def _language_model(source: Source, config: RunConfig, family: Family) -> Any:
    """The causal language model of `source`; as `models.load_model`, which is of classifiers."""
    from transformers import AutoModelForCausalLM

    return models.pretrained(AutoModelForCausalLM, source, config, family)
