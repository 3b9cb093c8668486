"""The linear layers of models that people fine-tune, as (N, K): N outputs, K inputs."""

import re
from typing import NamedTuple


class Layer(NamedTuple):
    """A weight [N, K] and which it is: a model's projection."""

    name: str
    N: int
    K: int


# One of each shape in a model; where several projections share it, one name stands for them.
MODELS = {
    "minilm": [
        Layer("MiniLM attention", 384, 384),
        Layer("MiniLM up", 1536, 384),
        Layer("MiniLM down", 384, 1536),
    ],
    "distilbert": [
        Layer("DistilBERT attention", 768, 768),
        Layer("DistilBERT up", 3072, 768),
        Layer("DistilBERT down", 768, 3072),
    ],
    "llama-1b": [
        Layer("Llama-3.2-1B q, o", 2048, 2048),
        Layer("Llama-3.2-1B k, v", 512, 2048),
        Layer("Llama-3.2-1B gate, up", 8192, 2048),
        Layer("Llama-3.2-1B down", 2048, 8192),
    ],
    "llama-3b": [
        Layer("Llama-3.2-3B q, o", 3072, 3072),
        Layer("Llama-3.2-3B k, v", 1024, 3072),
        Layer("Llama-3.2-3B gate, up", 8192, 3072),
        Layer("Llama-3.2-3B down", 3072, 8192),
    ],
    "llama-8b": [
        Layer("Llama-3.1-8B q, o", 4096, 4096),
        Layer("Llama-3.1-8B k, v", 1024, 4096),
        Layer("Llama-3.1-8B gate, up", 14336, 4096),
        Layer("Llama-3.1-8B down", 4096, 14336),
    ],
}


MOST = 10**6  # rows or columns: more is a slip of the finger


def layers(names: str) -> list[Layer]:
    """The layers of comma-separated models, or single ones written NxK.

    Raises ValueError for a name that is neither.
    """
    found: list[Layer] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        size = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", name)
        if size and max(int(size[1]), int(size[2])) > MOST:
            raise ValueError(f"--shapes wants sizes up to {MOST}, not {name!r}")
        if size:
            found.append(Layer("weight", int(size[1]), int(size[2])))
        elif name in MODELS:
            found += MODELS[name]
        elif name == "all":
            found += [layer for model in MODELS.values() for layer in model]
        else:
            raise ValueError(
                f"unknown shapes {name!r}; they are all, {', '.join(MODELS)}, or NxK as 768x3072"
            )
    if not found:
        raise ValueError("--shapes names no shape")
    return found
