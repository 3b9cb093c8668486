"""What fine-tuning makes a model forget: its language-model loss on general text (claim C11).

The encoder or decoder that was trained is put below the language-model head of its own
checkpoint, and reads text that has nothing to do with the task. Encoders are asked for
masked tokens (Devlin et al. 2019, 15 % of them, every one replaced by the mask), decoders for
the next token. "Before" is the same with the weights as the method holds them before its
first step, so that QLoRA's rounding to NF4 is not taken for forgetting.

The text is the language reference that comes with Python (`pydoc_data.topics`): English prose
that is on every machine. A checkpoint without such a head, as sentence encoders are saved,
gets one that is fitted to the frozen model on the other half of that text; it says how much
of what the head read is still there.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy

from peftprof.config import RunConfig
from peftprof.records import encode
from peftprof.run import adapters
from peftprof.run import model as models
from peftprof.run.folder import RunFolder
from peftprof.run.source import Source, load_tokenizer, locate
from peftprof.studies import Forgetting
from peftprof_kernels import dequantize

LENGTH = 128
SEQUENCES = 64  # that are judged
FIT_SEQUENCES = 128
FIT_STEPS = 120
FIT_ROWS = 256  # masked tokens a step
FIT_RATE = 2e-3
MASKED = 0.15
AT_ONCE = 8
SHORTEST = 200  # characters of a paragraph that is prose


class NotMeasurableError(Exception):
    """Why a model's forgetting cannot be measured."""


@dataclass(frozen=True)
class Text:
    """Token sequences [n, length] of general text, and which tokens are asked for (masked)."""

    tokens: torch.Tensor
    asked: torch.Tensor
    mask: int | None
    about: str

    def inputs(self, rows: slice) -> torch.Tensor:
        """Token ids of some sequences, the masked ones replaced."""
        tokens = self.tokens[rows]
        return tokens if self.mask is None else tokens.masked_fill(self.asked[rows], self.mask)


def record(folder: RunFolder, general: Path) -> None:
    """Write the run's forgetting.json: its `Forgetting`, or why there is none.

    `general` is a folder for what all runs of a study share.
    """
    if (folder.path / "forgetting.json").exists():
        return
    try:
        value = encode(measure(folder, general))
    except NotMeasurableError as error:
        value = {"absent": str(error)}
    with folder.whole("forgetting.json") as new:
        new.write_text(json.dumps(value) + "\n", encoding="utf-8")


def measure(folder: RunFolder, general: Path) -> Forgetting:
    """The losses of a finished run before and after. Raises NotMeasurableError."""
    run = folder.read_record()
    config = RunConfig.from_json(run.config)
    source = locate(config.model)
    tokenizer = load_tokenizer(source)
    family = models.family_of(source, config)
    masked = family.pools != "last"
    assert run.data is not None
    untrained = models.load_model(source, config, family, run.data.labels, tokenizer.pad_token_id)
    _dense(untrained.to(config.device))
    judge, head = _judge(source, tokenizer, masked, general, config.device)
    text = _text(tokenizer, masked, "held out", SEQUENCES)
    before = _cached(
        general / f"before-{config.method}-{config.precision}.json",
        source,
        lambda: loss(judge, _encoder(untrained), text),
    )
    after = loss(judge, _encoder(_trained(folder, config, untrained)), text)
    if not math.isfinite(after):
        raise NotMeasurableError("its loss on general text is not finite")
    return Forgetting(
        measure="masked language model" if masked else "language model",
        text=text.about,
        head=head,
        tokens=int(text.asked.sum()),
        before=before,
        after=after,
    )


def _trained(folder: RunFolder, config: RunConfig, untrained: torch.nn.Module) -> torch.nn.Module:
    """The run's model, loaded by stock transformers and PEFT."""
    if config.method == "full":
        from transformers import AutoModelForSequenceClassification

        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder.path / "model", use_safetensors=True, trust_remote_code=False
        )
        return loaded.to(config.device)  # type: ignore[no-any-return]
    from peft import PeftModel

    adapted = PeftModel.from_pretrained(untrained, str(folder.path / "adapter"))
    return adapted.get_base_model()  # type: ignore[no-any-return]


