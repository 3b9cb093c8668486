"""A recipe asks for the cells it says, in its order; one that cannot be is one ConfigError."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftprof.config import METHODS, RunConfig
from peftprof.errors import ConfigError
from peftprof.study.plan import Overrides, configuration, make_plan, recipes

PLAIN = """
ranks = [2, 8]
seeds = [1, 2, 3]
[all]
model = "m"
dataset = "d.csv"
learning_rate = 1e-3
"""
SEARCH = "[search]\nseed = 7\nrank = 8\n[search.rates]\nlora = [1e-3, 1e-2]\n"
LADDER = '[[ladder.rungs]]\nmethod = "full"\n[[ladder.rungs]]\ncause = "batch size"\n'


@pytest.fixture
def plan(tmp_path):
    """`plan(text, **overrides)`: the plan of a recipe with that text."""

    def make(text, **overrides):
        path = tmp_path / "mine.toml"
        path.write_text(text, encoding="utf-8")
        return make_plan(str(path), Overrides(**overrides))

    return make


def one_line(error: Exception) -> None:
    assert str(error)
    assert "\n" not in str(error)


def part(plan, name):
    return [cell for cell in plan.cells if cell.part == name]


def test_there_are_three_recipes_and_all_give_plans():
    assert recipes() == ["controlled", "paper", "quick"]
    for name in recipes():
        plan = make_plan(name, Overrides())
        assert plan.recipe == name
        assert plan.about
        names = [cell.name for cell in plan.cells]
        assert len(set(names)) == len(names)
        for cell in plan.cells:
            config = RunConfig.from_json(cell.config)
            assert config.to_json() == cell.config
            assert (config.method, config.seed) == (cell.method, cell.seed)
            assert cell.rank == (None if cell.method == "full" else config.rank)
            assert config.recipe == name


@pytest.mark.parametrize("name", ["paper", "controlled"])
def test_the_matrix_is_full_and_adapters_by_rank_and_seed(name):
    plan = make_plan(name, Overrides())
    found = {(c.method, c.rank, c.seed) for c in part(plan, "matrix")}
    adapters = itertools.product(("lora", "qlora"), (4, 8, 16, 32), (42, 43, 44))
    assert found == {*adapters, *(("full", None, seed) for seed in (42, 43, 44))}
    assert len(part(plan, "matrix")) == len(found) == 27
    assert plan.quick == ""


def test_the_paper_has_its_batches_its_padding_and_stock_kernels():
    cells = part(make_plan("paper", Overrides()), "matrix")
    assert not part(make_plan("paper", Overrides()), "search")
    for cell in cells:
        config = cell.config
        assert config["batch_size"] == (8 if cell.method == "full" else 32)
        assert config["precision"] == ("bf16" if cell.method == "qlora" else "fp32")
        if cell.method != "full":
            assert config["kernels"] == "bnb"
        assert config["padding"] == "pad"
        assert (config["model"], config["dataset"]) == ("distilbert-base-uncased", "glue/sst2")
        assert (config["learning_rate"], config["epochs"]) == (3e-5, 3)
        assert (config["warmup_ratio"], config["dropout"], config["max_length"]) == (0.1, 0.1, 128)
        assert config["max_steps"] is None
        assert config["alpha"] is None  # 2 r


def test_controlled_methods_differ_in_nothing_but_the_method():
    cells = part(make_plan("controlled", Overrides()), "matrix")
    own = {"method", "rank", "seed", "profiler", "alpha"}
    shared = [{k: v for k, v in c.config.items() if k not in own} for c in cells]
    assert all(one == shared[0] for one in shared)
    assert shared[0]["batch_size"] == 32


@pytest.mark.parametrize("name", ["paper", "controlled", "quick"])
def test_only_the_first_seed_is_profiled_full_and_rank_8(name):
    plan = make_plan(name, Overrides())
    profiled = {c.name for c in part(plan, "matrix") if c.config["profiler"] != "none"}
    assert profiled == {"full-s42", "lora-r8-s42", "qlora-r8-s42"}
    rungs = {c.name for c in part(plan, "ladder") if c.config["profiler"] != "none"}
    assert rungs == {"ladder-0-s42", "ladder-1-s42"}


def test_a_search_comes_first_and_looks_at_no_evaluation_set():
    plan = make_plan("controlled", Overrides())
    search = part(plan, "search")
    assert list(plan.cells[: len(search)]) == search
    assert [(c.method, c.config["learning_rate"]) for c in search] == [
        ("full", 3e-5), ("full", 1e-4), ("full", 3e-4),
        ("lora", 1e-3), ("lora", 3e-3), ("lora", 1e-2),
        ("qlora", 1e-3), ("qlora", 3e-3), ("qlora", 1e-2),
    ]  # fmt: skip
    seeds = {c.seed for c in plan.cells if c.part != "search"}
    for cell in search:
        assert cell.config["evaluate_on"] == "tuning"
        assert cell.seed not in seeds
    others = [c for c in plan.cells if c.part != "search"]
    assert {c.config["evaluate_on"] for c in others} == {"validation"}


def test_rounds_are_a_seed_each_and_every_second_is_backwards():
    plan = make_plan("paper", Overrides())
    rounds = [list(cells) for _, cells in itertools.groupby(plan.cells, lambda c: c.seed)]
    assert [cells[0].seed for cells in rounds] == [42, 43, 44]
    kinds = [[(c.part, c.method, c.rank, c.rung) for c in cells] for cells in rounds]
    assert kinds[0] == kinds[2] == kinds[1][::-1]
    assert kinds[0][0] == ("matrix", "full", None, None)


@pytest.mark.parametrize("name", ["paper", "controlled", "quick"])
def test_a_rung_changes_what_its_cause_says_and_nothing_else(name):
    changes = {
        "batch size": {"batch_size"},
        "gradient work": {"method", "kernels"},
        "padding": {"padding"},
        "kernels": {"kernels"},
        "precision": {"precision"},
        "dequantise": {"method"},
    }
    rungs = sorted((c for c in part(make_plan(name, Overrides()), "ladder") if c.seed == 42),
                   key=lambda c: c.rung)  # fmt: skip
    assert [c.rung for c in rungs] == list(range(len(rungs)))
    assert rungs[0].cause == ""
    assert rungs[0].config["batch_size"] == 8
    for before, after in itertools.pairwise(rungs):
        differ = {k for k in after.config if after.config[k] != before.config[k]} - {"profiler"}
        # Rates are the method's own where the recipe has them so; steps do not depend on them.
        assert differ - {"learning_rate"} == changes[after.cause]
    assert rungs[-1].method == "qlora"


def test_configurations_are_named_by_method_and_rank():
    assert configuration("full", None) == "full"
    assert configuration("qlora", 16) == "qlora-r16"


BAD = {
    "unknown key": (f"colour = 1\n{PLAIN}", "unknown key 'colour'"),
    "unknown setting": (f"{PLAIN}\ncolour = 1\n", "unknown setting 'colour'"),
    "ranks no list": (PLAIN.replace("[2, 8]", "8"), "ranks of the recipe must be a list"),
    "ranks empty": (PLAIN.replace("[2, 8]", "[]"), "ranks"),
    "ranks of words": (PLAIN.replace("[2, 8]", '["a"]'), "ranks"),
    "ranks of truths": (PLAIN.replace("[2, 8]", "[true]"), "ranks"),
    "rank below nothing": (PLAIN.replace("[2, 8]", "[-1]"), "ranks"),
    "rank 0": (PLAIN.replace("[2, 8]", "[0]"), "--rank is 0"),
    "no seeds": (PLAIN.replace("seeds = [1, 2, 3]\n", ""), "seeds of the recipe"),
    "seeds empty": (PLAIN.replace("[1, 2, 3]", "[]"), "seeds"),
    "duplicate seeds": (PLAIN.replace("[1, 2, 3]", "[1, 1]"), "different whole numbers"),
    "seed too large": (PLAIN.replace("[1, 2, 3]", "[4294967296]"), "--seed"),
    "no model": (PLAIN.replace('model = "m"\n', ""), "incomplete"),
    "a rate of words": (PLAIN.replace("1e-3", '"fast"'), "learning_rate cannot be 'fast'"),
    "all no table": ("all = 1\n" + PLAIN.replace("[all]", "[full]"), "all of the recipe is no"),
    "profiled unknown": (f"profiled = [3]\n{PLAIN}", "profiled names rank 3"),
    "forgetting unknown": (f"forgetting = [9]\n{PLAIN}", "forgetting names rank 9"),
    "profiled no list": (f"profiled = 8\n{PLAIN}", "profiled"),
    "search key": (f"{PLAIN}[search]\ncolour = 1\n", "[search] has the unknown key"),
    "search method": (f"{PLAIN}[search.rates]\nprefix = [1e-3]\n", "unknown key 'prefix'"),
    "rates no list": (f"{PLAIN}[search.rates]\nlora = 1e-3\n", "wants a list"),
    "rates empty": (f"{PLAIN}[search.rates]\nlora = []\n", "wants a list"),
    "rates of words": (f'{PLAIN}[search.rates]\nlora = ["x"]\n', "'x', which is no rate"),
    "rates twice": (f"{PLAIN}[search.rates]\nlora = [1e-3, 0.001]\n", "asks twice"),
    "rates alike": (f"{PLAIN}[search.rates]\nlora = [1e-3, 0.0010000001]\n", "asks twice"),
    "search rank": (f"{PLAIN}{SEARCH.replace('rank = 8', 'rank = true')}", "rank cannot be True"),
    "search seed": (f"{PLAIN}{SEARCH.replace('seed = 7', 'seed = []')}", "seed cannot be []"),
    "rung without cause": (f'{PLAIN}{LADDER}[[ladder.rungs]]\nmethod = "lora"\n', "has a cause"),
    "first with cause": (f'{PLAIN}[[ladder.rungs]]\ncause = "x"\nmethod = "full"\n', "has a cause"),
    "rung without method": (f"{PLAIN}[[ladder.rungs]]\nsettings = {{}}\n", "unknown method ''"),
    "unknown method": (f'{PLAIN}[[ladder.rungs]]\nmethod = "prefix"\n', "method 'prefix'"),
    "cause twice": (f'{PLAIN}{LADDER}[[ladder.rungs]]\ncause = "batch size"\n', "of its own"),
    "cause a number": (f"{PLAIN}{LADDER}[[ladder.rungs]]\ncause = 3\n", "of its own"),
    "rung key": (f"{PLAIN}{LADDER}colour = 1\n", "a rung of the ladder has the unknown"),
    "rungs no tables": (f"{PLAIN}[ladder]\nrungs = [1]\n", "the rungs of the ladder"),
    "rungs no list": (f"{PLAIN}[ladder]\nrungs = 1\n", "the rungs of the ladder"),
    "ladder seeds": (f"{PLAIN}[ladder]\nseeds = 1\n{LADDER}", "seeds"),
    "ladder seed": (f"{PLAIN}[ladder]\nseeds = [9]\n{LADDER}", "names seed 9"),
    "rung setting": (f"{PLAIN}{LADDER}settings = {{ batch_size = 0 }}\n", "--batch-size is 0"),
    "settings no table": (f"{PLAIN}{LADDER}settings = 1\n", "no table"),
    "other data": (f'{PLAIN}[lora]\ndataset = "other"\n', "with dataset"),
    "other model": (f'{PLAIN}{LADDER}settings = {{ model = "other" }}\n', "with model"),
    "broken": ("ranks = [", "cannot be read"),
    "control characters": ("ranks = \x00", "cannot be read"),
    "empty": ("", "ranks"),
}


@pytest.mark.parametrize(("text", "says"), BAD.values(), ids=BAD)
def test_a_bad_recipe_is_one_line_that_says_what(plan, text, says):
    with pytest.raises(ConfigError) as raised:
        plan(text)
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_recipe_that_is_not_there_or_no_text(tmp_path):
    for name in ("soup", "", str(tmp_path / "none.toml"), str(tmp_path), "config.json"):
        with pytest.raises(ConfigError, match="unknown --recipe"):
            make_plan(name, Overrides())
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read"):
        make_plan(str(tmp_path / "bytes.toml"), Overrides())


words = st.text("abcdefghijklmnop_ \"'[]{}=.#\n\t0123456789-+e", max_size=60)


@given(words)
def test_whatever_a_recipe_says_it_is_a_plan_or_a_config_error(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text(PLAIN + text, encoding="utf-8")
    try:
        make_plan(str(path), Overrides())
    except ConfigError as error:
        one_line(error)


keys = st.sampled_from(["seeds", "rungs", "cause", "rates", "lora", "settings", "rank"])
plain = st.none() | st.booleans() | st.integers(-2, 9) | st.floats() | st.text(max_size=3)
values = st.recursive(
    plain,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(keys, inner, max_size=2),
    max_leaves=6,
)  # fmt: skip


@given(st.sampled_from(["ranks", "seeds", "profiled", "forgetting", "all", "full", "search",
                        "ladder", "about", "quick"]), values)  # fmt: skip
def test_whatever_a_key_holds_it_is_a_plan_or_a_config_error(monkeypatch_recipe, key, value):
    table = {
        "ranks": [2], "seeds": [1], "all": {"model": "m", "dataset": "d", "learning_rate": 1.0},
    }  # fmt: skip
    with monkeypatch_recipe(table | {key: value}):
        try:
            plan = make_plan("mine", Overrides())
        except ConfigError as error:
            one_line(error)
        else:
            assert plan.cells


@pytest.fixture(scope="module")
def monkeypatch_recipe():
    """`monkeypatch_recipe(table)`: while it is open every recipe is this table."""
    import contextlib

    from peftprof.study import plan as module

    @contextlib.contextmanager
    def put(table):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(module, "_read", lambda recipe: (recipe, table))
            yield

    return put


@given(
    st.integers(1, 1000), st.integers(1, 1000), st.sampled_from(["paper", "quick", "controlled"])
)
def test_a_quick_look_only_shortens_and_says_so(steps, examples, name):
    whole = make_plan(name, Overrides())
    quick = make_plan(name, Overrides(max_steps=steps, subset=examples))
    assert f"at most {steps} steps a run" in quick.quick
    assert f"at most {examples} training examples" in quick.quick
    assert whole.quick in quick.quick
    for before, after in zip(whole.cells, quick.cells, strict=True):
        assert before.name == after.name
        differ = {k for k in before.config if before.config[k] != after.config[k]}
        assert differ <= {"max_steps", "subset"}
        assert after.config["subset"] == examples
        # Where a recipe counts epochs, the steps are cut when their number is known.
        old, new = before.config["max_steps"], after.config["max_steps"]
        assert new == (None if old is None else min(old, steps))


def test_overrides_are_the_users_in_every_cell(plan):
    made = plan(
        PLAIN + SEARCH + LADDER,
        model="other", dataset="o.csv", device="cpu", text_columns=("a", "b"), label_column="c",
    )  # fmt: skip
    for cell in made.cells:
        assert cell.config["model"] == "other"
        assert cell.config["dataset"] == "o.csv"
        assert cell.config["device"] == "cpu"
        assert cell.config["text_columns"] == ["a", "b"]
        assert cell.config["label_column"] == "c"
    assert made.quick == ""
    assert Overrides(text_columns=("a",)).to_json() == {"text_columns": ["a"]}
    assert Overrides().to_json() == {}


def test_a_ladder_may_have_fewer_seeds_than_the_matrix(plan):
    made = plan(f"{PLAIN}[ladder]\nseeds = [2]\n{LADDER}")
    assert {c.seed for c in part(made, "ladder")} == {2}
    assert [c.name for c in part(made, "ladder")] == ["ladder-1-s2", "ladder-0-s2"]
    assert {c.method for c in part(made, "matrix")} == set(METHODS)
