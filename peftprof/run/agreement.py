"""What must be the same: in a run that is gone on with, and in all processes of a run."""

from peftprof.errors import FolderError, InputError, TrainingError
from peftprof.records import DataInfo, ModelInfo, RunRecord
from peftprof.run import adapters, distributed, environment
from peftprof.run.loop import Trainee


def check_processes(record: RunRecord) -> None:
    """Refuse another number of processes: random numbers and the order of sums would differ."""
    then = record.execution.processes if record.execution is not None else 1
    if then != (now := distributed.size()):
        how = f"torchrun --nproc-per-node {then}" if then > 1 else "no torchrun"
        raise FolderError(
            f"the run was started over {then} processes and this is {now}; go on with it by {how}"
        )


def check_versions(record: RunRecord) -> None:
    """Refuse to go on under other libraries: the record could not say which step ran on what."""
    now = environment.describe()["packages"]
    then = record.environment.get("packages")
    if not isinstance(then, dict):
        raise FolderError(
            "the run does not say which packages it was started with; start a new one"
        )
    for name in ("torch", "transformers", "peft", "bitsandbytes", "tokenizers"):
        if then.get(name) != now[name]:
            raise FolderError(
                f"the run was started with {name} {then.get(name)} and this is {now[name]}; "
                "install that one to go on, or start a new run"
            )


def check_inputs(record: RunRecord, model: ModelInfo, loaded: DataInfo) -> None:
    """Refuse to go on with another model or other data."""
    for then, now in ((record.model, model), (record.data, loaded)):
        if then is not None and then.fingerprint != now.fingerprint:
            raise FolderError(f"{now.name!r} is not what the run started with; start a new run")


def check_everywhere(
    trainee: Trainee, frozen: str | None, model: ModelInfo, loaded: DataInfo
) -> None:
    """Refuse to train on what is not the same in every process."""
    if distributed.size() == 1:
        return
    found = {
        "model files": model.fingerprint,
        "data": loaded.fingerprint,
        "frozen weights": frozen,
        "weights to train": adapters.trained_sha256(trainee.model),
    }
    if (unlike := distributed.unlike(found)) is not None:
        raise InputError(f"{unlike} than rank 0; give every machine the same files and versions")


def check_trained(trainee: Trainee) -> None:
    """Every process made the same steps, so all must end with the same weights."""
    if distributed.size() == 1:
        return
    found = {"trained weights": adapters.trained_sha256(trainee.model)}
    if (unlike := distributed.unlike(found)) is not None:
        raise TrainingError(f"{unlike} than rank 0 after the same steps; the result is void")
