"""The command `advise`: parse, call, print."""

import contextlib
import gc
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from peftprof.advice import OBJECTIVES
from peftprof.config import METHODS, PADDINGS
from peftprof.errors import ConfigError, InputError, PeftprofError

PROCESSES = 1  # more in a process of its own, which `__main__` says
UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
    "k": 2**10,
    "m": 2**20,
    "g": 2**30,
    "t": 2**40,
}


def advise(
    model: Annotated[
        str, typer.Option(help="As of train, a config.json, or a shape such as llama-2-7b.")
    ] = "minilm",
    memory: Annotated[
        str | None, typer.Option(help="Such as 12GiB; all that the device has if not given.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, or a device by name, such as 4090.")
    ] = "auto",
    tokens: Annotated[int, typer.Option(help="Tokens of an example.")] = 128,
    method: Annotated[str | None, typer.Option(help="Of these only, comma-separated.")] = None,
    rank: Annotated[str | None, typer.Option(help="Of these only, comma-separated.")] = None,
    batch_size: Annotated[str | None, typer.Option(help="Of these only, comma-separated.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of these only, comma-separated.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Of these only, comma-separated.")] = None,
    checkpointing: Annotated[
        bool | None, typer.Option("--checkpointing/--no-checkpointing", help="Only with, without.")
    ] = None,
    padding: Annotated[str, typer.Option(help="One of " + ", ".join(PADDINGS) + ".")] = "auto",
    target_modules: Annotated[str | None, typer.Option(help="As of train.")] = None,
    objective: Annotated[
        str, typer.Option(help="What is best: " + ", ".join(OBJECTIVES) + ".")
    ] = "throughput",
    check: Annotated[
        list[Path] | None, typer.Option(help="Predict these runs and compare; may be repeated.")
    ] = None,
    all_: Annotated[
        bool, typer.Option("--all", help="Show every choice; of --check, every term.")
    ] = False,
    svg: Annotated[Path | None, typer.Option(help="Also draw memory and throughput.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict memory and time of every method on a device, and say which to use."""
    if check:
        _check(check, device, all_, json)
        return
    with _uncollected():
        limit = None if memory is None else memory_of(memory)
        if tokens < 1:
            raise ConfigError(f"--tokens is {tokens}; it must be 1 or more")
        if svg is not None:
            from peftprof.report.picture import check_writable

            check_writable(svg)
        from peftprof.advise import advisor
        from peftprof.report import advice as show

        wanted = advisor.Wanted(
            methods=_names(method, "--method", METHODS),
            ranks=_numbers(rank, "--rank"),
            batch_sizes=_numbers(batch_size, "--batch-size"),
            precisions=_names(precision, "--precision", ("fp32", "bf16", "fp16")),
            checkpointing=() if checkpointing is None else (checkpointing,),
            kernels=_names(kernels, "--kernels", ("torch", "bnb", "triton")),
            objective=objective,
        )
        subject = advisor.subject(
            model, device, tokens, padding, _names(target_modules, "--target-modules", None)
        )
        memory_bytes = limit or subject.device.memory_bytes
        made = advisor.advise(subject, memory_bytes, wanted, PROCESSES)
        if svg is not None:
            _write(svg, made)
        if json:
            import orjson

            print(orjson.dumps(show.to_json(made), option=orjson.OPT_INDENT_2).decode())
            return
        from peftprof.report.console import show as put

        put(show.render(made, all_))


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which imports make half a second of, for objects that stay."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _check(paths: list[Path], device: str, every: bool, json: bool) -> None:
    from peftprof.advise import advisor, check, lessons
    from peftprof.report import advice as show

    known = advisor.calibration(device)
    checker = check.Checker(known, lessons.read(known))
    checked, left_out = [], []
    for run in check.runs_below(paths):
        try:
            checked.append(checker.check(run))
        except PeftprofError as error:
            left_out.append(f"{run.name} is left out: {error}")
    if not checked:
        raise InputError(left_out[0])
    if json:
        import orjson

        print(orjson.dumps(show.check_json(checked, left_out), option=orjson.OPT_INDENT_2).decode())
    else:
        from peftprof.report.console import show as put

        put(show.render_check(checked, left_out, every))
    lessons.keep(known, checked)  # after the table, which is worth having without it


def say_compared(folder: Path) -> None:
    """Print what a run, or those of a study, were predicted to take, beside what they took."""
    from peftprof.advise import after
    from peftprof.report import advice as show
    from peftprof.report.console import show as put

    try:
        checked, left_out = after.compare(folder)
    except PeftprofError as error:  # the runs are complete, whatever becomes of this
        print(f"peftprof: {error}", file=sys.stderr)
        return
    put(show.render_compared(checked, left_out))


def memory_of(text: str) -> int:
    """Bytes that `text` such as 12GiB means. Raises ConfigError for what is no amount."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    unit = UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        raise ConfigError(f"--memory {text!r} is no amount of memory; write it as 12GiB")
    size = round(float(found[1]) * unit)
    if size < 1 or size > 2**60:
        raise ConfigError(f"--memory {text!r} is no memory that a device has; write it as 12GiB")
    return size


def _names(text: str | None, option: str, known: tuple[str, ...] | None) -> tuple[str, ...]:
    if text is None:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if not name or (known is not None and name not in known):
            of = f"; it is one of {', '.join(known)}" if known else ""
            raise ConfigError(f"unknown {option} {name!r}{of}")
    return names


def _numbers(text: str | None, option: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split(",") if text is not None else ():
        if not part.strip().isdecimal() or not 1 <= int(part) <= 10**6:
            raise ConfigError(f"{option} {part.strip()!r} is no number from 1 on")
        numbers.append(int(part))
    return tuple(numbers)


def _write(path: Path, made: Any) -> None:
    from peftprof.cache import write_whole
    from peftprof.errors import FolderError
    from peftprof.report import front

    try:
        write_whole(path, front.draw(made))
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror or error}") from error
    print(f"picture {path}", file=sys.stderr)
