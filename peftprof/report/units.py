"""Numbers as people read them."""


def mib(size: float) -> str:
    """Bytes as MiB or GiB (powers of two, and named so)."""
    return f"{size / 2**30:.2f} GiB" if size >= 10 * 2**30 else f"{size / 2**20:.0f} MiB"


def count(number: float) -> str:
    """A count with thin groups: 22 713 986 as 22,713,986."""
    return f"{number:,.0f}"
