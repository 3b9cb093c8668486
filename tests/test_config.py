import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftprof.config import METHODS, RunConfig, make_config, recipes
from peftprof.errors import ConfigError


@pytest.mark.parametrize("method", METHODS)
def test_the_paper_recipe_is_the_papers_table(method):
    config = make_config(method, "paper")
    assert config.model == "distilbert-base-uncased"
    assert config.dataset == "glue/sst2"
    assert config.learning_rate == 3e-5
    assert config.epochs == 3
    assert config.warmup_ratio == 0.1
    assert config.seed == 42
    assert config.dropout == 0.1
    assert config.max_length == 128
    assert config.batch_size == (8 if method == "full" else 32)
    assert config.precision == ("bf16" if method == "qlora" else "fp32")
    assert dataclasses.replace(config, rank=16).scaling == 2.0


def test_what_is_given_wins_over_the_recipe():
    assert make_config("lora", "paper", rank=32, learning_rate=None).rank == 32
    assert make_config("lora", "paper", learning_rate=None).learning_rate == 3e-5


def test_recipes_are_those_on_disk_and_all_load():
    assert {"default", "paper"} <= set(recipes())
    for recipe in recipes():
        for method in METHODS:
            assert make_config(method, recipe).recipe == recipe


@given(
    method=st.sampled_from(METHODS),
    rank=st.integers(1, 256),
    dropout=st.floats(0, 0.99),
    rate=st.floats(1e-8, 1.0),
    targets=st.lists(st.text("abc_", min_size=1), max_size=3),
)
def test_round_trip(method, rank, dropout, rate, targets):
    config = make_config(
        method, rank=rank, dropout=dropout, learning_rate=rate, target_modules=tuple(targets)
    )
    assert RunConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("setting", "value", "says"),
    [
        ("rank", 0, "--rank is 0"),
        ("rank", -3, "--rank is -3"),
        ("batch_size", 0, "--batch-size is 0"),
        ("max_length", 0, "--max-length"),
        ("max_steps", 0, "--max-steps"),
        ("dropout", 1.0, "--dropout is 1.0"),
        ("dropout", -0.1, "--dropout"),
        ("dropout", float("nan"), "--dropout"),
        ("learning_rate", 0.0, "--lr is 0.0"),
        ("learning_rate", float("inf"), "--lr"),
        ("learning_rate", 1e300, "--lr"),
        ("alpha", 1e300, "--alpha"),
        ("text_columns", ("a", "b", "c"), "--text-column"),
        ("epochs", -1.0, "--epochs"),
        ("alpha", 0.0, "--alpha"),
        ("warmup_ratio", 1.5, "--warmup-ratio"),
        ("seed", -1, "--seed"),
        ("seed", 2**32, "--seed"),
        ("epochs", 1e308, "--epochs"),
        ("max_steps", 10**12, "--max-steps"),
        ("kernels", "cuda", "unknown --kernels 'cuda'"),
        ("precision", "int8", "unknown --precision 'int8'"),
        ("profiler", "perf", "unknown --profiler 'perf'"),
        ("model", " ", "--model is empty"),
    ],
)
def test_a_setting_that_cannot_be(setting, value, says):
    with pytest.raises(ConfigError) as raised:
        make_config("lora", **{setting: value})
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_unknown_method_recipe_and_setting():
    for arguments in ({"method": "prefix"}, {"method": "lora", "recipe": "soup"}):
        with pytest.raises(ConfigError, match="it is one of"):
            make_config(**arguments)
    with pytest.raises(ConfigError, match="unknown setting 'colour'"):
        RunConfig.from_json({"colour": 1})
    with pytest.raises(ConfigError, match="incomplete"):
        RunConfig.from_json({"method": "lora"})
    with pytest.raises(ConfigError, match="rank cannot be"):
        make_config("lora", rank="eight")


def test_full_fine_tuning_has_no_adapter_kernels():
    with pytest.raises(ConfigError, match="has none"):
        make_config("full", kernels="bnb")
