"""A model's files on this machine: embedded, a local folder, or from the hub."""

import hashlib
import inspect
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peftprof.errors import InputError
from peftprof.run import embedded

WANTED_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
OTHER_FILES = ["*/*", "consolidated*"]  # further formats of the same weights
LOCAL = (".", "/", "~")  # a name that begins so is a path, and no hub is asked for it
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json", "*.model")


@dataclass(frozen=True)
class Source:
    """A model's files, before any weight is loaded.

    `reference` is what an adapter names as its base: a hub name, else a folder. `positions`
    is how many it has, None where the config does not say; `inputs` are the names
    that the classifier's forward takes; `fingerprint` is SHA-256 over the weight files.
    """

    name: str
    folder: Path
    source: str
    reference: str
    family: str
    vocabulary: int
    positions: int | None
    inputs: tuple[str, ...]
    fingerprint: str
    config: Any  # as transformers reads it


def locate(name: str) -> Source:
    """The local files of the model `name`.

    Raises InputError when it cannot be found, has no safetensors weights (pickled weights
    are not loaded), no readable config or no sequence classifier; FetchError when an
    embedded one cannot be fetched.
    """
    folder, source, reference = _find(name)
    if not list(folder.glob("*.safetensors")):
        raise InputError(
            f"model {name!r} has no *.safetensors weights, and pickled ones are not loaded; "
            "save the model there with save_pretrained"
        )
    config, inputs = _read_config(name, folder)
    return Source(
        name=name,
        folder=folder,
        source=source,
        reference=reference,
        family=config.model_type,
        vocabulary=config.vocab_size,
        positions=getattr(config, "max_position_embeddings", None),
        inputs=inputs,
        fingerprint=_fingerprint(folder),
        config=config,
    )


def _find(name: str) -> tuple[Path, str, str]:
    if name in embedded.MODELS:
        folder, source = embedded.model_folder(name)
        return folder, source, str(folder.resolve())
    local = Path(os.path.expanduser(name))  # noqa: PTH111  (Path's raises for an unknown user)
    if local.is_dir():
        return local, f"local folder {local.resolve().name}", str(local.resolve())
    if name.startswith(LOCAL):
        raise InputError(f"there is no folder {name!r}; check the path of --model")
    folder, source = _from_hub(name)
    return folder, source, name


def _from_hub(name: str) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = huggingface_hub.snapshot_download(
            name, allow_patterns=WANTED_FILES, ignore_patterns=OTHER_FILES
        )
    except HFValidationError as error:
        raise InputError(
            f"model {name!r} is no local folder and no name a hub could have; check --model"
        ) from error
    except (OSError, HfHubHTTPError, LocalEntryNotFoundError, RuntimeError) as error:
        raise InputError(
            f"model {name!r} is no local folder and could not be loaded from the hub "
            f"({hub_says(error)}); check the name and the network, or use --model minilm"
        ) from error
    return Path(path), f"Hugging Face hub {name} at revision {Path(path).name}"


def _read_config(name: str, folder: Path) -> tuple[Any, tuple[str, ...]]:
    """The config, and the inputs of the classifier that transformers has for it."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise InputError(
            f"model {name!r} has no config.json that transformers knows ({one_line(error)}); "
            "save the model there again with save_pretrained"
        ) from error
    try:
        kind = AutoModelForSequenceClassification._model_mapping[type(config)]
    except KeyError as error:
        raise InputError(
            f"model {name!r} has no sequence classifier in transformers; use another --model"
        ) from error
    return config, tuple(inspect.signature(kind.forward).parameters)


def _fingerprint(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(path.name.encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def load_tokenizer(source: Source) -> Any:
    """The model's tokenizer, with a padding token.

    Raises InputError when the model has none, or one whose vocabulary is larger than the
    model's embedding.
    """
    from transformers import AutoTokenizer

    # Without these files transformers makes up an empty tokenizer and says nothing.
    if not any(list(source.folder.glob(pattern)) for pattern in TOKENIZER_FILES):
        raise InputError(f"model {source.name!r} has no tokenizer files; save its tokenizer there")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.folder, trust_remote_code=False)
    # A file of another form than it should have fails wherever it is first used as that.
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        raise InputError(
            f"model {source.name!r} has no usable tokenizer ({one_line(error)}); save its "
            "tokenizer there again"
        ) from error
    if len(tokenizer) > source.vocabulary:
        raise InputError(
            f"the tokenizer of {source.name!r} has {len(tokenizer)} tokens and the model "
            f"{source.vocabulary}; they do not belong together"
        )
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(
                f"the tokenizer of {source.name!r} has neither padding nor end token; save it "
                "there again with one"
            )
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def one_line(error: BaseException, limit: int = 160) -> str:
    """What an error says, on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text
    whole, space, _ = text[: limit - 3].rpartition(" ")
    return (whole if space else text[: limit - 3]) + "..."


def hub_says(error: BaseException) -> str:
    """Why a hub has not given what it was asked for."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = isinstance(error, LocalEntryNotFoundError)
    return "no network, and no copy in the cache" if offline else one_line(error)


def quiet_libraries() -> None:
    """Keep other packages' progress bars and notes out of ours; their errors stay errors."""
    import datasets
    import transformers

    transformers.logging.set_verbosity_error()
    datasets.logging.set_verbosity(logging.CRITICAL)  # what it logs as an error, we raise
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    quiet_hub()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def quiet_hub() -> None:
    """Keep a hub's warnings, a line for each attempt, out of our one line."""
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
