"""The command line: parse, call, print. No logic, and no torch until a command needs it."""

import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from peftprof.cli_advise import advise, say_compared
from peftprof.cli_calibrate import calibrate
from peftprof.cli_infer import infer
from peftprof.config import (
    KERNELS,
    METHODS,
    PADDINGS,
    PRECISIONS,
    PROFILERS,
    check_used,
    make_config,
)
from peftprof.errors import ConfigError, LimitError, PeftprofError, TraceError

app = typer.Typer(
    name="peftprof",
    help="Where time and memory go when a transformer is fine-tuned.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

GOES_ON = {
    "train": "; `train --resume FOLDER` goes on with a run",
    "study": "; the same command goes on with the study",
}
INTERRUPTED = 130  # what a shell calls a process ended by Ctrl-C


def _one_of(names: tuple[str, ...]) -> str:
    return "One of " + ", ".join(names) + "."


@app.command()
def train(
    method: Annotated[str | None, typer.Option(help=_one_of(METHODS))] = None,
    kernels: Annotated[str | None, typer.Option(help=_one_of(KERNELS))] = None,
    model: Annotated[
        str | None,
        typer.Option(help="minilm, minilm-distilbert, smollm2-135m, a folder or a hub name."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            help="movie-reviews, a CSV, TSV, JSON lines or Parquet file, folder, hub name."
        ),
    ] = None,
    recipe: Annotated[str | None, typer.Option(help="default, or paper.")] = None,
    rank: Annotated[int | None, typer.Option(help="Adapter rank r.")] = None,
    alpha: Annotated[float | None, typer.Option(help="Scaling is alpha / r; default 2 r.")] = None,
    dropout: Annotated[float | None, typer.Option(help="Dropout before lora_A.")] = None,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated; default query and value projections.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="Optimiser steps, instead of epochs.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Examples a step.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens an example is cut to.")] = None,
    precision: Annotated[str | None, typer.Option(help=_one_of(PRECISIONS))] = None,
    padding: Annotated[str | None, typer.Option(help=_one_of(PADDINGS))] = None,
    cuda_graphs: Annotated[
        str | None, typer.Option(help="Whole steps as CUDA graphs: auto (where faster), on, off.")
    ] = None,
    checkpointing: Annotated[
        bool | None,
        typer.Option("--checkpointing", help="Compute activations anew in backward: less memory."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of data order, head and dropout.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    profiler: Annotated[str | None, typer.Option(help=_one_of(PROFILERS))] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text; comma-separated for a pair.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the class.")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder to make; default one below traces/.")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="Run folder to go on with.")] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw the closing table to this file.")
    ] = None,
) -> None:
    """Fine-tune, timed; then profile a few steps of the same run.

    Settings that are not given come from the recipe.
    """
    settings = {
        "kernels": kernels,
        "model": model,
        "dataset": dataset,
        "rank": rank,
        "alpha": alpha,
        "dropout": dropout,
        "target_modules": _names(target_modules, "--target-modules"),
        "learning_rate": lr,
        "epochs": epochs,
        "max_steps": max_steps,
        "batch_size": batch_size,
        "max_length": max_length,
        "precision": precision,
        "padding": padding,
        "cuda_graphs": cuda_graphs,
        "checkpointing": checkpointing,
        "seed": seed,
        "device": device,
        "profiler": profiler,
        "text_columns": _names(text_column, "--text-column"),
        "label_column": _name(label_column, "--label-column"),
        "checkpoint_every": checkpoint_every,
    }
    config = None
    if resume is None:
        check_used(method, settings)
        config = make_config("qlora" if method is None else method, recipe, **settings)
    elif any(value is not None for value in (method, recipe, out, *settings.values())):
        raise ConfigError("--resume goes on with the run's own settings; give it alone")
    from rich.console import Console

    from peftprof.report.picture import check_writable
    from peftprof.report.progress import watcher
    from peftprof.report.summary import render
    from peftprof.run import launch, runner

    if svg is not None:
        check_writable(svg)
    shows = launch.speaks()  # of several processes one
    console = Console(quiet=not shows)
    with watcher(console) as watch:
        if config is not None:
            folder = runner.train(config, out, sys.argv[1:], watch)
        else:
            assert resume is not None
            folder = runner.resume(resume, watch)
    if shows:
        _show(render(folder.read_record(), folder.path), svg, "python -m peftprof train")
        say_compared(folder.path)


