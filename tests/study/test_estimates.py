"""Figures by configuration and paired comparisons, against plain arithmetic over hand-made runs."""

import statistics as plain
from dataclasses import replace

import pytest

from peftprof.records import Memory
from peftprof.studies import CellResult
from peftprof.study import estimates
from tests.study import samples

NAMES = ["full", "lora-r4", "lora-r8", "qlora-r4", "qlora-r8"]


def test_configurations_are_in_order_their_runs_by_seed():
    made = samples.study(ranks=(32, 4, 16, 8))
    backwards = replace(made, results=made.results[::-1])
    found = estimates.by_configuration(backwards)
    ranks = [f"{method}-r{rank}" for method in ("lora", "qlora") for rank in (4, 8, 16, 32)]
    assert list(found) == ["full", *ranks]
    for runs in found.values():
        assert [run.cell.seed for run in runs] == list(samples.SEEDS)


def test_runs_that_are_not_complete_count_nowhere():
    made = samples.ended(samples.study(), "lora-r4-s2")
    made = samples.ended(made, "qlora-r8", "missing")
    assert [r.cell.seed for r in estimates.by_configuration(made)["lora-r4"]] == [1, 3]
    assert estimates.by_configuration(made)["qlora-r8"] == []
    for find in (
        estimates.accuracies,
        estimates.throughputs,
        estimates.step_times,
        estimates.memories,
    ):
        assert list(find(made)) == NAMES[:-1]
        assert find(made)["lora-r4"].n == 2
    assert estimates.compare_time(made, "full", "qlora-r8") is None
    assert estimates.compare_accuracy(made, "full", "qlora-r8") is None


@pytest.mark.parametrize(
    ("ranks", "chosen"), [((4, 8, 16), 8), ((4, 16), 4), ((2, 32), 2), ((16, 32), 16), ((12, 4), 4)]
)
def test_what_stands_for_a_method_is_rank_8_or_the_nearest(ranks, chosen):
    made = samples.study(ranks=ranks)
    assert estimates.reference(made, "lora") == f"lora-r{chosen}"
    assert estimates.reference(made, "full") == "full"
    assert estimates.reference(replace(made, results=()), "full") == ""


def test_figures_of_runs_with_known_times_answers_and_memory():
    made = samples.timed(samples.study(), "lora-r8", {1: 1e6, 2: 2e6, 3: 4e6})
    made = samples.answered(made, "lora-r8", lambda seed: set(range(seed)))
    peaks = {1: 7, 2: 3, 3: 5}
    made = samples.of_record(made, "lora-r8", memory=lambda s: Memory(peaks[s], 99, 99, 99))
    accuracy = estimates.accuracies(made)["lora-r8"]
    assert accuracy.value == pytest.approx(398 / 400)
    mean_ns = plain.mean(
        ns / samples.SAMPLES
        for run in estimates.by_configuration(made)["lora-r8"]
        for ns in run.step_ns
    )
    assert estimates.throughputs(made)["lora-r8"].value == pytest.approx(1e9 / mean_ns)
    assert estimates.step_times(made)["lora-r8"].value == pytest.approx(2e6 * samples.SAMPLES / 1e6)
    memory = estimates.memories(made)["lora-r8"]
    assert (memory.value, memory.low, memory.high, memory.n) == (5, 3, 7, 3)


def test_the_middle_of_two_peaks_is_between_them():
    made = samples.study(seeds=(1, 2))
    made = samples.of_record(made, "full", memory=lambda s: Memory(10 * s, 0, 0, 0))
    found = estimates.memories(made)["full"]
    assert (found.value, found.low, found.high) == (15, 10, 20)


def test_on_a_cpu_the_peak_is_the_resident_one():
    cpu = samples.of_record(samples.study(), "", memory=Memory(None, None, None, 42, {"a": "b"}))
    assert estimates.memories(cpu)["full"].value == 42


@pytest.mark.parametrize("memory", [None, Memory(None, None, None, None)])
def test_memory_that_nobody_measured_is_left_out(memory):
    made = samples.of_record(samples.study(), "lora", memory=memory)
    assert set(estimates.memories(made)) == {"full", "qlora-r4", "qlora-r8"}


def test_a_run_without_steps_after_its_warm_up_has_an_accuracy_and_no_times():
    def short(result: CellResult) -> CellResult:
        return replace(result, step_ns=(), step_samples=(), step_tokens=())

    made = samples.changed(samples.study(), "full", short)
    assert "full" in estimates.accuracies(made)
    assert "full" in estimates.memories(made)
    assert "full" not in estimates.throughputs(made)
    assert "full" not in estimates.step_times(made)
    assert estimates.compare_time(made, "full", "lora-r8") is None
    assert estimates.compare_accuracy(made, "full", "lora-r8") is not None


def test_pairs_have_the_same_seed():
    made = samples.study()
    groups = estimates.by_configuration(samples.ended(samples.ended(made, "full-s2"), "lora-r8-s3"))
    found = estimates.pairs(groups["full"], groups["lora-r8"])
    assert [(a.cell.name, b.cell.name) for a, b in found] == [("full-s1", "lora-r8-s1")]


def test_a_comparison_is_by_pairs_of_seeds_and_turns_around():
    made = samples.timed(samples.study(), "full", {1: 4e6, 2: 6e6, 3: 8e6})
    made = samples.timed(made, "lora-r8", {1: 2e6, 2: 3e6, 3: 4e6})
    there = estimates.compare_time(made, "full", "lora-r8")
    back = estimates.compare_time(made, "lora-r8", "full")
    assert there is not None
    assert back is not None
    assert there.quantity == "examples a second"
    assert (there.a, there.b) == ("full", "lora-r8")
    # Runs of full differ by a factor of two, its pairs with LoRA not at all.
    assert there.difference.value == pytest.approx(2)
    assert there.difference.high - there.difference.low < 0.01
    assert back.difference.value == pytest.approx(0.5)
    made = samples.answered(made, "full", lambda seed: set(range(40)))
    made = samples.answered(made, "lora-r8", lambda seed: set(range(30)))
    accuracy = estimates.compare_accuracy(made, "full", "lora-r8")
    assert accuracy is not None
    assert accuracy.difference.value == pytest.approx(10 / 400)
    assert accuracy.p == pytest.approx(2 / 2**10)


def test_the_reports_comparisons_are_methods_at_rank_8_and_ranks_of_a_method():
    found = estimates.comparisons(samples.study(ranks=(4, 8, 16)))
    wanted = {
        ("full", "lora-r8"), ("full", "qlora-r8"), ("lora-r8", "qlora-r8"),
        ("lora-r4", "lora-r8"), ("lora-r4", "lora-r16"), ("lora-r8", "lora-r16"),
        ("qlora-r4", "qlora-r8"), ("qlora-r4", "qlora-r16"), ("qlora-r8", "qlora-r16"),
    }  # fmt: skip
    assert {(p.a, p.b) for p in found if p.quantity == "accuracy"} == wanted
    assert {(p.a, p.b) for p in found if p.quantity == "examples a second"} == wanted
    assert len(found) == 2 * len(wanted)
    assert all(p.p == 1 for p in found)  # every run is like every other


def test_a_study_with_nothing_in_it():
    empty = replace(samples.study(), results=(), labels=())
    missing = samples.ended(samples.study(), "", "missing")
    for made in (empty, missing):
        for find in (
            estimates.accuracies,
            estimates.throughputs,
            estimates.step_times,
            estimates.memories,
        ):
            assert find(made) == {}
        assert estimates.comparisons(made) == ()
