import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.config import make_config
from peftprof.errors import InputError
from peftprof.run import data, embedded, runner
from peftprof.run.batches import Batches
from peftprof.run.tables import Examples


def config(**settings):
    return make_config("lora", **{"batch_size": 2} | settings)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(embedded.model_folder("minilm")[0])


NAMES = ["input_ids", "attention_mask", "token_type_ids"]


def _write_csv(path, rows, header="text,label"):
    path.write_text("\n".join([header, *rows]) + "\n")
    return str(path)


def test_the_embedded_data_says_where_it_is_from():
    info = data.load(config(dataset="movie-reviews")).info
    assert "sst" not in info.name.lower()
    assert "vaderSentiment" in info.source
    assert info.labels == ("negative", "positive")
    assert (info.train_examples, info.validation_examples) == (9169, 872)
    assert len(info.fingerprint) == 64


def test_csv_with_labels_as_words(tmp_path):
    rows = [f"words {i},{'good' if i % 3 else 'bad'}" for i in range(30)]
    loaded = data.load(config(dataset=_write_csv(tmp_path / "a.csv", rows)))
    assert loaded.info.labels == ("bad", "good")
    assert loaded.info.train_examples + loaded.info.validation_examples == 30
    assert "held out" in loaded.info.split
    assert not set(loaded.train.texts) & set(loaded.validation.texts)


def test_json_lines_and_parquet_give_the_same_data(tmp_path):
    import datasets

    rows = [{"review": f"text {i}", "sentiment": i % 2} for i in range(20)]
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet = tmp_path / "a.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    one, two = (data.load(config(dataset=str(p))) for p in (lines, parquet))
    assert one.info.fingerprint == two.info.fingerprint
    assert one.info.labels == ("0", "1")


def test_columns_can_be_named(tmp_path):
    rows = [f"a {i},b {i},{i % 2}" for i in range(20)]
    path = _write_csv(tmp_path / "a.csv", rows, "left,right,verdict")
    with pytest.raises(InputError, match="--text-column"):
        data.load(config(dataset=path))
    with pytest.raises(InputError, match="--label-column"):
        data.load(config(dataset=path, text_columns=("left", "right")))
    loaded = data.load(config(dataset=path, text_columns=("left", "right"), label_column="verdict"))
    assert loaded.train.texts[0] in {(f"a {i}", f"b {i}") for i in range(20)}


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (["a,1", "b,1", "c,1", "d,1"], "one class only"),
        (["a,1"], "one class only"),
        (["a,1", "b,0", "a,1", "b,0"], "1 of its 2 classes to train on and 2 examples to"),
        (["a,1", "b,0,7"], "as many cells in every row"),
        ([], "has no rows"),
        (["a,1", ",0", "c,1", "d,0"], "row 2 of .* has no text"),
        (["a,0.25", "b,0.5", "c,1.5"], "fractions"),
        (["a,good", "b,", "c,bad"], "row 2 of .* has no label"),
    ],
)
def test_data_that_cannot_be_trained_on(tmp_path, rows, says):
    with pytest.raises(InputError, match=says) as raised:
        data.load(config(dataset=_write_csv(tmp_path / "a.csv", rows)))
    assert "\n" not in str(raised.value)


def test_files_that_are_no_data(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"PK")
    (tmp_path / "b.parquet").write_bytes(b"not parquet")
    (tmp_path / "c.csv").write_text("")
    (tmp_path / "d.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    for name in ("a.xlsx", "b.parquet", "c.csv", "d.jsonl", "empty", "missing.csv"):
        with pytest.raises(InputError) as raised:
            data.load(config(dataset=str(tmp_path / name)))
        assert "\n" not in str(raised.value)


def test_a_batch_larger_than_the_data(tmp_path):
    path = _write_csv(tmp_path / "a.csv", [f"w {i},{i % 2}" for i in range(10)])
    with pytest.raises(InputError, match="--batch-size 64 is more than"):
        data.load(config(dataset=path, batch_size=64))


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.text(max_size=30), min_size=1, max_size=12),
    batch_size=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    padding=st.sampled_from(["pad", "split", "packed"]),
)
def test_batches_are_a_function_of_the_step(tokenizer, texts, batch_size, seed, padding):
    examples = Examples([(t,) for t in texts], [i % 2 for i in range(len(texts))])

    def make():
        return Batches(examples, tokenizer, NAMES, 16, batch_size, seed, padding)

    batches, again = make(), make()
    steps = list(range(2 * batches.per_epoch))
    first = [batches.at(n) for n in steps]
    for n in reversed(steps):
        same = again.at(n)
        for part, twin in zip(first[n].parts, same.parts, strict=True):
            assert torch.equal(part.labels, twin.labels)
            for name, tensor in part.inputs.items():
                assert torch.equal(tensor, twin.inputs[name])
    epoch = first[: batches.per_epoch]
    assert sum(b.samples for b in epoch) == len(texts)
    assert sum(b.real_tokens for b in epoch) == sum(batches.lengths)
    for batch in first:
        assert sum(len(part.labels) for part in batch.parts) == batch.samples
        sizes = [part.inputs["input_ids"].numel() for part in batch.parts]
        assert sum(sizes) == batch.padded_tokens
        if padding == "packed":
            assert batch.padded_tokens == batch.real_tokens
            continue
        masks = [part.inputs["attention_mask"] for part in batch.parts]
        assert sum(int(mask.sum()) for mask in masks) == batch.real_tokens
        for mask, part in zip(masks, batch.parts, strict=True):
            assert mask.shape == part.inputs["input_ids"].shape
            assert bool((mask[:, :-1] >= mask[:, 1:]).all())  # padding is on the right only
            padded = part.inputs["input_ids"][mask == 0]
            assert bool((padded == tokenizer.pad_token_id).all())


