"""Which rows the fused NF4 kernels take on this GPU: measured once, kept in the cache.

`python -m bench.crossover` measures and stores; a run with `--kernels triton` reads.
"""

import re
from pathlib import Path

import torch

from peftprof.errors import InputError
from peftprof.run.fetch import cache_folder
from peftprof_kernels.crossover import Crossover, read_crossovers, set_crossovers


def path_for(device_name: str) -> Path:
    """Where the table of the device that calls itself `device_name` is kept."""
    slug = re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")
    return cache_folder() / "crossovers" / f"{slug}.json"


def stored(device: torch.device) -> list[Crossover] | None:
    """What was measured on this GPU; None where nothing was, or on a CPU.

    Raises InputError when the file is damaged.
    """
    if device.type != "cuda":
        return None
    path = path_for(torch.cuda.get_device_name(device))
    try:
        return read_crossovers(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} cannot be used ({error}); remove it, or measure again with "
            "`python -m bench.crossover`"
        ) from error


def use_stored(device: torch.device) -> None:
    """Have the kernels dispatch by this GPU's table, or by the default."""
    set_crossovers(stored(device))
