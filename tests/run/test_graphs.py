import copy
import dataclasses
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.run import graphs, packing, runner
from peftprof.run.batches import Batch, Part, Segments
from peftprof_kernels import grouped, packed_attention

LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12).map(sorted)
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="capturing a CUDA graph needs a CUDA device"
)


def segments(lengths):
    sizes = torch.tensor(lengths)
    ends = sizes.cumsum(0)
    return Segments(grouped(lengths), ends - sizes, ends - 1)


def packed(lengths, tokens):
    """A batch of these lengths and dummy tokens up to `tokens`."""
    inputs = {"input_ids": torch.arange(tokens)[None]}
    part = Part(inputs, torch.zeros(len(lengths), dtype=torch.long), segments(lengths))
    return Batch((part,), len(lengths), sum(lengths), tokens, len(lengths))


# The static group


@settings(deadline=None, max_examples=80)
@given(LENGTHS, st.integers(0, 70), st.sampled_from([(4, 1), (4, 2)]), st.booleans())
def test_the_static_group_gives_the_real_tokens_what_their_groups_give(
    lengths, dummies, heads, causal
):
    """The same results and gradients; and through dummy tokens no gradient flows."""
    real, tokens = sum(lengths), sum(lengths) + dummies
    generator = torch.Generator().manual_seed(tokens)
    sizes = (heads[0], heads[0] // heads[1], heads[0] // heads[1])
    qkv = [torch.randn(tokens, h, 8, generator=generator).requires_grad_() for h in sizes]
    weights = torch.randn(tokens, heads[0], 8, generator=generator)
    weights[real:] = 0  # nobody reads what becomes of a dummy token
    outs, grads = [], []
    for groups in (grouped(lengths), (graphs.static_group(segments(lengths), tokens),)):
        out = packed_attention(*qkv, groups, 0.3, 0.0, causal)
        outs.append(out[:real])
        grads.append(torch.autograd.grad((out * weights).sum(), qkv))
    assert torch.allclose(*outs, atol=2e-6)
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a, b, atol=2e-5)
        assert not b[real:].any()


@settings(deadline=None, max_examples=40)
@given(LENGTHS, st.integers(0, 70), st.booleans())
def test_under_dropout_too_no_gradient_flows_through_dummy_tokens(lengths, dummies, causal):
    """The CPU's dropped attention reads gradients at `places`: they must be places of no token."""
    real, tokens = sum(lengths), sum(lengths) + dummies
    qkv = [torch.randn(tokens, 2, 8).requires_grad_() for _ in range(3)]
    group = graphs.static_group(segments(lengths), tokens)
    out = packed_attention(*qkv, (group,), 0.3, 0.2, causal)
    for grad in torch.autograd.grad(out[:real].square().sum(), qkv):
        assert grad.isfinite().all()
        assert not grad[real:].any()


@settings(deadline=None)
@given(LENGTHS, st.integers(0, 70))
def test_shapes_depend_on_the_key_alone(lengths, dummies):
    tokens = sum(lengths) + dummies
    group = graphs.static_group(segments(lengths), tokens)
    count, longest = len(lengths), group.longest
    assert (group.start, group.end, group.count) == (0, tokens, count)
    assert longest % graphs.BUCKET == 0
    assert max(lengths) <= longest < max(lengths) + 2 * graphs.BUCKET
    assert (group.rows.shape, group.rows.dtype) == ((count * longest,), torch.long)
    assert (group.places.shape, group.places.dtype) == ((tokens,), torch.long)
    assert (group.absent.shape, group.absent.dtype) == ((count, longest), torch.bool)
    batch = graphs.static_batch(packed(lengths, tokens), count)
    assert graphs.shape_of(batch, count) == (tokens, longest, count)


def test_all_tokens_present_and_still_a_place_for_the_dummies():
    """Three sequences that fill every place: attention is padded by one bucket more."""
    group = graphs.static_group(segments([16, 16, 16]), 64)
    assert group.longest == 32
    assert group.absent.view(-1)[group.places[48:]].all()
    assert graphs.static_group(segments([16, 16, 16, 16]), 64).longest == 16  # no dummies


def test_the_keys_of_batches():
    a, b = (graphs.static_batch(packed(ls, 64), 2) for ls in ([3, 20], [17, 32]))
    assert graphs.shape_of(a, 2) == graphs.shape_of(b, 2) == graphs.Shape(64, 32, 2)
    assert graphs.shape_of(graphs.static_batch(packed([3, 16], 64), 2), 2).longest == 16
    assert graphs.shape_of(graphs.static_batch(packed([3, 20], 128), 2), 2).tokens == 128


