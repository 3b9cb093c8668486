"""The memory step: one more step after the profiled pass, its allocations recorded.

It has a profiler session of its own, on the CPU alone: the caching allocator of a GPU
reports to that one too, so it needs no CUPTI and works beside Nsight Systems. Recording
every allocation slows a step, so its times are never used, and it comes after everything
that is timed or compared. A trace begins with memory already held; the inventory says
whose that is. docs/memory.md tells how the two are read.
"""

import gc
from collections.abc import Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from peftprof.records import Held, MemoryStep
from peftprof.run import adapters
from peftprof.run.capture import annotations
from peftprof.run.folder import RunFolder, Step
from peftprof.run.loop import Trainee
from peftprof.run.model import Family

TRACE = "memory.json.gz"


def record(trainee: Trainee, family: Family, folder: RunFolder, timed: list[Step]) -> MemoryStep:
    """Run one step of `timed` on `trainee` and record what it allocates in `TRACE`.

    The step is the first of those with the most padded tokens, for the timed pass's peak was
    most likely there. Raises FolderError when the trace cannot be written.
    """
    longest = max(timed, key=lambda step: step.padded_tokens, default=None)
    number = longest.step if longest else 0
    # Garbage of before must not be freed inside the step.
    gc.collect()
    held = inventory(trainee)
    with (
        annotations(trainee, family),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
    if folder.writes:
        with folder.whole(TRACE) as new:
            profiler.export_chrome_trace(str(new))
    return MemoryStep(TRACE, number, str(trainee.device), held)


def inventory(trainee: Trainee) -> tuple[Held, ...]:
    """What `trainee` holds on its device, by part; each storage once, in the first part it is in.

    What is trained beside a frozen model, the head included, is `adapters`; in full
    fine-tuning every parameter is a base weight. Buffers are `other`.
    """
    model, full = trainee.model, trainee.config.method == "full"
    parameters = [*model.parameters()]
    parts: dict[str, Iterable[torch.Tensor]] = {
        "adapters": () if full else [p for _, p in adapters.trainable(model)],
        "base_weights": parameters,
        "quantisation_state": _quantisation_state(trainee),
        "gradients": [p.grad for p in parameters if p.grad is not None],
        "optimizer_state": _optimizer_state(trainee.optimizer),
        "other": model.buffers(),
    }
    seen: set[int] = set()
    return tuple(
        Held(part, _storages(tensors, trainee.device, seen)) for part, tensors in parts.items()
    )


def _quantisation_state(trainee: Trainee) -> Iterable[torch.Tensor]:
    return adapters.quantisation_state(trainee.model) if trainee.config.method == "qlora" else ()


def _optimizer_state(optimizer: torch.optim.Optimizer) -> Iterable[torch.Tensor]:
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))


def _storages(
    tensors: Iterable[torch.Tensor], device: torch.device, seen: set[int]
) -> dict[str, int]:
    """Bytes of the tensors' storages on `device` by address, but for those in `seen`."""
    found: dict[str, int] = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        # The step counts of AdamW, for one, are on the host.
        if tensor.device.type == device.type and storage.nbytes() and address not in seen:
            seen.add(address)
            found[hex(address)] = storage.nbytes()
    return found
