"""The same training as stock's: transformers' Trainer, PEFT and bitsandbytes, in our order.

Both sides see the same examples in the same steps, and nothing is dropped out. What is left
is the order of sums, in which padded, split and packed batches differ; on it stand the
tolerances. The controls break what packing could get wrong and must leave them.
"""

import dataclasses
import functools

import pytest
import torch
import transformers
from safetensors.torch import load_file

from bench import stock_trainer, train_vs_stock
from peftprof.run import adapters, batches, packing, runner
from peftprof.run.model import DTYPES
from peftprof_kernels import grouped
from tests.tolerances import GRADIENT_STOCK, LOSS_STOCK

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


@pytest.fixture
def still(small_run, texts, kept):
    """`still(method, family, **settings)`: a configuration without any dropout."""

    def make(method, family, **settings):
        defaults = {"dataset": str(texts), "max_steps": STEPS, "kernels": "torch"}
        if method == "full":
            del defaults["kernels"]
        config = small_run(method, family, **(defaults | settings))
        folder = kept[0] / str(abs(hash(config.model)))
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
    hook = net.register_forward_hook(lambda *given: losses.append(float(given[-1].loss)))
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
def compare(still, of_stock, monkeypatch, record_property):
    """`compare(...)`: how far losses and gradients are from stock's, gradients' worst name."""

    def make(method, family, precision, padding, **settings):
        config = still(method, family, precision=precision, padding=padding, **settings)
        losses, pieces = our_losses(config)
        stock = of_stock("losses", config)
        assert max(pieces) > 1  # else padded, split and packed would be the same
        assert stock.std() > 0.01  # they are losses of a model that changes
        apart = losses_apart(losses, stock)
        ours, theirs = our_gradients(config, monkeypatch), of_stock("gradients", config)
        gradient, name = gradients_apart(ours, theirs)
        record_property("losses", apart)
        record_property("gradients", gradient)
        print(f"CELL {method} {family} {precision} {padding} {apart:.1e} {gradient:.1e} {name}")
        return apart, gradient

    return make


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_same_training_as_stock(method, family, precision, padding, compare):
    losses, gradient = compare(method, family, precision, padding)
    dtype = DTYPES[precision]
    assert losses < LOSS_STOCK[dtype]
    assert gradient < GRADIENT_STOCK[dtype]
