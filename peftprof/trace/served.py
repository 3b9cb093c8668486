"""Traces that `infer` made: one measurement, so that its variants can be set beside each other."""

from pathlib import Path

from peftprof.errors import FolderError
from peftprof.inferences import FILE, InferenceRecord, Trace, read_inference
from peftprof.records import RunRecord


def record_of(trace: Path) -> RunRecord | None:
    """What is known of `trace` by the infer.json beside it; None where it is not of one.

    As the record of a run, which says on what its steps worked and where.
    """
    if not (trace.parent / FILE).is_file():
        return None
    try:
        made = read_inference(trace.parent)
    except FolderError:
        return None
    for one in made.traces:
        if one.file == trace.name:
            return _as_run(made, one)
    return None


def _as_run(made: InferenceRecord, trace: Trace) -> RunRecord:
    tokens = f"1 after {trace.length}" if trace.phase == "decode" else trace.length
    of_steps = {"batch_size": trace.batch, "max_length": tokens}
    return RunRecord(
        version=made.version,
        name=made.name,
        state="complete",
        created=made.created,
        command=made.command,
        config=made.config | of_steps,
        environment=made.environment,
        model=made.model,
    )
