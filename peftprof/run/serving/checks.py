"""Whether the variants compute the same, before anything is timed."""

from dataclasses import dataclass
from typing import Any

import torch

from peftprof.errors import InferenceError
from peftprof.inferences import Checks, Drift, Equality
from peftprof.run.serving.served import GENERATE, Served
from peftprof.run.serving.tokens import Tokens

EXAMPLES = 32
MOST_LENGTH = 128
AT_ONCE = 8

# |logits - reference| / |reference|, Frobenius, where the reference is stock PEFT's unmerged
# adapter in fp32. In fp32 merged and unmerged differ in the order of sums only: a rounding of
# 6e-8 a product, some dozens of layers (measured: 9e-7 MiniLM, 7e-6 SmolLM2 of 30 layers).
# In half precision every activation and weight is rounded, and what that makes of the logits
# depends on the model (bf16: 1e-2 MiniLM, 5e-2 SmolLM2). So it is measured: base as served
# against base in fp32. A variant is rounded in as many places, and the adapter's two products.
LOGITS = 1e-4
ROUNDINGS = 2

# |W' - (W + s B A)| / |W + s B A| of each merged weight, Frobenius, with the right side in
# float64: fp32 rounds the sum by 6e-8 and the product by about as much of its own size, which
# is smaller. Logits alone would not tell: of some weights a model says the same without them.
WEIGHTS = 1e-6


@dataclass
class Compared:
    """The variants, built and ready to serve, and what the comparison of them gave."""

    models: dict[str, Any]
    checks: Checks


def build_and_compare(
    served: Served, variants: tuple[str, ...], tokens: Tokens, length: int
) -> Compared:
    """Build `variants` and compare their logits on sequences of `length` tokens.

    Raises InferenceError where merged, unmerged, or NF4 that is the same mathematics, are not
    equal; and the errors of `Served`.
    """
    ids = tokens.at(EXAMPLES, min(length, MOST_LENGTH)).to(served.config.device)
    if served.adapter is None:
        models = {variant: served.build(variant) for variant in variants}
        found = {v: logits(served, models[v], ids) for v in variants}
        checks = Checks(EXAMPLES, ids.shape[1], (), None, _drift(found, adapted=False))
        return Compared(models, checks)
    models, equal = {}, []
    unmerged = served.stock("unmerged").eval()
    reference = logits(served, unmerged, ids)
    if "merged" in variants:
        merged = served.stock("merged").eval()
        equal.append(_same_weights(merged, unmerged.get_base_model()))
        found_merged = logits(served, merged, ids)
        equal.append(_same_logits("merged", "fp32", LOGITS, found_merged, reference))
        models["merged"] = served.ready(merged, "merged")
    models["unmerged"] = served.ready(unmerged, "unmerged")
    base = served.stock("base").eval()
    bare = logits(served, base, ids)
    models["base"] = served.ready(base, "base")
    if "nf4" in variants:
        models["nf4"] = served.build("nf4")
    found = {name: logits(served, model, ids) for name, model in models.items()}
    allowed = max(LOGITS, ROUNDINGS * relative(found["base"], bare))
    exact = ("merged", "unmerged", *(("nf4",) if served.plan.dequantised else ()))
    precision = served.config.precision
    for name in (v for v in variants if v in exact):
        equal.append(_same_logits(name, precision, allowed, found[name], reference))
    drift = _drift({v: found[v] for v in variants}, adapted=True)
    checks = Checks(EXAMPLES, ids.shape[1], tuple(equal), relative(bare, reference), drift)
    return Compared({v: models[v] for v in variants}, checks)


@torch.inference_mode()
def logits(served: Served, model: Any, ids: torch.Tensor) -> torch.Tensor:
    """fp32 logits [examples, classes], or [examples, length, vocabulary], on the host."""
    parts = []
    for part in ids.split(AT_ONCE):
        options = {"use_cache": False} if served.plan.task == GENERATE else {}
        parts.append(model(input_ids=part, **options).logits.float().cpu())
    return torch.cat(parts)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """|actual - expected| / |expected|, Frobenius; NaN counts as infinite."""
    difference: float = (actual.double() - expected.double()).norm().item()
    if difference != difference:
        return float("inf")
    size: float = expected.double().norm().item()
    return difference / size if size else difference


def _same_logits(
    variant: str, precision: str, allowed: float, actual: torch.Tensor, expected: torch.Tensor
) -> Equality:
    error = relative(actual, expected)
    if not error <= allowed:
        raise InferenceError(
            f"{variant} is not the same model: its logits in {precision} are {error:.1e} of "
            f"their size away from the adapter computed apart by stock PEFT in fp32, allowed is "
            f"{allowed:.0e}; nothing was timed"
        )
    return Equality(variant, "logits", precision, error, allowed)


def _same_weights(merged: torch.nn.Module, unmerged: torch.nn.Module) -> Equality:
    """Every parameter of `merged` against that of `unmerged`, its adapter added in float64."""
    from peft.tuners.lora.layer import LoraLayer

    adapted = {n: m for n, m in unmerged.named_modules() if isinstance(m, LoraLayer)}
    expected = {
        name.replace(".base_layer", "").replace(".modules_to_save.default", ""): parameter
        for name, parameter in unmerged.named_parameters()
        if ".lora_" not in name and ".original_module" not in name
    }
    worst = 0.0
    for name, actual in merged.named_parameters():
        wanted = expected.pop(name, torch.empty(0)).detach().double()
        path, _, kind = name.rpartition(".")
        if kind == "weight" and (layer := adapted.get(path)) is not None:
            A, B = (getattr(layer, part)["default"].weight for part in ("lora_A", "lora_B"))
            wanted = wanted + layer.scaling["default"] * (B.detach().double() @ A.detach().double())
        error = relative(actual.detach(), wanted) if actual.shape == wanted.shape else float("inf")
        if not error <= WEIGHTS:
            raise InferenceError(
                f"merged is not the same model: {name} is {error:.1e} of its size away from "
                f"W + s B A, allowed is {WEIGHTS:.0e}; nothing was timed"
            )
        worst = max(worst, error)
    if expected:
        raise InferenceError(f"merged is not the same model: it has no {sorted(expected)[0]}")
    return Equality("merged", "weights", "fp32", worst, WEIGHTS)


def _drift(found: dict[str, torch.Tensor], adapted: bool) -> tuple[Drift, ...]:
    """What NF4 changes of the dense model with the same adapter."""
    against = [v for v in (("unmerged", "merged") if adapted else ("base",)) if v in found]
    if "nf4" not in found or not against:
        return ()
    ours, theirs = found["nf4"], found[against[0]]
    apart = (ours - theirs).abs()
    changed = ours.argmax(-1) != theirs.argmax(-1)
    return (
        Drift(
            "nf4",
            against[0],
            float(apart.max()),
            float(apart.mean()),
            int(changed.sum()),
            changed.numel(),
        ),
    )
