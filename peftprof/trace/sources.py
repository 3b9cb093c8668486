"""From the paths a user names to breakdowns: trace files, run folders, folders of runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from peftprof.breakdowns import Breakdown, Comparison, Timeline
from peftprof.errors import FolderError, TraceError
from peftprof.records import RunRecord, read_record
from peftprof.trace import kineto
from peftprof.trace.attribute import attribute
from peftprof.trace.breakdown import make_breakdown
from peftprof.trace.compare import compare

NEWEST = 4
NSYS = (".nsys-rep", ".sqlite", ".qdrep")


@dataclass(frozen=True)
class Source:
    """A trace to read, and the record of the run that made it where there is one."""

    name: str
    trace: Path
    record: RunRecord | None


@dataclass(frozen=True)
class Loaded:
    """Breakdowns of the traces found, how they compare, and how many older runs were left out.

    `comparable` is None where nothing can be said; see `compare`. `comparisons` hold every
    further run against the first. `timelines`, one a run, are there where asked for.
    """

    breakdowns: tuple[Breakdown, ...]
    comparable: bool | None
    differences: tuple[str, ...]
    left_out: int
    comparisons: tuple[Comparison, ...] = ()
    timelines: tuple[Timeline, ...] = ()


def load(paths: Sequence[Path], all_runs: bool = False) -> Loaded:
    """Read and attribute every trace that `paths` name.

    A path is a Kineto trace, a run folder, or a folder of run folders; of the last the
    newest four complete runs are taken, or all of them with `all_runs`. Raises FolderError
    for a folder without a run to read, TraceError for a trace that cannot be read.
    """
    sources: list[Source] = []
    left_out = 0
    for path in paths:
        found, older = find(path, all_runs)
        sources += found
        left_out += older
    comparable, differences = compare([source.record for source in sources])
    breakdowns = tuple(_breakdown(source) for source in sources)
    return Loaded(breakdowns, comparable, tuple(differences), left_out)


def find(path: Path, all_runs: bool = False) -> tuple[list[Source], int]:
    """The traces at `path`, oldest run first, and how many older runs were left out.

    Raises FolderError or TraceError when there is none.
    """
    if not path.exists():
        raise FolderError(f"there is no {path}; name a trace, a run folder or a folder of runs")
    if not path.is_dir():
        if path.name.endswith(NSYS):
            raise TraceError(
                f"{path} is from Nsight Systems, which a later version of peftprof will read; "
                "use a run made with --profiler torch"
            )
        return [Source(_stem(path), path, None)], 0
    if (path / "run.json").is_file():
        return [_run(path, read_record(path))], 0
    return _runs(path, all_runs)


def _runs(path: Path, all_runs: bool) -> tuple[list[Source], int]:
    folders = sorted(child for child in path.iterdir() if (child / "run.json").is_file())
    if not folders:
        raise FolderError(f"{path} holds no run; make one with: python -m peftprof train")
    runs = [(folder, read_record(folder)) for folder in folders]
    complete = [(folder, record) for folder, record in runs if record.state == "complete"]
    if not complete:
        raise FolderError(f"{path} holds no complete run; finish one with --resume")
    readable = [run for run in complete if _trace_of(*run) is not None]
    if not readable:
        _run(*complete[-1])  # says why its trace cannot be read
    readable.sort(key=lambda run: _created(run[1]))
    kept = readable if all_runs else readable[-NEWEST:]
    return [_run(*run) for run in kept], len(readable) - len(kept)


def _created(record: RunRecord) -> tuple[float, str]:
    try:
        return datetime.fromisoformat(record.created).timestamp(), record.name
    except ValueError:
        return 0.0, record.name


def _trace_of(folder: Path, record: RunRecord) -> Path | None:
    trace = record.profiled.trace if record.profiled else None
    # A run.json from elsewhere must not name a file outside its folder.
    return folder / Path(trace).name if trace else None


def _run(folder: Path, record: RunRecord) -> Source:
    if record.state != "complete":
        raise FolderError(f"the run in {folder} is not complete; finish it with --resume {folder}")
    trace = _trace_of(folder, record)
    if trace is None:
        if record.profiled and record.profiled.profiler == "nsys":
            raise TraceError(
                f"the run in {folder} was profiled by Nsight Systems, which a later version "
                "of peftprof will read; run it again with --profiler torch"
            )
        raise TraceError(
            f"the run in {folder} was not profiled; run it again with --profiler torch"
        )
    if not trace.is_file():
        raise TraceError(f"the run in {folder} has lost its trace {trace.name}; run it again")
    return Source(record.name, trace, record)


def _breakdown(source: Source) -> Breakdown:
    try:
        return make_breakdown(attribute(kineto.read(source.trace)), source.name, "kineto")
    except TraceError as error:
        message, path = str(error), str(source.trace)
        # A file name may hold a line break; a message may not.
        raise TraceError(_line(message if path in message else f"{path}: {message}")) from error


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace")


def _line(error: object) -> str:
    return " ".join(str(error).split())
