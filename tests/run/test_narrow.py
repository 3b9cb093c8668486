"""The last layer for the tokens that are read: what stays the same, and what is left out."""

import pytest
import torch

from peftprof.errors import InputError
from peftprof.run import adapters, model, narrow, packing, runner
from tests.tolerances import PACKED_FP32, relative_error

FAMILIES = ("bert", "distilbert", "roberta")
TARGETS = {
    "bert": ("query", "key", "value", "dense"),
    "distilbert": ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"),
    "roberta": ("query", "key", "value", "dense"),
}


@pytest.fixture
def trainee(small_run):
    """`trainee(method, family, **settings)`: one without dropout, its adapters' B not zero."""

    def make(method="lora", family="bert", **settings):
        config = small_run(method, family, **({"dropout": 0.0} | settings))
        made, _ = runner.prepare(config).build()
        for module in made.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapters.trainable(made.model):
            if "lora_B" in name:
                parameter.data.normal_(0, 0.1, generator=generator)
        return made

    return make


def last_attention(trainee, family):
    return narrow.attention(packing._classifier(trainee.model), model.FAMILIES[family])


def results(trainee):
    """The logits of batch 0, and the gradient of everything that is trained."""
    (part,) = trainee.train.at(0).parts
    trainee.model.zero_grad()
    logits = packing.logits(trainee.model, part)
    logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in adapters.trainable(trainee.model)}
    return {"logits": logits.detach()} | found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("full", {}),
        ("lora", {}),
        ("lora", {"kernels": "bnb"}),
        ("qlora", {}),
        ("lora", {"targets": True}),
        ("qlora", {"targets": True}),
    ],
)
def test_it_gives_the_logits_and_gradients_of_all_tokens(family, method, settings, trainee):
    targets = {"target_modules": TARGETS[family]} if settings else {}
    if "kernels" in settings:
        targets = settings
    narrowed = results(trainee(method, family, **targets))
    padded = results(trainee(method, family, padding="pad", **targets))
    assert narrowed.keys() == padded.keys()
    order = by_length(trainee(method, family))
    for name, found in narrowed.items():
        expected = padded[name][order] if name == "logits" else padded[name]
        # A key's bias changes no attention: what gradient it has is rounding.
        if expected.norm() > 1e-6:
            assert relative_error(found, expected) < 10 * PACKED_FP32, name


def by_length(trainee):
    """Where the examples of packed batch 0 are in the padded one."""
    indices = trainee.train.indices(0)
    lengths = [trainee.train.lengths[i] for i in indices]
    return sorted(range(len(indices)), key=lambda i: lengths[i])


@pytest.mark.parametrize("family", FAMILIES)
def test_only_keys_and_values_see_all_tokens(family, trainee):
    made = trainee("full", family)
    rows = {}

    def look(name):
        def hook(_, args, output):
            rows[name] = args[0].numel() // args[0].shape[-1]

        return hook

    for name, module in made.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(look(name))
    (part,) = made.train.at(0).parts
    packing.logits(made.model, part)
    tokens, sequences = part.inputs["input_ids"].numel(), len(part.labels)
    assert tokens > sequences
    layer = f".{model.FAMILIES[family].layers}."
    for name, seen in rows.items():
        last = f"{layer}1." in f".{name}"
        whole = last and name.rpartition(".")[2] in ("key", "value", "k_lin", "v_lin")
        first = f"{layer}0." in f".{name}"
        assert seen == (tokens if first or whole else sequences), name
    assert any(f"{layer}1." in f".{name}" for name in rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_batches_are_not_narrowed(family, trainee):
    """What evaluates a packed model on a padded batch gets what stock gives."""
    packs, padded = trainee("lora", family), trainee("lora", family, padding="pad")
    (part,) = padded.train.at(0).parts
    found, expected = (packing.logits(t.model, part) for t in (packs, padded))
    assert relative_error(found, expected) < PACKED_FP32
    assert narrow.of(last_attention(padded, family)) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_kept_after_a_forward_even_one_that_fails(family, trainee):
    made = trainee("lora", family)
    module = last_attention(made, family)
    holder = getattr(module, narrow.HOLDER)
    made.step(0)
    assert (holder.whole, holder.made) == (None, {})
    (part,) = made.train.at(0).parts

    def fail(*_):
        raise RuntimeError("in the middle of the last layer")

    hook = module.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        packing.logits(made.model, part)
    hook.remove()
    assert (holder.whole, holder.made) == (None, {})
    made.step(1)


def test_another_token_than_the_read_one_would_be_noticed(trainee, monkeypatch):
    def next_token(self, layer, args, kwargs):
        segments = kwargs["segments"]
        moved = type(segments)(segments.groups, segments.first + 1, segments.last)
        return real(self, layer, args, kwargs | {"segments": moved})

    real = narrow.LastLayer._narrow
    expected = results(trainee())["logits"]
    monkeypatch.setattr(narrow.LastLayer, "_narrow", next_token)
    assert relative_error(results(trainee())["logits"], expected) > 10 * PACKED_FP32


def test_causal_models_are_left_whole_and_unknown_layers_refused(trainee):
    made = trainee("lora", "llama")
    assert last_attention(made, "llama") is None
    assert not any(hasattr(m, narrow.HOLDER) for m in made.model.modules())
    (layer,) = [m for n, m in made.model.named_modules() if n.endswith("layers.1")]
    strange = torch.nn.ModuleDict({"layers": torch.nn.ModuleList([layer.mlp])})
    family = model.Family((), (), "layers", "first")
    with pytest.raises(InputError, match="no query, key and value"):
        narrow.attention(strange, family)
