"""What a model is made of, from its configuration alone: no weights, no tokenizer."""

import copy
import json
import tomllib
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from peftprof.errors import InputError
from peftprof.run import source
from peftprof.run.model import FAMILIES, Family

# Without any of these transformers fills in those of some published model, silently.
_NEEDED = {
    "distilbert": ("n_layers", "dim", "n_heads", "hidden_dim", "vocab_size"),
    None: (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    ),
}
_LAYERS = 0  # of these


def _needed(model_type: str) -> tuple[str, ...]:
    return _NEEDED.get(model_type, _NEEDED[None])


@dataclass(frozen=True)
class Shape:
    """A classifier without values: `values` of its config.json, and `basis` says whence.

    `reference` is what `train` knows the model by.
    """

    name: str
    basis: str
    values: dict[str, Any]
    family: Family
    labels: int = 2
    reference: str = ""

    @property
    def model_type(self) -> str:
        """transformers' name of the family."""
        return str(self.values["model_type"])

    @property
    def layers(self) -> int:
        """How many layers the whole model has."""
        return int(self.values[_needed(self.model_type)[_LAYERS]])

    @property
    def stored_bytes(self) -> int:
        """Bytes of a parameter in its makers' file, by what the configuration says."""
        kind = str(self.values.get("dtype") or self.values.get("torch_dtype") or "float32")
        return 2 if kind in ("float16", "bfloat16") else 4

    @cached_property
    def config(self) -> Any:
        """As transformers reads it, which takes seconds to import.

        Raises InputError where it cannot.
        """
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig

        # A quantised checkpoint's settings are of its files, and not of its shape.
        left_out = ("quantization_config", "auto_map")
        try:
            return AutoConfig.for_model(
                **{k: v for k, v in self.values.items() if k not in left_out}
            )
        except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
            raise InputError(
                f"the config.json of {self.name!r} is none that transformers knows "
                f"({source.one_line(error)}); save the model there again"
            ) from error

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the classifier is called with."""
        import inspect

        from transformers import AutoModelForSequenceClassification

        made = AutoModelForSequenceClassification._model_mapping[type(self.config)]
        return tuple(inspect.signature(made.forward).parameters)

    @property
    def alike(self) -> bool:
        """Whether all layers between the first and the last are the same."""
        kinds = getattr(self.config, "layer_types", None)
        return kinds is None or len(set(kinds)) <= 1

    def trimmed(self, layers: int | None) -> Any:
        """A copy of the configuration with only the first `layers` layers (None: all)."""
        made = copy.deepcopy(self.config)
        if layers is not None:
            made.num_hidden_layers = layers
            if getattr(made, "layer_types", None) is not None:
                made.layer_types = made.layer_types[:layers]
        return made


def known() -> dict[str, dict[str, Any]]:
    """Configurations that come with the package, by name: `shapes.toml`."""
    text = (resources.files("peftprof") / "advise" / "shapes.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)


def find(name: str, labels: int = 2) -> Shape:
    """The shape of the model `name`: one of `known`, embedded, a folder, or on the hub.

    Of a hub only the configuration is fetched. Raises InputError when there is none, it
    lacks a size, or its family is not one that peftprof trains.
    """
    shipped = known()
    if name.lower() in shipped:
        values = dict(shipped[name.lower()])
        basis, reference = values.pop("basis"), values.pop("hub")
        return replace(_shape(name, basis, values, labels), reference=reference)
    path, basis = _config_file(name)
    reference = str(path.parent) if Path(name).expanduser() == path else name
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"the config.json of {name!r} cannot be read ({source.one_line(error)}); save the "
            "model there again"
        ) from error
    if not isinstance(values, dict):
        raise InputError(f"the config.json of {name!r} is no object; save the model there again")
    return replace(_shape(name, basis, values, labels), reference=reference)


def _config_file(name: str) -> tuple[Path, str]:
    from peftprof.run import embedded

    if name in embedded.MODELS:
        folder, basis = embedded.model_folder(name)
        return folder / "config.json", basis
    local = Path(name).expanduser()
    if local.is_file():
        return local, f"local file {local.name}"
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise InputError(f"{name} has no config.json; name a folder that has one")
        return local / "config.json", f"local folder {local.resolve().name}"
    if name.startswith(source.LOCAL):
        raise InputError(f"there is no folder {name!r}; check the path of --model")
    return _from_hub(name)


def _from_hub(name: str) -> tuple[Path, str]:
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    source.quiet_hub()
    try:
        path = Path(huggingface_hub.hf_hub_download(name, "config.json"))
    except (
        OSError,
        ValueError,
        HFValidationError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"model {name!r} is no local folder and no hub gave its configuration "
            f"({source.hub_says(error)}); check the name and the network, or use one of "
            f"{', '.join(sorted(known()))}"
        ) from error
    return path, f"Hugging Face hub {name} at revision {path.parent.name}"


def _shape(name: str, basis: str, values: dict[str, Any], labels: int) -> Shape:
    kind = values.get("model_type")
    if kind not in FAMILIES:
        raise InputError(
            f"model {name!r} is of the family {kind!r}; peftprof knows "
            f"{', '.join(sorted(FAMILIES))}"
        )
    needed = _needed(kind)
    missing = [key for key in needed if key not in values]
    if missing:
        raise InputError(
            f"the config.json of {name!r} lacks {', '.join(missing)}; without it the model's size "
            "is not known"
        )
    wrong = [k for k in needed if type(values[k]) is not int or values[k] < 1]
    if wrong:
        raise InputError(
            f"the config.json of {name!r} has {wrong[0]} {values[wrong[0]]!r}, which is no size; "
            "save the model there again"
        )
    return Shape(name, basis, values, FAMILIES[kind], labels, name)
