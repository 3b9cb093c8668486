"""A training step of a model that is only a configuration: shapes without weights or data.

The classifier is transformers' own, its tensors fake: they have shapes, dtypes and an
autograd graph, and no memory. What peftprof changes about a model (`packing`, `narrow`,
`frugal`, our LoRA operators) is changed by the same code as in a run. Only PEFT's and
bitsandbytes' modules are stood in for, because importing the two takes longer than the whole
answer may; a test holds the stand-ins to what the real ones allocate.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import cross_entropy

from peftprof.advise.shapes import Shape
from peftprof.advise.standins import Adapted, Quantised
from peftprof.advise.tracker import BACKWARD, FORWARD, HEAD, Log, Tracker
from peftprof.config import RunConfig
from peftprof.run import adapters, frugal, narrow, packing
from peftprof.run.batches import Batch, Batches
from peftprof.run.model import DTYPES


@dataclass(frozen=True)
class Held:
    """Bytes of a model's tensors: what it is made of, its adapters, what is trained beside them."""

    base_weights: int = 0
    quantisation_state: int = 0
    lora: int = 0
    head: int = 0
    other: int = 0


@dataclass(frozen=True)
class Traced:
    """One step of a blueprint and the evaluation of its batch.

    What the model holds before, by layer (None: outside), and a log of each.
    """

    held: dict[int | None, Held]
    training: Log
    evaluation: Log


@dataclass(frozen=True)
class Facts:
    """What is asked of a shape before anything is traced.

    `positions` is how long an example may be (None: without end), `packable` how long where
    sequences are packed, 0 where they cannot be. `largest_rank` is the smaller side of the
    narrowest linear that is adapted.
    """

    parameters: int
    positions: int | None
    packable: int
    largest_rank: int


def trace(shape: Shape, config: RunConfig, batch: Batch, layers: int | None = None) -> Traced:
    """A step of `config` over `batch` with only the first `layers` layers (None: all).

    `config` is resolved; its device says what is traced for, and need not be here. Raises
    ConfigError as `adapters.attach`.
    """
    with FakeTensorMode() as mode:
        model = _model(shape, config, layers)
        fake = _fake(batch, mode)
        held = _held(model, shape, config)
        training = _logged(model, shape, fake, functools.partial(_learn, model, fake, config))
        model.zero_grad(set_to_none=True)
        model.eval()
        evaluation = _logged(model, shape, fake, functools.partial(_predict, model, fake, config))
    return Traced(held, training, evaluation)


def _logged(model: Any, shape: Shape, batch: Batch, does: Callable[[Tracker], None]) -> Log:
    """What `does` allocates and calls, marked by layer."""
    tracker = Tracker()
    tracker.hold([*_tensors(model), *_batch_tensors(batch)])
    stack = model.get_submodule(shape.family.layers)
    hooks = [hook for i, layer in enumerate(stack) for hook in _mark(layer, i, tracker)]
    # Of what holds the layers, so that what the last was called with is gone, too.
    holder = model.get_submodule(shape.family.layers.rpartition(".")[0])
    hooks.append(holder.register_forward_hook(lambda *_: tracker.mark(HEAD)))
    with tracker:
        does(tracker)
    for hook in hooks:
        hook.remove()
    return tracker.close()


def _learn(model: Any, batch: Batch, config: RunConfig, tracker: Tracker) -> None:
    """As `loop.Trainee.step` does."""
    for part in batch.parts:
        tracker.mark(FORWARD)
        with _autocast(config):
            logits = packing.logits(model, part)
            loss = cross_entropy(logits.float(), part.labels, reduction="sum")
            loss = loss / batch.samples
        del logits
        tracker.mark(BACKWARD)
        loss.backward()
        del loss


def _predict(model: Any, batch: Batch, config: RunConfig, tracker: Tracker) -> None:
    """As `loop.Trainee.predict` does."""
    for part in batch.parts:
        tracker.mark(FORWARD)
        with torch.inference_mode(), _autocast(config):
            packing.logits(model, part).float()


def _autocast(config: RunConfig) -> Any:
    dtype = DTYPES[config.precision]
    on = dtype != torch.float32
    return torch.autocast("cpu", dtype if on else None, enabled=on)


def _mark(layer: torch.nn.Module, number: int, tracker: Tracker) -> tuple[Any, Any]:
    """Tell the tracker where this layer's forward begins, and its backward."""

    def before(*_: Any) -> None:
        tracker.mark(FORWARD, number)

    def after(_: Any, args: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: tracker.mark(BACKWARD, number))

    return layer.register_forward_pre_hook(before), layer.register_forward_hook(after)


def _model(shape: Shape, config: RunConfig, layers: int | None) -> Any:
    """The classifier as `runner.Prepared.build` leaves it, without values."""
    model = _dense(shape, layers, attention_dropout=config.device == "cpu")
    model.train()
    family = shape.family
    if config.method == "full":
        model.requires_grad_(True)
    else:
        model.requires_grad_(False)
        for name in family.head:
            model.get_submodule(name).requires_grad_(True)
        if config.method == "qlora":
            _quantise(model, config, family.head)
        _attach(model, config)
        if config.kernels != "bnb":
            apart = narrow.attention(model, family) if config.padding == "packed" else None
            adapters.use_our_forwards(model, config, apart, _is_adapted, _quantised(model))
    if config.padding == "packed":
        packing.prepare(model, family)
    frugal.prepare(model, config)
    if config.checkpointing:
        frugal.checkpoint_activations(model, family)
    return model


