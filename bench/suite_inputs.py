"""A model and data for a training run where nothing can be fetched.

    python -m bench.suite_inputs FOLDER [--tiny]

DistilBERT's shape (6 layers of 768, 12 heads) with random weights and a vocabulary of the
words in the data: what a step costs does not depend on what was learned. Every sentence
fills `WORDS` tokens, so that no batch is padded and M is batch size times length.
"""

import argparse
import random
import sys
from pathlib import Path

SUBJECTS = ("film", "story", "actor", "scene", "plot", "ending", "music", "camera", "cast")
VERBS = ("was", "seemed", "felt", "looked", "became", "stayed", "sounded", "remained")
GOOD = ("bright", "fine", "grand", "warm", "clever", "lovely", "honest", "fresh")
BAD = ("dull", "weak", "poor", "flat", "stale", "clumsy", "hollow", "tired")
FILLERS = ("the", "a", "very", "quite", "and", "then", "also", "with", "of", "in", "that", "so")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = 126  # with [CLS] and [SEP], 128 tokens
LAYERS, HIDDEN, HEADS = 6, 768, 12


def make_model(folder: Path, layers: int = LAYERS, hidden: int = HIDDEN) -> None:
    """A classifier with random weights, and its tokenizer, as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    vocabulary = [*SPECIAL, *sorted({*SUBJECTS, *VERBS, *GOOD, *BAD, *FILLERS})]
    ids = {word: i for i, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B [SEP]",
        special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad", "unk", "cls", "sep", "mask"), SPECIAL, strict=True))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=512,
        **{f"{kind}_token": word for kind, word in names.items()},
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = DistilBertConfig(
        vocab_size=len(vocabulary),
        dim=hidden,
        hidden_dim=4 * hidden,
        n_layers=layers,
        n_heads=HEADS,
        pad_token_id=ids["[PAD]"],
        num_labels=2,
    )
    DistilBertForSequenceClassification(config).save_pretrained(folder)


def make_data(path: Path, examples: int = 2400) -> None:
    """A CSV of sentences whose label is in their adjectives."""
    choose = random.Random(0)
    rows = ["text,label"]
    for n in range(examples):
        words: list[str] = []
        while len(words) < WORDS:
            adjective = choose.choice(GOOD if n % 2 else BAD)
            words += [choose.choice(FILLERS), choose.choice(SUBJECTS), choose.choice(VERBS)]
            words += [choose.choice(FILLERS), adjective]
        rows.append(f"{' '.join(words[:WORDS])},{n % 2}")
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tiny", action="store_true", help="for a rehearsal: 2 layers of 192")
    given = parser.parse_args()
    make_model(given.folder / "model", *((2, 192) if given.tiny else (LAYERS, HIDDEN)))
    make_data(given.folder / "sentences.csv", 400 if given.tiny else 2400)
    return 0


if __name__ == "__main__":
    sys.exit(main())
