"""What Triton makes of the kernels for GPUs that are not here, and whether it got worse.

    python -m bench.codegen                             every variant on every target
    python -m bench.codegen --targets 90 --kernel nf4_dequant
    python -m bench.codegen --check                     beside bench/codegen_baseline.json

Registers, shared memory, spills and machine code, read from the compiled kernel; and the
dequantise kernel beside that of the installed bitsandbytes. No GPU is needed, and nothing
here is a time.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from operator import attrgetter
from pathlib import Path
from typing import Any

import triton
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bench.stock_sass import NoStockError, Stock, stock_dequantise
from peftprof_kernels import codegen
from peftprof_kernels.codegen import CompileError, Listing
from peftprof_kernels.variant import TARGETS, Variant

BASELINE = Path(__file__).with_name("codegen_baseline.json")
COLUMNS = ("registers", "shared_bytes", "instructions")

# By how much a kernel may grow before that is a regression. A warp gets registers in steps
# of 8 a thread, so 9 more always cost a step, and 10 % of a small kernel's can cost a warp.
REGISTERS_MARGIN = 0.10
REGISTERS_STEP = 8
# ptxas orders and merges a little differently after any edit, by a few instructions; in
# the dequantise kernel 5 % is one instruction for three weights.
INSTRUCTIONS_MARGIN = 0.05
# A tile is what shared memory is for: 10 % is padding, more is another tile.
SHARED_MARGIN = 0.10

# Variants that a child compiles before it starts the disassembler once.
BATCH = 12
PROCESSES = 2

Outcome = Listing | CompileError


def compile_all(
    variants: Sequence[Variant], targets: Sequence[int] = TARGETS, quiet: bool = True
) -> list[Outcome]:
    """Every variant on each of the targets that it is for: by variant, then by target.

    Compiles in child processes: under TRITON_INTERPRET, which is read when triton is
    imported, this one could not. Their cache is empty, so nothing stale hides a change.
    """
    keys = {target: [v.key for v in variants if target in v.targets] for target in targets}
    tasks = [
        (target, keys[target][first : first + BATCH])
        for target in targets
        for first in range(0, len(keys[target]), BATCH)
    ]
    found: dict[tuple[str, int], Outcome] = {}
    with (
        tempfile.TemporaryDirectory() as cache,
        _environment(TRITON_CACHE_DIR=cache, TRITON_INTERPRET=None),
        ProcessPoolExecutor(PROCESSES, get_context("spawn")) as pool,
    ):
        done = pool.map(_compile, *zip(*tasks, strict=True)) if tasks else iter(())
        steps = track(
            zip(tasks, done, strict=True),
            "compiling",
            len(tasks),
            console=Console(stderr=True),
            transient=True,
            disable=quiet,
        )
        for (target, batch), outcomes in steps:
            found |= {(key, target): o for key, o in zip(batch, outcomes, strict=True)}
    return [found[v.key, t] for v in variants for t in targets if t in v.targets]


def faults(variants: Sequence[Variant], outcomes: Sequence[Outcome]) -> list[str]:
    """What does not compile, and what no kernel may have; one line each."""
    by_key = {variant.key: variant for variant in variants}
    lines = []
    for o in outcomes:
        if isinstance(o, CompileError):
            lines.append(str(o))
        else:
            found = codegen.faults(by_key[f"{o.kernel}/{o.variant}"], o)
            lines += [f"{o.name}: {fault}" for fault in found]
    return lines


def regressions(listings: Sequence[Listing], baseline: dict[str, list[int]]) -> list[str]:
    """What grew by more than its margin over the baseline, or has no baseline; one line each."""
    lines = []
    for listing in listings:
        if listing.name not in baseline:
            lines.append(f"{listing.name}: not in the baseline, see --write-baseline")
            continue
        before = dict(zip(COLUMNS, baseline[listing.name], strict=True))
        registers = before["registers"]
        limits = {
            "registers": min(registers * (1 + REGISTERS_MARGIN), registers + REGISTERS_STEP),
            "shared_bytes": before["shared_bytes"] * (1 + SHARED_MARGIN),
            "instructions": before["instructions"] * (1 + INSTRUCTIONS_MARGIN),
        }
        lines += [
            f"{listing.name}: {before[name]} -> {getattr(listing, name)} {name.replace('_', ' ')}"
            for name, limit in limits.items()
            if getattr(listing, name) > limit
        ]
    return lines


def read_baseline(path: Path = BASELINE) -> tuple[str, dict[str, list[int]]]:
    """The Triton that made the baseline, and ``COLUMNS`` of each variant on each target."""
    stored = json.loads(path.read_text())
    return stored["triton"], stored["kernels"]


def write_baseline(listings: Sequence[Listing], path: Path = BASELINE) -> None:
    """One line for each variant on each target, sorted, so that a diff says what changed."""
    rows = sorted(
        f"    {json.dumps(x.name)}: {[getattr(x, column) for column in COLUMNS]}" for x in listings
    )
    head = f'  "triton": "{triton.__version__}",\n  "columns": {json.dumps(COLUMNS)},\n'
    lines = ",\n".join(rows)
    path.write_text(f'{{\n{head}  "kernels": {{\n{lines}\n  }}\n}}\n')


def _compile(target: int, keys: Sequence[str]) -> list[Outcome]:
    by_key = {variant.key: variant for variant in codegen.all_variants()}
    return codegen.listings([by_key[key] for key in keys], target)


@contextmanager
def _environment(**wanted: str | None) -> Iterator[None]:
    """Set these variables, or unset those that are None; put back afterwards."""
    before = {name: os.environ.pop(name, None) for name in wanted}
    os.environ.update({name: value for name, value in wanted.items() if value is not None})
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def show(console: Console, listings: Sequence[Listing]) -> None:
    """A table for each kernel; a line for each variant and target."""
    kernel_of = attrgetter("kernel")
    for kernel, group in itertools.groupby(sorted(listings, key=kernel_of), kernel_of):
        rows = list(group)
        gap = 1 if console.width < 100 else 2
        table = Table(box=None, pad_edge=False, padding=(0, gap, 0, 0), header_style="dim")
        table.add_column("variant", overflow="fold")
        table.add_column("target")
        for name in ("regs", "shared", "spills", "instr/out", "tensor", "load", "store"):
            table.add_column(name, justify="right")
        previous = None
        for x in rows:
            loads, stores = x.widths("LDG", "LDGSTS"), x.widths("STG")
            table.add_row(
                "" if x.variant == previous else x.variant,
                f"sm_{x.capability}",
                str(x.registers),
                str(x.shared_bytes),
                str(x.local) if x.local == 0 else f"[red]{x.local}[/]",
                f"{x.per_output:.2f}",
                str(x.tensor_core or "-"),
                _widest(x, loads, "UTMALDG"),
                _widest(x, stores, "UTMASTG"),
            )
            previous = x.variant
        console.print(f"[bold]{kernel}[/]")
        console.print(table)
        console.print()
    console.print(
        "[dim]regs: a thread. shared: bytes a program. instr/out: instructions for an output "
        "element, a loop's body once. tensor: tensor-core instructions. load, store: bits of "
        "the widest global access.[/]"
    )


def _widest(listing: Listing, widths: set[int], bulk: str) -> str:
    return "TMA" if bulk in listing.memory else str(max(widths, default="-"))


def show_stock(console: Console, listings: Sequence[Listing], stock: Stock) -> None:
    """Our dequantise kernel beside bitsandbytes', in instructions for a weight."""
    ours = {
        x.variant: x.per_output
        for x in listings
        if x.kernel == "nf4_dequant" and x.capability == stock.capability
    }
    theirs = {"plain": stock.plain, "nested": stock.nested(64)}
    console.print(
        f"\n[bold]NF4 to bf16 on sm_{stock.capability}[/], instructions a weight; "
        f"bitsandbytes {stock.version}, {stock.library}"
    )
    for name, their in theirs.items():
        if (our := ours.get(f"{name}-bf16")) is not None:
            console.print(
                f"  {name:6}  ours {our:5.2f}  bitsandbytes {their:5.2f}  "
                f"{1 - our / their:.0%} lower"
            )
    console.print(
        f"[dim]bitsandbytes: {stock.weight_instructions} instructions a thread for "
        f"{stock.weight_elements} weights, nested {stock.absmax_instructions} more for "
        f"{stock.absmax_elements} absmax; its third step, a torch kernel that adds the offset, "
        f"is not counted. Ours is one kernel. {_stores(stock)}[/]",
    )


