"""Everything that needs a GPU, in one command of under eight minutes.

    python -m bench.gpu_suite [--out FOLDER] [--seconds 450]

Parts, each a process of its own, so that one that crashes ends nothing but itself: the
kernels' tests on the GPU, compiled and not interpreted; the benchmarks in quick mode; the
crossovers; the device's calibration; a QLoRA run of each backend on a model and data made
here, for such machines often reach no network; the breakdown of each run's trace; and what
`advise` would have said of the runs, beside the allocator's own peaks.

A part may take its weight's share of the time that is left, so what one leaves over goes
to those after it. One that runs out is cut short and says so; what it had measured is
kept. FOLDER gets suite.json, with everything in it, and suite.html, one page that needs
nothing else. Exit 0: all parts are right; 1: the failed ones are named; 2: no GPU.

`--rehearse` goes the same way on a CPU with tiny sizes: a test of the suite, no measurement.
"""

import argparse
import datetime
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import results
from bench.command import finish
from bench.suite_page import render
from peftprof.run import environment

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 450.0
TAIL = 6000  # characters of a part's output that are kept
BACKENDS = ("bnb", "torch", "triton")
BENCHMARKS = ("dequantize", "nf4_linear", "lora_linear")


@dataclass(frozen=True)
class Part:
    """A command, the weight of its time, and the part that must have gone well before it.

    `{seconds}` in the command is what the part should aim at, less than it may take.
    """

    name: str
    command: Sequence[str]
    weight: float
    variables: dict[str, str] = field(default_factory=dict)
    after: str | None = None
    sums_up: bool = False  # whether its last line of output says how it went


@dataclass(frozen=True)
class Outcome:
    """How a part went: ok, cut short, failed or skipped, and the end of what it printed."""

    name: str
    status: str
    why: str
    seconds: float
    output: str = ""
    errors: str = ""


def plan(work: Path, rehearse: bool) -> list[Part]:
    """The parts, in order; `work` is a folder for what they leave to each other."""
    python = sys.executable
    device = "cpu" if rehearse else "cuda"
    pytest = [python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    pytest.append("--continue-on-collection-errors")
    interpret = {"TRITON_INTERPRET": str(int(rehearse))}
    tests = "tests/kernels/test_reference.py" if rehearse else "tests/kernels"
    tiny = ["--shapes", "64x64", "--tokens", "4"] if rehearse else []
    measuring = ["--device", device, "--quick", "--seconds", "{seconds}"]
    measuring += ["--out", str(work / "results"), *tiny]
    cache = {"PEFTPROF_CACHE": str(work / "cache")}
    inputs = [python, "-m", "bench.suite_inputs", str(work / "inputs")]
    parts = [
        # They take the GPU where there is one, and those that need it are skipped elsewhere.
        Part("kernel tests", [*pytest, "-m", "not slow", tests], 160, interpret, sums_up=True),
    ]
    parts += [
        Part(name, [python, "-m", f"bench.{name}", *measuring], weight)
        for name, weight in zip(BENCHMARKS, (40, 60, 70), strict=True)
    ]
    if not rehearse:
        parts.append(Part("crossover", [python, "-m", "bench.crossover", *measuring], 80))
        calibrate = [python, "-m", "peftprof", "calibrate", "--device", device]
        parts.append(Part("calibrate", calibrate, 60, cache))
    parts.append(Part("inputs", [*inputs, *(["--tiny"] if rehearse else [])], 25))
    options = ["--method", "qlora", "--model", str(work / "inputs" / "model")]
    options += ["--dataset", str(work / "inputs" / "sentences.csv"), "--device", device]
    options += ["--max-steps", "8" if rehearse else "40"]
    for kernels in BACKENDS if not rehearse else BACKENDS[:2]:
        folder = str(work / "runs" / kernels)
        train = [python, "-m", "peftprof", "train", *options, "--kernels", kernels]
        parts.append(Part(f"train {kernels}", [*train, "--out", folder], 35, cache, "inputs"))
        read = [python, "-m", "peftprof", "breakdown", "--json", folder]
        parts.append(Part(f"breakdown {kernels}", read, 8, after=f"train {kernels}"))
    if not rehearse:
        check = [python, "-m", "peftprof", "advise", "--check", str(work / "runs"), "--all"]
        parts.append(Part("advise", [*check, "--device", device], 15, cache, "calibrate"))
    return parts


# --- Running


def run_all(
    parts: Sequence[Part],
    seconds: float,
    run: Callable[[Part, float], Outcome],
    clock: Callable[[], float] = time.monotonic,
) -> list[Outcome]:
    """The parts one after the other, each with its share of what is left of `seconds`."""
    end = clock() + seconds
    outcomes: dict[str, Outcome] = {}
    for i, part in enumerate(parts):
        before = outcomes.get(part.after or "")
        if part.after and (before is None or before.status != "ok"):
            why = f"{part.after!r} did not end well"
            outcomes[part.name] = Outcome(part.name, "skipped", why, 0.0)
            continue
        share = part.weight / sum(p.weight for p in parts[i:])
        left = (end - clock()) * share
        if left < 1:
            outcomes[part.name] = Outcome(part.name, "skipped", "no time was left", 0.0)
            continue
        print(f"{part.name}: up to {left:.0f} s", file=sys.stderr, flush=True)
        try:
            outcomes[part.name] = done = run(part, left)
        except KeyboardInterrupt:
            outcomes[part.name] = Outcome(part.name, "failed", "interrupted", 0.0)
            break
        print(f"  {done.status} {done.why}".rstrip(), file=sys.stderr, flush=True)
    return list(outcomes.values())


def run_part(part: Part, seconds: float) -> Outcome:
    """One part as a process of its own, ended with its children when its time is over."""
    aim = f"{max(1.0, 0.75 * seconds, seconds - 15):.0f}"
    command = [argument.replace("{seconds}", aim) for argument in part.command]
    search = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    variables = {"PYTHONPATH": os.pathsep.join(filter(None, search)), "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | variables | part.variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
            text=True,
            start_new_session=True,
        )
        code: int | None = None
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if code is None:
                _end(process)
        took = time.monotonic() - started
        said, complained = _text(output), _text(errors)
    status, why = judge(part, code, said, complained)
    return Outcome(part.name, status, why, round(took, 1), said, complained[-TAIL:])


def _end(process: "subprocess.Popen[str]") -> None:
    """The process and its children, asked first."""
    for which in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, which)
            process.wait(timeout=3)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _text(file: Any) -> str:
    file.seek(0)
    return str(file.read())