def _dense(model: torch.nn.Module) -> None:
    """Replace NF4 linears by dense ones of the same values, in place: the same on any device."""
    quantised = set(adapters.linear_4bit(model))
    for name, module in list(model.named_modules()):
        if module in quantised:
            weight = dequantize(adapters.nf4_weight(module), torch.float32)
            dense = torch.nn.Linear(
                module.in_features, module.out_features, module.bias is not None, device="meta"
            )
            dense.weight = torch.nn.Parameter(weight, requires_grad=False)
            if module.bias is not None:
                dense.bias = torch.nn.Parameter(module.bias.float(), requires_grad=False)
            model.set_submodule(name, dense)


def _encoder(model: torch.nn.Module) -> torch.nn.Module:
    """What is below a classifier's head."""
    below: torch.nn.Module = getattr(model, str(model.base_model_prefix))
    return below.eval()


def _judge(
    source: Source, tokenizer: Any, masked: bool, general: Path, device: str
) -> tuple[Any, str]:
    """A language model of the checkpoint, whose head is the judge, and where that is from."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    if masked and tokenizer.mask_token_id is None:
        raise NotMeasurableError("the tokenizer has no mask token")
    try:
        model, loading = kind.from_pretrained(
            source.folder,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        raise NotMeasurableError(
            f"transformers has no language model of the family {source.family}"
        ) from error
    model.to(device).eval().requires_grad_(False)
    lacking = {key for key in loading["missing_keys"] if not _below(model, key)}
    if not lacking:
        return model, "the checkpoint's own"
    if not masked:
        raise NotMeasurableError("the checkpoint has no language-model head")
    path = general / "head.safetensors"
    if path.exists():
        model.load_state_dict(load_file(path, device=device), strict=False)
    else:
        _fit(model, _text(tokenizer, masked, "fitted on", FIT_SEQUENCES))
        general.mkdir(parents=True, exist_ok=True)
        # By parameter, so that what is tied is there once; the output embeddings are the base's.
        output = model.get_output_embeddings().weight
        kept = {
            name: parameter.data.contiguous()
            for name, parameter in model.named_parameters()
            if not _below(model, name) and parameter is not output
        }
        temporary = path.with_name(".new-" + path.name)
        save_file(kept, temporary)
        temporary.replace(path)
    return model, "fitted to the frozen model on other parts of the text"


def _below(model: Any, key: str) -> bool:
    return key.startswith(f"{model.base_model_prefix}.")


def _fit(model: Any, text: Text) -> None:
    """Fit the head of a masked language model to its own frozen encoder, in place."""
    below = getattr(model, model.base_model_prefix)
    states, wanted = [], []
    with torch.inference_mode():
        for rows in _slices(len(text.tokens)):
            hidden = below(input_ids=text.inputs(rows).to(_device(model)))[0]
            states.append(hidden[text.asked[rows]])
            wanted.append(text.tokens[rows][text.asked[rows]])
    hidden, labels = torch.cat(states).clone(), torch.cat(wanted).to(_device(model))
    output = model.get_output_embeddings().weight
    head = [
        parameter
        for name, parameter in model.named_parameters()
        if not _below(model, name) and parameter is not output
    ]
    generator = torch.Generator().manual_seed(0)
    for parameter in head:
        parameter.requires_grad_(True)
        if parameter.ndim > 1:  # as it begins should not depend on who drew before
            torch.nn.init.eye_(parameter.data)
    optimizer = torch.optim.AdamW(head, lr=FIT_RATE)
    for _ in range(FIT_STEPS):
        drawn = torch.randint(len(labels), (FIT_ROWS,), generator=generator)
        setattr(model, model.base_model_prefix, _Given(hidden[drawn][None]))
        logits = model(input_ids=labels[drawn][None]).logits[0]
        optimizer.zero_grad()
        cross_entropy(logits, labels[drawn]).backward()
        optimizer.step()
    setattr(model, model.base_model_prefix, below)
    model.requires_grad_(False)


class _Given(torch.nn.Module):
    """An encoder whose answer is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        return BaseModelOutput(last_hidden_state=self.hidden)


