"""What Python, dispatch and autograd take of the host for one operator, and new memory."""

import time
from collections.abc import Callable
from typing import Final

import torch

from peftprof.calibrations import Overheads
from peftprof.run.timing import time_in_turn

_TINY: Final = 200  # operators in a row, for what one costs
_REPEATS: Final = 15
_FRESH: Final = 1 << 26  # bytes; above what glibc keeps


def overheads(device: torch.device) -> Overheads:
    """The constants of `device`, the least of several repeats each. Takes about a second."""
    x = torch.ones(1, device=device)
    y = torch.ones(1, device=device, requires_grad=True)
    module = torch.nn.Identity()

    def chain(start: torch.Tensor) -> torch.Tensor:
        for _ in range(_TINY):
            start = start * x
        return start

    def without() -> None:
        with torch.no_grad():
            chain(x)

    def modules() -> None:
        for _ in range(_TINY):
            module(x)

    def cast() -> None:
        dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        with torch.no_grad(), torch.autocast(device.type, dtype):
            chain(x)

    backwards: list[float] = []
    forwards = [_host(lambda: chain(y), device) for _ in range(_REPEATS)]
    for _ in range(_REPEATS):
        out = chain(y)
        backwards.append(_host(out.backward, device))
    plain = min(_host(without, device) for _ in range(_REPEATS))
    each = {
        "record": min(forwards) - plain,
        "node": min(backwards) - plain,
        "module": min(_host(modules, device) for _ in range(_REPEATS)),
        "autocast": min(_host(cast, device) for _ in range(_REPEATS)) - plain,
    }
    kernel = 0.0
    if device.type == "cuda":
        with torch.no_grad():
            kernel = time_in_turn([lambda: x * x], device, 0.1)[0].best_s
    extra = {name: max(seconds, 0.0) / _TINY for name, seconds in each.items()}
    return Overheads(
        call_s=plain / _TINY,
        record_s=extra["record"],
        node_s=extra["node"],
        module_s=extra["module"],
        autocast_s=extra["autocast"],
        kernel_s=kernel,
        fresh_s=_fresh_s(device),
    )


def _fresh_s(device: torch.device) -> float:
    """Seconds a byte of memory that is new to the process takes more; 0 on a GPU."""
    if device.type != "cpu":
        return 0.0
    used = torch.empty(_FRESH, dtype=torch.uint8)
    again = min(_host(lambda: used.fill_(1), device) for _ in range(_REPEATS))

    def fresh() -> None:
        torch.empty(_FRESH, dtype=torch.uint8).fill_(1)

    first = min(_host(fresh, device) for _ in range(_REPEATS))
    return max(first - again, 0.0) / _FRESH


def _host(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the host for `call`, the device idle before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    before = time.perf_counter()
    call()
    return time.perf_counter() - before
