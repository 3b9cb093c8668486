"""Turns, figures and what does not fit."""

import math

import pytest
import torch

from peftprof.inferences import read_inference
from peftprof.run.serving import calls, memory, timing
from peftprof.run.serving.timing import Turn
from tests.run.serving.small import measure


class Ticking:
    """A clock that a model moves: each of its calls takes as long as is said."""

    def __init__(self) -> None:
        self.now = 0
        self.called: list[str] = []

    def model(self, name, *durations):
        taken = iter(durations)

        def call(input_ids, **_):
            self.called.append(name)
            self.now += next(taken)
            return type("Out", (), {"logits": torch.zeros(len(input_ids), 2)})

        return call


def test_variants_take_turns_and_every_second_round_goes_backwards():
    clock = Ticking()
    models = {"base": clock.model("base", *[7] * 99), "nf4": clock.model("nf4", *[9] * 99)}
    found = timing.measure(models, "forward", torch.zeros(2, 3), 3, 8, lambda: clock.now)
    assert [(t.round, t.variant, t.ns) for t in found.turns[:4]] == [
        (0, "base", (7, 7)),
        (0, "nf4", (9, 9)),
        (1, "nf4", (9, 9)),
        (1, "base", (7, 7)),
    ]
    assert len(found.turns) == 10  # 5 rounds of 2 calls make 8 and more
    # A call to warm up before each turn, and two before the first round.
    assert clock.called[:7] == ["base", "base", "nf4", "nf4", "base", "base", "base"]
    base, nf4 = timing.cells(found.turns, ["base", "nf4"], {})
    assert (base.calls, base.p50_ns, base.p99_ns) == (10, 7, 7)
    assert base.examples_per_s == pytest.approx(2 / 7e-9)
    assert base.tokens_per_s == pytest.approx(6 / 7e-9)
    assert nf4.ratio.value == pytest.approx(9 / 7)


def test_a_machine_that_slows_down_moves_no_ratio():
    def turns(variant, factor):
        drift = [100, 110, 150, 220, 300]
        return [
            Turn(variant, "decode", 2, 8, n, (round(ns * factor),) * 3)
            for n, ns in enumerate(drift)
        ]

    base, nf4 = timing.cells(turns("nf4", 1.5) + turns("base", 1.0), ["base", "nf4"], {})
    assert nf4.ratio.value == pytest.approx(1.5, rel=1e-6)
    assert nf4.ratio.low == pytest.approx(1.5, rel=1e-6)
    assert nf4.ratio.high == pytest.approx(1.5, rel=1e-6)
    assert base.ratio is None
    assert base.examples_per_s is None
    assert base.tokens_per_s == pytest.approx(2 * 15 / (3 * 880e-9))


def test_the_interval_is_students_over_the_rounds():
    from scipy import stats

    base = [Turn("base", "forward", 1, 1, n, (100,)) for n in range(4)]
    other = [Turn("nf4", "forward", 1, 1, n, (ns,)) for n, ns in enumerate((110, 120, 130, 115))]
    found = timing.ratio(other, base)
    logs = [math.log(ns / 100) for ns in (110, 120, 130, 115)]
    low, high = stats.t.interval(0.95, 3, loc=sum(logs) / 4, scale=stats.sem(logs))
    assert (found.low, found.high) == pytest.approx((math.exp(low), math.exp(high)))
    alone = timing.ratio(other[:1], base)
    assert (alone.value, alone.low, alone.high) == (pytest.approx(1.1), None, None)


def test_what_does_not_fit_is_told_and_the_rest_goes_on(tiny, tmp_path, monkeypatch, no_children):
    real = calls.classify

    def greedy_for_memory(made, ids):
        if len(ids) == 2 and any("lora_A" in name for name, _ in made.named_parameters()):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to")
        return real(made, ids)

    monkeypatch.setattr(calls, "classify", greedy_for_memory)
    record, folder = measure(tmp_path / "out", model=str(tiny("bert")))
    absent = {(c.variant, c.batch): c.absent for c in record.cells if c.absent}
    assert absent.keys() == {("unmerged", 2), ("nf4", 2)}
    assert all(why.startswith("out of memory: ") for why in absent.values())
    assert len([c for c in record.cells if c.p50_ns]) == 6
    assert read_inference(folder) == record


def test_any_other_error_of_a_call_is_a_bug(tiny, tmp_path, monkeypatch, no_children):
    def broken(*_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(calls, "classify", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        measure(tmp_path / "out", model=str(tiny("bert")))
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_leaves_cells_without_a_peak():
    cells = [("forward", 1, 8), ("forward", 2, 8)]
    answers = [{"weight_bytes": 5, "loaded_bytes": 7}, {"peak_bytes": 9, "absent": None}]
    found = memory._peaks(answers, "nf4", cells, -9)
    assert found.bytes == {cells[0]: 9}
    assert "run out of memory" in found.absent[cells[1]]
    assert found.footprint.weight_bytes == 5
    found = memory._peaks([{"error": "out of memory: so much"}], "nf4", cells, 2)
    assert found.footprint is None
    assert set(found.absent.values()) == {"out of memory: so much"}
