"""What is traced without data, against what real tensors of the real model allocate."""

import dataclasses
import gc

import pytest
import torch

from peftprof.advise import blueprint, shapes
from peftprof.advise.tracker import BACKWARD, FORWARD, Tracker
from peftprof.run import packing, runner
from peftprof.run.batches import Batches
from peftprof.run.memory_trace import inventory

# What NF4 is dequantised with, and numpy's random bits, are memory of some KiB that only the real
# step has; it shows in models as small as these. bitsandbytes makes its products inside one
# operator, out of a tracker's sight.
INSIDE = {"qlora": 0.03}
WAYS = [
    ("full", "torch"),
    ("lora", "torch"),
    ("lora", "bnb"),
    ("qlora", "torch"),
]


def tracker_for(trainee, batch):
    tracker = Tracker()
    gc.collect()
    held = [*trainee.model.parameters(), *trainee.model.buffers()]
    tracker.hold([*held, *blueprint._batch_tensors(batch)])
    return tracker


def evaluated(trainee, batch):
    """The log of one real batch's evaluation."""
    tracker = tracker_for(trainee, batch)
    trainee.model.eval()
    with tracker:
        for part in batch.parts:
            tracker.mark(FORWARD)
            with torch.inference_mode(), trainee.autocast():
                packing.logits(trainee.model, part).float()
        log = tracker.close()
    trainee.model.train()
    return log


def traced(trainee, batch):
    """The log of one real step's forward and backward."""
    tracker = tracker_for(trainee, batch)
    with tracker:
        for part in batch.parts:
            tracker.mark(FORWARD)
            with trainee.autocast():
                logits = packing.logits(trainee.model, part)
                loss = torch.nn.functional.cross_entropy(
                    logits.float(), part.labels, reduction="sum"
                )
                loss = loss / batch.samples
            del logits
            tracker.mark(BACKWARD)
            loss.backward()
            del loss
        log = tracker.close()
    trainee.optimizer.zero_grad(set_to_none=True)
    return log


def peak(log) -> int:
    now = most = 0
    for number, sign in log.events:
        now += sign * log.blocks[number].bytes
        most = max(most, now)
    return most


def both(config, shortest=9):
    """The real step, its logs and the blueprint's: six sequences of 9 tokens, one shorter."""
    prepared = runner.prepare(config)
    config = prepared.config
    trainee, _ = prepared.build()
    shape = shapes.find(config.model)
    made = dataclasses.replace(config, target_modules=shape.family.targets)
    first = packing.first_position(shape.model_type, 0)
    lengths = [shortest, *[9] * 5]

    def batch():
        every = Batches.of_lengths(
            lengths, shape.inputs, config.padding, first, packing.multiple(config)
        )
        return every.collate(range(6))

    for log in (traced, evaluated):  # what is made once: by libraries, of a shape
        log(trainee, batch())
    real = blueprint.Traced({}, traced(trainee, batch()), evaluated(trainee, batch()))
    return trainee, real, blueprint.trace(shape, made, blueprint.batch_of(shape, made, 6, 9))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(("method", "kernels"), WAYS)
def test_a_blueprint_allocates_what_the_model_does(
    method, kernels, precision, checkpointing, small_run
):
    config = small_run(method, kernels=kernels, precision=precision, checkpointing=checkpointing)
    _, real, made = both(config)
    for mine, theirs in ((made.training, real.training), (made.evaluation, real.evaluation)):
        assert 0 <= peak(theirs) - peak(mine) <= INSIDE.get(method, 0) * peak(theirs)


@pytest.mark.parametrize("family", ["distilbert", "llama", "qwen3", "modernbert", "roberta"])
def test_every_family_on_padded_batches(family, small_run):
    config = small_run("lora", family, kernels="torch", padding="pad")
    _, real, made = both(config, shortest=7)
    assert peak(made.training) == peak(real.training)
    assert peak(made.evaluation) == peak(real.evaluation)


@pytest.mark.parametrize("family", ["distilbert", "llama", "qwen3", "roberta"])
def test_every_family_that_can_be_packed(family, small_run):
    config = small_run("lora", family, kernels="torch", padding="packed")
    _, real, made = both(config)
    assert peak(made.training) == peak(real.training)
    assert peak(made.evaluation) == peak(real.evaluation)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_what_is_held_is_what_the_inventory_counts(method, small_run):
    config = small_run(method, kernels="torch" if method != "full" else "auto")
    trainee, _, made = both(config)
    held = {part.part: sum(part.storages.values()) for part in inventory(trainee)}
    sums = {
        name: sum(getattr(layer, name) for layer in made.held.values())
        for name in ("base_weights", "quantisation_state", "lora", "head")
    }
    assert sums["base_weights"] == held["base_weights"]
    assert sums["quantisation_state"] == held["quantisation_state"]
    assert sums["lora"] + sums["head"] == held["adapters"]
