"""Sequences packed one after the other: the same classifier, no computation on padding.

The models are transformers' own and unchanged but for two things. Their attention is asked
for by name and gets the batch's segments through the keyword arguments that transformers
hands down; and what leaves the last layer (`narrow`) is, for each sequence, the one token
that the classifier reads. Everything between works token by token and needs nothing.
"""

import sys
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.run import graphs, narrow
from peftprof.run.batches import Part
from peftprof.run.model import Family
from peftprof_kernels import packed_attention

ATTENTION = "peftprof_packed"

# Packed tokens are rounded up to this where each new number of tokens costs: on a CPU in
# reduced precision, oneDNN writes code for every new shape of a product, 5 to 10 ms for one
# that then takes 1.5 ms (2 cores, AMD EPYC, torch 2.13; docs/speed.md). A CUDA graph is of
# one shape.
BUCKET = 64


def packable(model_config: Any, family: Family) -> int:
    """Tokens of the longest sequence that a model of this transformers config can have packed.

    A window of attention that is shorter would be ignored, and so are encoders made into
    decoders: 0 for them.
    """
    if family.pools is None or getattr(model_config, "is_decoder", False):
        return 0
    window = getattr(model_config, "sliding_window", None)
    if window is None or not getattr(model_config, "use_sliding_window", True):
        return sys.maxsize
    return int(window)


def first_position(family: str, pad_token_id: int) -> int:
    """The number of a sequence's first position: RoBERTa's come after the padding's.

    `pad_token_id` is the tokenizer's, which is the one that the model is loaded with.
    """
    return pad_token_id + 1 if family == "roberta" else 0


def multiple(config: RunConfig) -> int:
    """What packed tokens are rounded up to under `config`."""
    new_code = config.device == "cpu" and config.precision != "fp32"
    return BUCKET if new_code or graphs.possible(config) is None else 1


def prepare(model: Any, family: Family) -> None:
    """Let `model`, a transformers sequence classifier or PEFT's of one, take packed parts.

    In place, and after adapters are attached (`narrow`).
    """
    _register()
    classifier = _classifier(model)
    classifier.set_attn_implementation(ATTENTION)
    if family.pools == "first":
        stack = classifier.get_submodule(family.layers.rpartition(".")[0])
        stack.register_forward_hook(_first_tokens, with_kwargs=True)
        narrow.prepare(classifier, family)


def logits(model: Any, part: Part) -> torch.Tensor:
    """The logits [sequences, labels] of a part, padded or packed; `model` may be PEFT's."""
    if part.segments is None:
        padded: torch.Tensor = model(**part.inputs).logits
        return padded
    classifier = _classifier(model)
    inputs = part.inputs | {"segments": part.segments}
    if hasattr(classifier, "score"):  # causal: the head alone, on the last tokens
        hidden = getattr(classifier, classifier.base_model_prefix)(**inputs).last_hidden_state
        scores: torch.Tensor = classifier.score(hidden[0, part.segments.last])
        return scores
    pooled: torch.Tensor = classifier(**inputs).logits
    return pooled


def _classifier(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _first_tokens(stack: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Each sequence's first token as a batch of sequences of one, for stock code to pool."""
    if kwargs.get("segments") is not None:
        output["last_hidden_state"] = output.last_hidden_state.transpose(0, 1)
    return output


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Any = None,
    **further: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: [1, heads, T, d] each -> [1, T, heads, d]."""
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **further
        )
        return padded
    # [T, heads, d]. Not t[0]: its backward writes the gradient into zeros, in another layout.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    causal = further.get("is_causal")
    last = narrow.of(module)
    if last is not None:
        k, v = last.keys_and_values(k.shape[1:])
    out = packed_attention(
        q,
        k,
        v,
        segments.groups,
        q.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
        one_query=last is not None,
    )
    return out[None], None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **further: Any) -> Any:
    """No mask for packed tokens, whose segments say more; else the stock one."""
    if attention_mask is None:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, attention_mask=attention_mask, **further)


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, _attention)
    AttentionMaskInterface.register(ATTENTION, _mask)
