"""A checkpoint: everything that a step starts from, in one safetensors file.

Trainable tensors, optimiser moments, the random state of every process, and as JSON in the
header the step, the loss scaling and whatever else the loop wants back.
"""

import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peftprof.errors import FolderError
from peftprof.run import adapters, distributed
from peftprof.run.folder import RunFolder

if TYPE_CHECKING:  # loop.py imports this module
    from peftprof.run.loop import Trainee


def save_checkpoint(
    folder: RunFolder, trainee: "Trainee", step: int, further: dict[str, Any]
) -> None:
    """Everything that step `step` starts from, and `further` JSON, in one safetensors file."""
    tensors: dict[str, torch.Tensor] = {}
    for rank, states in enumerate(distributed.gathered(_random_states(trainee.device))):
        tensors |= {_of_rank(name, rank): state for name, state in states.items()}
    if not folder.writes:
        return
    for name, parameter in adapters.trainable(trainee.model):
        tensors[f"model/{name}"] = parameter.detach().contiguous()
        for key, value in trainee.optimizer.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = value.detach().contiguous()
    state = {"step": step, "scaler": trainee.scaler.state_dict()} | further
    with folder.whole(folder.checkpoint.name) as new:
        save_file(tensors, new, metadata={"state": json.dumps(state)})


def load_checkpoint(folder: RunFolder, trainee: "Trainee") -> tuple[int, dict[str, Any]]:
    """Put the trainee where the checkpoint left off; its step, and its JSON state.

    Raises FolderError when the checkpoint is damaged or belongs to another model.
    """
    try:
        with safe_open(folder.checkpoint, framework="pt") as file:
            state: dict[str, Any] = json.loads(file.metadata()["state"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        if missing := {"step", "scaler", "trainable", "memory", "energy"} - state.keys():
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        random_state = tensors[_of_rank("rng/cpu", distributed.rank())]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FolderError(f"{folder.checkpoint} is damaged: {error}") from error
    named = adapters.trainable(trainee.model)
    wanted = {f"model/{name}": parameter for name, parameter in named}
    stored = {key for key in tensors if key.startswith("model/")}
    if stored != wanted.keys() or any(tensors[k].shape != p.shape for k, p in wanted.items()):
        raise FolderError(f"{folder.checkpoint} does not fit the model; start a new run")
    for name, parameter in named:
        parameter.data.copy_(tensors[f"model/{name}"])
        kept = {
            key.partition("/")[0]: value
            for key, value in tensors.items()
            if key.partition("/")[2] == name and not key.startswith("model/")
        }
        if kept:
            trainee.optimizer.state[parameter] = {
                key: value.to(parameter.device) for key, value in kept.items()
            }
    if trainee.scaler.is_enabled():
        trainee.scaler.load_state_dict(state["scaler"])
    torch.set_rng_state(random_state)
    on_cuda = tensors.get(_of_rank("rng/cuda", distributed.rank()))
    if on_cuda is not None and trainee.device.type == "cuda":
        torch.cuda.set_rng_state(on_cuda, trainee.device)
    return int(state["step"]), state


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    states = {"rng/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["rng/cuda"] = torch.cuda.get_rng_state(device)
    return states


def _of_rank(name: str, rank: int) -> str:
    """The name of a rank's tensor: the first's has none of its own, as a run of one process."""
    return f"{name}/{rank}" if rank else name
