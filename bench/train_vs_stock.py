"""Is this runner faster than stock transformers.Trainer + PEFT + bitsandbytes, and by how much?

    python -m bench.train_vs_stock [--pairs 3] [--steps 40] [--methods lora] [--precisions fp32]

Both sides train the same model with the same hyperparameters from the same initial weights
on the same examples in the same order, or the benchmark ends with an error. Every run is a
process of its own, one after the other. A round runs every cell (method x precision) on both
sides; which side goes first changes every time. The first five steps are not timed. Stock
pads to the longest of the batch; both have as many threads, and the same environment.

Timed runs have the configuration's dropout, and so other random numbers on either side: their
losses differ by them. A further pair per cell has every dropout off, the model's and the
adapter's (`--no-equality` leaves it out): its losses can be compared step by step.

Memory is the peak of the training steps: on CUDA the allocator's, else the resident peak,
and beside it how far that is above what the process held just before its model was loaded:
the resident peak has Python and the libraries in it, stock's Trainer too.
MFU is model FLOPs on real tokens (`bench.train_vs_stock_flops`) a second, over a large GEMM
in the cell's precision, measured here before and after all runs, the faster of the two.
Results go to bench/results/<device>/train_vs_stock.jsonl and .svg, written at the end.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.text import Text

from bench.command import make_console
from bench.options import RESULTS, device_name, slug
from bench.train_vs_stock_figures import (
    Cell,
    Run,
    UnequalError,
    across,
    check_pair,
    order,
    summary,
)
from bench.train_vs_stock_picture import draw
from bench.train_vs_stock_report import between, machine, table
from peftprof.config import METHODS, RunConfig, make_config, recipes
from peftprof.errors import PeftprofError
from peftprof.run import environment, runner
from peftprof.run.loop import WARMUP_STEPS
from peftprof.run.source import locate

NAME = "train_vs_stock"
ROOT = Path(__file__).resolve().parent.parent
PRECISIONS = ("fp32", "bf16")
BATCH = 32  # of the default recipe here, whose own is smaller; a recipe's own otherwise


class ChildError(RuntimeError):
    """A run that failed; the message is its one line."""


def main(arguments: list[str] | None = None) -> int:
    """Run it as the command line asks."""
    given = _parser().parse_args(arguments)
    try:
        if given.steps <= WARMUP_STEPS:
            least = WARMUP_STEPS + 1
            raise ValueError(f"--steps is {given.steps}; it must be {least} or more (warm-up)")
        if given.pairs < 1:
            raise ValueError(f"--pairs is {given.pairs}; it must be 1 or more")
        configs = _configs(given)
        runner.prepare(next(iter(configs.values())))  # bad input shows before a minute of GEMMs
        lines = measure(configs, given.pairs, equality=not given.no_equality)
        folder = _keep(given.out, lines)
    except KeyboardInterrupt:
        print(f"bench.{NAME}: interrupted; nothing is written", file=sys.stderr)
        return 130
    except (PeftprofError, ChildError, UnequalError, ValueError, OSError) as error:
        print(f"bench.{NAME}: {error}", file=sys.stderr)
        return 2
    console = make_console()
    console.print(Text(machine(lines[0])), table(lines), *between(lines), sep="\n")
    console.print(Text(f"\nwritten: {NAME}.jsonl and {NAME}.svg, in {folder}"))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"python -m bench.{NAME}", description=(__doc__ or "").splitlines()[0]
    )
    for option, known in (("--methods", METHODS), ("--precisions", PRECISIONS)):
        said = f"of {', '.join(known)}; default all"
        parser.add_argument(option, type=_names(known), default=known, metavar="A,B", help=said)
    parser.add_argument("--pairs", type=int, default=3, help="timed pairs of runs a cell (3)")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps a run (40)")
    parser.add_argument("--recipe", choices=recipes(), default="default", help="as of train")
    parser.add_argument("--batch-size", type=int, help=f"{BATCH}, or a recipe's own")
    parser.add_argument("--model", help="as of train")
    parser.add_argument("--dataset", help="as of train")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--no-equality", action="store_true", help="no pair without dropout")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of results")
    return parser


def _names(known: Sequence[str]) -> Any:
    def names(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
        if wrong := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{wrong[0]!r} is not one of {', '.join(known)}")
        return found

    return names


def _configs(given: argparse.Namespace) -> dict[Cell, RunConfig]:
    batch = BATCH if given.batch_size is None and given.recipe == "default" else given.batch_size
    return {
        Cell(method, precision): runner.resolve(
            make_config(
                method,
                given.recipe,
                precision=precision,
                model=given.model,
                dataset=given.dataset,
                device=given.device,
                batch_size=batch,
                max_steps=given.steps,
                profiler="none",
            )
        )
        for method in given.methods
        for precision in given.precisions
    }


# --- Measuring


def measure(configs: dict[Cell, RunConfig], rounds: int, equality: bool) -> list[dict[str, Any]]:
    """The lines of the results: header, runs, cells, ratios across cells, end.

    Raises ChildError for a run that fails, UnequalError for two that are no pair.
    """
    cells = list(configs)
    load = round(os.getloadavg()[0], 2)
    begun = _now()
    ceilings = [_ceilings(configs)]
    runs: list[Run] = []
    for number in range(rounds):
        runs += _round(number, order(number, cells), configs, dropout=True)
    if equality:
        with tempfile.TemporaryDirectory() as folder:
            still = {c: without_dropout(config, Path(folder)) for c, config in configs.items()}
            runs += _round(0, order(0, cells), still, dropout=False)
    ceilings.append(_ceilings(configs))
    peaks = {p: max(c["flops_per_s"][p] for c in ceilings) for p in ceilings[0]["flops_per_s"]}
    device = next(iter(configs.values())).device
    header = {
        "kind": "header",
        "benchmark": NAME,
        "question": (__doc__ or "").splitlines()[0],
        "date": begun,
        "device": device_name(torch.device(device)),
        "rounds": rounds,
        "warmup_steps": WARMUP_STEPS,
        "load": load,
        "ceilings": ceilings,
        "gemm_flops_per_s": peaks,
        "environment": environment.describe(),
        "configs": {str(cell): config.to_json() for cell, config in configs.items()},
    }
    return [
        header,
        *({"kind": "run", **run.to_json()} for run in runs),
        *({"kind": "cell", **summary(cell, runs, peaks[cell.precision])} for cell in cells),
        *({"kind": "across", **line} for line in across(runs, cells)),
        {"kind": "end", "date": _now()},
    ]


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def _round(
    number: int,
    turns: Sequence[tuple[Cell, str]],
    configs: dict[Cell, RunConfig],
    dropout: bool,
) -> list[Run]:
    found: list[Run] = []
    for cell, side in turns:
        name = f"round {number + 1}" if dropout else "no dropout"
        try:
            values = child({"what": side, "config": configs[cell].to_json()})
        except ChildError as error:
            raise ChildError(f"{name}, {cell}, {side}: {error}") from error
        run = Run(number, cell, side, dropout, values)
        print(f"{name}, {cell}, {side}: {run.samples_per_s:.1f} samples/s", file=sys.stderr)
        mates = {r.side: r for r in found if r.cell == cell} | {side: run}
        if len(mates) == 2:
            check_pair(mates["stock"], mates["ours"])
        found.append(run)
    return found


def child(request: dict[str, Any]) -> dict[str, Any]:
    """What a process of its own answers. Raises ChildError with the last line of its errors."""
    search = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.train_vs_stock_child", json.dumps(request)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        how = f"signal {-done.returncode}" if done.returncode < 0 else "nothing said"
        raise ChildError(" ".join(said[-1].split())[:400] if said else f"it ended: {how}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _ceilings(configs: dict[Cell, RunConfig]) -> dict[str, Any]:
    device = next(iter(configs.values())).device
    precisions = list(dict.fromkeys(cell.precision for cell in configs))
    return child({"what": "ceilings", "device": device, "precisions": precisions})


def without_dropout(config: RunConfig, folder: Path) -> RunConfig:
    """The run with no dropout: LoRA's is 0, and the model's config says 0 wherever it has one.

    The model is the same files again, in `folder`, with another config.json, so that each
    side reads it as it reads any model.
    """
    from transformers import AutoConfig

    source = locate(config.model).folder
    copy = folder / "model"
    if not copy.exists():
        copy.mkdir()
        for path in source.iterdir():
            if path.name != "config.json":
                (copy / path.name).symlink_to(path.resolve())
        values = json.loads((source / "config.json").read_text(encoding="utf-8"))
        known = AutoConfig.from_pretrained(source).to_dict()
        rates = {k for k, v in known.items() if "dropout" in k and isinstance(v, float | int)}
        settings = json.dumps(values | dict.fromkeys(sorted(rates), 0.0))
        (copy / "config.json").write_text(settings, encoding="utf-8")
    return RunConfig.from_json(config.to_json() | {"model": str(copy), "dropout": 0.0})


# --- Keeping


def _keep(out: Path, lines: list[dict[str, Any]]) -> Path:
    """Both files, each whole or not at all."""
    folder = out / slug(lines[0]["device"])
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    for name, content in (
        (f"{NAME}.jsonl", text),
        (f"{NAME}.svg", draw(lines, machine(lines[0]))),
    ):
        new = folder / f"{name}.new"
        new.write_text(content, encoding="utf-8")
        new.replace(folder / name)
    return folder


if __name__ == "__main__":
    sys.exit(main())