def test_what_has_no_static_form_stays_as_it_is():
    smaller = packed([3, 20], 64)
    assert graphs.static_batch(smaller, 3) is smaller
    assert graphs.shape_of(smaller, 3) is None
    (part,) = smaller.parts
    padded = dataclasses.replace(smaller, parts=(dataclasses.replace(part, segments=None),))
    split = dataclasses.replace(padded, parts=padded.parts * 2)
    for batch in (padded, split):
        assert graphs.static_batch(batch, 2) is batch
        assert graphs.shape_of(batch, 2) is None
    assert graphs.shape_of(smaller, 2) is None  # its group ends before its tokens
    several = packed([1, 200], 201)
    assert len(several.parts[0].segments.groups) == 2
    assert graphs.shape_of(several, 2) is None


def test_filling_is_all_that_differs_between_batches_of_a_key():
    a, b = (graphs.static_batch(packed(ls, 64), 2).parts[0] for ls in ([3, 20], [17, 32]))
    b.inputs["input_ids"] += 5
    static = copy.deepcopy(a)
    where = [t.data_ptr() for t in graphs._tensors(static)]
    graphs.fill(static, b)
    assert len(where) == 7
    assert [t.data_ptr() for t in graphs._tensors(static)] == where
    for ours, theirs in zip(graphs._tensors(static), graphs._tensors(b), strict=True):
        assert torch.equal(ours, theirs)
    assert not torch.equal(a.inputs["input_ids"], static.inputs["input_ids"])


# Whether


def test_why_graphs_are_not_possible(small_run):
    config = dataclasses.replace(
        small_run("lora"), device="cuda:0", precision="bf16", kernels="bnb", padding="packed"
    )
    assert graphs.possible(config) is None
    for change, reason in (
        ({"device": "cpu"}, "on cpu"),
        ({"padding": "split"}, "these are split"),
        ({"padding": "pad"}, "these are pad"),
        ({"precision": "fp16"}, "loss scaling"),
        ({"kernels": "torch"}, "dropout on the host"),
    ):
        assert reason in graphs.possible(dataclasses.replace(config, **change))
    for change in (
        {"kernels": "torch", "dropout": 0.0},
        {"kernels": "torch", "method": "full"},  # has no adapter to drop out
        {"kernels": "triton"},
        {"precision": "fp32"},
    ):
        assert graphs.possible(dataclasses.replace(config, **change)) is None


def test_choosing_goes_by_medians():
    assert graphs.choose([5, 5, 5], [4, 4, 100])
    assert not graphs.choose([5, 5, 5], [6, 6, 1])
    for nothing in (([5], [5]), ([], [1]), ([1], [])):
        assert not graphs.choose(*nothing)


# The step, on a CPU


def make_trainee(config, tokens=packing.BUCKET, without_dropout=True):
    """A trainee whose batches are static, and rounded up to a multiple of `tokens`."""
    trainee, _ = runner.prepare(config).build()
    trainee.train.multiple = tokens
    for module in trainee.model.modules():
        if without_dropout and isinstance(module, torch.nn.Dropout):
            module.p = 0.0

    def load(self, number):
        batch = graphs.static_batch(self.train.at(number), self.config.batch_size)
        return batch.to(self.device)

    trainee._load = types.MethodType(load, trainee)
    return trainee


def parameters(trainee):
    return [p.detach().clone() for g in trainee.optimizer.param_groups for p in g["params"]]


def distance(some, others):
    return sum(float((a - b).abs().sum()) for a, b in zip(some, others, strict=True))


def optimizer_state(trainee):
    states = trainee.optimizer.state.values()
    return [value.clone() for state in states for value in state.values()]


@pytest.mark.parametrize(
    ("method", "family", "limit"),
    [("lora", "bert", 1.0), ("lora", "bert", 1e-3), ("full", "bert", 1e3), ("qlora", "llama", 0.1)],
)
def test_the_captured_function_is_the_step(method, family, limit, small_run):
    """Run eagerly on one set of buffers a shape, it gives the bits of `Trainee.step`."""
    more = {"padding": "packed", "dropout": 0.0, "max_steps": 10, "max_grad_norm": limit}
    config = small_run(method, family, **more)
    stepped, ours = make_trainee(config), make_trainee(config)
    rate = stepped.rate
    stepped.rate = lambda number: float(torch.tensor(rate(number)))  # a graph's rate is fp32
    learning_rate, buffers = torch.zeros(()), {}
    for number in range(config.max_steps):
        expected, _ = stepped.step(number)
        stepped.optimizer.zero_grad(set_to_none=True)
        batch = ours._load(number)
        (part,) = batch.parts
        shape = graphs.shape_of(batch, config.batch_size)
        graphs.fill(buffers.setdefault(shape, copy.deepcopy(part)), part)
        learning_rate.fill_(rate(number))
        with graphs.rate_from(learning_rate, ours.optimizer, capturable=True):
            loss = graphs.body(ours, buffers[shape], batch.samples)
        ours.optimizer.zero_grad(set_to_none=True)
        assert torch.equal(loss, expected)
    assert len(buffers) < config.max_steps  # some were used again
    for which in (parameters, optimizer_state):
        for a, b in zip(which(ours), which(stepped), strict=True):
            assert torch.equal(a, b)
    for group in ours.optimizer.param_groups:  # as it was, nothing on the device
        assert (group["lr"], group["capturable"]) == (config.learning_rate, False)


