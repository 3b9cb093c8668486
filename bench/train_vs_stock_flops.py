"""The model FLOPs of a training step: what its products take at the least, padding left out."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from peftprof.run.narrow import PROJECTIONS

KEYS_AND_VALUES = frozenset(name for _, *names in PROJECTIONS for name in names)


@dataclass(frozen=True)
class Product:
    """One linear layer [N, K] of a transformer layer, and which products its backward takes.

    `once`: only the token that the classifier reads goes through it.
    """

    N: int
    K: int
    dx: bool
    dw: bool
    once: bool = False

    @property
    def flops_per_token(self) -> int:
        return 2 * self.N * self.K * (1 + self.dx + self.dw)


@dataclass(frozen=True)
class ModelFlops:
    """Model FLOPs of a step, by the real length L of each of its examples.

    A token of an example of length L takes, in each transformer layer,

        forward    2 N K for each linear layer [N, K], and 4 L H for attention: QK' and PV,
                   with H = heads x head size;
        backward   2 N K for dX of each linear layer whose input needs a gradient, 2 N K for
                   dW of each that is trained, and 8 L H for attention.

    So full fine-tuning's backward is twice its forward, and a frozen layer's, NF4 or dense,
    is as much as its forward (none where nothing below it is trained). Adapters are linear
    layers like others: A and B, forward, dX and dW. Whatever a program does beyond is not
    counted: padding, dequantising, recomputation. Nor are embeddings, normalisation,
    pooler, head and optimiser, which are no products or little ones. Attention counts whole
    for causal models too, as is usual, and dK is counted in a first layer that needs none.

    Where the classifier reads a sequence's first token (`narrow`), only that one counts in the
    last layer, but for keys and values: what others compute there goes nowhere. A program
    that computes it all the same, as stock's does, is not credited with it.
    """

    products: tuple[Product, ...]
    layers: int
    hidden: int
    narrow: bool = False

    @classmethod
    def of(
        cls, model: Any, layers: str, inputs: Mapping[str, torch.Tensor], narrow: bool = False
    ) -> "ModelFlops":
        """Counted on `model` in training, whose transformer layers are at `layers`.

        One forward of `inputs` tells which layers' inputs need a gradient; a 4-bit layer is
        counted at the size of its weight unpacked.
        """
        names = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and f".{layers}." in f".{name}"
        }
        needs: dict[str, bool] = {}

        def look(name: str) -> Any:
            def hook(_: Any, args: tuple[torch.Tensor, ...]) -> None:
                needs[name] = args[0].requires_grad

            return hook

        hooks = [m.register_forward_pre_hook(look(name)) for name, m in names.items()]
        try:
            with torch.enable_grad():
                model(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        config = model.config
        last = f".{layers}.{config.num_hidden_layers - 1}."
        products = tuple(
            Product(
                m.out_features,
                m.in_features,
                needs[name],
                m.weight.requires_grad,
                narrow and last in f".{name}" and KEYS_AND_VALUES.isdisjoint(name.split(".")),
            )
            for name, m in names.items()
            if name in needs
        )
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        return cls(products, config.num_hidden_layers, heads * head, narrow)

    def of_step(self, lengths: Iterable[int]) -> int:
        """The FLOPs of a step over examples of these lengths."""
        linear = sum(p.flops_per_token for p in self.products if not p.once)
        once = sum(p.flops_per_token for p in self.products if p.once)
        scores = 12 * self.hidden
        whole = self.layers - self.narrow
        return sum(
            once + n * linear + n * n * scores * whole + n * scores * self.narrow for n in lengths
        )


def share(flops: Sequence[int], seconds: Sequence[float], peak: float) -> float:
    """Model FLOPs utilisation: FLOPs of these steps a second, over the GEMM's."""
    return sum(flops) / sum(seconds) / peak
