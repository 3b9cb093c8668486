"""The command `calibrate`: parse, call, print."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from peftprof.errors import ConfigError, InputError


def calibrate(
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    check: Annotated[
        bool, typer.Option("--check", help="Time other calls against what is stored.")
    ] = False,
    list_: Annotated[
        bool, typer.Option("--list", help="Show what is stored, and devices by data sheet.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure what this device needs for the operators of a step, once; kept in the cache."""
    from peftprof import devices
    from peftprof.report import calibration as show

    if list_:
        if check:
            raise ConfigError("--list shows what is known and --check measures; give one of them")
        known = devices.known()
        shown = (known.calibrations, known.unreadable, devices.shipped())
        _put(show.list_json(*shown) if json else show.render_list(*shown), json)
        return
    from peftprof.run import calibrate as run

    where = run.device_of(device)
    if not check:
        devices.check_writable()
        _warn_of_damaged(where)
    with _telling() as tell:
        outcome = run.check(where, tell) if check else run.measure(where, tell)
    made, checked, held = outcome.calibration, outcome.checked, outcome.held
    file, kept = (devices.path_for(made.key), True) if check else run.keep(made)
    path = str(file) if kept else f"no: {file} was measured on a quieter machine"
    if json:
        _put(show.to_json(made, checked, path), json)
        if made.busy:
            print(f"peftprof: {show.BUSY}; calibrate again when it is quiet", file=sys.stderr)
    elif check:
        _put(show.render_check(made, checked, held), json)
    else:
        _put(show.render(made, checked, held, path), json)


def _warn_of_damaged(where: Any) -> None:
    """A damaged calibration is about to be replaced; that is worth a line."""
    from peftprof.run.calibrate import stored

    try:
        stored(where)
    except InputError as error:
        print(f"peftprof: replaced: {error}", file=sys.stderr)


@contextlib.contextmanager
def _telling() -> Iterator[Callable[[str, float], None]]:
    """Progress on a terminal's stderr; silence elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what, done: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda what, done: progress.update(task, description=what, completed=done)


def _put(shown: Any, json: bool) -> None:
    if json:
        import orjson

        print(orjson.dumps(shown, option=orjson.OPT_INDENT_2).decode())
        return
    from peftprof.report.console import show

    show(shown)
