"""After a run: its prediction beside what it measured, said, written down and learnt from."""

import json
from pathlib import Path

from peftprof.advice import CheckedRun
from peftprof.advise import advisor, lessons
from peftprof.advise.check import Checker, runs_below
from peftprof.cache import write_whole
from peftprof.errors import ConfigError, FolderError, PeftprofError
from peftprof.records import encode, read_record

FILE = "prediction.json"


def compare(folder: Path) -> tuple[list[CheckedRun], list[str]]:
    """The complete runs at `folder` compared, and why any was not, a line each.

    Each gets a prediction.json. A device that was not calibrated is one such line. Raises
    FolderError where there is no run, or a file cannot be written.
    """
    runs = runs_below([folder])
    try:
        known = advisor.calibration(read_record(runs[0]).config["device"])
    except ConfigError as error:
        return [], [f"not compared with a prediction: {error}"]
    checker = Checker(known, lessons.read(known), with_parts=False)
    checked, left_out = [], []
    for run in runs:
        try:
            one = checker.check(run)
        except PeftprofError as error:
            left_out.append(f"{run.name} is not compared with a prediction: {error}")
            continue
        _write(run / FILE, one)
        checked.append(one)
    if checked:
        lessons.keep(known, checked)
    return checked, left_out


def _write(path: Path, one: CheckedRun) -> None:
    made = encode(one) | {"memory_error": one.memory_error, "time_error": one.time_error}
    try:
        write_whole(path, json.dumps(made, indent=2) + "\n")
    except OSError as error:
        raise FolderError(f"cannot write {path}: {error.strerror or error}") from error
