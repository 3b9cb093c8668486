import json
from pathlib import Path

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.report.export import to_json
from peftprof.trace import load
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
