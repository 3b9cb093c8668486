"""Up to how many rows does the fused NF4 kernel beat dequantising and a library GEMM?

    python -m bench.crossover [--quick] [--shapes llama-8b] [--no-store]

For each layer's shape, forward and dX apart: M from 1 to 512, both ways verified and timed
in turn. The crossover is the largest M up to which every M measured is a win, and a win is
beyond the self-pair's spread in every round (`bench.harness.Ratio`); 0 is never. With
--quick a direction stops at the first M that is no win.

The table is stored for this GPU in peftprof's cache, whole, where the Triton backend looks
it up. A shape that was not measured to its end is left out of it.
"""

import dataclasses
import sys
import time
from typing import Any, NamedTuple, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bench import nf4_linear, results
from bench.command import complain, finish, make_console, quiet
from bench.harness import Deadline, Row, measure
from bench.layers import Layer
from bench.options import Setup, parser, settle
from peftprof.errors import DeviceError
from peftprof.run import environment

QUESTION = "Up to how many rows does the fused NF4 kernel beat dequantising and a library GEMM?"
BASELINE, FUSED = "ours-two-step", "ours-fused"
TOKENS = "1,2,4,8,16,32,64,128,256,512"


class Found(NamedTuple):
    """The crossovers of a weight [N, K]."""

    N: int
    K: int
    forward_max_m: int
    dx_max_m: int


def main(arguments: list[str] | None = None) -> int:
    options = parser("crossover", QUESTION)
    options.add_argument("--no-store", action="store_true", help="leave the stored table alone")
    given = options.parse_args(arguments)
    try:
        need_gpu(given.device)
        kinds = [("cuda", True), ("cuda", False)]
        setup = settle(given, dict.fromkeys(kinds, "all"), dict.fromkeys(kinds, TOKENS))
    except (DeviceError, ValueError) as error:
        print(f"bench.crossover: {error}", file=sys.stderr)
        return 2
    quiet()
    console = make_console()
    with (setup.folder / "crossover.jsonl").open("w", encoding="utf-8") as file:
        found, rows = run(setup, file, console)
    console.print(show(found))
    if found and not given.no_store:
        store(setup.device, found)
    return complain("crossover", rows)


def need_gpu(device: str) -> None:
    """Raises DeviceError where `device`, or any GPU for auto, is not here."""
    cuda = environment.describe()["cuda"]
    if not cuda["available"]:
        raise DeviceError(f"needs a GPU, and {cuda['reason']}")
    if environment.check_device("cuda" if device == "auto" else device).type != "cuda":
        raise DeviceError(f"needs a GPU; --device {device} is none")


def run(setup: Setup, file: TextIO, console: Console) -> tuple[list[Found], list[Row]]:
    """Measure every shape once, as far as the time goes; the crossovers, and all rows."""
    started, deadline = time.monotonic(), Deadline(setup.seconds)
    header = results.header("crossover", QUESTION, setup, None)
    results.write(file, header)
    console.print(Text(f"{QUESTION}\n{results.machine(header)}"))
    shapes = {(layer.N, layer.K): layer for layer in setup.layers}
    found: list[Found] = []
    rows: list[Row] = []
    for layer in shapes.values():
        limits = []
        for direction in nf4_linear.DIRECTIONS:
            own, limit = _limit(setup, layer, direction, deadline)
            rows += own
            limits.append(limit)
            results.write_rows(file, own)
        if None in limits:
            break
        found.append(Found(layer.N, layer.K, *(limit or 0 for limit in limits)))
        results.write(file, {"kind": "crossover", "layer": layer.name, **found[-1]._asdict()})
        console.print(Text(f"{layer.name} [{layer.N}, {layer.K}]: {limits[0]}, {limits[1]}"))
    end = {"kind": "end", "planned": len(shapes), "done": len(found)}
    end |= {"cut_short": len(found) < len(shapes), "seconds": round(time.monotonic() - started, 1)}
    results.write(file, end)
    if end["cut_short"]:
        console.print(Text(f"cut short: {len(found)} of {len(shapes)} shapes, out of time"))
    return found, rows


def _limit(
    setup: Setup, layer: Layer, direction: str, deadline: Deadline
) -> tuple[list[Row], int | None]:
    """The rows of one direction, and its crossover; None where the time ran out."""
    rows: list[Row] = []
    wins: dict[int, bool] = {}
    for M in sorted(setup.tokens):
        if deadline.passed:
            return rows, None
        key = {**layer._asdict(), "M": M, "direction": direction}
        case = nf4_linear.build(setup, key)
        by_name = {provider.name: provider for provider in case.providers}
        case = dataclasses.replace(case, providers=[by_name[BASELINE], by_name[FUSED]])
        rows += measure(case, setup.sampler, setup.effort, None)
        wins[M] = is_win(rows[-2:])
        if setup.quick and not wins[M]:
            break
    return rows, limit(wins)


def is_win(rows: list[Row]) -> bool:
    """Whether the fused kernel is right, and faster than the baseline beyond the spread."""
    fused = next(row for row in rows if row.provider == FUSED)
    ratio = fused.ratio
    return ratio is not None and ratio.to == BASELINE and ratio.verdict == "faster"


def limit(wins: dict[int, bool]) -> int:
    """The largest M up to which all are wins; 0 where the smallest is none."""
    largest = 0
    for M in sorted(wins):
        if not wins[M]:
            break
        largest = M
    return largest


def show(found: list[Found]) -> Table:
    """The crossovers as a table."""
    table = Table(title="largest M at which the fused kernel wins", title_justify="left")
    for name in ("N", "K", "forward", "dX"):
        table.add_column(name, justify="right")
    for entry in found:
        table.add_row(*map(str, entry))
    return table


def store(device: torch.device, found: list[Found]) -> None:
    """Where the Triton backend looks for this GPU's crossovers."""
    from peftprof.run.crossovers import path_for
    from peftprof_kernels.crossover import Crossover, write_crossovers

    name = torch.cuda.get_device_name(device)
    described: dict[str, Any] = environment.describe()
    entries = [Crossover(**entry._asdict()) for entry in found]
    write_crossovers(path_for(name), name, entries, described)


if __name__ == "__main__":
    finish("crossover", main)