def _name(text: str | None, option: str) -> str | None:
    if text is not None and not text.strip():
        raise ConfigError(f"{option} is empty; name one, or leave the option out")
    return text


def _names(text: str | None, option: str) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(part.strip() for part in text.split(","))
    if not all(names):
        raise ConfigError(f"{option} {text!r} has an empty name in it")
    return names


@app.command()
def study(
    recipe: Annotated[
        str, typer.Option(help="paper, controlled, quick, or a .toml file.")
    ] = "quick",
    out: Annotated[
        Path | None, typer.Option(help="Study folder; traces/study-RECIPE if not named.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Instead of the recipe's; as of train.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Instead of the recipe's; as of train.")
    ] = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column of the text; comma-separated for a pair.")
    ] = None,
    label_column: Annotated[str | None, typer.Option(help="Column of the class.")] = None,
    max_steps: Annotated[
        int | None, typer.Option(help="A quick look: at most so many steps a run.")
    ] = None,
    subset: Annotated[
        int | None, typer.Option(help="A quick look: at most so many training examples.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    list_: Annotated[
        bool, typer.Option("--list", help="Print the names of the runs, and make none.")
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Make this run only; may be repeated.")
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Try runs that have failed once more.")
    ] = False,
) -> None:
    """Run what the paper ran, and judge its claims. The same command goes on where it ended."""
    from rich.console import Console

    from peftprof.report.progress import study_watcher
    from peftprof.study import runs

    asked = runs.Asked(
        recipe=recipe,
        out=out,
        model=model,
        dataset=dataset,
        text_columns=_names(text_column, "--text-column"),
        label_column=_name(label_column, "--label-column"),
        max_steps=max_steps,
        subset=subset,
        device=device,
    )
    opened = runs.open_study(asked)
    if list_:
        print("\n".join(opened.names()))
        return
    console = Console()
    with study_watcher(console) as watch:
        opened.run(watch, only or (), again)
    if only:
        return
    from peftprof.report import study as show

    judged = opened.judge()
    written = show.write(judged, opened.folder.path)
    _show(show.render(judged, written), None, "python -m peftprof study")
    say_compared(opened.folder.path)