def test_static_batches_train_as_grouped_ones_do(small_run):
    config = small_run("lora", padding="packed", dropout=0.0, max_steps=10)
    static, plain = make_trainee(config), make_trainee(config)
    del plain._load
    plain.train.multiple = 1
    for number in range(config.max_steps):
        losses = []
        for trainee in (static, plain):
            loss, _ = trainee.step(number)
            trainee.optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss))
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_the_first_steps_of_a_shape_are_the_callers(small_run):
    """Nothing is done on the device, and nothing is used, before a shape has come often."""
    config = small_run("lora", padding="packed", dropout=0.0)
    trainee = make_trainee(config)
    for mode, most in (("on", graphs.EAGER_USES), ("auto", 20)):
        graphed = graphs.GraphedStep(trainee, mode)
        batch = trainee._load(0)
        for number in range(most):
            assert graphed.step(number, batch) is None
        assert not graphed.record.used
        assert graphed.record.why == "no shape of a batch came often enough"
    graphed = graphs.GraphedStep(trainee, "on")
    smaller = dataclasses.replace(batch, samples=config.batch_size - 1)
    for number in range(10):
        assert graphed.step(number, smaller) is None


@pytest.mark.parametrize("faster", [True, False])
def test_graphs_stay_only_where_they_are_faster(faster, small_run):
    trainee = make_trainee(small_run("lora", padding="packed", dropout=0.0))
    graphed = graphs.GraphedStep(trainee, "auto")
    batch = trainee._load(0)
    shape = graphs.shape_of(batch, trainee.config.batch_size)
    for number in range(graphs.TRIAL):
        assert not graphed._due(shape)
        assert graphed.step(number, batch) is None
        graphed.observe(number, 5_000_000 + number)
    assert graphed._due(shape)
    graphed.observe(99, 1)  # a step that was no part of the trial
    for number in range(10, 10 + graphs.TRIAL):
        graphed._unobserved[number] = shape, True  # as a replay leaves it
        graphed.observe(number, 2_000_000 if faster else 6_000_000)
    assert graphed.record.eager_ms == pytest.approx(5.000002)
    assert graphed.record.graphed_ms == (2.0 if faster else 6.0)
    assert graphed._stopped is not faster
    assert ("were faster" in graphed.record.why) is faster
    if not faster:
        assert not graphed.record.used
        assert graphed.step(30, batch) is None  # for good


# The step, on a GPU


def gpu_config(small_run, method="lora", **more):
    fixed = {"device": "cuda", "padding": "packed", "max_steps": 40, "warmup_ratio": 0.2}
    return small_run(method, **(fixed | {"kernels": "bnb", "dropout": 0.0} | more))


def step(trainee, graphed, number, batch):
    """The loss of one step, eager where `graphed` leaves it, and whether it did."""
    loss = None if graphed is None else graphed.step(number, batch)
    if loss is not None:
        return loss, True
    trainee._ready = {number: batch}
    loss, _ = trainee.step(number)
    trainee.optimizer.zero_grad(set_to_none=True)
    return loss, False


def train(trainee, graphed, steps):
    """The losses of `steps`, and how many of them `graphed` did."""
    done = [step(trainee, graphed, n, trainee._batch(n)) for n in range(steps)]
    return torch.stack([loss for loss, _ in done]).tolist(), sum(ours for _, ours in done)


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "qlora", "full"])
def test_replayed_steps_train_as_eager_ones_do(method, precision, small_run):
    kernels = "torch" if method == "full" else "bnb"
    config = gpu_config(small_run, method, precision=precision, kernels=kernels)
    assert graphs.possible(config) is None
    eager, ours = make_trainee(config, 256), make_trainee(config, 256)
    start = parameters(ours)
    graphed = graphs.GraphedStep(ours, "on")
    expected, _ = train(eager, None, 30)
    losses, done = train(ours, graphed, 30)
    assert done > 15
    assert graphed.record.used, graphed.record
    assert losses == pytest.approx(expected, rel=2e-2 if precision == "bf16" else 1e-3)
    # As a whole: an element whose gradient is noise, such as a key's bias, goes anywhere.
    now = parameters(ours)
    assert distance(now, parameters(eager)) < 0.05 * distance(now, start)
    steps = {float(s["step"]) for s in ours.optimizer.state.values()}
    assert steps == {30.0}
    assert all(p.grad is None for p in ours.model.parameters())
    assert isinstance(ours.optimizer.param_groups[0]["lr"], float)


