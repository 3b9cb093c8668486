"""The command `infer`: parse, call, print."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from peftprof.config import KERNELS, PRECISIONS
from peftprof.errors import ConfigError
from peftprof.inferences import VARIANTS


def infer(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder whose model and adapter are served.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Without a run: a model as of train, and a new adapter.")
    ] = None,
    rank: Annotated[int | None, typer.Option(help="Of the new adapter.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha / r; default 2 r.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated; default query and value projections.")
    ] = None,
    variants: Annotated[
        str | None, typer.Option(help=f"Comma-separated, of {', '.join(VARIANTS)}; default all.")
    ] = None,
    batch_sizes: Annotated[str, typer.Option(help="Sequences a call, comma-separated.")] = "1,8,32",
    lengths: Annotated[str, typer.Option(help="Tokens a sequence, comma-separated.")] = "32,128",
    decode: Annotated[
        int | None,
        typer.Option(help="Tokens made by a causal model (32); 0: none, the prompt alone."),
    ] = None,
    requests: Annotated[
        int | None, typer.Option(help="Timed calls; default about a second, 20 or more.")
    ] = None,
    kernels: Annotated[str | None, typer.Option(help=f"One of {', '.join(KERNELS)}.")] = None,
    precision: Annotated[str | None, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the inputs and a new adapter.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    profiler: Annotated[str | None, typer.Option(help="One of auto, none, torch, nsys.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder to make; default one below traces/.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Measure what a fine-tuned model costs to serve: merged, unmerged, quantised, or bare."""
    batches, tokens = _numbers(batch_sizes, "--batch-sizes"), _numbers(lengths, "--lengths")
    names = _names(variants, "--variants")
    targets = _names(target_modules, "--target-modules")
    from rich.console import Console

    from peftprof.report.inference import render, watching
    from peftprof.run.inference import infer as measure
    from peftprof.run.serving.settle import Asked

    asked = Asked(
        run=run,
        model=model,
        rank=rank,
        alpha=alpha,
        target_modules=targets,
        kernels=kernels,
        precision=precision,
        device=device,
        seed=seed,
        profiler=profiler,
        variants=names,
        batch_sizes=batches,
        lengths=tokens,
        decode=decode,
        requests=requests,
        out=out,
    )
    with watching(None if json else Console()) as progress:
        record, folder = measure(asked, sys.argv[1:], progress)
    if json:
        import orjson

        from peftprof.records import encode
        from peftprof.report.console import put

        put(orjson.dumps(encode(record), option=orjson.OPT_INDENT_2).decode() + "\n")
        return
    from peftprof.report.console import show

    show(render(record, folder))


def _names(text: str | None, option: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ConfigError(f"{option} {text!r} has an empty name in it")
    return names


def _numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers, comma-separated. Raises ConfigError for anything else."""
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(int(part))
        except ValueError:
            raise ConfigError(
                f"{option} {text!r} has {part.strip()!r} in it; it takes whole numbers, such as 1,8"
            ) from None
    return tuple(numbers)
