"""Query and value of a layer as one group: what each would give alone, and nothing kept."""

import pytest
import torch

from peftprof.run import adapters, packing, runner
from peftprof_kernels import lora_linear
from tests.tolerances import FP32_REORDERED, relative_error

FAMILIES = {  # what is adapted beside what, in a layer
    "bert": ("query", "value"),
    "distilbert": ("q_lin", "v_lin"),
    "llama": ("q_proj", "v_proj"),
}


@pytest.fixture
def siblings(small_run, monkeypatch):
    """`siblings(method, family, **settings)`: a trainee, and the groups of its model."""
    made = []
    real = adapters._Siblings.__init__

    def remembering(self, *given):
        made.append(self)
        real(self, *given)

    monkeypatch.setattr(adapters._Siblings, "__init__", remembering)

    def make(method="lora", family="bert", **settings):
        made.clear()
        config = small_run(method, family, **({"dropout": 0.0} | settings))
        trainee, _ = runner.prepare(config).build()
        generator = torch.Generator().manual_seed(3)
        for name, parameter in adapters.trainable(trainee.model):
            if "lora_B" in name:
                parameter.data.normal_(generator=generator)
        return trainee, list(made)

    return make


def inputs(rows=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, rows, 64, generator=generator).requires_grad_()


def same(found, expected):
    return relative_error(found, expected) < FP32_REORDERED


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_query_and_value_of_every_layer_are_a_group(method, family, siblings):
    trainee, groups = siblings(method, family)
    layers = {id(layer) for group in groups for layer in group.layers}
    named = {id(m): n for n, m in trainee.model.named_modules() if id(m) in layers}
    for group in groups:
        leaves = tuple(named[id(layer)].rpartition(".")[2] for layer in group.layers)
        assert len({named[id(layer)].rpartition(".")[0] for layer in group.layers}) == 1
        apart = family != "llama" and ".1." in named[id(group.layers[0])]
        assert leaves == FAMILIES[family] or (
            apart and leaves in [(name,) for name in FAMILIES[family]]
        )
    # Of two layers; an encoder's last has its query for fewer tokens than its value.
    assert len(groups) == (2 if family == "llama" else 3)


def test_a_target_without_siblings_is_alone(siblings):
    _, groups = siblings(target_modules=("value", "dense"))
    # Per layer value, the attention's and both feed-forward's dense; and the pooler's.
    assert sorted(len(group.layers) for group in groups) == [1] * 9


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_group_gives_what_each_gives_alone(method, siblings):
    _, groups = siblings(method)
    group = groups[0]
    tensors = [getattr(layer, w)["default"].weight for layer in group.layers for w in ADAPTER]
    dys = [torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(i)) for i in range(2)]

    def results(ys, x):
        return *ys, *torch.autograd.grad(ys, (x, *tensors), dys)

    x = inputs()
    together = results([layer(x) for layer in group.layers], x)
    x = inputs()
    stock = results([forward(x) for forward in group.stock], x)
    x = inputs()
    alone = results(
        [
            lora_linear(
                x,
                base.weight if frozen is None else frozen,
                base.bias,
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.scaling["default"],
            )
            for layer, base, frozen in zip(group.layers, group.bases, group.frozen, strict=True)
        ],
        x,
    )
    for found, one, other in zip(together, alone, stock, strict=True):
        assert same(found, one)
        assert same(found, other)


ADAPTER = ("lora_A", "lora_B")


def test_one_called_alone_or_with_another_input_is_right(siblings):
    _, groups = siblings()
    query, value = groups[0].layers
    stock_query, stock_value = groups[0].stock
    a, b = inputs(seed=1), inputs(seed=2)
    assert same(value(a), stock_value(a))
    assert same(query(b), stock_query(b))
    assert same(value(a), stock_value(a))  # b's, which is ready, is not a's
    # In every order, again and again, and with an equal input that is another tensor.
    for layer, stock, x in (
        (value, stock_value, a),
        (value, stock_value, a),
        (query, stock_query, a),
        (query, stock_query, a),
        (query, stock_query, a.detach()),
        (value, stock_value, b),
        (value, stock_value, inputs(rows=1)),
    ):
        assert same(layer(x), stock(x))


def test_an_output_of_before_an_update_is_not_given_after_it(siblings):
    """Query and value, then an update, then the same input once more."""
    _, groups = siblings()
    query, value = groups[0].layers
    x = inputs()
    query(x)
    value(x)
    with torch.no_grad():
        for layer in (query, value):
            layer.lora_B["default"].weight.mul_(-1.0)
    for layer, stock in zip(groups[0].layers, groups[0].stock, strict=True):
        assert same(layer(x), stock(x))


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_disabled_adapters_are_the_base(method, siblings):
    trainee, groups = siblings(method)
    (part,) = trainee.train.at(0).parts
    trainee.model.eval()
    with torch.no_grad():
        adapted = packing.logits(trainee.model, part)
        with trainee.model.disable_adapter():
            disabled = packing.logits(trainee.model, part)
            x = inputs()
            for layer in groups[0].layers:
                assert same(layer(x), layer.get_base_layer()(x))
        again = packing.logits(trainee.model, part)
        for name, parameter in adapters.trainable(trainee.model):
            if "lora_B" in name:
                parameter.zero_()
        base = packing.logits(trainee.model, part)
    assert torch.equal(adapted, again)
    assert relative_error(disabled, base) < FP32_REORDERED < relative_error(adapted, base)


def test_disabled_between_query_and_value(siblings):
    """What is ready when adapters are switched off is not given."""
    trainee, groups = siblings()
    query, value = groups[0].layers
    x = inputs()
    query(x)
    with trainee.model.disable_adapter():
        assert same(value(x), value.get_base_layer()(x))
    assert same(value(x), groups[0].stock[1](x))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_nothing_is_kept_after_a_forward(family, dropout, siblings):
    trainee, groups = siblings(family=family, dropout=dropout)
    trainee.step(0)
    trainee.evaluate()
    assert groups
    for group in groups:
        assert group.ready == {}
        assert group.x is None


def test_dropout_is_one_mask_and_off_in_evaluation(siblings):
    _, groups = siblings(dropout=0.5)
    query, value = groups[0].layers
    with torch.no_grad():  # value's adapter is query's: what differs is the mask
        for weight in ADAPTER:
            source = getattr(query, weight)["default"].weight
            getattr(value, weight)["default"].weight.copy_(source)
        for base in groups[0].bases:
            base.weight.zero_()
            base.bias.zero_()
        x = inputs()
        first, second = query(x), value(x)
        assert torch.equal(first, second)
        assert not torch.equal(query(x), first)  # another forward, another mask
        value(x)
        for layer in (query, value):
            layer.eval()
        assert same(query(x), groups[0].stock[0](x))
