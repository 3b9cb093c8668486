"""A short profiled pass of each variant, after everything that is timed.

Each call, or in decode each token, is a step with a forward phase in it, so that `breakdown`
reads it as it reads a training step. The times are never mixed into the timed results.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from peftprof import annotate
from peftprof.run import adapters
from peftprof.run.serving import calls
from peftprof.run.serving.served import Served
from peftprof_kernels import spans

WAIT, WARMUP, ACTIVE = 2, 2, 3
STEPS = WAIT + WARMUP + ACTIVE

Whole = Callable[[str], contextlib.AbstractContextManager[Path]]


def record(
    served: Served, model: Any, variant: str, phase: str, ids: torch.Tensor, whole: Whole
) -> str | None:
    """Record `ACTIVE` steps of `model`; the file's name, None where nsys records.

    `ids` are [batch, length], and in decode `STEPS` more; `whole` gives a file by its name, whole
    or not at all.
    """
    torch_records = served.config.profiler == "torch"
    name = f"{variant}-{phase}.json.gz"
    recorder = _torch_profiler(ids.device, name, whole) if torch_records else _nsys(ids.device)
    config = served.config_of(variant)
    ranges = adapters.ranges(model, served.family, config)
    spans.set_listener(annotate.range)
    try:
        with torch.inference_mode(), annotate.enabled(), annotate.hooks(ranges):
            step = _step(model, phase, ids)
            with recorder as advance:
                for number in range(STEPS):
                    with annotate.step(number), annotate.phase("forward"):
                        step(number)
                    advance(number)
    finally:
        spans.set_listener(None)
    return name if torch_records else None


def _step(model: Any, phase: str, ids: torch.Tensor) -> Callable[[int], object]:
    if phase == "forward":
        return lambda _: calls.classify(model, ids)
    if phase == "prefill":
        return lambda _: calls.prefill(model, ids)
    length = ids.shape[1] - STEPS
    _, kept = calls.prefill(model, ids[:, :length])
    return lambda n: calls.decode(model, ids[:, length + n : length + n + 1], kept)


@contextlib.contextmanager
def _torch_profiler(
    device: torch.device, name: str, whole: Whole
) -> Iterator[Callable[[int], None]]:
    from torch.profiler import ProfilerActivity, profile, schedule

    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def save(finished: Any) -> None:
        with whole(name) as new:
            finished.export_chrome_trace(str(new))

    with profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=save,
        record_shapes=True,
        acc_events=True,
    ) as profiler:
        yield lambda _: profiler.step()


@contextlib.contextmanager
def _nsys(device: torch.device) -> Iterator[Callable[[int], None]]:
    """cudaProfilerStart and -Stop round the active steps: a capture for each variant."""
    cuda = device.type == "cuda"

    def advance(number: int) -> None:
        if cuda and number == WAIT + WARMUP - 1:
            torch.cuda.profiler.start()

    yield advance
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.profiler.stop()
