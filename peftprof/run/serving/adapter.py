"""The adapter that is served: a run's, as it was saved, or a new one that costs the same."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from peftprof.config import RunConfig
from peftprof.errors import FolderError, InputError
from peftprof.run import adapters
from peftprof.run.model import Family
from peftprof.run.source import one_line

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"

# How large a new adapter's update is beside the weight it is added to, |s B A| / |W|, Frobenius:
# what fine-tuning does. Speed does not depend on it; that merged differs from base does.
UPDATE = 0.05


@dataclass(frozen=True)
class Adapter:
    """PEFT's LoraConfig, and tensors by the names that PEFT saves them under."""

    settings: Any
    tensors: dict[str, torch.Tensor]

    @classmethod
    def read(cls, folder: Path) -> "Adapter":
        """The adapter in `folder`, from safetensors alone.

        Raises FolderError where it is not there, InputError where it is damaged.
        """
        from peft import LoraConfig

        for name in (SETTINGS, WEIGHTS):
            if not (folder / name).is_file():
                raise FolderError(f"{folder} has lost its {name}; train it again")
        try:
            settings = LoraConfig.from_pretrained(str(folder))
            tensors = load_file(folder / WEIGHTS)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise InputError(
                f"the adapter in {folder} is damaged ({one_line(error)}); train it again"
            ) from error
        return cls(settings, tensors)

    def save(self, folder: Path) -> None:
        """Write it into `folder` as PEFT does."""
        self.settings.save_pretrained(str(folder))
        save_file(self.tensors, folder / WEIGHTS, metadata={"format": "pt"})

    def without_head(self) -> "Adapter":
        """The same for a language model, which has no head that was trained."""
        lora = {name: tensor for name, tensor in self.tensors.items() if ".lora_" in name}
        return Adapter(_copied(self.settings, modules_to_save=None, task_type="CAUSAL_LM"), lora)

    def on(self, model: torch.nn.Module, what: str) -> Any:
        """`model` with this adapter, as stock PEFT applies it: a PeftModel.

        Raises InputError, naming the model `what`, when it is another model's.
        """
        from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

        settings = _copied(self.settings)
        try:
            adapted = get_peft_model(model, settings, autocast_adapter_dtype=False)
        except ValueError as error:
            raise _foreign(what, one_line(error)) from error
        wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
        shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
        given = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        for name in sorted(shapes.keys() | given.keys()):
            if shapes.get(name) != given.get(name):
                raise _foreign(what, f"{name} is {given.get(name)}, not {shapes.get(name)}")
        set_peft_model_state_dict(adapted, self.tensors)
        return adapted


def _foreign(what: str, why: str) -> InputError:
    return InputError(f"the adapter does not belong to {what!r} ({why}); name the run of its model")


def _copied(settings: Any, **changes: Any) -> Any:
    """PEFT writes into the settings that it is given."""
    from peft import LoraConfig

    return LoraConfig(**{**settings.to_dict(), **changes})


def fresh(model: torch.nn.Module, config: RunConfig, family: Family, head: bool) -> Adapter:
    """An adapter of `config` for dense `model`, in place, drawn from `config.seed`.

    Its B is not zero, as a new one's would be. With `head` the classifier's modules are in it
    as they are. Raises ConfigError for targets or a rank that `model` has not.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from peft.tuners.lora.layer import LoraLayer

    adapters.check_targets(model, config.model, family, config.rank)
    settings = LoraConfig(
        task_type="SEQ_CLS" if head else "CAUSAL_LM",
        r=config.rank,
        lora_alpha=config.scaling * config.rank,
        target_modules=list(family.targets),
        modules_to_save=list(family.head) if head else None,
    )
    adapted: Any = get_peft_model(model, settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(config.seed)
    for layer in adapted.modules():
        if isinstance(layer, LoraLayer):
            _draw(layer, generator)
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
    settings.inference_mode = True
    return Adapter(_copied(settings), tensors)


def _draw(layer: Any, generator: torch.Generator) -> None:
    (name,) = layer.lora_A
    A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
    a = torch.randn(A.shape, generator=generator) / A.shape[1] ** 0.5
    b = torch.randn(B.shape, generator=generator)
    size = UPDATE * layer.get_base_layer().weight.detach().float().norm().cpu()
    b *= size / (layer.scaling[name] * (b @ a)).norm().clamp(min=1e-30)
    A.data.copy_(a)
    B.data.copy_(b)
