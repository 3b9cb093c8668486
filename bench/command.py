"""What every benchmark of kernels does around its cases: measure, write down, print, draw.

Results go to bench/results/<device>/<name>.jsonl and .svg (`bench.results`).
"""

import logging
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TextIO

from rich.console import Console
from rich.text import Text

from bench import results
from bench.harness import Case, Deadline, Ratio, Row, measure
from bench.options import Setup, parser, settle
from bench.picture import draw, title
from bench.work import measure_ceilings
from peftprof.errors import DeviceError

OWN = "ours"  # what our providers' names begin with
HEAD = ("provider", "ms, p50", "p20 to p80", "of light", "error")
LINE = "  {:18}{:>9}{:>22}{:>10}{:>9}"  # 70 columns; what follows from it goes below
WIDTH = 120


@dataclass(frozen=True)
class Benchmark:
    """One question in many cases: `plan` names them, `build` makes each when its turn comes.

    `shapes` and `tokens` are taken where none are asked for, by kind of device and quick.
    """

    name: str
    question: str
    plan: Callable[[Setup], list[dict[str, Any]]]
    build: Callable[[Setup, dict[str, Any]], Case]
    shapes: dict[tuple[str, bool], str]
    tokens: dict[tuple[str, bool], str]


def finish(name: str, run: Callable[[], int]) -> NoReturn:
    """Exit as `run` says; a Ctrl-C is one line."""
    try:
        sys.exit(run())
    except KeyboardInterrupt:
        print(f"bench.{name}: interrupted; what was measured is in its results", file=sys.stderr)
        sys.exit(130)


def main(benchmark: Benchmark, arguments: list[str] | None = None) -> int:
    """Run it as the command line asks. 1 where one of our providers is wrong or fails."""
    given = parser(benchmark.name, benchmark.question).parse_args(arguments)
    try:
        setup = settle(given, benchmark.shapes, benchmark.tokens)
    except (DeviceError, ValueError) as error:
        print(f"bench.{benchmark.name}: {error}", file=sys.stderr)
        return 2
    quiet()
    console = make_console()
    path = setup.folder / f"{benchmark.name}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        rows = _run(benchmark, setup, file, console)
    header, *others = results.lines(path)
    kept = [line for line in others if line["kind"] == "row"]
    picture = path.with_suffix(".svg")
    picture.write_text(draw(kept, benchmark.question, results.machine(header)), encoding="utf-8")
    console.print(Text(f"\nwritten: {path.name} and {picture.name}, in {setup.folder}"))
    return complain(benchmark.name, rows)


def _run(benchmark: Benchmark, setup: Setup, file: TextIO, console: Console) -> list[Row]:
    started, deadline = time.monotonic(), Deadline(setup.seconds)
    sampler, ceilings = setup.sampler, None
    if sampler is not None:
        ceilings = measure_ceilings(setup.device, setup.dtype, sampler, setup.quick)
    header = results.header(benchmark.name, benchmark.question, setup, ceilings)
    results.write(file, header)
    console.print(Text(f"{benchmark.question}\n{results.machine(header)}"))
    plan = benchmark.plan(setup)
    rows: list[Row] = []
    told: set[str] = set()
    done = 0
    for key in plan:
        if deadline.passed:
            break
        found = measure(benchmark.build(setup, key), sampler, setup.effort, ceilings)
        done += 1
        results.write_rows(file, found)
        console.print(*table(found, told), sep="\n")
        rows += found
    end = {"kind": "end", "planned": len(plan), "done": done, "cut_short": done < len(plan)}
    results.write(file, end | {"seconds": round(time.monotonic() - started, 1)})
    if done < len(plan):
        console.print(Text(f"\ncut short: {done} of {len(plan)} cases, out of time", "bold"))
    return rows


def complain(name: str, rows: list[Row]) -> int:
    """1, and a line that says so, where a provider of ours is wrong or failed; else 0."""
    ours = [row for row in rows if row.provider.startswith(OWN)]
    bad = [row for row in ours if row.status in ("wrong", "failed")]
    if bad:
        first = f"{bad[0].provider} in {title(bad[0].case)}: {bad[0].why}"
        print(f"bench.{name}: {len(bad)} wrong or failed, first {first}", file=sys.stderr)
    return int(bool(bad))


def make_console() -> Console:
    """A console wide enough for the table, where the output is no terminal."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def quiet() -> None:
    """Other packages' advice is not this benchmark's result."""
    warnings.simplefilter("ignore")
    for name in ("bitsandbytes", "torchao"):
        logging.getLogger(name).setLevel(logging.ERROR)


def table(rows: list[Row], told: set[str]) -> list[Text]:
    """A case's title, its timed rows in a table, and what was not timed with the reason.

    Who is absent is said once a run: `told` remembers.
    """
    shown = [Text("\n" + title(rows[0].case), "bold")]
    shown += [Text(LINE.format(*HEAD), "dim")] if any(row.ms for row in rows) else []
    for row in rows:
        if row.ms is not None:
            light = "" if row.light is None else f"{100 * row.light:.0f} %"
            spread = f"{row.ms.p20:.4g} to {row.ms.p80:.4g}"
            said = against(row.provider, row.ratio) + _notes(row.notes)
            values = (row.provider, f"{row.ms.p50:.4g}", spread, light, f"{row.error:.0e}")
            shown.append(Text(LINE.format(*values)))
            shown += [Text(f"      {said}", "dim")] if said else []
        elif row.status == "right":
            shown.append(Text(f"  {row.provider}: right, error {row.error:.1e}{_notes(row.notes)}"))
        elif row.status in ("wrong", "failed"):
            shown.append(Text(f"  {row.provider} is {row.status}: {row.why}", "bold red"))
    absent = [f"{row.provider} ({row.why})" for row in rows if row.status == "absent"]
    news = [text for text in absent if text not in told]
    told.update(news)
    return [*shown, Text(f"  absent: {', '.join(news)}", "dim")] if news else shown


def against(name: str, ratio: Ratio | None) -> str:
    """A ratio in words: what was measured, or that nothing was."""
    if ratio is None:
        return ""
    if name == ratio.to:
        return f"baseline, self-pair within {100 * (ratio.self_spread - 1):.1f} %"
    if ratio.verdict not in ("faster", "slower"):
        return ratio.verdict
    return f"{ratio.median:.2f}x as fast ({ratio.low:.2f} to {ratio.high:.2f})"


def _notes(notes: dict[str, Any]) -> str:
    return "".join(f"; {name.replace('_', ' ')} {value}" for name, value in notes.items())
