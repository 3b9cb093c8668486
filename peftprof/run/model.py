"""The base model of a run: found, fingerprinted, loaded for a method; its family's names."""

import hashlib
import inspect
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from peftprof.config import RunConfig
from peftprof.errors import InputError
from peftprof.records import ModelInfo
from peftprof.run import embedded

WANTED_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
]


@dataclass(frozen=True)
class Family:
    """Names inside one family of models, as transformers calls them.

    `targets` are the query and value projections, `head` the classifier's modules,
    `layers` the list of transformer layers, all by the end of their paths.
    """

    targets: tuple[str, ...]
    head: tuple[str, ...]
    layers: str


_DECODER = Family(("q_proj", "v_proj"), ("score",), "model.layers")
FAMILIES = {
    "bert": Family(("query", "value"), ("classifier",), "bert.encoder.layer"),
    "distilbert": Family(
        ("q_lin", "v_lin"), ("pre_classifier", "classifier"), "distilbert.transformer.layer"
    ),
    "roberta": Family(("query", "value"), ("classifier",), "roberta.encoder.layer"),
    # ModernBERT holds query, key and value in one projection; there is no narrower choice.
    "modernbert": Family(("Wqkv",), ("head", "classifier"), "model.layers"),
    "llama": _DECODER,
    "mistral": _DECODER,
    "qwen2": _DECODER,
    "qwen3": _DECODER,
}


@dataclass(frozen=True)
class Source:
    """A model's files on this machine, before anything is loaded."""

    name: str
    folder: Path
    source: str
    family: str
    reference: str  # what an adapter names as its base: a hub name, else a folder


def locate(name: str) -> Source:
    """The local folder of the model `name`: embedded, a local folder, or from the hub.

    Raises InputError when it cannot be found, has no safetensors weights (pickled weights
    are not loaded) or no readable config; FetchError when an embedded one cannot be fetched.
    """
    reference = None
    if name in embedded.MODELS:
        folder, source = embedded.model_folder(name)
    elif Path(name).expanduser().is_dir():
        folder = Path(name).expanduser()
        source = f"local folder {folder.resolve().name}"
    else:
        folder, source = _from_hub(name)
        reference = name
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"model {name!r} has no *.safetensors weights, and pickled ones are not loaded; "
            "convert it with save_pretrained"
        )
    from transformers import AutoConfig

    try:
        family = AutoConfig.from_pretrained(folder, trust_remote_code=False).model_type
    except (OSError, ValueError, KeyError) as error:
        raise InputError(
            f"model {name!r} has no config.json that transformers knows: {_one_line(error)}"
        ) from error
    return Source(name, folder, source, family, reference or str(folder.resolve()))


def _from_hub(name: str) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = huggingface_hub.snapshot_download(name, allow_patterns=WANTED_FILES)
    except HFValidationError as error:
        raise InputError(
            f"model {name!r} is no local folder and no name a hub could have"
        ) from error
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        raise InputError(
            f"model {name!r} is no local folder and could not be loaded from the hub "
            f"({_one_line(error)}); check the name and the network, or use --model minilm"
        ) from error
    revision = Path(path).name
    return Path(path), f"Hugging Face hub {name} at revision {revision}"


def _one_line(error: Exception, limit: int = 160) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


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
        return Family(config.target_modules, known.head, known.layers)
    return known


def longest_input(source: Source) -> int | None:
    """Positions the model has, from its config; None where it does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and source.family == "roberta":
        limit -= config.pad_token_id + 1  # RoBERTa numbers positions from after the padding
    return limit


def input_names(source: Source) -> list[str]:
    """Names of the inputs that the model's forward takes."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    try:
        kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(
            f"model {source.name!r} has no sequence classifier in transformers"
        ) from error
    return list(inspect.signature(kind.forward).parameters)


def fingerprint(source: Source) -> str:
    """SHA-256 over the names and bytes of the model's weight files."""
    digest = hashlib.sha256()
    for path in sorted(source.folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer, with a padding token. Raises InputError when it has none."""
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"model {source.name!r} has no usable tokenizer: {_one_line(error)}"
        ) from error
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of {source.name!r} has neither padding nor end token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    source: Source, config: RunConfig, family: Family, labels: tuple[str, ...], pad_token_id: int
) -> torch.nn.Module:
    """The classifier on its device, weights fp32 or (qlora) NF4 with nested statistics.

    The head is newly initialised from `config.seed` where the checkpoint has none.
    Raises InputError when transformers cannot load it.
    """
    from transformers import AutoModelForSequenceClassification, set_seed

    set_seed(config.seed)
    options: dict[str, Any] = {}
    if config.method == "qlora":
        options["quantization_config"] = quantization(config, family)
        options["device_map"] = {"": config.device}
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            source.folder,
            num_labels=len(labels),
            id2label=dict(enumerate(labels)),
            label2id={name: i for i, name in enumerate(labels)},
            pad_token_id=pad_token_id,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            **options,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"model {config.model!r} cannot be loaded: {_one_line(error)}") from error
    if config.method != "qlora":
        model.to(config.device)
    model.config.use_cache = False
    return model  # type: ignore[no-any-return]  # transformers is not typed


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


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def describe(source: Source, model: torch.nn.Module) -> ModelInfo:
    """What is recorded of a model; parameters are counted at their unpacked size."""
    return ModelInfo(
        name=source.name,
        source=source.source,
        family=source.family,
        fingerprint=fingerprint(source),
        parameters=sum(unpacked_size(p) for p in model.parameters()),
        layers=int(getattr(model.config, "num_hidden_layers", 0)),
    )


def unpacked_size(parameter: torch.Tensor) -> int:
    """Elements of a parameter as the model uses it: 4-bit weights are stored two to a byte."""
    state = getattr(parameter, "quant_state", None)
    return int(state.shape.numel()) if state is not None else parameter.numel()
