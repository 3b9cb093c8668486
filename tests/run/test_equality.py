"""The same training as stock's: transformers' Trainer, PEFT and bitsandbytes, in our order.

Both sides see the same examples in the same steps, and nothing is dropped out. What is left
is the order of sums, in which padded, split and packed batches differ; on it stand the
tolerances. The controls break what packing could get wrong and must leave them.
"""

import dataclasses
import functools
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from bench import stock_trainer, train_vs_stock
from peftprof.run import adapters, batches, loop, packing, runner
from peftprof.run.model import DTYPES
from peftprof_kernels import grouped
from tests.conftest import WHOLE, save_tokenizer, tiny_config
from tests.tolerances import GRADIENT_PRETRAINED, GRADIENT_STOCK, LOSS_STOCK

FAMILIES = ("bert", "distilbert", "llama")
METHODS = ("full", "lora", "qlora")
PADDINGS = ("packed", "split")
STEPS = 14  # an epoch of 11 batches, the last one smaller, and a few of the next


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Sentences of 1 to 50 words: attention works on groups, and a split batch has parts."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    words = ("dull", "weak", "poor", "flat"), ("bright", "fine", "grand", "warm")
    rows = [
        f"a {'very ' * (i * 29 % 50)}{words[i % 2][i // 2 % 4]} film number {i},{i % 2}"
        for i in range(96)
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """Folders of models without dropout, and what stock did with them, for this module."""
    return tmp_path_factory.mktemp("still"), {}


@pytest.fixture(scope="module")
def lively(tiny, kept):
    """`lively(family)`: a model of weights so large that its logits tell texts apart.

    With the usual ones a tiny model says the same of every text, so that gradients over a
    batch of both labels cancel and consist of rounding.
    """

    def make(family):
        folder = kept[0] / f"lively-{family}"
        if not folder.exists():
            shutil.copytree(tiny(family), folder)
            save_tokenizer(folder, WHOLE)
            config = tiny_config(family, 64, WHOLE)
            config.initializer_range = 0.1
            torch.manual_seed(0)
            net = transformers.AutoModelForSequenceClassification.from_config(config)
            net.save_pretrained(folder)
        return folder

    return make


@pytest.fixture
def still(small_run, texts, kept, lively):
    """`still(method, family, **settings)`: a configuration without any dropout."""

    def make(method, family, **settings):
        defaults = {"dataset": str(texts), "max_steps": STEPS}
        if "model" not in settings:
            defaults["model"] = str(lively(family))
        config = small_run(method, family, **(defaults | settings))
        folder = kept[0] / Path(config.model).name.replace("lively", "still")
        folder.mkdir(exist_ok=True)
        return train_vs_stock.without_dropout(config, folder)

    return make


def stir(model):
    """Adapters that already do something: at step 0 B is zero, and then A has no gradient."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in adapters.trainable(model):
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=generator)


def gradients(model):
    return {name: p.grad.clone() for name, p in adapters.trainable(model)}


def stock_gradients(config):
    """Of step 0, before clipping: the stock model on a padded batch, with plain autograd."""
    prepared = runner.prepare(dataclasses.replace(config, padding="pad"))
    net = stock_trainer.load(prepared).train()
    stir(net)
    rows = stock_trainer.Rows(prepared.train)
    collate = transformers.DataCollatorWithPadding(prepared.tokenizer)
    inputs = collate([rows[i] for i in prepared.train.indices(0)])
    dtype = DTYPES[config.precision]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        loss = net(**inputs).loss
    loss.backward()
    return gradients(net)


def our_gradients(config, monkeypatch):
    """Of step 0: the runner's own step, with an update that changes nothing."""
    trainee, _ = runner.prepare(config).build()
    stir(trainee.model)
    with monkeypatch.context() as patched:
        patched.setattr(type(trainee), "_update", lambda *_: None)
        trainee.step(0)
    return gradients(trainee.model)


def gradients_apart(found, expected):
    """The farthest tensor: max |a - b| / max |b|.

    A tensor whose gradient is rounding alone is left out: keys' biases change no attention
    (softmax takes the same from every score), so their gradients are exactly zero in theory.
    """
    assert found.keys() == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    apart = {}
    for name, gradient in expected.items():
        size = float(gradient.abs().max())
        if not name.endswith(("key.bias", "k_lin.bias")):
            assert size > 1e-5 * largest, name
            apart[name] = float((found[name] - gradient).abs().max()) / size
    worst = max(apart, key=apart.get)
    return apart[worst], worst


def stock_losses(config, folder):
    """By step, of the stock Trainer."""
    prepared = runner.prepare(dataclasses.replace(config, padding="pad"))
    net = stock_trainer.load(prepared)
    losses = []
    hook = net.register_forward_hook(lambda *given: losses.append(given[-1].loss.item()))
    rows = stock_trainer.Rows(prepared.train)
    trainer = stock_trainer.make_trainer(
        stock_trainer.OrderedTrainer, prepared, net, rows, str(folder)
    )
    trainer.train()
    hook.remove()
    assert len(losses) == config.max_steps
    return torch.tensor(losses, dtype=torch.float64)


def our_losses(config):
    """By step, of the runner's own steps, and in how many parts or groups its batches came."""
    trainee, _ = runner.prepare(config).build()
    losses, pieces = [], []
    for number in range(config.max_steps):
        loss, batch = trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
        packed = batch.parts[0].segments
        pieces.append(len(batch.parts) if packed is None else len(packed.groups))
    return torch.tensor(losses, dtype=torch.float64), pieces


@pytest.fixture
def of_stock(kept, tmp_path):
    """`of_stock(what, config)`: stock's losses or gradients, made once a module."""

    def make(what, config):
        key = what, dataclasses.replace(config, padding="pad")
        if key not in kept[1]:
            compute = {
                "losses": functools.partial(stock_losses, folder=tmp_path),
                "gradients": stock_gradients,
            }[what]
            kept[1][key] = compute(config)
        return kept[1][key]

    return make


def losses_apart(ours, stock):
    return float(((ours - stock) / stock).abs().max())


@pytest.fixture
def compare(still, of_stock, monkeypatch):
    """`compare(...)`: the run, and how far its losses and gradients are from stock's."""

    def make(method, family, precision, padding, **settings):
        config = still(method, family, precision=precision, padding=padding, **settings)
        losses, pieces = our_losses(config)
        stock = of_stock("losses", config)
        assert max(pieces) > 1  # else padded, split and packed would be the same
        assert stock.std() > 0.01  # they are losses of a model that changes
        apart = losses_apart(losses, stock)
        ours = our_gradients(config, monkeypatch)
        gradient, name = gradients_apart(ours, of_stock("gradients", config))
        # pytest -s shows the table.
        cell = f"{method} {settings.get('model', family)} {precision} {padding}"
        print(f"{cell}: losses {apart:.1e}, gradients {gradient:.1e} ({name})")
        return config, ours, apart, gradient

    return make


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_training_as_stock(method, family, precision, padding, compare, of_stock):
    config, ours, losses, gradient = compare(method, family, precision, padding)
    dtype = DTYPES[precision]
    assert losses < LOSS_STOCK[dtype]
    assert gradient < GRADIENT_STOCK[dtype]
    if precision == "bf16":
        # Two roundings of one gradient: ours is not farther from it than stock's own.
        exact = of_stock("gradients", dataclasses.replace(config, precision="fp32"))
        rounding, _ = gradients_apart(of_stock("gradients", config), exact)
        assert gradients_apart(ours, exact)[0] < 2 * rounding


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "padding"),
    [(method, "minilm", padding) for method in METHODS for padding in PADDINGS]
    + [("qlora", "minilm-distilbert", "packed"), ("lora", "smollm2-135m", "packed")],
)
def test_the_same_training_of_pretrained_models(method, name, padding, compare):
    rate = 1e-4 if method == "full" else 5e-3
    # What many steps add up to, small models show; of thirty layers a step takes seconds.
    steps = 4 if name == "smollm2-135m" else 6
    settings = {"model": name, "max_length": 64, "learning_rate": rate, "max_steps": steps}
    # The family only names a small model that is not used.
    _, _, losses, gradient = compare(method, "bert", "fp32", padding, **settings)
    assert losses < LOSS_STOCK[torch.float32]
    assert gradient < GRADIENT_PRETRAINED