@torch.inference_mode()
def loss(judge: Any, encoder: torch.nn.Module, text: Text) -> float:
    """Mean loss in nats of the tokens that are asked for, `encoder` below the judge's head."""
    device = _device(judge)
    below = getattr(judge, judge.base_model_prefix)
    output = judge.get_output_embeddings()
    own = output.weight
    if judge.config.tie_word_embeddings:  # then the head's rows are the encoder's embeddings
        output.weight = encoder.get_input_embeddings().weight  # type: ignore[operator]
    total = 0.0
    try:
        for rows in _slices(len(text.tokens)):
            tokens, asked = text.tokens[rows].to(device), text.asked[rows].to(device)
            hidden = encoder(input_ids=text.inputs(rows).to(device))[0]
            if text.mask is None:  # the next token is asked for where this one is
                hidden, asked, tokens = hidden[:, :-1], asked[:, 1:], tokens[:, 1:]
            setattr(judge, judge.base_model_prefix, _Given(hidden[asked][None].float()))
            logits = judge(input_ids=tokens[asked][None]).logits[0]
            total += float(cross_entropy(logits.float(), tokens[asked], reduction="sum"))
    finally:
        setattr(judge, judge.base_model_prefix, below)
        output.weight = own
    count = text.asked.sum() if text.mask is not None else text.asked[:, 1:].sum()
    return total / int(count)


def _device(model: Any) -> torch.device:
    return next(iter(model.parameters())).device  # type: ignore[no-any-return]


def _slices(count: int) -> Iterator[slice]:
    return (slice(start, start + AT_ONCE) for start in range(0, count, AT_ONCE))


def _text(tokenizer: Any, masked: bool, half: str, sequences: int) -> Text:
    """General text as token sequences; the two halves share no paragraph."""
    chosen = [p for p in paragraphs() if _digest(p)[0] % 2 == (half == "held out")]
    ids: list[int] = []
    for paragraph in chosen:
        ids += tokenizer(paragraph, add_special_tokens=False, verbose=False)["input_ids"]
    # What a tokenizer makes of nothing is what it puts around a text: [CLS] and [SEP], say.
    around = tokenizer("")["input_ids"] if masked else []
    before, after = around[: len(around) // 2], around[len(around) // 2 :]
    size = LENGTH - len(around)
    count = min(sequences, len(ids) // size)
    rows = [before + ids[i * size : (i + 1) * size] + after for i in range(count)]
    tokens = torch.tensor(rows)
    own = ~torch.isin(tokens, torch.tensor(tokenizer.all_special_ids))
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(tokens.shape, generator=generator) < MASKED
    digest = hashlib.sha256("\n".join(chosen).encode()).hexdigest()
    return Text(
        tokens,
        own & drawn if masked else torch.ones_like(own),
        tokenizer.mask_token_id if masked else None,
        f"pydoc_data.topics of Python, {half} half, SHA-256 {digest[:12]}",
    )


def paragraphs() -> list[str]:
    """The paragraphs of prose in Python's language reference, each on one line."""
    from pydoc_data.topics import topics

    found: dict[str, None] = {}
    for name in sorted(topics):
        for block in topics[name].split("\n\n"):
            lines = block.splitlines()
            prose = " ".join(block.split())
            if len(prose) >= SHORTEST and not any(line.startswith("   ") for line in lines):
                found[prose] = None
    return list(found)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _cached(path: Path, source: Source, make: Any) -> float:
    """A loss that all runs of a method share, worked out once for these weights."""
    if path.exists():
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["fingerprint"] == source.fingerprint:
            return float(kept["loss"])
    value = float(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(".new-" + path.name)
    temporary.write_text(json.dumps({"fingerprint": source.fingerprint, "loss": value}))
    temporary.replace(path)
    return value
