"""How this process was started: alone, or by torchrun or `accelerate launch` as one of several.

Both say so in the environment, so it is known before torch is imported: the command line
has to know which of the processes speaks.
"""

import os
from dataclasses import dataclass

from peftprof.errors import ConfigError

NEEDED = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """One of `size` processes: its number among all, and among those of its machine."""

    rank: int
    local_rank: int
    size: int


def launched() -> Launch | None:
    """This process among those it was started with; None where it is alone.

    Raises ConfigError where the environment says that there are several, and not which is this.
    """
    size = _number("WORLD_SIZE", "1")
    if size <= 1:
        return None
    for name in NEEDED:
        if name not in os.environ:
            raise ConfigError(
                f"WORLD_SIZE is {size} in the environment and {name} is not set; start the "
                "processes with torchrun, or unset WORLD_SIZE for one"
            )
    found = Launch(_number("RANK"), _number("LOCAL_RANK"), size)
    if not 0 <= found.local_rank <= found.rank < size:
        raise ConfigError(
            f"RANK {found.rank}, LOCAL_RANK {found.local_rank} and WORLD_SIZE {size} in the "
            "environment do not go together; start the processes with torchrun"
        )
    return found


def _number(name: str, default: str = "") -> int:
    text = os.environ.get(name, default)
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{name} in the environment is {text!r}, and no whole number") from None


_raised = False


def speak_up() -> None:
    """Let this process speak though it is not the first: it alone knows what went wrong."""
    global _raised
    _raised = True


def speaks() -> bool:
    """Whether this process writes to the terminal: it is alone or the first, or has spoken up."""
    try:
        found = launched()
    except ConfigError:
        return True
    return _raised or found is None or found.rank == 0