# --- the controls: each is wrong in a way that packing or splitting could be


def borderless(monkeypatch):
    """Sequences look at each other."""
    real = packing.packed_attention

    def attention(q, k, v, groups, *further, one_query):
        whole = groups if one_query else grouped([groups[-1].end])
        return real(q, k, v, whole, *further, one_query=one_query)

    monkeypatch.setattr(packing, "packed_attention", attention)


def on_and_on(monkeypatch):
    """Positions do not start again with a sequence."""
    real = batches.Batches._packed

    def packed(self, *given):
        part = real(self, *given)
        places = torch.arange(part.inputs["input_ids"].shape[1])[None]
        return dataclasses.replace(part, inputs=part.inputs | {"position_ids": places})

    monkeypatch.setattr(batches.Batches, "_packed", packed)


def neighbours(monkeypatch):
    """The classifier reads the token beside a sequence's own."""
    real = batches.Batches._packed

    def packed(self, *given):
        part = real(self, *given)
        segments = part.segments
        wrong = dataclasses.replace(segments, first=segments.first + 1, last=segments.last - 1)
        return dataclasses.replace(part, segments=wrong)

    monkeypatch.setattr(batches.Batches, "_packed", packed)


def means_of_parts(monkeypatch):
    """A part of few examples counts as much as one of many."""
    real = loop.Trainee._learn
    monkeypatch.setattr(
        loop.Trainee, "_learn", lambda self, part, _: real(self, part, 2 * len(part.labels))
    )


@pytest.mark.parametrize(
    ("family", "padding", "broken"),
    [
        ("bert", "packed", borderless),
        ("llama", "packed", borderless),
        ("bert", "packed", on_and_on),
        ("bert", "packed", neighbours),
        ("llama", "packed", neighbours),
        ("bert", "split", means_of_parts),
    ],
)
def test_what_is_not_the_same_would_be_noticed(family, padding, broken, compare, monkeypatch):
    broken(monkeypatch)
    _, _, losses, gradient = compare("lora", family, "fp32", padding)
    assert losses > 10 * LOSS_STOCK[torch.float32]
    assert gradient > 10 * GRADIENT_STOCK[torch.float32]
