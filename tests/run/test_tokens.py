"""Texts are tokenised once: a second run reads ids, and nothing else may answer for them."""

import pytest
import torch

from peftprof.run import tokens
from peftprof.run.source import load_tokenizer, locate
from peftprof.run.tables import Examples

NAMES = ("input_ids", "token_type_ids")
EXAMPLES = Examples([("a good film",), ("",), ("not so good, not so bad",)], [1, 0, 0])


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(locate("minilm"))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "cache_folder", lambda: tmp_path)
    return tmp_path / "tokens"


def files(cache):
    return sorted(cache.glob("*"))


def same(a, b):
    return a.keys() == b.keys() and all(
        len(a[n]) == len(b[n]) and all(map(torch.equal, a[n], b[n])) for n in a
    )


def test_the_second_time_is_read_and_equal(tokenizer, cache, monkeypatch):
    first = tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8)
    assert first["input_ids"][0].tolist() == tokenizer("a good film")["input_ids"]
    assert [len(row) for row in first["input_ids"]] == [5, 2, 8]
    assert first["input_ids"][0].dtype == torch.int64
    monkeypatch.setattr(tokens, "_encode", None)  # would raise
    assert same(tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8), first)
    assert len(files(cache)) == 1


@pytest.mark.parametrize("change", ["texts", "order", "length", "names", "pieces"])
def test_other_arguments_are_other_files(change, tokenizer, cache):
    tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8)
    texts, names, length = EXAMPLES.texts, NAMES, 8
    if change == "texts":
        texts = [*texts[:2], ("not so good, not so bad!",)]
    elif change == "order":
        texts = texts[::-1]
    elif change == "length":
        length = 7
    elif change == "names":
        names = NAMES[:1]
    else:
        texts = [("a", "good film"), ("", ""), ("not so good,", " not so bad")]
    other = tokens.tokenise(Examples(texts, [0, 0, 0]), tokenizer, names, length)
    assert len(files(cache)) == 2
    assert len(other["input_ids"]) == 3


@pytest.mark.parametrize("damage", [b"", b"no safetensors", None])
def test_a_damaged_file_is_made_again(damage, tokenizer, cache):
    first = tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8)
    (path,) = files(cache)
    whole = path.read_bytes()
    path.write_bytes(whole[:-8] if damage is None else damage)
    assert same(tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8), first)
    assert path.read_bytes() == whole


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(tokenizer, cache):
    cache.write_text("a file where the folder should be")
    assert len(tokens.tokenise(EXAMPLES, tokenizer, NAMES, 8)["input_ids"]) == 3


def test_the_cache_does_not_grow_without_end(tokenizer, cache, monkeypatch):
    monkeypatch.setattr(tokens, "KEPT", 3)
    for n in range(6):
        tokens.tokenise(Examples([(str(n),)], [0]), tokenizer, NAMES, 8)
    assert len(files(cache)) == 3


def test_an_example_without_tokens_is_one_padding_token(tokenizer, cache):
    class Bare:
        pad_token_id = 7

        def __call__(self, texts, **_):
            return {"input_ids": [[5] if text else [] for text in texts]}

    rows = tokens.tokenise(Examples([("x",), ("",)], [0, 0]), Bare(), ("input_ids",), 8)
    assert [row.tolist() for row in rows["input_ids"]] == [[5], [7]]
    assert not cache.exists()  # a tokenizer in Python code cannot be told from another