def _dense(shape: Shape, layers: int | None, attention_dropout: bool = True) -> Any:
    """The classifier as its configuration has it."""
    from transformers import AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights

    settings = shape.trimmed(layers)
    settings.num_labels = shape.labels
    settings.pad_token_id = 0  # a small model may not have the one it is said to pad with
    settings.use_cache = False
    if not attention_dropout:
        _without_attention_dropout(settings)
    with no_init_weights():
        return AutoModelForSequenceClassification.from_config(settings)


def _without_attention_dropout(settings: Any) -> None:
    """On a GPU dropout of attention is inside the kernel; a CPU's path would save it."""
    for name in ("attention_probs_dropout_prob", "attention_dropout"):
        if hasattr(settings, name):
            setattr(settings, name, 0.0)


def _is_adapted(layer: Any) -> bool:
    return isinstance(layer, Adapted)


def _quantised(model: torch.nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, Quantised))


def _replace(model: torch.nn.Module, make: Any, wanted: Any) -> None:
    for path, module in list(model.named_modules()):
        if type(module) in (torch.nn.Linear, Quantised) and wanted(path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, make(module))


def _quantise(model: torch.nn.Module, config: RunConfig, head: Iterable[str]) -> None:
    kept = tuple(head)
    _replace(model, lambda m: Quantised(m, config), lambda path: path.split(".")[0] not in kept)


def _attach(model: torch.nn.Module, config: RunConfig) -> None:
    targets = config.target_modules
    _replace(
        model,
        lambda m: Adapted(m, config),
        lambda path: any(path == t or path.endswith("." + t) for t in targets),
    )


def _fake(batch: Batch, mode: FakeTensorMode) -> Batch:
    """The batch's shapes."""

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return mode.from_tensor(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names = (f.name for f in dataclasses.fields(value) if f.init)
            return type(value)(**{name: moved(getattr(value, name)) for name in names})
        if isinstance(value, tuple):
            return tuple(moved(v) for v in value)
        if isinstance(value, dict):
            return {key: moved(v) for key, v in value.items()}
        return value

    made: Batch = moved(batch)
    return made


def _batch_tensors(batch: Batch) -> Iterator[torch.Tensor]:
    for part in batch.parts:
        yield from part.inputs.values()
        yield part.labels


def _tensors(model: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in _quantised(model):
        yield from _state(module)


def _state(module: Any) -> list[torch.Tensor]:
    """What dequantising needs beside the packed weight, and what of it we keep twice."""
    state = module.weight.quant_state
    nested = state.state2
    own = getattr(module, adapters.OWN_WEIGHT, None)
    found = [state.absmax, state.code, nested.absmax, nested.code, state.offset]
    return found + ([] if own is None else own.tensors()[1:])


def _held(model: torch.nn.Module, shape: Shape, config: RunConfig) -> dict[int | None, Held]:
    """What the model's tensors take, by layer, each storage once; as `memory_trace.inventory`."""
    seen: set[int] = set()
    found: dict[int | None, dict[str, int]] = {}

    def count(layer: int | None, part: str, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata not in seen:
            seen.add(storage._cdata)
            parts = found.setdefault(layer, {})
            parts[part] = parts.get(part, 0) + storage.nbytes()

    prefix = shape.family.layers + "."
    for path, module in model.named_modules():
        index = path.removeprefix(prefix).partition(".")[0] if path.startswith(prefix) else ""
        layer = int(index) if index.isdigit() else None
        for parameter in module.parameters(recurse=False):
            trained = parameter.requires_grad and config.method != "full"
            beside = "lora" if ".lora_" in path else "head"
            count(layer, beside if trained else "base_weights", parameter)
            if trained and beside == "head":  # PEFT keeps a copy as it was
                count(layer, "base_weights", torch.empty_like(parameter))
        if isinstance(module, Quantised):
            for tensor in _state(module):
                count(layer, "quantisation_state", tensor)
        for buffer in module.buffers(recurse=False):
            count(layer, "other", buffer)
    return {layer: Held(**parts) for layer, parts in found.items()}


def facts(shape: Shape, targets: tuple[str, ...]) -> Facts:
    """What is known of `shape` with these modules adapted.

    Raises ConfigError where no linear of the model bears such a name.
    """
    few = 2 if shape.alike and shape.layers > 2 else shape.layers
    family = dataclasses.replace(shape.family, targets=targets)
    with FakeTensorMode():
        model = _dense(shape, few)
        stack = model.get_submodule(shape.family.layers)
        layer = sum(p.numel() for p in stack[-1].parameters())
        found = sum(p.numel() for p in model.parameters()) + (shape.layers - few) * layer
        sides = adapters.check_targets(model, shape.name, family)
    return Facts(found, positions(shape), packing.packable(shape.config, shape.family), sides)


def positions(shape: Shape) -> int | None:
    """How many tokens an example may have; None where there is no end."""
    limit = getattr(shape.config, "max_position_embeddings", None)
    return None if limit is None else int(limit)


def sizes(shape: Shape) -> set[int]:
    """Every number that a tensor's size may be a multiple of, beside those of a batch."""
    found = {v for v in shape.config.to_dict().values() if isinstance(v, int) and v > 1}
    with FakeTensorMode():
        for parameter in _dense(shape, 1).parameters():
            found |= set(parameter.shape)
    return found | {shape.labels}


def batch_of(
    shape: Shape, config: RunConfig, sequences: int, length: int, multiple: int | None = None
) -> Batch:
    """A batch of `sequences` examples of `length` tokens each, all zeros."""
    return Batches.of_lengths(
        [length] * sequences,
        shape.inputs,
        config.padding,
        packing.first_position(shape.model_type, 0),
        packing.multiple(config) if multiple is None else multiple,
    ).collate(range(sequences))