def replaying(trainee):
    """A GraphedStep that has a graph for batch 0's shape, and that batch."""
    graphed = graphs.GraphedStep(trainee, "on")
    batch = trainee._load(0)
    for number in range(graphs.EAGER_USES + 2):
        step(trainee, graphed, number, batch)
    assert graphed.record.shapes == 1, graphed.record
    return graphed, batch


@on_a_gpu
@pytest.mark.parametrize("kernels", ["bnb", "triton"])
def test_every_replay_draws_other_dropout_masks(kernels, small_run):
    config = gpu_config(small_run, dropout=0.3, learning_rate=1e-12, kernels=kernels)
    trainee = make_trainee(config, 256, without_dropout=False)
    graphed, batch = replaying(trainee)
    before = torch.cuda.get_rng_state(trainee.device)
    losses = [float(graphed.step(10, batch)) for _ in range(6)]
    assert len(set(losses)) == 6  # the weights hardly move
    after = torch.cuda.get_rng_state(trainee.device)
    assert not torch.equal(before, after)
    torch.cuda.set_rng_state(before, trainee.device)  # as a checkpoint does
    assert [float(graphed.step(10, batch)) for _ in range(6)] == pytest.approx(losses, rel=1e-4)


@on_a_gpu
def test_a_replay_follows_the_learning_rate(small_run):
    trainee = make_trainee(gpu_config(small_run), 256)
    graphed, batch = replaying(trainee)
    moved = {}
    for rate in (0.0, 1e-4, 2e-4):
        trainee.rate = lambda number, rate=rate: rate
        before = parameters(trainee)
        graphed.step(10, batch)
        moved[rate] = distance(parameters(trainee), before)
    assert moved[0.0] == 0
    assert moved[2e-4] == pytest.approx(2 * moved[1e-4], rel=0.2)


@on_a_gpu
def test_graphs_of_several_shapes_share_memory_and_do_not_disturb_each_other(small_run):
    """Replayed in any order; each loss is that of the batch and weights at hand."""
    config = gpu_config(small_run, learning_rate=1e-12, batch_size=4)
    trainee = make_trainee(config, 16)
    graphed = graphs.GraphedStep(trainee, "on")
    batches = {}
    for number in range(24):
        batch = trainee._load(number)
        batches.setdefault(graphs.shape_of(batch, 4), batch)
    batches.pop(None, None)  # an epoch's last batch
    assert len(batches) > 1
    for number in range(graphs.EAGER_USES + 2):
        for batch in batches.values():
            step(trainee, graphed, number, batch)
    assert graphed.record.shapes == min(len(batches), graphs.MOST_GRAPHS)
    captured, eager = [b for s, b in batches.items() if s in graphed._kept], []
    for batch in captured:
        with torch.no_grad(), trainee.autocast():
            logits = packing.logits(trainee.model, batch.parts[0]).float()
        eager.append(float(torch.nn.functional.cross_entropy(logits, batch.parts[0].labels)))
    for way in (1, -1):
        losses = [graphed.step(10, batch) for batch in captured[::way]]
        assert torch.stack(losses).tolist() == pytest.approx(eager[::way], rel=1e-3)


@on_a_gpu
@pytest.mark.parametrize(
    ("disturb", "why"),
    [
        (lambda loss: loss.item(), "could not be captured"),
        (lambda loss: torch.rand(()), "random numbers on the host"),
    ],
)
def test_a_step_that_no_graph_can_repeat_goes_on_eagerly(disturb, why, small_run):
    trainee = make_trainee(gpu_config(small_run), 256)
    learn = trainee._learn

    def disturbed(part, samples):
        loss = learn(part, samples)
        disturb(loss)
        return loss

    trainee._learn = disturbed
    graphed = graphs.GraphedStep(trainee, "on")
    losses, _ = train(trainee, graphed, 30)
    assert why in graphed.record.why
    assert (graphed.record.used, graphed.record.shapes) == (False, 0)
    expected, _ = train(make_trainee(gpu_config(small_run), 256), None, 30)
    assert losses == pytest.approx(expected, rel=1e-3)
