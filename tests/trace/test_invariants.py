"""Random traces against a slow, obvious count of every nanosecond."""

import json
import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import CATEGORIES, PHASES
from peftprof.errors import TraceError
from peftprof.trace import kineto, load
from peftprof.trace.attribute import Attribution, attribute
from peftprof.trace.breakdown import make_breakdown
from tests.trace.build import MAIN, Trace

OPERATORS = {
    "aten::layer_norm": "elementwise",
    "aten::linear": "base_gemm",
    "aten::copy_": "memcpy",
    "mystery::op": None,  # what is round it, else unattributed
}
KERNELS = {
    "elementwise_kernel": ("elementwise", 0),
    "sgemm": ("base_gemm", 0),
    "ncclKernel_AllReduce": ("communication", 1),
    "Memcpy DtoD": ("memcpy", 2),
}
UNKNOWN = "unattributed"
LENGTH = 120  # of a step, in ns
Count = dict[tuple[int, str, str], int]  # (step, phase, category) to ns

spans = st.tuples(st.integers(0, LENGTH), st.integers(0, LENGTH)).map(sorted)
operators = st.lists(
    st.tuples(st.sampled_from(sorted(OPERATORS)), spans, st.sampled_from([MAIN, MAIN, 8, 9])),
    min_size=1,
    max_size=12,
)
kernels = st.lists(
    st.tuples(
        st.sampled_from(sorted(KERNELS)),
        st.integers(0, 300),  # start after the launch
        st.integers(0, 60),  # duration
        st.integers(0, LENGTH - 1),  # launch within the step
        st.integers(7, 9),  # stream
        st.booleans(),  # the launch was recorded
    ),
    min_size=1,
    max_size=8,
)


def attributed(trace: Trace) -> Attribution:
    with tempfile.TemporaryDirectory() as folder:
        return attribute(kineto.read(trace.write(Path(folder))))


def counted(found: Attribution) -> Count:
    names = (*CATEGORIES, UNKNOWN)
    total: Count = {}
    pieces = found.pieces
    for step, row, ns in zip(
        pieces.step.tolist(), pieces.row.tolist(), pieces.ns.tolist(), strict=True
    ):
        key = step, PHASES[found.meaning.phase[row]], names[found.meaning.category[row]]
        total[key] = total.get(key, 0) + ns
    return {key: ns for key, ns in total.items() if ns}


def adds_up(found: Attribution) -> None:
    busy = np.zeros(len(found.windows), np.int64)
    np.add.at(busy, found.pieces.step, found.pieces.ns)
    assert (found.pieces.ns >= 0).all()
    assert (found.idle_ns >= 0).all()
    assert (found.overlap_ns >= 0).all()
    assert (busy + found.idle_ns.sum(axis=1) == found.windows.length).all()
    breakdown = make_breakdown(found, "x", "kineto")
    total = sum(row.ns for row in breakdown.rows) + breakdown.idle_ns + breakdown.unattributed_ns
    assert abs(total - breakdown.step_ns.median) < 1e-6 * breakdown.step_ns.median
    assert abs(sum(breakdown.idle_by_phase_ns.values()) - breakdown.idle_ns) < 1e-3


def phase_at(time: int) -> str:
    return "forward" if time % 200 < 60 else "backward" if time % 200 < 100 else "other"


def skeleton(steps: int) -> Trace:
    trace = Trace()
    for n in range(steps):
        trace.range(f"step:{n}", 200 * n, 200 * n + LENGTH)
        trace.range("phase:forward", 200 * n, 200 * n + 60)
        trace.range("phase:backward", 200 * n + 60, 200 * n + 100)
    return trace


def nested(spans: list[tuple[str, list[int], int]]) -> list[tuple[str, int, int, int]]:
    """Operators cut so that on each thread they nest, and within a phase on the main one."""
    kept: list[tuple[str, int, int, int]] = []
    for name, (start, end), tid in spans:
        if tid == MAIN:
            end = min(
                end, next(edge for edge in (60, 100, LENGTH) if start < edge or edge == LENGTH)
            )
        crosses = any(
            tid == t and (s < start < e < end or start < s < end < e) for _, s, e, t in kept
        )
        if not crosses and (start, end, tid) not in {(s, e, t) for _, s, e, t in kept}:
            kept.append((name, start, end, tid))
    return kept


def category_of(operator: tuple[str, int, int, int], all_: list[tuple[str, int, int, int]]) -> str:
    around = [
        o for o in all_ if o[3] == operator[3] and o[1] <= operator[1] and operator[2] <= o[2]
    ]
    around.sort(key=lambda o: o[2] - o[1])
    return next((c for o in around if (c := OPERATORS[o[0]])), UNKNOWN)


