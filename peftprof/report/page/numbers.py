"""Figures as the page shows them."""

MINUS = "\N{MINUS SIGN}"
TO = "\N{EN DASH}"


def ms(ns: float, places: int) -> str:
    """Nanoseconds as milliseconds."""
    return f"{ns / 1e6:,.{places}f}".replace("-", MINUS)


def signed_ms(ns: float, places: int) -> str:
    """Nanoseconds as milliseconds with their sign."""
    return f"{round(ns / 1e6, places) + 0.0:+,.{places}f}".replace("-", MINUS)


def between(low: float, high: float, places: int) -> str:
    """Two times in nanoseconds as a range of milliseconds."""
    return f"{ms(low, places)}{TO}{ms(high, places)}"


def duration(ns: float) -> str:
    """A time of any length, in the unit that suits it."""
    for unit, size in (("s", 1e9), ("ms", 1e6), ("\N{MICRO SIGN}s", 1e3)):
        if abs(ns) >= size:
            return f"{ns / size:,.3g} {unit}" if ns < 1000 * size else f"{ns / size:,.0f} {unit}"
    return f"{ns:,.0f} ns"


def percent(share: float) -> str:
    """A share of one in per cent."""
    return f"{100 * share:.1f} %".replace("-", MINUS)


def amount(number: float, unit: str) -> str:
    """A number with a decimal prefix: 1.2e12 FLOP is 1.20 TFLOP."""
    for prefix, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g} {prefix}{unit}"
    return f"{number:.3g} {unit}"


def count(number: float) -> str:
    """A count; a mean of counts keeps one decimal where it has one."""
    return f"{number:,.0f}" if number == round(number) else f"{number:,.1f}"
