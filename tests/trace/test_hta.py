"""Agreement with HolisticTraceAnalysis, an independent reader, to 0.1 %."""

import importlib.util
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench.synthetic_trace import write
from peftprof.trace import load

TRACES = Path(__file__).parents[3] / "shared" / "traces"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("hta") is None,
    reason="HolisticTraceAnalysis is not installed; pip install -e '.[hta]'",
)
needs_traces = pytest.mark.skipif(
    not TRACES.is_dir(), reason="the folder of other people's traces, ../shared/traces, is missing"
)
AGREES = 1e-3

# In a process of its own: it forks, plots and logs. It drops the last step unless told
# otherwise. Times of types are sums over many short stretches, each cut to microseconds;
# only where it rounds all times first, as it does by itself, nothing is lost by that.
READ = """
import json, logging, os, sys
logging.disable(logging.CRITICAL)
from hta.trace_analysis import TraceAnalysis

def trace(exact):
    os.environ["HTA_DISABLE_NS_ROUNDING"] = exact
    return TraceAnalysis(
        trace_files={0: sys.argv[1]}, trace_dir="", include_last_profiler_step=True
    )

times = trace("1").get_temporal_breakdown(visualize=False).iloc[0].to_dict()
types = trace("0").get_gpu_kernel_breakdown(visualize=False)[0]
sums = dict(zip(types["kernel_type"].tolist(), types["sum"].tolist()))
print(json.dumps({"times": times, "types": sums}))
"""


@cache
def theirs(path: Path) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", READ, str(path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def agrees(path: Path) -> None:
    (breakdown,) = load([path]).breakdowns
    ours, times = breakdown.totals, theirs(path)["times"]
    assert ours is not None
    assert ours.span_ns == pytest.approx(1000 * times["kernel_time(us)"], rel=AGREES)
    assert ours.idle_ns == pytest.approx(1000 * times["idle_time(us)"], rel=AGREES)
    assert ours.compute_ns == pytest.approx(1000 * times["compute_time(us)"], rel=AGREES)
    other = times["non_compute_time(us)"]
    assert ours.busy_ns - ours.compute_ns == pytest.approx(1000 * other, rel=AGREES)


@needs_traces
@pytest.mark.parametrize("name", ["v100_ddp_training.json.gz", "a100_ddp_training.json.gz"])
def test_busy_idle_and_compute_of_real_traces(name: str) -> None:
    agrees(TRACES / name)


@needs_traces
def test_communication_by_kernel_type() -> None:
    """Copies are too short for its microseconds; test_real_traces.py counts them all."""
    path = TRACES / "a100_ddp_training.json.gz"
    (breakdown,) = load([path]).breakdowns
    assert breakdown.totals is not None
    talks = sum(us for kind, us in theirs(path)["types"].items() if "COMMUNICATION" in kind)
    assert breakdown.totals.communication_ns == pytest.approx(1000 * talks, rel=AGREES)


def test_a_synthetic_training_trace(tmp_path: Path) -> None:
    path = tmp_path / "synthetic.json"
    write(path, 20_000)
    agrees(path)


def test_a_trace_that_disagrees_is_noticed(tmp_path: Path) -> None:
    """The control: a longer kernel in the file that we read, not in theirs."""
    path = tmp_path / "synthetic.json"
    write(path, 10_000)
    theirs(path)
    document = json.loads(path.read_text())
    kernel = next(e for e in document["traceEvents"] if e.get("cat") == "kernel")
    kernel["dur"] += 5_000_000
    path.write_text(json.dumps(document))
    with pytest.raises(AssertionError):
        agrees(path)
