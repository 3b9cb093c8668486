"""From the paths a user names to traces: files of any kind, run folders, folders of both."""

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from peftprof.errors import FolderError, PeftprofError, TraceError
from peftprof.records import RunRecord, read_record
from peftprof.trace import nsys_export
from peftprof.trace.served import record_of

NEWEST = 4
DATABASES = (".sqlite", ".sqlite3", ".db")
TRACES = (".json", ".json.gz", *DATABASES, *nsys_export.REPORTS)
# Files of a run folder that are no trace to break down.
OTHERS = ("run.json", "infer.json", "memory.json.gz")


@dataclass(frozen=True)
class Source:
    """A trace to read, and the folder and record of the run that made it where there is one."""

    name: str
    trace: Path
    folder: Path | None = None
    record: RunRecord | None = None


@dataclass
class Found:
    """Traces, oldest first; how many older ones were left out; why others could not be read."""

    sources: list[Source] = field(default_factory=list)
    left_out: int = 0
    unreadable: list[str] = field(default_factory=list)
    named: bool = False  # by its own path, so that not reading it is an error


def find(path: Path, all_runs: bool = False) -> Found:
    """The traces at `path`.

    Raises FolderError or TraceError when there is none.
    """
    if not path.exists():
        raise FolderError(f"there is no {path}; name a trace, a run folder or a folder of runs")
    if not path.is_dir():
        return Found([Source(stem(path), path, record=record_of(path))], named=True)
    if (path / "run.json").is_file():
        return Found([_run(path)], named=True)
    return _folder(path, all_runs)


def _folder(path: Path, all_runs: bool) -> Found:
    """The newest complete runs and other traces in a folder."""
    try:
        children = sorted(path.iterdir())
    except OSError as error:
        raise FolderError(f"cannot read {path}: {error.strerror}") from error
    found = Found()
    dated: list[tuple[tuple[float, str], Source]] = []
    reasons: list[PeftprofError] = []
    for folder in (child for child in children if (child / "run.json").is_file()):
        try:
            source = _run(inside(folder))
        except PeftprofError as error:
            reasons.append(error)
            if not isinstance(error, NotFinishedError):
                found.unreadable.append(str(error))
            continue
        assert source.record is not None
        dated.append((_created(source.record), source))
    taken = {source.trace for _, source in dated}
    for file in children:
        if file.is_file() and file not in taken and _is_trace(file, children):
            try:
                source = Source(stem(file), inside(file), record=record_of(file))
                dated.append(((file.stat().st_mtime, file.name), source))
            except TraceError as error:
                reasons.append(error)
                found.unreadable.append(str(error))
    if not dated:
        raise (
            reasons[-1]
            if reasons
            else FolderError(
                f"{path} holds no run and no trace; make a run with: python -m peftprof train"
            )
        )
    dated.sort(key=lambda one: one[0])
    kept = dated if all_runs else dated[-NEWEST:]
    found.sources = [source for _, source in kept]
    found.left_out = len(dated) - len(kept)
    return found


def _is_trace(file: Path, beside: list[Path]) -> bool:
    if not file.name.endswith(TRACES) or file.name in OTHERS or file.name.startswith("."):
        return False
    # A report beside its own export is the same trace.
    return not (file.name.endswith(nsys_export.REPORTS) and file.with_suffix(".sqlite") in beside)


class NotFinishedError(FolderError):
    """A run that is not complete, or was not profiled: nothing is wrong with it."""


def inside(path: Path) -> Path:
    """`path`, found in a folder. Raises TraceError for a link that leads out of that folder."""
    if not path.resolve().is_relative_to(path.parent.resolve()):
        raise TraceError(f"{path} is a link to somewhere else; name what it leads to")
    return path


def _run(folder: Path) -> Source:
    inside(folder / "run.json")
    record = read_record(folder)
    if record.state != "complete":
        raise NotFinishedError(
            f"the run in {folder} is not complete; finish it with --resume {folder}"
        )
    if record.profiled and record.profiled.profiler == "nsys":
        return Source(record.name, _nsys_file(folder), folder, record)
    named = record.profiled.trace if record.profiled else None
    if named is None:
        raise NotFinishedError(
            f"the run in {folder} was not profiled; run it again with --profiler torch"
        )
    return Source(record.name, named_in(folder, named), folder, record)


def named_in(folder: Path, named: str) -> Path:
    """The trace that the run.json in `folder` names.

    One from elsewhere may name any file: only the last part of the name counts, and it is
    looked for in the folder. Raises TraceError where it is not there.
    """
    trace = folder / Path(named).name
    try:
        there = trace.is_file()
    except OSError:  # no name that a file can have
        there = False
    if not there:
        raise TraceError(f"the run in {folder} has lost its trace {trace.name[:80]}; run it again")
    return inside(trace)


def _nsys_file(folder: Path) -> Path:
    """What nsys recorded of a run: in its folder, or beside it by the same name."""
    within = sorted(child for child in folder.iterdir() if child.is_file())
    endings = (*DATABASES, *nsys_export.REPORTS)
    beside = [folder.with_name(folder.name + ending) for ending in endings]
    for ending in endings:
        for file in [*within, *beside]:
            if file.name.endswith(ending) and file.is_file():
                return inside(file)
    raise NotFinishedError(
        f"the run in {folder} was profiled by Nsight Systems and its report is not there; "
        f"name the .nsys-rep or .sqlite file, or run it again with --profiler torch"
    )


def _created(record: RunRecord) -> tuple[float, str]:
    try:
        return datetime.fromisoformat(record.created).timestamp(), record.name
    except (ValueError, OverflowError, OSError):
        return 0.0, record.name


def stem(path: Path) -> str:
    """The name of a trace file without what says its kind."""
    name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".pt.trace")
    for ending in (*DATABASES, *nsys_export.REPORTS):
        name = name.removesuffix(ending)
    return name or path.name
