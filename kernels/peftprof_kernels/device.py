"""What a launcher asks a device; nothing here runs at import."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch

# A grid of a few programs under the interpreter, so that what is split on a GPU is split.
_INTERPRETED_PROGRAMS = 4


@cache
def wanted_programs(device: torch.device) -> int:
    """How many programs fill ``device``: two for each multiprocessor."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return 2 * int(torch.cuda.get_device_properties(device).multi_processor_count)


@cache
def has_tensor_cores(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether Triton makes tensor-core code for products in ``dtype`` on ``device``.

    Not for fp32, which would be shortened to tf32, and from Triton 3.6 on not for sm_75.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)


def split(size: int, block: int, programs: int, device: torch.device) -> tuple[int, int]:
    """A sum over ``size`` cut in parts: how many, and how much each, a multiple of ``block``.

    ``programs`` is the grid without the cut; more parts than fill the device gain nothing.
    """
    blocks = -(-size // block)
    wanted = min(blocks, -(-wanted_programs(device) // max(programs, 1)))
    part = -(-blocks // max(wanted, 1)) * block
    return -(-size // part), part


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes ``device`` the current one: Triton launches there, wherever its arguments lie."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
