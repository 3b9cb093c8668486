"""Times of many short calls on a machine that may be doing something else as well."""

import contextlib
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import numpy as np
import torch

# Calls are taken in turn, all of them again and again: what disturbs the machine for a
# second is then in one repeat of everything, and not in every repeat of one thing.
_LEAST_ROUNDS: Final = 4
# A call that was had undisturbed this often need not be timed again.
_ENOUGH: Final = 8
_MOST_CALLS: Final = 12
# A turn of one call on a CPU. Short: a busy machine gives a thread a few milliseconds.
_TURN_S: Final = 0.003
_TELL_EVERY: Final = 10
_LONG_S: Final = 0.1
# What a GPU is kept busy with while the host launches what is to be timed, in clocks.
_AHEAD_CLOCKS_PER_CALL: Final = 200_000
_CUDA_TURN_S: Final = 0.004
_CUDA_MOST_CALLS: Final = 20


# A call is undisturbed if its threads waited for a processor at most this long, or this part
# of it; to be woken takes a few microseconds on an idle machine, too.
_WAIT_NS: Final = 5_000
_WAIT_PART: Final = 0.05
TASKS: Final = Path("/proc/self/task")


@dataclass(frozen=True)
class Times:
    """Seconds of one call: the best, the median and (p75 - p25) / median of all repeats.

    `clean` of `repeats` were undisturbed; without any the best may be too long.
    """

    best_s: float
    median_s: float
    spread: float
    repeats: int
    clean: int


class Waiting:
    """Nanoseconds that this process's threads were ready to run and had no processor.

    Linux counts it for each thread (/proc/PID/task/TID/schedstat, second figure); elsewhere,
    and where the kernel does not count, it is 0 for ever.
    """

    def __init__(self, tasks: Path = TASKS) -> None:
        self._tasks = tasks
        self._files: dict[str, BinaryIO] = {}

    def look_round(self) -> None:
        """Find the threads that there are now."""
        try:
            names = {task.name for task in self._tasks.iterdir()}
        except OSError:
            return
        for gone in self._files.keys() - names:
            self._files.pop(gone).close()
        for name in names - self._files.keys():
            with contextlib.suppress(OSError):
                self._files[name] = (self._tasks / name / "schedstat").open("rb", buffering=0)

    def ns(self) -> int:
        """The sum over all threads up to now."""
        total = 0
        for file in self._files.values():
            with contextlib.suppress(OSError, IndexError, ValueError):
                total += int(os.pread(file.fileno(), 80, 0).split()[1])
        return total

    def close(self) -> None:
        """Close the kernel's files."""
        for file in self._files.values():
            file.close()
        self._files.clear()


Sample = tuple[float, bool]  # seconds, and whether nothing disturbed it


def time_in_turn(
    calls: Sequence[Callable[[], object]],
    device: torch.device,
    seconds: float,
    tell: Callable[[float], None] = lambda done: None,
) -> list[Times]:
    """The times of each of `calls`: four rounds, then of those that were disturbed more of them.

    It goes on until all have been had undisturbed or `seconds` are over.
    On a GPU they are the device's, not the host's: the host launches ahead. `tell` is told
    the share that is done.
    """
    samples: list[list[Sample]] = [[] for _ in calls]
    order = list(range(len(calls)))
    shuffle = random.Random(0).shuffle
    cuda = device.type == "cuda"
    begun = time.perf_counter()
    rounds = 0
    with contextlib.closing(Waiting()) as waiting:
        while order and (rounds < _LEAST_ROUNDS or time.perf_counter() - begun < seconds):
            shuffle(order)
            for done, index in enumerate(order):
                if done % _TELL_EVERY == 0:
                    tell(min((time.perf_counter() - begun) / max(seconds, 1e-9), 1.0))
                samples[index] += _cuda_turn(calls[index]) if cuda else _turn(calls[index], waiting)
            rounds += 1
            if rounds >= _LEAST_ROUNDS:
                order = [i for i in order if sum(clean for _, clean in samples[i]) < _ENOUGH]
    return [_summary(of) for of in samples]


def _turn(call: Callable[[], object], waiting: Waiting) -> list[Sample]:
    call()
    waiting.look_round()
    taken: list[Sample] = []
    begun = time.perf_counter()
    for _ in range(_MOST_CALLS):
        waited = waiting.ns()
        before = time.perf_counter()
        call()
        after = time.perf_counter()
        waited = waiting.ns() - waited
        allowed = max(_WAIT_NS, _WAIT_PART * 1e9 * (after - before))
        taken.append((after - before, waited <= allowed))
        if after - begun > _TURN_S:
            break
    return taken


def _cuda_turn(call: Callable[[], object]) -> list[Sample]:
    first = _cuda_seconds(call, 3)
    count = int(min(max(_CUDA_TURN_S / max(first, 1e-6), 3), _CUDA_MOST_CALLS))
    return [(_cuda_seconds(call, count), True)]


def _cuda_seconds(call: Callable[[], object], count: int) -> float:
    """Seconds a call on the device, of `count` one after the other without a gap."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_AHEAD_CLOCKS_PER_CALL * count)
    begin.record()
    for _ in range(count):
        call()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds / 1e3 / count


def _summary(samples: list[Sample]) -> Times:
    low, middle, high = np.percentile([seconds for seconds, _ in samples], (25, 50, 75))
    best = min(seconds for seconds, _ in samples)
    clean = sum(undisturbed for _, undisturbed in samples)
    return Times(best, float(middle), float((high - low) / middle), len(samples), clean)


def warm_seconds(call: Callable[[], object], device: torch.device) -> float:
    """About how long `call` takes when it is not disturbed; of a long one the first time."""
    begun = time.perf_counter()
    call()
    if (first := time.perf_counter() - begun) > _LONG_S and device.type != "cuda":
        return first
    if device.type == "cuda":
        return _cuda_seconds(call, 1)
    with contextlib.closing(Waiting()) as waiting:
        return min(seconds for _ in range(3) for seconds, _ in _turn(call, waiting))
