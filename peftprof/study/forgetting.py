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
from dataclasses import dataclass, replace
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

LENGTH = 128
SEQUENCES = 64  # that are judged
FIT_SEQUENCES = 128
FIT_MASKS = 4  # times that each is masked anew
FIT_STEPS = 300  # beyond these the loss on the other half rises again
FIT_ROWS = 256  # masked tokens a step
FIT_RATE = 1e-3
FIT_SCALE = 0.1  # of the head's norm at the start: embeddings are long, and logits begin small
MASKED = 0.15
AT_ONCE = 8
SHORTEST = 200  # characters of a paragraph that is prose
RARE = 0.1  # counts of a token that the text for the fit lacks


class NotMeasurableError(Exception):
    """Why a model's forgetting cannot be measured."""


@dataclass(frozen=True)
class Text:
    """Token sequences [n, length] of general text, and which tokens are asked for (masked)."""

    tokens: torch.Tensor
    asked: torch.Tensor
    own: torch.Tensor  # which tokens are the text's, and not the tokenizer's
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
    judge = _judge(source, tokenizer, masked, general, untrained)
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
        head=judge.about,
        tokens=int((text.asked if masked else text.asked[:, 1:]).sum()),
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
            weight = adapters.dequantized(module)
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


class OwnHead:
    """The head of a checkpoint's language model: logits of the whole vocabulary."""

    about = "the checkpoint's own"

    def __init__(self, model: Any) -> None:
        self.model = model.eval().requires_grad_(False)

    def loss(self, encoder: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of `hidden` [n, d], states of `encoder`, for the tokens `labels` [n]."""
        model, output = self.model, self.model.get_output_embeddings()
        below, own = getattr(model, model.base_model_prefix), output.weight
        if model.config.tie_word_embeddings:  # its rows are the encoder's embeddings
            output.weight = encoder.get_input_embeddings().weight
        setattr(model, model.base_model_prefix, _Given(hidden[None]))
        try:
            logits = model(input_ids=labels[None]).logits[0].float()
        finally:
            setattr(model, model.base_model_prefix, below)
            output.weight = own
        return cross_entropy(logits, labels, reduction="sum")


class FittedHead(torch.nn.Module):
    """BERT's head (dense, GELU, norm, tied embeddings, bias) over the tokens of the text."""

    about = "fitted to the frozen model on other parts of the text, over its tokens alone"

    def __init__(self, width: int, tokens: torch.Tensor, counts: torch.Tensor) -> None:
        super().__init__()
        self.dense = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        torch.nn.init.eye_(self.dense.weight)
        torch.nn.init.zeros_(self.dense.bias)
        torch.nn.init.constant_(self.norm.weight, FIT_SCALE)
        # It begins with how often each token is seen, and learns what the states add.
        frequencies = (counts.double() + RARE) / (counts.double() + RARE).sum()
        self.bias = torch.nn.Parameter(frequencies.log().float())
        self.register_buffer("tokens", tokens)

    def loss(self, encoder: Any, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Summed loss of `hidden` [n, d], states of `encoder`, for the tokens `labels` [n]."""
        embeddings = encoder.get_input_embeddings().weight[self.tokens].float()
        states = self.norm(torch.nn.functional.gelu(self.dense(hidden)))
        logits = states @ embeddings.T + self.bias
        assert isinstance(self.tokens, torch.Tensor)
        return cross_entropy(logits, torch.searchsorted(self.tokens, labels), reduction="sum")


def _judge(
    source: Source, tokenizer: Any, masked: bool, general: Path, untrained: Any
) -> OwnHead | FittedHead:
    """The head that judges: the checkpoint's own, or one fitted to `untrained`'s encoder."""
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
    below = f"{model.base_model_prefix}."
    if all(key.startswith(below) for key in loading["missing_keys"]):
        return OwnHead(model.to(_device(untrained)))
    if not masked:
        raise NotMeasurableError("the checkpoint has no language-model head")
    fitted = _fitted(getattr(model, model.base_model_prefix), tokenizer, general)
    return fitted.to(_device(untrained))


def _fitted(encoder: Any, tokenizer: Any, general: Path) -> FittedHead:
    """The head of `general`, fitted to `encoder` and kept there if it is not there yet."""
    fit = _text(tokenizer, True, "fitted on", FIT_SEQUENCES)
    held = _text(tokenizer, True, "held out", SEQUENCES)
    tokens = torch.unique(torch.cat([fit.tokens.flatten(), held.tokens.flatten()]))
    counts = torch.bincount(torch.searchsorted(tokens, fit.tokens.flatten()), None, len(tokens))
    head = FittedHead(encoder.config.hidden_size, tokens, counts)
    path = general / "head.safetensors"
    if path.exists():
        head.load_state_dict(load_file(path))
    else:
        _fit(head, encoder.eval(), fit)
        general.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(".new-" + path.name)
        save_file(head.state_dict(), temporary)
        temporary.replace(path)
    return head.requires_grad_(False)


def _fit(head: FittedHead, encoder: Any, text: Text) -> None:
    """Train the head on states of the frozen encoder."""
    generator = torch.Generator().manual_seed(0)
    states, wanted = [], []
    for _ in range(FIT_MASKS):
        drawn = torch.rand(text.tokens.shape, generator=generator) < MASKED
        masked = replace(text, asked=drawn & text.own)
        with torch.inference_mode():
            for hidden, labels in _states(encoder, masked):
                states.append(hidden)
                wanted.append(labels)
    hidden, labels = torch.cat(states).clone(), torch.cat(wanted).clone()
    optimizer = torch.optim.AdamW(head.parameters(), lr=FIT_RATE)
    for _ in range(FIT_STEPS):
        some = torch.randint(len(labels), (FIT_ROWS,), generator=generator)
        optimizer.zero_grad()
        (head.loss(encoder, hidden[some], labels[some]) / FIT_ROWS).backward()
        optimizer.step()


class _Answer(tuple[torch.Tensor]):
    """An encoder's output as any family reads it; what else it could hold is None."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, _: str) -> None:
        return None


class _Given(torch.nn.Module):
    """An encoder whose answer is known."""

    def __init__(self, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, *_: Any, **__: Any) -> Any:
        return _Answer((self.hidden,))


@torch.inference_mode()
def loss(judge: OwnHead | FittedHead, encoder: Any, text: Text) -> float:
    """Mean loss in nats of the tokens that are asked for, `encoder` below the judge."""
    total, count = 0.0, 0
    for hidden, labels in _states(encoder, text):
        total += float(judge.loss(encoder, hidden, labels))
        count += len(labels)
    return total / count


def _states(encoder: Any, text: Text) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """States [n, d] that must tell a token, and the tokens [n], some sequences at a time."""
    device = _device(encoder)
    for start in range(0, len(text.tokens), AT_ONCE):
        rows = slice(start, start + AT_ONCE)
        tokens, asked = text.tokens[rows].to(device), text.asked[rows].to(device)
        hidden = encoder(input_ids=text.inputs(rows).to(device))[0].float()
        if text.mask is None:  # the next token is asked for
            hidden, tokens, asked = hidden[:, :-1], tokens[:, 1:], asked[:, 1:]
        yield hidden[asked], tokens[asked]


def _device(model: Any) -> torch.device:
    return next(iter(model.parameters())).device  # type: ignore[no-any-return]


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
        own,
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
