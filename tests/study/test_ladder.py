"""The rungs add up, their factors multiply, and none is told of a change it is not alone in."""

import math
import statistics as plain
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.studies import CellResult
from peftprof.study import ladder
from peftprof.study.plan import BATCH
from tests.study import samples

CAUSES = ("", BATCH, "gradient work", "padding", "dequantise")
METHODS = ("full", "full", "lora", "lora", "qlora")


def made(times: list[dict[int, float]]):
    """A study whose ladder has these times of an example by rung and seed."""
    rungs = [
        (cause, method, ns, 8 if not number else 32)
        for number, (cause, method, ns) in enumerate(
            zip(CAUSES[: len(times)], METHODS[: len(times)], times, strict=True)
        )
    ]
    return samples.laddered(samples.study(), rungs)


def with_idle(study, shares: dict[int, float]):
    """The share of time without work on the device, by rung, of the first seed's profiles."""

    def change(result: CellResult) -> CellResult:
        cell = result.cell
        if cell.part != "ladder" or cell.rung not in shares or cell.seed != 1:
            return result
        idle = shares[cell.rung] * 100e6
        return replace(result, breakdown=samples.breakdown({}, 100e6, idle))

    return replace(study, results=tuple(map(change, study.results)))


ns = st.floats(1e4, 1e9)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(ns, ns, ns), min_size=2, max_size=5), st.booleans())
def test_rungs_add_up_and_factors_multiply(values, profiled):
    times = [dict(zip(samples.SEEDS, one, strict=True)) for one in values]
    study = made(times)
    if profiled:
        study = with_idle(study, {0: 0.5, 1: 0.25})
    found = ladder.rungs(study)
    assert found[0].cause == ladder.START
    middle = [plain.median(one) for one in values]
    assert found[0].ns == pytest.approx(middle[0], rel=1e-3)
    assert math.fsum(r.ns for r in found) == pytest.approx(middle[-1], rel=1e-3)
    factors = ladder.factor(study)
    assert list(factors) == list(CAUSES[1 : len(times)])
    # Of runs with the same seed, geometrically: what multiplies.
    whole = math.exp(
        plain.mean(math.log(a / b) for a, b in zip(values[0], values[-1], strict=True))
    )
    assert math.prod(factors.values()) == pytest.approx(whole, rel=1e-3)


def test_the_batch_size_is_told_apart_by_the_profile():
    study = with_idle(made([{1: 8e6}, {1: 2e6}]), {0: 0.5, 1: 0.1})
    start, launch, batch = ladder.rungs(study)
    assert (start.cause, launch.cause, batch.cause) == (ladder.START, ladder.LAUNCH, BATCH)
    assert launch.ns == pytest.approx(0.1 * 2e6 - 0.5 * 8e6)
    assert launch.ns + batch.ns == pytest.approx(-6e6)
    assert launch.factor == batch.factor
    assert batch.factor.value == pytest.approx(4)
    assert ladder.factor(study) == {BATCH: pytest.approx(4)}
    assert ladder.factor(study, ["padding"]) == {}


def test_without_a_profile_of_both_ends_the_batch_size_is_whole():
    for shares in ({}, {0: 0.5}, {1: 0.5}):
        found = ladder.rungs(with_idle(made([{1: 8e6}, {1: 2e6}]), shares))
        assert [r.cause for r in found] == [ladder.START, BATCH]
        assert found[1].ns == pytest.approx(-6e6)


def test_one_rung_or_none_is_no_ladder():
    assert ladder.rungs(samples.study()) == ()
    assert ladder.rungs(made([{1: 1e6}])) == ()
    assert ladder.factor(made([{1: 1e6}])) == {}
    assert ladder.rungs(replace(samples.study(), results=())) == ()


@pytest.mark.parametrize("state", ["failed", "missing"])
@pytest.mark.parametrize("number", [0, 1, 2, 3, 4])
def test_after_a_rung_that_is_not_there_nothing_is_told_of_its_change(state, number):
    """Else the next cause would be told of two changes."""
    study = made([dict.fromkeys(samples.SEEDS, (9.0 - i) * 1000000.0) for i in range(5)])
    for seed in samples.SEEDS:
        study = samples.ended(study, f"ladder-{number}-s{seed}", state, "ladder")
    told = [r.cause for r in ladder.rungs(study)]
    assert told == ([] if number < 2 else [ladder.START, *CAUSES[1:number]])


def test_a_missing_seed_takes_its_pairs_alone():
    all_three = [dict.fromkeys((1, 2, 3), ns) for ns in (4e6, 2e6)]
    study = made([*all_three, {2: 1e6, 3: 1e6}])
    found = ladder.rungs(study)
    assert [r.factor.n for r in found] == [3, 3, 2]
    apart = made([{1: 4e6}, {2: 2e6}])
    assert ladder.rungs(apart) == ()
    broken = made([{1: 4e6, 2: 4e6}, {1: 2e6}, {2: 1e6}])
    assert [r.cause for r in ladder.rungs(broken)] == [ladder.START, BATCH]


def test_a_rung_that_was_left_out_changes_nothing_and_breaks_nothing():
    study = made([{1: 4e6}, {1: 2e6}, {1: 1e6}, {1: 0.5e6}])
    study = replace(study, results=tuple(r for r in study.results if r.cell.rung != 2))
    assert [r.cause for r in ladder.rungs(study)] == [ladder.START, BATCH, "padding"]


def test_notes_name_what_ran_unequal_batches_among_it():
    found = ladder.rungs(made([{1: 4e6}, {1: 2e6}, {1: 1e6}]))
    assert found[0].note == "full, batch 8, pad, fp32, kernels torch"
    assert found[2].note == "lora, batch 32, pad, fp32, kernels torch"
