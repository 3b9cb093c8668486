"""Turns a report of Nsight Systems (.nsys-rep, .qdrep) into SQLite, by nsys itself."""

import shutil
import subprocess
from pathlib import Path

from peftprof.errors import TraceError

REPORTS = (".nsys-rep", ".qdrep")
MAX_SECONDS = 1800.0  # nsys takes minutes for a report of some GiB


def export(path: Path, into: Path, max_seconds: float = MAX_SECONDS) -> Path:
    """The SQLite export of the report at `path`, written by `nsys` into the folder `into`.

    Raises TraceError when there is no nsys, or it fails, or takes more than `max_seconds`.
    """
    report = path.resolve()  # absolute: never taken for an option
    if not report.is_file():
        raise TraceError(f"cannot read {path}: it is no file; name a report of nsys, a .nsys-rep")
    nsys = shutil.which("nsys")
    if nsys is None:
        raise TraceError(
            f"{path} must be exported first and there is no nsys here; where there is, run: "
            "nsys export --type sqlite REPORT, and name the .sqlite file"
        )
    target = into.resolve() / f"{report.stem}.sqlite"
    command = [nsys, "export", "--type", "sqlite", "--force-overwrite", "true"]
    try:
        done = subprocess.run(
            [*command, "--output", str(target), str(report)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=max_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise TraceError(
            f"nsys export of {path} took more than {max_seconds:g} s; run it by hand and name "
            "the .sqlite file"
        ) from error
    except OSError as error:
        raise TraceError(f"cannot run {nsys}: {error.strerror}; mend its installation") from error
    if done.returncode != 0 or not target.is_file():
        said = done.stdout.decode("utf-8", "replace").split()
        reason = " ".join(said)[-200:] or f"exit code {done.returncode}, no file written"
        raise TraceError(f"nsys could not export {path} ({reason}); is it a newer report?")
    return target
