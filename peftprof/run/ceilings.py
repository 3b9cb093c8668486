"""What this device reaches at most: a large product in each dtype, and a large copy.

Measured where the run ran, not taken from a data sheet: a breakdown then says which share
of the possible a category reached, with the same clocks, threads and libraries.
"""

import datetime
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Final

import torch

from peftprof.breakdowns import Ceilings
from peftprof.run import environment
from peftprof.run.meters import StepClock

NAMES: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}

# The copy is far beyond what a cache holds, the products are large enough to be at their
# peak (two cores of an AMD EPYC: side 512 to 2048 within 6 %), and all takes about a second.
_CPU_SIDE: Final = 1024
_CPU_COPY: Final = 1 << 27
_CUDA_SIDE: Final = 8192
_CUDA_COPY: Final = 1 << 30
# Of the memory that is free, at most this part is asked for.
_FREE_PART: Final = 4
# Each in turn, several times over, a call before each turn to wake it: what disturbs one
# turn has passed by the next.
_ROUNDS: Final = 4
_MOST_CALLS: Final = 10
_SECONDS: Final = 0.06
_COPY: Final = "copy"


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """The dtypes whose products are worth a ceiling on `device`.

    fp16 on a CPU is emulated by most; bf16 on an older GPU is.
    """
    if device.type != "cuda":
        return (torch.float32, torch.bfloat16)
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return (torch.float32, torch.bfloat16, torch.float16)
    return (torch.float32, torch.float16)


def measure(device: torch.device, of: Iterable[torch.dtype] | None = None) -> Ceilings:
    """The fastest call of each kind on `device`; `of` are dtypes of NAMES (None: `dtypes`).

    A ceiling is what is possible, so the best counts, not the median: whatever else the
    machine does only makes calls longer. A product of side n is 2 n^3 operations; a copy
    of n bytes reads n and writes n. Takes about a second.
    """
    side, size = _sizes(device)
    # Random values: on zeros a GPU draws less power and clocks higher.
    generator = torch.Generator(device).manual_seed(0)
    values = torch.randn(side, side, device=device, generator=generator)
    calls: dict[str, Callable[[], object]] = {}
    for dtype in dtypes(device) if of is None else of:
        a = values.to(dtype)
        calls[NAMES[dtype]] = functools.partial(torch.mm, a, a, out=torch.empty_like(a))
    source = torch.ones(size, dtype=torch.uint8, device=device)
    calls[_COPY] = functools.partial(torch.zeros_like(source).copy_, source)
    seconds = _fastest(calls, device)
    bytes_per_s = 2 * size / seconds.pop(_COPY)
    flops_per_s = {name: 2 * side**3 / took for name, took in seconds.items()}
    return Ceilings(_source(device), flops_per_s, bytes_per_s)


def _sizes(device: torch.device) -> tuple[int, int]:
    """Side of the products and bytes of the copy, so that they fit into what is free."""
    if device.type != "cuda":
        return _CPU_SIDE, _CPU_COPY
    torch.cuda.empty_cache()  # what the run gave back is free, too
    free = torch.cuda.mem_get_info(device)[0] // _FREE_PART
    side, size = _CUDA_SIDE, _CUDA_COPY
    # fp32, bf16 and fp16, an operand and a result of each: 16 bytes.
    while 16 * side**2 > free and side > _CPU_SIDE:
        side //= 2
    while 2 * size > free and size > _CPU_COPY:
        size //= 2
    return side, size


def _fastest(calls: dict[str, Callable[[], object]], device: torch.device) -> dict[str, float]:
    """Seconds of the fastest of each of `calls`."""
    clock = StepClock(device)
    best = dict.fromkeys(calls, math.inf)
    for _ in range(_ROUNDS):
        for name, call in calls.items():
            call()
            begun = time.perf_counter()
            for _ in range(_MOST_CALLS):
                clock.start()
                call()
                clock.stop()
                best[name] = min(best[name], clock.durations_ns()[0] / 1e9)
                if time.perf_counter() - begun > _SECONDS:
                    break
    return best


def _source(device: torch.device) -> str:
    today = datetime.date.today().isoformat()
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        tf32 = torch.get_float32_matmul_precision() != "highest"
        how = f"fp32 products {'may use' if tf32 else 'without'} TF32"
    else:
        name, how = environment.describe()["cpu"]["model"], f"{torch.get_num_threads()} threads"
    return f"measured by peftprof on {name}, torch {torch.__version__}, {today}, {how}"