def judge(part: Part, code: int | None, output: str, errors: str) -> tuple[str, str]:
    """Status and reason from an exit code; None is a part that ran out of time."""
    said = [output] if part.sums_up else [output, errors]
    lines = [line.strip() for text in said for line in text.splitlines()]
    last = next((line for line in reversed(lines) if line), "it printed nothing")[:300]
    if code is None:
        return "cut short", "its time ran out"
    if code == 0:
        return "ok", last if part.sums_up else ""
    return "failed", f"{f'signal {-code}' if code < 0 else f'exit {code}'}: {last}"


# --- Collecting


def collect(outcomes: Sequence[Outcome], work: Path) -> dict[str, Any]:
    """Everything the parts left, as JSON values."""
    by_name = {outcome.name: outcome for outcome in outcomes}
    benchmarks: dict[str, Any] = {}
    for path in sorted((work / "results").glob("*/*.jsonl")):
        lines = results.lines(path)
        kinds = {kind: [v for v in lines if v["kind"] == kind] for kind in ("row", "crossover")}
        benchmarks[path.stem] = {
            "header": next((v for v in lines if v["kind"] == "header"), None),
            "rows": kinds["row"],
            "crossovers": kinds["crossover"],
            "end": next((v for v in lines if v["kind"] == "end"), None),
        }
    training, breakdowns = {}, {}
    for kernels in BACKENDS:
        record = work / "runs" / kernels / "run.json"
        if record.exists():
            training[kernels] = json.loads(record.read_text(encoding="utf-8"))
        told = by_name.get(f"breakdown {kernels}")
        if told is not None and told.status == "ok":
            breakdowns[kernels] = json.loads(told.output)
    parts = [_part(outcome, benchmarks) for outcome in outcomes]
    return {
        "version": 1,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "environment": environment.describe(),
        "parts": parts,
        "failed": [part["name"] for part in parts if part["status"] == "failed"],
        "benchmarks": benchmarks,
        "training": training,
        "breakdowns": breakdowns,
    }


def _part(outcome: Outcome, benchmarks: dict[str, Any]) -> dict[str, Any]:
    part = vars(outcome) | {"output": outcome.output[-TAIL:]}
    end = benchmarks.get(outcome.name, {}).get("end")
    if outcome.status == "ok" and end and end["cut_short"]:
        why = f"{end['done']} of {end['planned']} cases in its time"
        part |= {"status": "cut short", "why": why}
    return part


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "suite")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, tiny: no measurement")
    given = parser.parse_args(arguments)
    cuda = environment.describe()["cuda"]
    if not cuda["available"] and not given.rehearse:
        print(f"bench.gpu_suite: needs a GPU, and {cuda['reason']}", file=sys.stderr)
        return 2
    if not 0 < given.seconds < math.inf:
        print(f"bench.gpu_suite: --seconds {given.seconds} is not above 0", file=sys.stderr)
        return 2
    try:
        given.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"bench.gpu_suite: --out {given.out}: {error.strerror}", file=sys.stderr)
        return 2
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="gpu-suite-") as folder:
        work = Path(folder)
        outcomes = run_all(plan(work, given.rehearse), given.seconds, run_part)
        result = collect(outcomes, work)
    result |= {"rehearsal": given.rehearse, "seconds": round(time.monotonic() - started, 1)}
    (given.out / "suite.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    (given.out / "suite.html").write_text(render(result), encoding="utf-8")
    for part in result["parts"]:
        print(f"{part['status']:10}{part['name']:20}{part['seconds']:6.1f} s  {part['why']}")
    print(f"written: suite.json and suite.html, in {given.out}")
    if result["failed"]:
        print(f"bench.gpu_suite: failed: {', '.join(result['failed'])}", file=sys.stderr)
    elif all(part["status"] == "skipped" for part in result["parts"]):
        print("bench.gpu_suite: nothing was run; give it more --seconds", file=sys.stderr)
        return 1
    return int(bool(result["failed"]))


if __name__ == "__main__":
    finish("gpu_suite", main)