def test_evaluation_sees_every_example_once(tokenizer):
    examples = Examples([(f"word {'very ' * (i % 7)}",) for i in range(23)], list(range(23)))
    for padding in ("pad", "split", "packed"):
        batches = Batches(examples, tokenizer, NAMES, 16, 4, 0, padding)
        parts = [part for _, batch in batches.in_order(5) for part in batch.parts]
        assert sorted(int(label) for part in parts for label in part.labels) == list(range(23))
        most = max(part.inputs["input_ids"].numel() for part in parts)
        found = batches.largest(5)
        assert found.tokens == most
        assert any(
            (len(p.labels), p.inputs["input_ids"].numel()) == (found.examples, most) for p in parts
        )


def test_seeds_and_epochs_give_different_orders(tokenizer):
    examples = Examples([(f"w{i}",) for i in range(64)], list(range(64)))

    def order(seed, epoch):
        batches = Batches(examples, tokenizer, NAMES, 16, 64, seed)
        return batches.at(epoch).parts[0].labels.tolist()

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(sorted(o) == list(range(64)) for o in orders)
    assert len({tuple(o) for o in orders}) == 4


def test_words_that_mean_missing_elsewhere_are_text(tmp_path):
    rows = [f"{word},{i % 2}" for i, word in enumerate(["NA", "None", "nan", "null"] * 5)]
    loaded = data.load(config(dataset=_write_csv(tmp_path / "a.csv", rows)))
    assert {t for (t,) in loaded.train.texts} <= {"NA", "None", "nan", "null"}
    assert loaded.info.labels == ("0", "1")


def test_a_pair_of_columns_goes_before_one_of_them(tmp_path):
    rows = [f"q {i},s {i},{i % 2}" for i in range(20)]
    path = _write_csv(tmp_path / "a.csv", rows, "question,sentence,label")
    assert all(len(t) == 2 for t in data.load(config(dataset=path)).train.texts)


def test_repeated_texts_stay_together_and_a_tenth_is_held_out(tmp_path):
    rows = [f"text {i % 40},{i % 2}" for i in range(200)]
    loaded = data.load(config(dataset=_write_csv(tmp_path / "a.csv", rows)))
    assert (len(loaded.train), len(loaded.validation)) == (180, 20)
    assert not set(loaded.train.texts) & set(loaded.validation.texts)


@pytest.mark.parametrize("labels", ["[1, 2]", '{"a": 1}'])
def test_a_label_that_is_no_class(tmp_path, labels):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(f'{{"text": "t{i}", "label": {labels}}}\n' for i in range(9)))
    with pytest.raises(InputError, match="one class a row"):
        data.load(config(dataset=str(path)))


def test_labels_of_odd_digits(tmp_path):
    rows = [f"text {i},{'²' if i % 2 else '--1'}" for i in range(20)]
    loaded = data.load(config(dataset=_write_csv(tmp_path / "a.csv", rows)))
    assert loaded.info.labels == ("--1", "²")


def test_broken_json_says_what_is_broken(tmp_path, capfd):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "label": 1}\n{"text": ')
    runner.quiet_libraries()
    with pytest.raises(InputError, match="cannot be read") as raised:
        data.load(config(dataset=str(path)))
    assert "JSON" in str(raised.value)
    assert capfd.readouterr().err == ""


def test_no_room_for_text(tokenizer):
    examples = Examples([("a b c",), ("d",)], [0, 1])
    with pytest.raises(InputError, match="--max-length 2 leaves no room"):
        Batches(examples, tokenizer, NAMES, 2, 1, 0)
    assert Batches(examples, tokenizer, NAMES, 3, 1, 0).lengths == [3, 3]


def test_a_tuning_split_never_sees_the_validation_examples(tmp_path):
    path = _write_csv(tmp_path / "a.csv", [f"w {i},{i % 2}" for i in range(100)])
    whole = data.load(config(dataset=path))
    tuning = data.load(config(dataset=path, evaluate_on="tuning"))
    seen = set(tuning.train.texts) | set(tuning.validation.texts)
    assert seen == set(whole.train.texts)
    assert not set(tuning.train.texts) & set(tuning.validation.texts)
    assert "tuning" in tuning.info.split
    assert tuning.info.fingerprint != whole.info.fingerprint


@pytest.mark.parametrize("size", [2, 7, 44])
def test_a_subset_is_stratified_and_keeps_the_order(tmp_path, size):
    path = _write_csv(tmp_path / "a.csv", [f"w {i},{int(i % 4 == 0)}" for i in range(100)])
    whole = data.load(config(dataset=path))
    part = data.load(config(dataset=path, subset=size))
    assert len(part.train) == size
    places = [whole.train.texts.index(text) for text in part.train.texts]
    assert places == sorted(set(places))
    assert abs(sum(part.train.labels) - size / 4) < 1
    assert part.validation == whole.validation
    assert data.load(config(dataset=path, subset=1000)).info == whole.info


def test_a_repeated_text_is_two_examples_of_a_subset(tmp_path):
    path = _write_csv(tmp_path / "a.csv", [f"w {i % 30},{i % 2}" for i in range(300)])
    assert len(data.load(config(dataset=path, subset=100)).train) == 100
