from pathlib import Path

import pytest

from peftprof.breakdowns import Breakdown, Spread
from peftprof.trace import load
from tests.trace.build import Trace


def breakdown(trace: Trace, tmp_path: Path) -> Breakdown:
    return load([trace.write(tmp_path)]).breakdowns[0]


def steps(*busy: tuple[int, int, int]) -> Trace:
    """Steps of 1000 ns: (elementwise, copies, unknown) ns each, the rest idle."""
    trace = Trace()
    for n, (add, copy, unknown) in enumerate(busy):
        start = 1000 * n
        trace.range(f"step:{n}", start, start + 1000)
        for name, ns in (("aten::add", add), ("aten::copy_", copy), ("mystery::op", unknown)):
            if ns:
                trace.op(name, start, start + ns)
                start += ns
    return trace


def test_medians_are_scaled_by_one_factor_to_the_median_step(tmp_path: Path) -> None:
    found = breakdown(steps((100, 500, 0), (200, 300, 50), (600, 100, 100)), tmp_path)
    # Medians: 200, 300, 50 and idle 400, 450, 200: 950 in all, of a step of 1000.
    factor = 1000 / (200 + 300 + 50 + 400)
    rows = {row.category: row for row in found.rows}
    assert rows["elementwise"].ns == pytest.approx(200 * factor)
    assert rows["memcpy"].ns == pytest.approx(300 * factor)
    assert found.unattributed_ns == pytest.approx(50 * factor)
    assert found.idle_ns == pytest.approx(400 * factor)
    assert found.idle_by_phase_ns == {"other": pytest.approx(400 * factor)}
    assert rows["elementwise"].min_ns == pytest.approx(100 * factor)
    assert rows["elementwise"].max_ns == pytest.approx(600 * factor)
    assert sum(r.share for r in found.rows) + (found.unattributed_ns + found.idle_ns) / 1000 == (
        pytest.approx(1)
    )


def test_work_of_every_step_differing_falls_back_to_means(tmp_path: Path) -> None:
    trace = Trace()
    for n, name in enumerate(["aten::add", "aten::copy_", "aten::mm"]):
        trace.range(f"step:{n}", 1000 * n, 1000 * n + 900)
        trace.op(name, 1000 * n, 1000 * n + 900)
    assert [row.ns for row in breakdown(trace, tmp_path).rows] == pytest.approx([300] * 3)


def test_operators_are_means_by_self_time_with_the_unknown_listed_apart(tmp_path: Path) -> None:
    found = breakdown(steps((100, 500, 0), (200, 300, 60)), tmp_path)
    assert [(o.name, o.category, o.ns, o.count) for o in found.operators] == [
        ("aten::copy_", "memcpy", 400, 1),
        ("aten::add", "elementwise", 150, 1),
        ("mystery::op", "unattributed", 30, 0.5),
    ]
    assert [o.name for o in found.unattributed_operators] == ["mystery::op"]
    assert found.operators[0].share == pytest.approx(0.4)


def test_the_longest_operators_are_kept_and_the_rest_is_in_the_rows(tmp_path: Path) -> None:
    trace = Trace()
    durations = range(1, 251)
    trace.range("step:0", 0, sum(durations))
    start = 0
    for ns in durations:
        trace.op(f"aten::empty{ns}", start, start + ns)
        start += ns
    found = breakdown(trace, tmp_path)
    assert [o.ns for o in found.operators] == list(range(250, 50, -1))
    assert [row.ns for row in found.rows] == [sum(durations)]


def test_a_step_cut_off_by_the_end_of_the_trace_is_a_step(tmp_path: Path) -> None:
    trace = steps((100, 0, 0), (100, 0, 0))
    trace.range("step:2", 2000, 2100)
    found = breakdown(trace, tmp_path)
    assert found.steps == 3
    assert (found.step_ns.min, found.step_ns.median, found.step_ns.max) == (100, 1000, 1000)


def test_what_a_step_gains_at_most_where_a_category_takes_no_time(tmp_path: Path) -> None:
    """Of each step 1000 / (1000 - its own time); the median and the extremes."""
    found = breakdown(steps((100, 500, 0), (200, 300, 50), (600, 100, 100)), tmp_path)
    assert found.if_free == {
        "idle": Spread(1000 / 600, 1000 / 800, 1000 / 550),  # idle 400, 450 and 200
        "memcpy": Spread(1000 / 700, 1000 / 900, 1000 / 500),
        "elementwise": Spread(1000 / 800, 1000 / 900, 1000 / 400),
    }
    assert list(found.if_free) == ["idle", "memcpy", "elementwise"]


def test_a_step_of_one_category_alone_is_not_said_to_become_nothing(tmp_path: Path) -> None:
    assert breakdown(steps((1000, 0, 0)), tmp_path).if_free == {}
