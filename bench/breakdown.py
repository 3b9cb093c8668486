"""How long does a breakdown of a trace take, beside HolisticTraceAnalysis, and how much memory?

    python -m bench.breakdown [--events 2000000] [--rounds 3] [--traces FOLDER] [--growth]

Reads a synthetic training trace (bench/synthetic_trace.py) and the traces in FOLDER with
both, in turn, every second round backwards, each in a fresh process. Timed is what a user
waits for once Python and the imports are there: peftprof's `load`, that is reading,
attribution and breakdown; theirs is `TraceAnalysis`, the temporal and the kernel breakdown.
The whole process, start and imports included, is given beside it. Memory is the process's
peak. `--growth` reads peftprof alone at 1, 2, 5 and 10 million events. Both find the same
idle time in the same file or the run is refused.
"""

import argparse
import datetime
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import results
from bench.command import finish
from bench.synthetic_trace import write
from peftprof.run import environment

GROWTH = (1_000_000, 2_000_000, 5_000_000, 10_000_000)
SAME = 1e-3  # relative difference of idle time between the two

OURS = """
import json, sys, time
from pathlib import Path
from peftprof.trace import load
start = time.perf_counter()
found = load([Path(sys.argv[1])])
seconds = time.perf_counter() - start
(run,) = found.breakdowns
"""
THEIRS = """
import json, logging, os, sys, time
from pathlib import Path
logging.disable(logging.CRITICAL)
os.environ["HTA_DISABLE_NS_ROUNDING"] = "1"
from hta.trace_analysis import TraceAnalysis
start = time.perf_counter()
trace = TraceAnalysis(trace_files={0: sys.argv[1]}, trace_dir="", include_last_profiler_step=True)
times = trace.get_temporal_breakdown(visualize=False).iloc[0]
trace.get_gpu_kernel_breakdown(visualize=False)
seconds = time.perf_counter() - start
"""
# The peak of this program alone: ru_maxrss also knows what forked it.
SAY = """
status = Path("/proc/self/status").read_text()
peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
print(json.dumps({"seconds": seconds, "peak_bytes": peak, "idle_ns": %s}))
"""
PROGRAMS = {
    "ours": OURS + SAY % "run.totals.idle_ns",
    "HTA": THEIRS + SAY % '1000 * float(times["idle_time(us)"])',
}


def read(program: str, trace: Path) -> dict[str, Any]:
    """One reading in a process of its own: seconds, whole_seconds, peak_bytes, idle_ns."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAMS[program], str(trace)],
        capture_output=True,
        text=True,
        check=False,
    )
    whole = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{program} cannot read {trace}: {done.stderr.strip()[-400:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"whole_seconds": whole}


def compare(trace: Path, rounds: int, programs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """`rounds` readings by each program, in turn. Raises RuntimeError where they disagree."""
    found: dict[str, list[dict[str, Any]]] = {program: [] for program in programs}
    for number in range(rounds):
        for program in programs if number % 2 == 0 else tuple(reversed(programs)):
            found[program].append(read(program, trace))
    idle = [round_["idle_ns"] for readings in found.values() for round_ in readings]
    if max(idle) - min(idle) > SAME * max(idle):
        raise RuntimeError(f"{trace}: the programs disagree in idle time: {sorted(set(idle))}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run it as the command line asks."""
    given = _parser().parse_args(arguments)
    programs = [p for p in PROGRAMS if p == "ours" or importlib.util.find_spec("hta")]
    if len(programs) == 1:
        print("HolisticTraceAnalysis: absent (pip install -e '.[hta]')", file=sys.stderr)
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        cases: list[tuple[str, Path, Sequence[str]]] = []
        for trace in sorted(given.traces.glob("*training*.json.gz")) if given.traces else []:
            cases.append((trace.name, trace, programs))
        for events in GROWTH if given.growth else (given.events,):
            trace = Path(folder) / f"{events}.json"
            count = write(trace, events)
            cases.append(
                (f"synthetic, {count:,} events", trace, ["ours"] if given.growth else programs)
            )
        try:
            lines = [_measured(name, trace, given.rounds, by) for name, trace, by in cases]
        except RuntimeError as error:
            print(f"bench.breakdown: {' '.join(str(error).split())}", file=sys.stderr)
            return 2
    _keep(given.out, lines)
    console.print(_table(lines))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench.breakdown", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--events", type=int, default=2_000_000, help="of the synthetic trace")
    parser.add_argument("--rounds", type=int, default=3, help="readings by each program")
    parser.add_argument("--traces", type=Path, help="a folder of real *training*.json.gz traces")
    parser.add_argument("--growth", action="store_true", help="peftprof alone, 1 to 10 million")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser


def _measured(name: str, trace: Path, rounds: int, programs: Sequence[str]) -> dict[str, Any]:
    found = compare(trace, rounds, programs)
    return {"kind": "trace", "trace": name, "bytes": trace.stat().st_size, "readings": found}


def _keep(out: Path, lines: list[dict[str, Any]]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    header = {
        "kind": "header",
        "benchmark": "breakdown",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 2),
        "environment": environment.describe(),
    }
    with (out / "breakdown.jsonl").open("w", encoding="utf-8") as file:
        for line in (header, *lines):
            results.write(file, line)


def _table(lines: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("trace")
    table.add_column("reader")
    for name in ("s, median", "min-max", "process s", "peak MB", "faster", "memory"):
        table.add_column(name, justify="right")
    for line in lines:
        readings = line["readings"]
        for program, found in readings.items():
            seconds = [one["seconds"] for one in found]
            peak = max(one["peak_bytes"] for one in found)
            table.add_row(
                Text(line["trace"] if program == "ours" else ""),
                program,
                f"{statistics.median(seconds):.2f}",
                f"{min(seconds):.2f}-{max(seconds):.2f}",
                f"{statistics.median(one['whole_seconds'] for one in found):.2f}",
                f"{peak / 1e6:,.0f}",
                *_ratios(readings, program),
            )
    return table


def _ratios(readings: dict[str, list[dict[str, Any]]], program: str) -> tuple[str, str]:
    """Ours against theirs, round by round: the median and the extremes; and of the peaks."""
    if program != "ours" or "HTA" not in readings:
        return "", ""
    pairs = list(zip(readings["HTA"], readings["ours"], strict=True))
    faster = [theirs["seconds"] / ours["seconds"] for theirs, ours in pairs]
    memory = statistics.median(ours["peak_bytes"] / theirs["peak_bytes"] for theirs, ours in pairs)
    return (
        f"{statistics.median(faster):.1f}x ({min(faster):.1f}-{max(faster):.1f})",
        f"{memory:.2f}x",
    )


if __name__ == "__main__":
    finish("breakdown", main)
