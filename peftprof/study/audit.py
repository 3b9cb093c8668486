"""Trainable parameters of the paper's model: live, nominal, packed, and as the paper counted.

The model is DistilBERT with the paper's head, its shapes alone (PyTorch's meta device): an
adapter is attached as in a run, one backward says which tensors get a gradient. The paper
prints 1.26 M for QLoRA at rank 4 where LoRA at rank 4 has 0.67 M: PEFT keeps the original
of each module in `modules_to_save` beside the copy that it trains. Unfrozen by name after the
adapter is attached, `pre_classifier` is trainable twice, and only the copy is ever used.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from peftprof.config import RunConfig
from peftprof.run import adapters
from peftprof.run.model import FAMILIES
from peftprof.studies import Audit, Count

PRINTED = {  # the paper's tables I and II
    ("lora", 4): 0.67e6, ("lora", 8): 0.74e6, ("lora", 16): 0.89e6, ("lora", 32): 1.18e6,
    ("qlora", 4): 1.26e6, ("qlora", 8): 1.33e6, ("qlora", 16): 1.48e6, ("qlora", 32): 1.77e6,
}  # fmt: skip
UNFROZEN_TWICE = "pre_classifier"
WIDTH = 768  # of the smaller side of q_lin and v_lin: no rank is above it


def audit(ranks: Sequence[int]) -> tuple[Audit, ...]:
    """Counts for LoRA and QLoRA at each of `ranks` that fits the model."""
    pairs = [count(rank) for rank in ranks if 1 <= rank <= WIDTH]
    return tuple(one for method in zip(*pairs, strict=True) for one in method)


def count(rank: int) -> tuple[Audit, Audit]:
    """The counts of LoRA and of QLoRA at one rank, from the model's tensors and two backwards."""
    model = _adapted(rank)
    _backward(model)
    named = dict(model.named_parameters())
    nominal = {n: p for n, p in named.items() if p.requires_grad}
    rows = tuple(
        Count(
            what,
            sum(p.numel() for n, p in nominal.items() if _group(n) == what and p.grad is not None),
            sum(p.numel() for n, p in nominal.items() if _group(n) == what),
        )
        for what in ("adapters", "pre_classifier", "classifier")
    )
    total = sum(p.numel() for p in named.values())
    quantised = sum(m.weight.numel() for m in _quantised(model))
    asked = sum(row.nominal for row in rows)
    lora = Audit(
        method="lora",
        rank=rank,
        rows=rows,
        live=sum(row.live for row in rows),
        nominal=asked,
        total=total,
        packed_total=total,
        as_the_paper=asked,
        printed=round(PRINTED.get(("lora", rank), 0)),
        duplicated=0,
        without_gradient=0,
    )
    second = [p for n, p in named.items() if UNFROZEN_TWICE in n and n not in nominal]
    for parameter in second:
        parameter.requires_grad_(True)
    _backward(model)
    duplicated = sum(p.numel() for p in second)
    qlora = replace(
        lora,
        method="qlora",
        packed_total=total - quantised + quantised // 2,
        as_the_paper=asked + duplicated,
        printed=round(PRINTED.get(("qlora", rank), 0)),
        duplicated=duplicated,
        without_gradient=sum(p.numel() for p in second if p.grad is None),
    )
    return lora, qlora


def _adapted(rank: int) -> torch.nn.Module:
    from transformers import AutoModelForSequenceClassification, DistilBertConfig

    config = RunConfig(
        method="lora",
        model="distilbert-base-uncased",
        dataset="glue/sst2",
        learning_rate=3e-5,
        rank=rank,
        kernels="bnb",
        padding="pad",
        device="cpu",
    )
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(DistilBertConfig(num_labels=2))
        return adapters.attach(model, config, FAMILIES["distilbert"])


def _backward(model: torch.nn.Module) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    model.train()(input_ids=ids).logits.sum().backward()


def _quantised(model: torch.nn.Module) -> list[torch.nn.Linear]:
    """The linears that QLoRA stores in four bits: all of the base model, none of the head."""
    return [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "classifier" not in name
    ]


def _group(name: str) -> str:
    if "lora_" in name:
        return "adapters"
    return "pre_classifier" if "pre_classifier" in name else "classifier"
