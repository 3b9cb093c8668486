"""The last layer only for the tokens that are read.

A BERT-like classifier reads one token of each sequence. What the last layer computes for
the others goes nowhere, but for their keys and values. So its input is narrowed to the
tokens that are read, and only the key and value projections get all of it: the same logits
and the same gradients, without ten of the layer's twelve units of work a token (its linear
layers in units of a hidden x hidden one).
"""

from typing import Any

import torch

from peftprof.errors import InputError
from peftprof.run.model import Family

HOLDER = "peftprof_last"  # where the last layer's attention keeps what went round it

# Projections of a layer's attention, as the families that pool their first token name them.
PROJECTIONS = (("query", "key", "value"), ("q_lin", "k_lin", "v_lin"))


def attention(classifier: torch.nn.Module, family: Family) -> Any:
    """The attention module of the last layer; None where the last layer is read as a whole.

    Raises InputError when its projections are not where the family has them.
    """
    if family.pools != "first":
        return None
    for module in _last_layer(classifier, family).modules():
        children = {name for name, _ in module.named_children()}
        if any(children.issuperset(names) for names in PROJECTIONS):
            return module
    raise InputError(f"the last layer of {family.layers!r} has no query, key and value projection")


def _last_layer(classifier: torch.nn.Module, family: Family) -> torch.nn.Module:
    layers: Any = classifier.get_submodule(family.layers)
    last: torch.nn.Module = layers[-1]
    return last


def prepare(classifier: torch.nn.Module, family: Family) -> None:
    """Narrow the last layer of `classifier` on packed batches, in place.

    After adapters are attached: hooks on a layer that PEFT wraps would not be called.
    Raises as `attention`.
    """
    module = attention(classifier, family)
    if module is not None:
        setattr(module, HOLDER, LastLayer(_last_layer(classifier, family), module))


def of(module: Any) -> "LastLayer | None":
    """What `prepare` left at an attention module that is now computing for one query each."""
    holder: LastLayer | None = getattr(module, HOLDER, None)
    return holder if holder is not None and holder.whole is not None else None


class LastLayer:
    """Hooks that narrow a layer's input, and carry all tokens round to its keys and values."""

    def __init__(self, layer: torch.nn.Module, module: Any) -> None:
        self.whole: torch.Tensor | None = None  # [1, T, hidden], while the layer is computing
        self.queries = 0
        self.made: dict[str, torch.Tensor] = {}
        layer.register_forward_pre_hook(self._narrow, with_kwargs=True)
        layer.register_forward_hook(self._forget, always_call=True)
        (names,) = (names for names in PROJECTIONS if hasattr(module, names[0]))
        for name, projection in zip(("keys", "values"), names[1:], strict=True):
            getattr(module, projection).register_forward_pre_hook(self._widen)
            getattr(module, projection).register_forward_hook(self._keep(name))

    def keys_and_values(self, heads: torch.Size) -> tuple[torch.Tensor, torch.Tensor]:
        """Those of all tokens, [T, *heads]; the layer itself saw as many as it has queries."""
        keys, values = (self.made.pop(name) for name in ("keys", "values"))
        return keys.view(-1, *heads), values.view(-1, *heads)

    def _narrow(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        segments = kwargs.get("segments")
        if segments is None:
            return None
        self.whole, *rest = args
        assert self.whole is not None
        narrowed = self.whole.index_select(1, segments.first)
        self.queries = narrowed.shape[1]
        return (narrowed, *rest), kwargs

    def _widen(self, _: Any, args: tuple[Any, ...]) -> Any:
        return args if self.whole is None else (self.whole, *args[1:])

    def _keep(self, name: str) -> Any:
        def keep(_: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
            if self.whole is None:
                return output
            self.made[name] = output
            # Of the shape that the layer expects of what it thinks are its tokens.
            return output[:, : self.queries]

        return keep

    def _forget(self, *_: Any) -> None:
        self.whole = None
        self.made.clear()
