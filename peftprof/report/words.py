"""What things are called in a report, and how its numbers are written."""

import unicodedata

# A line says its own name where it is not here.
COMPARABLE = "Comparable: same model, data, batches, tokens, precision, steps, seed, device."
LABELS = {"base_gemm": "base GEMM", "adapter_gemm": "adapter GEMM", "head_loss": "head and loss"}
LABELS |= {"memcpy": "memory copies"}
CAUSES = {
    "launch": "launch-bound",
    "data": "data-bound",
    "sync": "after a sync",
    "queued": "queued",
}
MEMORY = {
    "base_weights": "base weights",
    "quantisation_state": "quantisation state",
    "optimizer_state": "optimizer state",
    "activations": "activations saved",
    "dequant_workspace": "dequant workspace",
}
WHOLE_TRACE = "whole trace"
OWN_STEPS = "step:N"


def label(category: str) -> str:
    """A category, idle or unattributed, as people read it."""
    return LABELS.get(category, category)


def clean(text: str) -> str:
    """`text` without control, formatting and unassigned characters, on one line."""
    if text.isprintable():
        return " ".join(text.split())
    kept = (" " if c.isspace() else c for c in text if c.isspace() or _is_visible(c))
    return " ".join("".join(kept).split())


def _is_visible(character: str) -> bool:
    return not unicodedata.category(character).startswith("C")


def called(name: str) -> str:
    """An operator or kernel by its name alone: a kernel's return type says nothing."""
    return clean(name).removeprefix("void ")


def digits(step_ns: float) -> int:
    """Decimals of milliseconds: three or four figures of the step."""
    return 0 if step_ns >= 1e10 else 1 if step_ns >= 1e9 else 2 if step_ns >= 1e7 else 3


def ms(ns: float, decimals: int) -> str:
    """Nanoseconds as milliseconds."""
    return f"{ns / 1e6:,.{decimals}f}"


def change(ns: float, decimals: int) -> str:
    """Milliseconds with their sign."""
    return f"{round(ns / 1e6, decimals) + 0.0:+,.{decimals}f}"  # + 0.0: no negative zero


def span(low: float, high: float, decimals: int) -> str:
    """From and to, in milliseconds."""
    return f"{ms(low, decimals)}-{ms(high, decimals)}"


def percent(share: float) -> str:
    """A share of 0 to 1."""
    return f"{100 * share:.1f} %"


def figures(number: float) -> str:
    """About three figures of a number that may be of any size."""
    decimals = 0 if abs(number) >= 100 else 1 if abs(number) >= 10 else 2
    return f"{number:,.{decimals}f}"


def steps_by(text: str) -> str | None:
    """A sentence on what was taken for a step, or None where it is our own range."""
    if text == WHOLE_TRACE:
        return "No steps in this trace: the whole of it is read as one."
    return f"Steps: the ranges {clean(text)}." if text not in ("", OWN_STEPS) else None


def steps(count: int) -> str:
    """How many steps."""
    return "1 step" if count == 1 else f"{count:,} steps"


def mib(size: float, sign: str = "") -> str:
    """Bytes as MiB; `sign` is `+` for one in any case."""
    return f"{size / 2**20:{sign},.1f}"
