import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import CATEGORIES, PHASES, Timeline
from peftprof.trace import kineto
from peftprof.trace.attribute import Attribution, attribute
from peftprof.trace.timeline import timeline
from tests.trace.build import ENGINE, MAIN, Trace

REAL = Path(__file__).parents[3] / "shared" / "traces"


def attributed(trace: Trace) -> Attribution:
    with tempfile.TemporaryDirectory() as folder:
        return attribute(kineto.read(trace.write(Path(folder))))


def lane(drawn: Timeline, name: str) -> list[tuple[int, int, str, str]]:
    (found,) = [lane for lane in drawn.lanes if lane.name == name]
    return [(span.start_ns, span.end_ns, span.category, span.name) for span in found.spans]


def sound(drawn: Timeline) -> None:
    for each in drawn.lanes:
        until = 0
        for span in each.spans:
            assert until <= span.start_ns < span.end_ns <= drawn.length_ns
            assert span.category in {*CATEGORIES, "unattributed"}
            assert span.phase in PHASES
            until = span.end_ns
        assert each.spans


def test_the_step_nearest_the_median_is_drawn() -> None:
    trace = Trace()
    for n, length in enumerate((100, 900, 500, 480, 470)):
        trace.range(f"step:{n}", 1000 * n, 1000 * n + length)
        trace.op("aten::mm", 1000 * n + 10, 1000 * n + 60)
    drawn = timeline(attributed(trace))
    assert (drawn.step, drawn.length_ns) == (3, 480)
    assert lane(drawn, f"thread {MAIN}") == [(10, 60, "base_gemm", "aten::mm")]


def test_on_a_cpu_each_thread_shows_what_is_innermost() -> None:
    trace = Trace()
    trace.range("step:0", 100, 1000)
    trace.op("aten::layer_norm", 200, 600)
    trace.op("aten::copy_", 300, 350)
    trace.op("aten::mm", 400, 1200, tid=ENGINE)
    drawn = timeline(attributed(trace))
    sound(drawn)
    assert lane(drawn, f"thread {MAIN}") == [
        (100, 200, "elementwise", "aten::layer_norm"),
        (200, 250, "memcpy", "aten::copy_"),
        (250, 500, "elementwise", "aten::layer_norm"),
    ]
    assert lane(drawn, f"thread {ENGINE}") == [(300, 900, "base_gemm", "aten::mm")]


def test_beside_a_device_its_threads_come_first() -> None:
    trace = Trace()
    trace.range("step:0", 0, 400)
    trace.op("aten::mm", 0, 60)
    trace.kernel("sgemm", 20, 90, launched=10)
    trace.kernel("elementwise_kernel", 70, 120, launched=30, stream=8)
    drawn = timeline(attributed(trace))
    sound(drawn)
    assert [each.name for each in drawn.lanes] == [f"thread {MAIN}", "stream 7", "stream 8"]
    # The window begins with the first kernel; what aten::mm launches is its work.
    assert lane(drawn, "stream 7") == [(0, 70, "base_gemm", "sgemm")]
    assert lane(drawn, "stream 8") == [(50, 100, "base_gemm", "elementwise_kernel")]
    assert lane(drawn, f"thread {MAIN}")[-1][1] == 40


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(1, 60), st.integers(7, 8)),
        min_size=1,
        max_size=15,
    ),
    st.integers(1, 20),
)
def test_the_shortest_are_left_out_and_counted(
    kernels: list[tuple[int, int, int]], limit: int
) -> None:
    trace = Trace()
    trace.range("step:0", 0, 400)
    for start, lasts, stream in kernels:
        trace.kernel("sgemm", start, start + lasts, 0, MAIN, stream)
    found = attributed(trace)
    whole, part = timeline(found), timeline(found, limit)
    sound(part)
    lengths = sorted(s.end_ns - s.start_ns for each in whole.lanes for s in each.spans)
    kept = sorted(s.end_ns - s.start_ns for each in part.lanes for s in each.spans)
    assert whole.left_out == 0
    assert len(kept) == min(limit, len(lengths))
    assert kept == lengths[len(lengths) - len(kept) :]
    assert part.left_out == len(lengths) - len(kept)


@pytest.mark.parametrize("name", ["a100_ddp_training", "v100_ddp_training"])
def test_real_steps_are_sound_and_busy(name: str) -> None:
    path = REAL / f"{name}.json.gz"
    if not path.is_file():
        pytest.skip("the real traces are not here")
    found = attribute(kineto.read(path))
    drawn = timeline(found)
    sound(drawn)
    busy = found.windows.length[drawn.step] - found.idle_ns[drawn.step].sum()
    streams = [each for each in drawn.lanes if each.name.startswith("stream")]
    shown = sum(span.end_ns - span.start_ns for each in streams for span in each.spans)
    assert shown == busy + found.overlap_ns[drawn.step]
