"""One trace against traces of other batches, ranks and depths."""

import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.advise import blueprint, profile, shapes
from peftprof.config import RunConfig
from tests.advise.test_blueprint import peak
from tests.tolerances import REPEATED_LAYERS

BERT = {
    "model_type": "bert",
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "vocab_size": 1024,
    "max_position_embeddings": 128,
}
LLAMA = BERT | {"model_type": "llama", "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    made = {}
    for name, values in (("bert", BERT), ("llama", LLAMA)):
        path = tmp_path_factory.mktemp("shapes") / f"{name}.json"
        path.write_text(json.dumps(values))
        made[name] = shapes.find(str(path))
    return made


def config(shape, method="lora", kernels="torch", **settings) -> RunConfig:
    return RunConfig(
        method=method,
        model="x",
        dataset="x",
        learning_rate=1e-3,
        kernels=kernels,
        target_modules=shape.family.targets,
        **{"precision": "fp32", "padding": "packed", "device": "cpu"} | settings,
    )


CASES = [
    ("full", "torch", "cpu", False),
    ("full", "torch", "cpu", True),
    ("lora", "torch", "cpu", False),
    ("lora", "bnb", "cuda", True),
    ("qlora", "triton", "cuda", False),
    ("qlora", "bnb", "cpu", True),
]


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize(("method", "kernels", "device", "checkpointing"), CASES)
def test_one_trace_gives_the_peak_of_other_batches_and_ranks(
    shape, family, method, kernels, device, checkpointing
):
    of = shape[family]
    settings = {"device": device, "checkpointing": checkpointing, "precision": "bf16"}
    one = profile.make(of, config(of, method, kernels, **settings), 48)
    assert of.layers > profile.TRACED
    for batch, rank in ((4, 8), (32, 16)):
        wanted = config(of, method, kernels, rank=rank, **settings)
        whole = blueprint.trace(of, wanted, blueprint.batch_of(of, wanted, batch, 48, 1))
        assert one.peak(batch, rank).total == pytest.approx(peak(whole.log), rel=REPEATED_LAYERS)
        assert one.holds(rank) == profile._whole(whole.held, 1)


def test_a_middle_layer_that_is_forgotten_is_noticed(shape):
    of = shape["bert"]
    one = profile.make(of, config(of), 48)
    fewer = dataclasses.replace(
        one,
        segments=tuple(
            dataclasses.replace(s, times=s.times - 1) if s.times > 1 else s for s in one.segments
        ),
    )
    assert fewer.peak(8, 8).total < (1 - REPEATED_LAYERS) * one.peak(8, 8).total


@given(batch=st.integers(1, 500), rank=st.integers(1, 64), more=st.integers(1, 100))
@settings(max_examples=50, deadline=None)
def test_parts_add_up_and_more_takes_more(shape, batch, rank, more):
    of = shape["llama"]
    if "one" not in shape:
        shape["one"] = profile.make(of, config(of), 48)
    one = shape["one"]
    found = one.peak(batch, rank)
    assert sum(found.parts.values()) == pytest.approx(found.total, abs=len(found.parts))
    assert min(found.parts.values()) >= 0
    assert one.peak(batch + more, rank).total > found.total
    assert one.peak(batch, rank + more).total >= found.total
    assert one.peak(batch, rank, rounded=True).total >= found.total


def test_layers_that_differ_are_all_traced(tmp_path):
    path = tmp_path / "modernbert.json"
    path.write_text(json.dumps(BERT | {"model_type": "modernbert", "num_hidden_layers": 6}))
    of = shapes.find(str(path))
    assert not of.alike
    one = profile.make(of, config(of, padding="pad"), 32)
    assert [s.times for s in one.segments] == [1]
