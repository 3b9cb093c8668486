"""One trace against traces of other batches, ranks, lengths and depths."""

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof import devices
from peftprof.advise import blueprint, kept, profile, shapes
from peftprof.advise.growth import PRIMES, Markers, markers, products
from peftprof.config import RunConfig
from peftprof.errors import ConfigError
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
def test_one_trace_gives_the_peak_of_other_batches_ranks_and_lengths(
    shape, family, method, kernels, device, checkpointing
):
    of = shape[family]
    settings = {"device": device, "checkpointing": checkpointing, "precision": "bf16"}
    one = profile.make(of, config(of, method, kernels, **settings))
    assert of.layers > max(profile.TRACED.values())
    for batch, rank, tokens in ((4, 8, 96), (32, 16, 24)):
        wanted = config(of, method, kernels, rank=rank, **settings)
        whole = blueprint.trace(of, wanted, blueprint.batch_of(of, wanted, batch, tokens, 1))
        for mine, log in ((one.training, whole.training), (one.evaluation, whole.evaluation)):
            found = mine.peak(batch, rank, tokens).total
            assert found == pytest.approx(peak(log), rel=REPEATED_LAYERS)
        assert one.holds(rank) == profile._whole(whole.held, 1)


def test_a_middle_layer_that_is_forgotten_is_noticed(shape):
    of = shape["bert"]
    one = profile.make(of, config(of)).training
    fewer = dataclasses.replace(
        one,
        segments=tuple(
            dataclasses.replace(s, times=s.times - 1) if s.times > 1 else s for s in one.segments
        ),
    )
    assert fewer.peak(8, 8, 48).total < (1 - REPEATED_LAYERS) * one.peak(8, 8, 48).total


@given(
    batch=st.integers(1, 500),
    rank=st.integers(1, 64),
    tokens=st.integers(1, 128),
    more=st.integers(1, 100),
)
@settings(max_examples=50, deadline=None)
def test_parts_add_up_and_more_takes_more(shape, batch, rank, tokens, more):
    of = shape["llama"]
    if "one" not in shape:
        shape["one"] = profile.make(of, config(of)).training
    one = shape["one"]
    found = one.peak(batch, rank, tokens)
    assert sum(found.parts.values()) == pytest.approx(found.total, abs=len(found.parts))
    assert min(found.parts.values()) >= 0
    assert one.peak(batch + more, rank, tokens).total > found.total
    assert one.peak(batch, rank, tokens + more).total > found.total
    assert one.peak(batch, rank + more, tokens).total >= found.total
    assert one.peak(batch, rank, tokens, rounded=True).total >= found.total


def test_layers_that_differ_are_all_traced(tmp_path):
    path = tmp_path / "modernbert.json"
    path.write_text(json.dumps(BERT | {"model_type": "modernbert", "num_hidden_layers": 6}))
    of = shapes.find(str(path))
    assert not of.alike
    one = profile.make(of, config(of, padding="pad"))
    assert [s.times for s in one.training.segments] == [1]


@given(
    of=st.builds(Markers, st.just(11), st.sampled_from([0, 13]), st.just(37)),
    amounts=st.lists(
        st.tuples(st.sampled_from([1, 2, 3, 64, 96]), *[st.integers(0, n) for n in (1, 1, 2)]),
        max_size=8,
    ),
    at=st.tuples(st.integers(1, 99), st.integers(1, 99), st.integers(1, 999)),
)
def test_a_sum_of_products_grows_as_its_products_do(of, amounts, at):
    ranks = 1 if of.rank else 0
    traced = [n * 11**i * 13 ** (j * ranks) * 37**k for n, i, j, k in amounts]
    batch, rank, tokens = at
    wanted = sum(n * batch**i * rank ** (j * ranks) * tokens**k for n, i, j, k in amounts)
    assert of.spread(traced) @ products(*at) == pytest.approx(wanted)


def test_markers_divide_no_size_of_the_model(shape):
    for of in (shape["bert"], shape["llama"]):
        found = markers(blueprint.sizes(of), blueprint.positions(of), ranked=True)
        primes = {found.batch, found.rank, found.tokens}
        assert len(primes) == 3
        assert found.tokens <= blueprint.positions(of)
        assert all(size % prime for size in blueprint.sizes(of) for prime in primes)


def test_a_model_that_no_prime_is_left_for():
    with pytest.raises(ConfigError, match="no prime"):
        markers([math.prod(PRIMES)], None, ranked=True)
    with pytest.raises(ConfigError, match="no prime"):
        markers([64], 7, ranked=True)


def test_a_kept_profile_is_the_one_that_was_made(shape, tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    of, asked = shape["llama"], config(shape["llama"], "qlora")
    assert not kept.has(of, asked)
    made = kept.profile_of(of, asked)
    assert kept.has(of, asked)
    monkeypatch.setattr(profile, "make", lambda *_: pytest.fail("traced again"))
    again = kept.profile_of(of, asked)
    assert again.training.peak(3, 8, 20) == made.training.peak(3, 8, 20)
    assert again.evaluation.peak(3, 8, 20) == made.evaluation.peak(3, 8, 20)
    assert again.holds(4) == made.holds(4)
    device = devices.find("rtx 4090")
    times = [one.work.seconds(device, 8, 4, 20, 1e6).tolist() for one in (made, again)]
    assert times[0] == times[1]
    assert kept.facts_of(of, of.family.targets) == kept.facts_of(of, of.family.targets)


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"training": 3, "work": {"work": []}}'])
def test_a_damaged_profile_is_made_anew(shape, tmp_path, monkeypatch, text):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    of, asked = shape["bert"], config(shape["bert"])
    made = kept.profile_of(of, asked)
    (file,) = (tmp_path / "profiles").iterdir()
    file.write_text(text)
    assert kept.profile_of(of, asked).holds(8) == made.holds(8)
    assert len(file.read_text()) > 1000


@pytest.mark.parametrize(
    "change",
    [{"precision": "bf16"}, {"checkpointing": True}, {"dropout": 0.0}, {"device": "cuda"}],
)
def test_another_way_is_another_profile(shape, change):
    of = shape["bert"]
    assert kept._path(of, kept._way(config(of))) != kept._path(of, kept._way(config(of, **change)))
    same = config(of, rank=32, batch_size=7, max_length=11)
    assert kept._path(of, kept._way(config(of))) == kept._path(of, kept._way(same))


def test_a_cache_that_cannot_be_written_costs_only_time(shape, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "file"))
    of = shape["bert"]
    assert kept.profile_of(of, config(of)).training.peak(1, 8, 9).total > 0
