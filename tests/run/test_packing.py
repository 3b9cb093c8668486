"""Packed sequences: the logits and gradients of padded ones, in models that stay stock's."""

import dataclasses
import functools
import json
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForSequenceClassification

from peftprof.errors import ConfigError
from peftprof.run import adapters, model, packing, runner
from peftprof.run.batches import Batches
from peftprof.run.source import load_tokenizer, locate
from peftprof.run.tables import Examples
from peftprof_kernels import grouped
from tests.tolerances import LOGITS_FP32, PACKED_FP32, relative_error

PACKED = ("bert", "distilbert", "roberta", "llama", "qwen2", "qwen3", "mistral")
EMBEDDED = ("minilm", "minilm-distilbert", "smollm2-135m")
WORDS = ["a", "good", "film", "that", "was", "not", "so", "very", "bad", "then"]  # a token each
LONGEST = 48
INDICES = st.lists(st.integers(0, LONGEST - 1), min_size=1, max_size=12)


@pytest.fixture
def variant(tiny, tmp_path):
    """`variant(family, **settings)`: a tiny model's folder with other settings in its config."""

    def make(family, **changed):
        folder = shutil.copytree(tiny(family), tmp_path / f"{family}-variant")
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changed))
        return folder

    return make


@pytest.fixture
def pair(small_run):
    """`pair(family)`: two equal models, eval mode, one that packs and one that is stock's."""

    def make(family, method="full", **settings):
        found = []
        for padding in ("packed", "pad"):
            config = small_run(method, family, padding=padding, **settings)
            found.append(runner.prepare(config).build()[0].model.eval())
        return found

    return make


@functools.cache
def files(name):
    source = locate(name)
    return source, load_tokenizer(source)


def example_batches(name, padding, multiple=1, pairs=False, seed=0, size=4):
    """Batches whose example i has i + 1 words and whose label is i."""
    source, tokenizer = files(str(name))
    words = [" ".join(WORDS[(7 * i + j) % 10] for j in range(1 + i)) for i in range(LONGEST)]
    texts = [(w, words[-1 - i]) if pairs else (w,) for i, w in enumerate(words)]
    return Batches(
        Examples(texts, list(range(LONGEST))),
        tokenizer,
        source.inputs,
        LONGEST,
        size,
        seed,
        padding,
        packing.first_position(source.family, tokenizer.pad_token_id),
        multiple,
    )


def by_length(batches, indices):
    """The order in which a batch that is not padded as a whole has its examples."""
    return sorted(indices, key=lambda i: batches.lengths[i])


def stock_logits(stock, padded, indices):
    (part,) = padded.collate(by_length(padded, indices)).parts
    return stock(**part.inputs).logits


@pytest.mark.parametrize("family", PACKED)
def test_packed_logits_are_those_of_stock(family, pair, tiny):
    packs, stock = pair(family)
    folder = tiny(family)
    padded = example_batches(folder, "pad")
    packed, rounded = (example_batches(folder, "packed", multiple) for multiple in (1, 16))

    @settings(deadline=None, max_examples=15)
    @given(INDICES)
    def check(indices):
        with torch.no_grad():
            expected = stock_logits(stock, padded, indices)
            for batches in (packed, rounded):
                (part,) = batches.collate(indices).parts
                assert relative_error(packing.logits(packs, part), expected) < PACKED_FP32

    check()


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_pairs_of_texts_keep_their_segments(family, pair, tiny):
    packs, stock = pair(family)
    padded, packed = (example_batches(tiny(family), p, pairs=True) for p in ("pad", "packed"))
    indices = [3, 20, 40, 20, 7]
    (part,) = packed.collate(indices).parts
    assert ("token_type_ids" in part.inputs) == (family == "bert")
    with torch.no_grad():
        expected = stock_logits(stock, padded, indices)
        assert relative_error(packing.logits(packs, part), expected) < PACKED_FP32