def _stores(stock: Stock) -> str:
    widths = sorted(name.removeprefix("STG.") for name in stock.memory if name.startswith("STG."))
    return f"Theirs stores {' and '.join(widths)} bits a thread at a time."


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.codegen", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--targets", help=f"such as 80,90; all of {','.join(map(str, TARGETS))}")
    parser.add_argument("--kernel", action="append", help="only this kernel; again for more")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it here too")
    parser.add_argument("--write-baseline", action="store_true", help=f"write {BASELINE.name}")
    parser.add_argument("--check", action="store_true", help="exit 1 on a fault or a regression")
    given = parser.parse_args()
    if given.write_baseline and (given.targets or given.kernel):
        parser.error("a baseline is of everything: no --targets, no --kernel")
    if given.json and (given.json.is_dir() or not given.json.absolute().parent.is_dir()):
        parser.error(f"--json {given.json} is no file that can be written")
    targets = _targets(parser, given.targets)
    every = codegen.all_variants()
    names = list(dict.fromkeys(v.kernel_name for v in every))
    if unknown := set(given.kernel or ()) - set(names):
        parser.error(f"no kernel {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    variants = [v for v in every if v.kernel_name in (given.kernel or names)]

    console = Console(highlight=False)
    outcomes = compile_all(variants, targets, quiet=not sys.stderr.isatty())
    listings = [o for o in outcomes if isinstance(o, Listing)]
    show(console, listings)
    stock = None
    if "nf4_dequant" in {x.kernel for x in listings}:
        try:
            stock = stock_dequantise()
            show_stock(console, listings, stock)
        except NoStockError as error:
            console.print(f"\nNo comparison with bitsandbytes: {error}.")
    wrong = faults(variants, outcomes)
    if given.check:
        wrong += _compare(console, listings)
        if not wrong:
            console.print("No faults, and nothing worse than the baseline.")
    if given.json:
        given.json.write_text(json.dumps(_as_json(listings, stock, wrong), indent=1) + "\n")
    for line in wrong:
        console.print(line, style="red", markup=False)
    if given.write_baseline:
        if wrong:
            sys.exit("not written: a baseline has no faults")
        write_baseline(listings)
    sys.exit(bool(wrong))


def _targets(parser: argparse.ArgumentParser, given: str | None) -> tuple[int, ...]:
    if given is None:
        return TARGETS
    wanted = given.split(",")
    if wrong := [t for t in wanted if t not in map(str, TARGETS)]:
        parser.error(f"no target {', '.join(wrong)}; there are {', '.join(map(str, TARGETS))}")
    return tuple(t for t in TARGETS if str(t) in wanted)


def _compare(console: Console, listings: Sequence[Listing]) -> list[str]:
    made_by, baseline = read_baseline()
    if made_by != triton.__version__:
        console.print(
            f"\nThe baseline is Triton {made_by}'s and this is {triton.__version__}: their code "
            "differs, whatever the kernels do."
        )
    return regressions(listings, baseline)


def _as_json(listings: Sequence[Listing], stock: Stock | None, wrong: list[str]) -> dict[str, Any]:
    return {
        "triton": triton.__version__,
        "listings": [asdict(x) for x in listings],
        "bitsandbytes": stock and asdict(stock),
        "faults": wrong,
    }


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("bench.codegen: interrupted")
