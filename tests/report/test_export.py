import json
from dataclasses import fields
from pathlib import Path

from peftprof.breakdowns import CATEGORIES, PHASES, Breakdown
from peftprof.report.export import to_json
from peftprof.trace import load
from tests.report.samples import compared, full, loaded, made
from tests.trace.build import Trace


def test_the_fields_that_were_promised(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 1000)
    trace.range("phase:forward", 0, 1000)
    trace.op("aten::mm", 0, 600)
    trace.op("mystery::op\ud800[b]", 700, 800)
    document = json.loads(to_json(load([trace.write(tmp_path)])))
    assert document["version"] == 1
    assert document["comparable"] is None
    assert document["differences"] == []
    assert document["comparisons"] == []
    (run,) = document["runs"]
    assert run["name"] == "trace"
    assert run["source"] == "kineto"
    assert run["device"] == "cpu"
    assert run["steps"] == 1
    assert run["step_ns"] == {"median": 1000.0, "min": 1000.0, "max": 1000.0}
    (row,) = run["rows"]
    assert {"phase", "category", "ns", "share", "count"} <= row.keys()
    assert row["phase"] in PHASES
    assert row["category"] in CATEGORIES
    assert row["ns"] + run["unattributed_ns"] + run["idle_ns"] == 1000
    assert [o["name"] for o in run["operators"]] == ["aten::mm", "mystery::op?[b]"]


def test_all_that_is_known_is_in_it_and_the_rest_is_null() -> None:
    document = json.loads(to_json(loaded(full(), made())))
    known, plain = document["runs"]
    assert known.keys() == plain.keys() == {field.name for field in fields(Breakdown)}
    assert known["idle_by_cause_ns"] == {"launch": 2.5e6, "sync": 1.5e6}
    assert known["memory"]["parts"][0] == {
        "part": "base_weights",
        "bytes": 332 * 2**20,
        "blocks": 148,
    }
    assert known["communication"]["exposed_ns"] == 0.4e6
    assert known["work"][0]["bound"] == "compute"
    assert known["rules"][0] == {"rule": "kernel: products", "share": 0.6}
    assert plain["memory"] is plain["communication"] is plain["ceilings"] is None


def test_a_comparison_has_bars_that_sum_to_the_difference() -> None:
    (comparison,) = json.loads(to_json(compared()))["comparisons"]
    assert (comparison["base"], comparison["other"]) == (0, 1)
    assert sum(bar["ns"] for bar in comparison["bars"]) == comparison["step_ns"] == -2.6e6
    assert comparison["speedup"] == 1.6