@pytest.mark.parametrize("family", PACKED)
def test_a_model_that_packs_still_takes_padded_batches(family, pair, tiny):
    packs, stock = pair(family)
    (part,) = example_batches(tiny(family), "pad").collate([3, 30, 14]).parts
    with torch.no_grad():
        expected = stock(**part.inputs).logits
        assert relative_error(packing.logits(packs, part), expected) < PACKED_FP32


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED)
def test_packed_logits_of_pretrained_models(name, pair):
    packs, stock = pair("bert", model=name)
    indices = [3, 11, 11, 29, 47]
    with torch.no_grad():
        expected = stock_logits(stock, example_batches(name, "pad"), indices)
        (part,) = example_batches(name, "packed", 16).collate(indices).parts
        # Up to thirty layers, each with activations far from 1.
        assert relative_error(packing.logits(packs, part), expected) < LOGITS_FP32


# --- the controls: what the comparison would not let pass


def logits_apart(family, pair, tiny, change):
    """How far logits are from stock's when `change` is done to a packed batch."""
    packs, stock = pair(family)
    indices = [5, 14, 30, 31, 47]
    with torch.no_grad():
        expected = stock_logits(stock, example_batches(tiny(family), "pad"), indices)
        (part,) = example_batches(tiny(family), "packed").collate(indices).parts
        return relative_error(packing.logits(packs, change(part)), expected)


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
def test_wrong_positions_would_be_noticed(family, pair, tiny):
    def on_and_on(part):
        tokens = part.inputs["input_ids"].shape[1]
        places = torch.arange(tokens)[None] + part.inputs["position_ids"][0, 0]
        return dataclasses.replace(part, inputs=part.inputs | {"position_ids": places})

    # Rotary positions are relative: a sequence that starts later is the same sequence.
    apart = logits_apart(family, pair, tiny, on_and_on)
    if family == "llama":
        assert apart < 10 * PACKED_FP32
        apart = logits_apart(family, pair, tiny, backwards)
    assert apart > 10 * PACKED_FP32


def backwards(part):
    places = part.inputs["position_ids"].flip(1)
    return dataclasses.replace(part, inputs=part.inputs | {"position_ids": places})


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
def test_attention_across_sequences_would_be_noticed(family, pair, tiny, monkeypatch):
    def borderless(q, k, v, groups, *further, one_query):
        whole = groups if one_query else grouped([groups[-1].end])
        return real(q, k, v, whole, *further, one_query=one_query)

    real = packing.packed_attention
    monkeypatch.setattr(packing, "packed_attention", borderless)
    assert logits_apart(family, pair, tiny, lambda part: part) > 10 * PACKED_FP32


# --- gradients, and tokens that are none


@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "llama"])
def test_dummy_tokens_change_no_gradient(family, pair, tiny):
    packs, stock = pair(family)
    indices = [2, 9, 9, 25]

    def gradients(net, logits):
        net.zero_grad()
        logits.square().sum().backward()
        return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}

    expected = gradients(stock, stock_logits(stock, example_batches(tiny(family), "pad"), indices))
    for multiple in (1, 64):
        (part,) = example_batches(tiny(family), "packed", multiple).collate(indices).parts
        assert part.inputs["input_ids"].numel() % multiple == 0
        found = gradients(packs, packing.logits(packs, part))
        assert found.keys() == expected.keys()
        for name, gradient in found.items():
            # A key's bias changes no attention: what gradient it has is rounding.
            if expected[name].norm() > 1e-6:
                assert relative_error(gradient, expected[name]) < 10 * PACKED_FP32, name


# --- which models


@pytest.mark.parametrize(
    ("family", "changed", "packs"),
    [
        ("bert", {}, True),
        ("bert", {"is_decoder": True}, False),
        ("distilbert", {}, True),
        ("roberta", {}, True),
        ("roberta", {"is_decoder": True}, False),
        ("modernbert", {}, False),
        ("llama", {}, True),
        ("qwen3", {}, True),
        ("mistral", {"sliding_window": None}, True),
        ("mistral", {"sliding_window": 128}, True),
        ("mistral", {"sliding_window": 127}, False),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8}, True),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, False),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 128}, True),
    ],
)
def test_which_models_are_packed(family, changed, packs):
    config = AutoConfig.for_model(family, **changed)
    assert (packing.packable(config, model.FAMILIES[family]) >= 128) == packs