@settings(max_examples=120, deadline=None)
@given(st.lists(operators, min_size=1, max_size=3))
def test_every_nanosecond_of_a_cpu_step_is_counted_once(steps: list[list]) -> None:  # type: ignore[type-arg]
    trace = skeleton(len(steps))
    expected: Count = {}
    for n, spans in enumerate(steps):
        placed = nested(spans)
        for name, start, end, tid in placed:
            trace.op(name, 200 * n + start, 200 * n + end, tid)
        for time in range(LENGTH):
            running = [o for o in placed if o[1] <= time < o[2]]
            main = [o for o in running if o[3] == MAIN]
            if not running:
                continue
            if main:
                winner = min(main, key=lambda o: o[2] - o[1])
                key = n, phase_at(time), category_of(winner, placed)
            else:
                key = n, "other", "beside"
            expected[key] = expected.get(key, 0) + 1
    if not expected:
        return
    found = attributed(trace)
    adds_up(found)
    got = counted(found)
    # Which of several other threads is counted is a matter of order; how long they are is not.
    main_rows = found.events.thread[found.pieces.row] == found.events.thread[0]
    beside: Count = {}
    for step, ns in zip(
        found.pieces.step[~main_rows].tolist(), found.pieces.ns[~main_rows].tolist(), strict=True
    ):
        beside[step, "other", "beside"] = beside.get((step, "other", "beside"), 0) + ns
    assert {k: v for k, v in beside.items() if v} == {
        k: v for k, v in expected.items() if k[2] == "beside"
    }
    of_main = Attribution(
        **{
            **vars(found),
            "pieces": type(found.pieces)(*(c[main_rows] for c in vars(found.pieces).values())),
        }
    )
    assert counted(of_main) == {k: v for k, v in expected.items() if k[2] != "beside"}
    assert sum(got.values()) == sum(expected.values())


@settings(max_examples=120, deadline=None)
@given(st.lists(operators, min_size=1, max_size=2), st.sampled_from([1, 10_000]))
def test_operators_that_cross_each_other_still_add_up(steps: list[list], unit: int) -> None:  # type: ignore[type-arg]
    trace, within = Trace(), Trace()
    busy = set()
    for n, spans in enumerate(steps):
        start_of_step = 200 * n * unit
        for each in (trace, within):
            each.range(f"step:{n}", start_of_step, start_of_step + LENGTH * unit)
        trace.range("phase:forward", start_of_step, start_of_step + 60 * unit)
        for name, (start, end), tid in spans:
            for each in (trace, within):
                each.op(name, start_of_step + start * unit, start_of_step + end * unit, tid)
            busy |= {200 * n + time for time in range(start, end)}
    if not busy:
        return
    found = attributed(within)
    adds_up(found)
    assert found.pieces.ns.sum() == len(busy) * unit
    adds_up(attributed(trace))  # and where they cross a range


@settings(max_examples=200, deadline=None)
@given(st.lists(kernels, min_size=1, max_size=3), st.integers(-150, 10_000))
def test_every_nanosecond_of_a_device_step_is_counted_once(steps: list[list], gap: int) -> None:  # type: ignore[type-arg]
    """`gap` is the distance between the CPU's clock and the device's."""
    trace = skeleton(len(steps))
    events = []  # (priority, start, end, phase, category)
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for n, launches in enumerate(steps):
        for name, delay, duration, at, stream, recorded in launches:
            start = max(0, 200 * n + at + delay + gap)
            cat = "gpu_memcpy" if name.startswith("Mem") else "kernel"
            launch = 200 * n + at if recorded else None
            trace.kernel(name, start, start + duration, launch, MAIN, stream, cat)
            category, priority = KERNELS[name]
            phase = phase_at(at) if recorded else "other"
            events.append((priority, start, start + duration, phase, category))
            if recorded:
                first[n] = min(first.get(n, start), start)
                last[n] = max(last.get(n, 0), start + duration)
    if not first:
        return
    order = sorted(first)
    end = max(last[order[-1]], 200 * order[-1] + LENGTH)
    starts = [min(first[n] for n in order[i:]) for i in range(len(order))]
    ends = [*starts[1:], end]
    if np.median(np.subtract(ends, starts)) == 0:
        return
    expected: Count = {}
    busy = [0] * len(starts)
    for step, (begin, stop) in enumerate(zip(starts, ends, strict=True)):
        for time in range(begin, stop):
            running = [e for e in events if e[1] <= time < e[2]]
            if not running:
                continue
            busy[step] += 1
            best = min((e[0], e[1]) for e in running)
            winners = {e[3:] for e in running if (e[0], e[1]) == best}
            if len(winners) == 1:
                key = (step, *winners.pop())
                expected[key] = expected.get(key, 0) + 1
    found = attributed(trace)
    adds_up(found)
    got = counted(found)
    for key, ns in expected.items():
        assert got[key] >= ns  # more where several start together: any of them may be counted
    assert [int(found.pieces.ns[found.pieces.step == i].sum()) for i in range(len(starts))] == busy
    assert found.windows.length.tolist() == np.subtract(ends, starts).tolist()


@settings(max_examples=60, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(["ph", "cat", "name", "ts", "dur", "pid", "tid", "args", "id"]),
        inner | st.sampled_from(["X", "s", "f", "kernel", "cpu_op", "user_annotation", "step:1"]),
        max_size=8,
    ),
    max_leaves=40,
))  # fmt: skip
def test_any_json_is_read_or_refused_in_one_line(document: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "t.json"
        for content in (document, {"traceEvents": document}, {"traceEvents": [document] * 2}):
            path.write_text(json.dumps(content))
            message = ""
            try:
                load([path])
            except TraceError as error:
                message = str(error)
            assert "\n" not in message
