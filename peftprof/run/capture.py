"""The profiled pass: the timed pass's first steps again, annotated and recorded.

It starts from a freshly built model and the same seed, so on a CPU its losses must equal
the timed pass's bit by bit; the record says whether they did. Its times are never mixed
into the timed results. What the step allocates is recorded after it, by `memory_trace`.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from peftprof import annotate
from peftprof.records import Profiled
from peftprof.run import adapters, distributed
from peftprof.run.folder import RunFolder, Step
from peftprof.run.loop import Trainee
from peftprof.run.meters import StepClock
from peftprof.run.model import Family
from peftprof.watcher import Watcher
from peftprof_kernels import spans

WAIT, WARMUP, ACTIVE = 5, 5, 3
TRACE = "trace.json.gz"


def profile(
    trainee: Trainee, family: Family, folder: RunFolder, timed: list[Step], watcher: Watcher
) -> Profiled:
    """Run and record `ACTIVE` steps after `WAIT` + `WARMUP` others; `trainee` is at step 0."""
    profiler = trainee.config.profiler
    record = {"torch": _torch_profiler, "nsys": _nsys_range}[profiler]
    clock = StepClock(trainee.device)
    losses: list[torch.Tensor] = []
    active = range(WAIT + WARMUP, WAIT + WARMUP + ACTIVE)
    watcher.begin("profiling", WAIT + WARMUP + ACTIVE, 0)
    with annotations(trainee, family), record(trainee, folder) as advance:
        for number in range(WAIT + WARMUP + ACTIVE):
            clock.start()
            loss, _ = trainee.step(number)
            trainee.optimizer.zero_grad(set_to_none=True)
            clock.stop()
            losses.append(loss)
            advance(number)
    durations = clock.durations_ns()
    whole = distributed.summed(torch.stack(losses)).tolist()
    watcher.steps(len(whole), whole[-1], 0.0, None)
    difference = _difference(whole, timed)
    return Profiled(
        profiler=profiler,
        trace=TRACE if profiler == "torch" else None,
        active_steps=ACTIVE,
        step_p50_ms=statistics.median(durations[-ACTIVE:]) / 1e6,
        overhead=sum(durations[-ACTIVE:]) / sum(_again(trainee, active)),
        same_losses=None if difference is None else difference == 0,
        loss_difference=difference,
    )


def _again(trainee: Trainee, numbers: range) -> list[int]:
    """Durations of steps `numbers` run once more with nothing recording, as warm as they were."""
    clock = StepClock(trainee.device)
    for number in numbers:
        clock.start()
        trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
        clock.stop()
    return clock.durations_ns()


def _difference(losses: list[float], timed: list[Step]) -> float | None:
    """The largest relative difference to the timed pass's losses."""
    both = [(losses[s.step], s.loss) for s in timed if s.step < len(losses)]
    return max((abs(a - b) / abs(b or 1) for a, b in both), default=None)


@contextlib.contextmanager
def annotations(trainee: Trainee, family: Family) -> Iterator[None]:
    """Every range of docs/nvtx.md on, round the model's modules and inside the kernels."""
    ranges = adapters.ranges(trainee.model, family, trainee.config)
    spans.set_listener(annotate.range)
    try:
        with annotate.enabled(), annotate.hooks(ranges):
            yield
    finally:
        spans.set_listener(None)


@contextlib.contextmanager
def _torch_profiler(trainee: Trainee, folder: RunFolder) -> Iterator[Callable[[int], None]]:
    from torch.profiler import ProfilerActivity, schedule
    from torch.profiler import profile as torch_profile

    activities = [ProfilerActivity.CPU]
    if trainee.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)

    def save(finished: Any) -> None:
        if not folder.writes:
            return
        with folder.whole(TRACE) as new:
            finished.export_chrome_trace(str(new))

    with torch_profile(
        activities=activities,
        schedule=schedule(wait=WAIT, warmup=WARMUP, active=ACTIVE, repeat=1),
        on_trace_ready=save,
        record_shapes=True,
        with_stack=False,
        acc_events=True,
    ) as profiler:

        def advance(number: int) -> None:
            # What was launched before the active steps must not run inside them.
            if trainee.device.type == "cuda" and number == WAIT + WARMUP - 1:
                torch.cuda.synchronize(trainee.device)
            profiler.step()

        yield advance


@contextlib.contextmanager
def _nsys_range(trainee: Trainee, _: RunFolder) -> Iterator[Callable[[int], None]]:
    """cudaProfilerStart and -Stop round the active steps; Nsight Systems does the recording.

    Without a CUDA device there is no such call to make: the NVTX ranges alone are heard.
    """
    cuda = trainee.device.type == "cuda"

    def advance(number: int) -> None:
        if cuda and number == WAIT + WARMUP - 1:
            torch.cuda.synchronize(trainee.device)
            torch.cuda.profiler.start()

    yield advance
    if cuda:
        torch.cuda.synchronize(trainee.device)
        torch.cuda.profiler.stop()