WINDOWED = (
    ("mistral", {"sliding_window": 8}),
    (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2},
    ),
)


@pytest.mark.parametrize(("family", "changed"), WINDOWED)
def test_a_window_shorter_than_the_sequences_is_not_packed(
    family, changed, small_run, variant, tiny, pair, monkeypatch
):
    folder = str(variant(family, **changed))
    assert runner.prepare(small_run("lora", model=folder)).config.padding == "split"
    with pytest.raises(ConfigError, match="--padding packed is not known"):
        runner.prepare(small_run("lora", model=folder, padding="packed"))
    # No sequence is longer than its window: there is nothing to ignore.
    short = runner.prepare(small_run("lora", model=folder, max_length=8)).config
    assert short.padding == "packed"
    # The control: packed all the same, long sequences have other logits.
    monkeypatch.setattr(packing, "packable", lambda *_: 10**6)
    packs, stock = pair(family, model=folder)
    padded = example_batches(folder, "pad")
    within = [i for i in range(LONGEST) if padded.lengths[i] <= 8]
    for indices, same in ((within, True), ([*within, 30, 47], False)):
        with torch.no_grad():
            expected = stock_logits(stock, padded, indices)
            (part,) = example_batches(folder, "packed").collate(indices).parts
            apart = relative_error(packing.logits(packs, part), expected)
        assert (apart < PACKED_FP32) == same, apart


def test_packed_is_refused_in_one_line_where_it_is_not_known(small_run):
    with pytest.raises(ConfigError) as raised:
        runner.prepare(small_run("lora", "modernbert", padding="packed"))
    said = str(raised.value)
    assert said.startswith("--padding packed is not known for ")
    assert said.endswith("(modernbert); use --padding split, which pads to lengths that are close")
    assert "\n" not in said


@pytest.mark.parametrize(
    ("family", "padding", "resolved"),
    [(family, "auto", "packed") for family in PACKED]
    + [("modernbert", "auto", "split"), ("bert", "split", "split"), ("bert", "pad", "pad")],
)
def test_the_record_says_how_batches_were_made(
    family, padding, resolved, small_run, tmp_path, quiet
):
    config = small_run("lora", family, padding=padding, max_steps=2, profiler="none")
    folder = runner.train(config, tmp_path / "run", [], quiet)
    written = json.loads((folder.path / "run.json").read_text())
    assert written["config"]["padding"] == resolved
    record = folder.read_record()
    assert record.execution.padding == resolved
    assert record.execution.token_multiple == 1  # fp32


def test_tokens_are_rounded_up_where_shapes_cost(small_run):
    prepared = runner.prepare(small_run("lora", precision="bf16"))
    for _, batch in prepared.validation.in_order(3):
        assert batch.padded_tokens % packing.BUCKET == 0
        assert 0 <= batch.padded_tokens - batch.real_tokens < packing.BUCKET


def test_positions_start_where_the_loaded_model_starts(small_run, variant):
    """RoBERTa's positions come after its padding token, which is the tokenizer's."""
    folder = str(variant("roberta", pad_token_id=1))  # the tokenizer's is 0
    prepared = runner.prepare(small_run("full", model=folder))
    net = prepared.build()[0].model
    (part,) = prepared.train.at(0).parts
    assert int(part.inputs["position_ids"].min()) == net.config.pad_token_id + 1


