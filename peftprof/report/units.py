"""Numbers as people read them."""

from collections.abc import Callable


def mib(size: float) -> str:
    """Bytes as MiB or GiB (powers of two, and named so)."""
    return f"{size / 2**30:.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:.0f} MiB"


def unit_of(largest: float) -> tuple[str, Callable[[float], str]]:
    """One unit for a column whose largest entry is `largest` bytes, and how to write one in it."""
    if largest >= 10 * 2**30:
        return "GiB", lambda size: f"{size / 2**30:.2f}"
    return "MiB", lambda size: f"{size / 2**20:.0f}"


def count(number: float) -> str:
    """A count with thin groups: 22 713 986 as 22,713,986."""
    return f"{number:,.0f}"
