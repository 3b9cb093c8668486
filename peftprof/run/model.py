"""The base model of a run, loaded for a method, and its family's names."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.records import ModelInfo
from peftprof.run.source import Source, one_line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Family:
    """Names inside one family of models, as transformers calls them.

    `targets` are the query and value projections, `head` the classifier's modules,
    `layers` the list of transformer layers, all by the end of their paths. `pools` says
    which token of a sequence its classifier reads, "first" or "last", where sequences can be
    packed (`packing`); None where they cannot.
    """

    targets: tuple[str, ...]
    head: tuple[str, ...]
    layers: str
    pools: str | None = None


_DECODER = Family(("q_proj", "v_proj"), ("score",), "model.layers", "last")
FAMILIES = {
    "bert": Family(("query", "value"), ("classifier",), "bert.encoder.layer", "first"),
    "distilbert": Family(
        ("q_lin", "v_lin"),
        ("pre_classifier", "classifier"),
        "distilbert.transformer.layer",
        "first",
    ),
    "roberta": Family(("query", "value"), ("classifier",), "roberta.encoder.layer", "first"),
    # ModernBERT holds query, key and value in one projection; there is no narrower choice.
    "modernbert": Family(("Wqkv",), ("head", "classifier"), "model.layers"),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}


def family_of(source: Source, config: RunConfig) -> Family:
    """Target, head and layer names for `source`; --target-modules win over the family's.

    Raises InputError for a family that is not in the table.
    """
    known = FAMILIES.get(source.family)
    if known is None:
        raise InputError(
            f"model {config.model!r} is of the family {source.family!r}; peftprof knows "
            f"{', '.join(sorted(FAMILIES))}"
        )
    if config.target_modules:
        return dataclasses.replace(known, targets=config.target_modules)
    return known


def load_model(
    source: Source, config: RunConfig, family: Family, labels: tuple[str, ...], pad_token_id: int
) -> torch.nn.Module:
    """The classifier on its device, weights fp32 or (qlora) NF4 with nested statistics.

    The head is newly initialised from `config.seed` where the checkpoint has none.
    Raises InputError when transformers cannot load it, or when the checkpoint lacks
    anything but the head, which would otherwise be random weights that nobody trains.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(config.seed)
    model = pretrained(
        AutoModelForSequenceClassification,
        source,
        config,
        family,
        new=family.head,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
        pad_token_id=pad_token_id,
    )
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]  # transformers is not typed


def pretrained(
    kind: Any,
    source: Source,
    config: RunConfig,
    family: Family,
    new: tuple[str, ...] = (),
    **settings: Any,
) -> Any:
    """A model of transformers' class `kind` on its device, fp32 or (qlora) NF4.

    `new` are the modules that the checkpoint may lack. Raises InputError as `load_model`.
    """
    options: dict[str, Any] = {}
    if config.method == "qlora":
        options["quantization_config"] = quantization(config, family)
        options["device_map"] = {"": config.device}
    try:
        model, loading = kind.from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **settings,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"model {config.model!r} cannot be loaded ({one_line(error)}); save it or fetch it "
            "again"
        ) from error
    lacking = sorted(k for k in loading["missing_keys"] if k.split(".")[0] not in new)
    if lacking:
        raise InputError(
            f"the weights of {config.model!r} lack {len(lacking)} tensors of the "
            f"{'base' if new else 'language'} model, {lacking[0]} first; they would be random"
        )
    if config.method != "qlora":
        model.to(config.device)
    if config.method != "full" and config.device == "cpu":
        _own_memory(model)
    return model


def _own_memory(model: torch.nn.Module) -> None:
    """Copy the dense weights of a frozen model out of its file, which is mapped into memory.

    Else any one of them holds the mapping, and those that were quantised or rounded stay
    resident: 170 MB of a DistilBERT in bf16.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.clone()


def quantization(config: RunConfig, family: Family) -> Any:
    """bitsandbytes' settings: NF4, nested statistics, the run's compute dtype, head left out."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[config.precision],
        llm_int8_skip_modules=list(family.head),
    )


def describe(source: Source, model: torch.nn.Module) -> ModelInfo:
    """What is recorded of a model; parameters are counted at their unpacked size."""
    return ModelInfo(
        name=source.name,
        source=source.source,
        family=source.family,
        fingerprint=source.fingerprint,
        parameters=sum(unpacked_size(p) for p in model.parameters()),
        layers=int(getattr(model.config, "num_hidden_layers", 0)),
    )


def unpacked_size(parameter: torch.Tensor) -> int:
    """Elements of a parameter as the model uses it: 4-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