# --- what is saved is stock's


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama"])
@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_was_trained_packed_loads_in_stock(
    method, family, small_run, tmp_path, quiet, trained
):
    from peft import PeftModel

    config = small_run(method, family, max_steps=3, profiler="none", learning_rate=1e-2)
    folder = runner.train(config, tmp_path / "run", [], quiet)
    for path in folder.path.rglob("*.json"):
        if path.name != "run.json":
            assert packing.ATTENTION not in path.read_text(), path
    if method == "full":
        saved = json.loads((folder.path / "model" / "config.json").read_text())
        assert not any("attn_implementation" in key for key in saved)
        stock = AutoModelForSequenceClassification.from_pretrained(folder.path / "model")
    else:
        options = {}
        if method == "qlora":
            options["quantization_config"] = model.quantization(config, model.FAMILIES[family])
        base = AutoModelForSequenceClassification.from_pretrained(
            config.model, num_labels=2, dtype=torch.float32, **options
        )
        for module in adapters.linear_4bit(base):
            module.support_avx512bf16_for_cpu = False  # would re-quantise the weight: kernels.md
        stock = PeftModel.from_pretrained(base, folder.path / "adapter")
    stock.eval()
    assert getattr(stock.config, "_attn_implementation", None) == "sdpa"
    (trainee,) = trained
    trainee.model.eval()
    packed = trainee.validation
    padded = runner.prepare(dataclasses.replace(config, padding="pad")).validation
    indices = list(range(7))
    with torch.no_grad():
        (part,) = packed.collate(indices).parts
        ours = packing.logits(trainee.model, part)
        expected = stock_logits(stock, padded, indices)
    # bitsandbytes may dequantise to another last place.
    limit = LOGITS_FP32 if method == "qlora" else PACKED_FP32
    assert relative_error(ours, expected) < limit


# --- batches


@settings(deadline=None, max_examples=10)
@given(size=st.integers(1, 20), seed=st.integers(0, 2**20), step=st.integers(0, 200))
def test_every_mode_has_the_same_examples_in_a_step(size, seed, step):
    modes = {
        padding: example_batches("minilm", padding, seed=seed, size=size)
        for padding in ("pad", "split", "packed")
    }
    batches = {padding: mode.at(step) for padding, mode in modes.items()}
    chosen = modes["pad"].indices(step)
    for padding, batch in batches.items():
        assert modes[padding].indices(step) == chosen
        labels = torch.cat([part.labels for part in batch.parts])  # a label is an index here
        assert sorted(labels.tolist()) == sorted(chosen)  # each once
        assert batch.samples == len(chosen)
        assert batch.real_tokens == sum(modes["pad"].lengths[i] for i in chosen)
        computed = sum(part.inputs["input_ids"].numel() for part in batch.parts)
        assert batch.padded_tokens == computed >= batch.real_tokens
        if padding != "packed":
            for part in batch.parts:
                for row, mask, label in zip(
                    part.inputs["input_ids"],
                    part.inputs["attention_mask"],
                    part.labels.tolist(),
                    strict=True,
                ):
                    own = modes["pad"].columns["input_ids"][label]
                    assert torch.equal(row[mask.bool()], own)
    computed = [batches[padding].padded_tokens for padding in ("packed", "split", "pad")]
    assert computed == sorted(computed)
    assert [len(batches[p].parts) for p in ("pad", "packed")] == [1, 1]


def test_packed_tokens_are_the_sequences_one_after_the_other():
    for multiple in (1, 16):
        batches = example_batches("minilm", "packed", multiple, pairs=True)
        indices = [9, 2, 40, 17]
        (part,) = batches.collate(indices).parts
        order = by_length(batches, indices)
        assert part.labels.tolist() == order
        total = sum(batches.lengths[i] for i in order)
        for name in ("input_ids", "token_type_ids"):
            ids = part.inputs[name][0]
            assert torch.equal(ids[:total], torch.cat([batches.columns[name][i] for i in order]))
            assert not ids[total:].any()  # MiniLM's padding is 0
            assert len(ids) == -(-total // multiple) * multiple
        places = torch.cat([torch.arange(batches.lengths[i]) for i in order])
        assert torch.equal(part.inputs["position_ids"][0, :total], places)
        ends = torch.tensor([batches.lengths[i] for i in order]).cumsum(0)
        assert torch.equal(part.segments.last, ends - 1)
        assert torch.equal(part.segments.first[1:], ends[:-1])
        assert part.segments.groups[-1].end == total