@app.command()
def breakdown(
    paths: Annotated[
        list[Path] | None, typer.Argument(help="Run folders, traces, or folders of these.")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    csv: Annotated[bool, typer.Option("--csv", help="Print a table for spreadsheets.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print tables for GitHub.")] = False,
    html: Annotated[Path | None, typer.Option(help="Also write a page with charts.")] = None,
    perfetto: Annotated[
        Path | None, typer.Option(help="Also write the categories as tracks for ui.perfetto.dev.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option(help="Also draw what is printed to this file.")
    ] = None,
    top: Annotated[int, typer.Option(help="Operators to list.", min=0)] = 10,
    all_runs: Annotated[
        bool, typer.Option("--all", help="Every run of a folder, not the newest four.")
    ] = False,
    rules: Annotated[
        Path | None, typer.Option(help="Rules of your own (TOML), before those of peftprof.")
    ] = None,
    ceilings: Annotated[
        Path | None, typer.Option(help="What the device can reach: a run folder or JSON.")
    ] = None,
    unfair: Annotated[
        bool, typer.Option("--unfair", help="Speed-ups also where the runs are not comparable.")
    ] = False,
    fail_if: Annotated[
        list[str] | None, typer.Option(help="Such as 'dequant>25%': exit code 1 where it holds.")
    ] = None,
) -> None:
    """Say where each step's time went: phase by category, one run or several side by side."""
    from peftprof.report import limits, picture
    from peftprof.report.console import put
    from peftprof.trace import ceilings as known_ceilings
    from peftprof.trace import load
    from peftprof.trace import rules as known_rules

    if json + csv + markdown > 1:
        raise ConfigError("--json, --csv and --markdown are printed one at a time; give one")
    if svg is not None and (json or csv or markdown):
        raise ConfigError("--svg draws the table that --json, --csv and --markdown replace")
    outputs = {"--html": html, "--perfetto": perfetto, "--svg": svg}
    given = {option: path for option, path in outputs.items() if path is not None}
    picture.check_apart(given, paths or ())
    set_limits = [limits.parse(text) for text in fail_if or ()]
    attributions: list[Any] = []
    loaded = load(
        paths or [Path("traces")],
        all_runs=all_runs,
        ruleset=known_rules.load(rules),
        ceilings=known_ceilings.read(ceilings) if ceilings is not None else None,
        unfair=unfair,
        timelines=html is not None,
        keep=(lambda *found: attributions.append(found)) if perfetto is not None else None,
    )
    for reason in loaded.unreadable:
        print(f"peftprof: left out: {reason}", file=sys.stderr)
    if set_limits and loaded.unreadable:
        raise TraceError("--fail-if cannot be answered where runs cannot be read; see above")
    if perfetto is not None:
        from peftprof.report.perfetto import write

        write(attributions, perfetto)
    if html is not None:
        from peftprof.report.page import render as page

        picture.save(page(loaded), html, "--html")
    if json:
        from peftprof.report.export import to_json

        print(to_json(loaded))
    elif csv:
        from peftprof.report.tables import to_csv

        put(to_csv(loaded))
    elif markdown:
        from peftprof.report.tables import to_markdown

        put(to_markdown(loaded, top))
    else:
        from peftprof.report.breakdown import render

        _show(render(loaded, top=top), svg, "python -m peftprof breakdown")
    broken = limits.broken(set_limits, loaded.breakdowns)
    if broken:
        raise LimitError("; ".join(broken))


@app.command()
def env(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what this machine can do: device, precision, kernels, meters, versions."""
    from peftprof.run.environment import describe

    description = describe()
    if json:
        import orjson

        print(orjson.dumps(description, option=orjson.OPT_INDENT_2).decode())
        return
    from peftprof.report.environment import render

    _show(render(description), None, "python -m peftprof env")


app.command()(infer)
app.command()(calibrate)
app.command()(advise)


def _show(renderable: Any, svg: Path | None, title: str) -> None:
    from peftprof.report.console import show

    console = show(renderable, record=svg is not None)
    if svg is not None:
        from peftprof.report.picture import save_svg

        save_svg(console, svg, title)


def main() -> NoReturn:
    """Run the command line. Exit 0; 2 with one line on stderr for a user's error; 130 at Ctrl-C.

    1 where a limit of --fail-if is broken, with a line that says which.
    """
    _settle()
    if sys.stdout is None:
        _fail("standard output is closed; send it to a file or a terminal", 2)
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    try:
        # Outside its standalone mode the parser returns what it would have exited with.
        code = app(standalone_mode=False)
        if code == INTERRUPTED:
            raise KeyboardInterrupt
    except PeftprofError as error:
        _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        _fail(f"interrupted{GOES_ON.get(sys.argv[1], '')}", INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone, as `| head` does; there is nobody to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        what = error.strerror or str(error)
        _fail(f"{what}: {error.filename}" if error.filename else what, 2)
    except Exception as error:
        # Usage errors are an exception of the parser that typer carries.
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message().rstrip('.')}. See --help.", 2)
    sys.exit(code or 0)


def _settle() -> None:
    """Settings of other packages that are read once, when they are loaded.

    The notes that they write for their developers stay off a user's terminal. GNU OpenMP's
    threads spin for long when they wait for each other, and on a machine that does anything
    else a spinning thread takes the core that the thread it waits for needs; a short spin
    costs nothing where the machine is idle (bench/LOG.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(?!peftprof)")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # its start and stop lines go to stderr


def _fail(message: str, code: int) -> NoReturn:
    from peftprof.run import launch

    # What only runs over several processes have to say is said by one of them.
    if launch.speaks() or sys.argv[1:2] not in (["train"], ["study"]):
        print("peftprof: " + " ".join(message.split()), file=sys.stderr)
    sys.exit(code)
