"""What a calibration says, what it is worth, and which devices are known, as tables."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftprof.calibrations import BYTES, FLOPS, MOVES, NARROW, Calibration, Checked, Curve, moved
from peftprof.records import encode
from peftprof.report.pieces import note, table
from peftprof.report.units import mib

BUSY = "measured on a busy machine: what was disturbed in every repeat is too slow"
_SMALL, _LARGE = 1e6, 1e8  # bytes that a cache holds, and bytes that it does not
_WORST = 4


def render(
    calibration: Calibration, checked: Sequence[Checked], held: int, where: str
) -> RenderableType:
    """A calibration as it was just made or read; `where` says where it is kept."""
    c = calibration
    lines: list[RenderableType] = [
        Text(),
        Text(f"{c.device}, {_threads(c)}", "bold"),
        note(f"{c.basis} {c.created[:10]}, {_versions(c)}"),
        Text(),
        _products(c),
        Text(),
        _moves(c),
        Text(),
        _rest(c, checked, held, where),
    ]
    if c.busy:
        disturbed = f"{100 * c.disturbed:.0f} % of all calls were"
        lines += [Text(), Text(f"{BUSY} ({disturbed}); calibrate again when it is quiet", "yellow")]
    return Group(*lines, *[note(text) for text in c.notes])


def render_check(calibration: Calibration, checked: Sequence[Checked], held: int) -> RenderableType:
    """How far the curves are off, by kind and dtype, and where they are worst."""
    shown = table()
    shown.add_column("kind", no_wrap=True)
    shown.add_column("dtype")
    for name in ("calls", "|error|", "9 of 10", "bias"):
        shown.add_column(name, justify="right", no_wrap=True)
    for (kind, dtype), errors in sorted(by_kind(checked).items()):
        size = np.abs(errors)
        shown.add_row(
            Text(kind),
            dtype,
            str(len(errors)),
            f"{100 * np.median(size):.0f} %",
            f"{100 * np.percentile(size, 90):.0f} %",
            f"{100 * statistics.median(errors):+.0f} %",
        )
    worst = sorted(checked, key=lambda one: -abs(np.log(one.predicted_s / one.measured_s)))
    c = calibration
    return Group(
        Text(),
        Text(f"Held-out calls on {c.device}, {_threads(c)}", "bold"),
        note(f"curves {c.basis} {c.created[:16]}; {_undisturbed(len(checked), held)}"),
        Text(),
        shown,
        Text(),
        Text(f"all: {_error(checked)}"),
        *[
            note(
                f"{one.kind} {one.dtype} {one.label}: {_time(one.predicted_s)} predicted, "
                f"{_time(one.measured_s)} measured"
            )
            for one in worst[:_WORST]
        ],
    )


def render_list(
    stored: Iterable[Calibration], unreadable: Iterable[str], shipped: Iterable[Calibration]
) -> RenderableType:
    """The devices that are known, measured ones first."""
    measured = _devices()
    count = 0
    for count, c in enumerate(stored, 1):  # noqa: B007
        measured.add_row(*_device(c, f"{c.device}, {_threads(c)}", c.created[:10]))
    sheets = _devices()
    for c in shipped:
        sheets.add_row(*_device(c, c.device, ""))
    nothing = "nothing yet: `python -m peftprof calibrate` measures this machine"
    return Group(
        Text(),
        Text("measured here", "bold"),
        measured if count else note(nothing),
        *[note(f"left out: {reason}") for reason in unreadable],
        Text(),
        Text("by their data sheets", "bold"),
        sheets,
    )


def to_json(calibration: Calibration, checked: Sequence[Checked], where: str) -> dict[str, Any]:
    """A calibration as JSON values, with its file and the held-out calls."""
    return {"key": calibration.key, "path": where, "calibration": encode(calibration)} | {
        "checked": [encode(one) | {"error": one.error} for one in checked]
    }


def list_json(
    stored: Iterable[Calibration], unreadable: Iterable[str], shipped: Iterable[Calibration]
) -> dict[str, Any]:
    """The devices that are known as JSON values, without their curves."""

    def brief(c: Calibration) -> dict[str, Any]:
        return {"key": c.key} | {k: v for k, v in encode(c).items() if k != "curves"}

    return {
        "measured": [brief(c) for c in stored],
        "unreadable": list(unreadable),
        "datasheet": [brief(c) for c in shipped],
    }


def by_kind(checked: Iterable[Checked]) -> dict[tuple[str, str], list[float]]:
    """Errors of held-out calls by kind and dtype."""
    found: dict[tuple[str, str], list[float]] = {}
    for one in checked:
        found.setdefault((one.kind, one.dtype), []).append(one.error)
    return found


def _products(c: Calibration) -> Table:
    peak = max(curve.rate for curve in c.curves if curve.kind == "gemm" and curve.per == FLOPS)
    size, unit = (1e12, "TFLOP/s") if peak >= 1e13 else (1e9, "GFLOP/s")
    shown = table()
    shown.add_column(unit)
    for name in ("GEMM", "rank 8", "batched", "attention", "backward", "weights, GB/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    for dtype in c.dtypes:
        rates = [
            c.curve("gemm", dtype, FLOPS),
            c.curve("gemm", dtype, NARROW),
            *(c.curve(kind, dtype, FLOPS) for kind in ("bmm", "attention", "attention_backward")),
        ]
        shown.add_row(
            dtype,
            *(_in(curve, size) for curve in rates),
            _in(c.curve("gemm", dtype, BYTES), 1e9),
        )
    return shown


def _in(curve: Curve | None, unit: float) -> str:
    return "-" if curve is None else _figure(curve.rate / unit)


def _moves(c: Calibration) -> Table:
    shown = table()
    shown.add_column("GB/s")
    for dtype in c.dtypes:
        shown.add_column(f"{dtype}, 1 MB", justify="right", no_wrap=True)
        shown.add_column("100 MB", justify="right", no_wrap=True)
    for kind in MOVES:
        rates = [
            _figure(size / float(c.seconds(kind, dtype, 0, size)[0]) / 1e9)
            for dtype in c.dtypes
            for size in (_SMALL, _LARGE)
        ]
        shown.add_row(kind, *rates)
    return shown


def _rest(c: Calibration, checked: Sequence[Checked], held: int, where: str) -> Table:
    shown = Table.grid(padding=(0, 2, 0, 0))
    shown.add_column(style="dim", no_wrap=True)
    shown.add_column(overflow="fold")
    o = c.overheads
    autograd = f"autograd {_time(o.record_s)} more, and {_time(o.node_s)} a node in backward"
    rows = [
        ("NF4 dequantised", _per_element(c, "dequant", "weights/s")),
        ("dropout masks", _per_element(c, "dropout", "elements/s")),
        ("AdamW", _per_element(c, "optimizer", "parameters/s")),
        ("an operator", f"{_time(o.call_s)} at least; {autograd}"),
        ("a module", f"{_time(o.module_s)} a call"),
        *([("a kernel", f"{_time(o.kernel_s)} at least")] if c.kind == "cuda" else []),
        *([("new memory", f"{1e9 * o.fresh_s:.2g} s more a GB")] if o.fresh_s else []),
        ("a process", f"{mib(c.process_bytes)} with all that a run imports{_context(c)}"),
        ("memory", f"{c.memory_bytes / 2**30:.1f} GiB"),
        *(
            [("held-out calls", f"{_error(checked)}; {_undisturbed(len(checked), held)}")]
            * bool(held)
        ),
        ("stored", where),
    ]
    for name, value in rows:
        shown.add_row(name, Text(value))
    return shown


def _per_element(c: Calibration, kind: str, unit: str) -> str:
    """Elements a second in large calls, by dtype."""
    dtypes = ("int8", *c.dtypes) if kind == "dropout" else c.dtypes
    found = []
    for dtype in ("fp32",) if kind == "optimizer" else dtypes:
        if curve := c.curve(kind, dtype):
            found.append(f"{_si(curve.rate / float(moved(kind, dtype, 1)[0]), unit)} {dtype}")
    return ", ".join(found)


def _error(checked: Sequence[Checked]) -> str:
    if not checked:
        return "none was had undisturbed"
    sizes = np.abs([one.error for one in checked])
    median, most = np.percentile(sizes, (50, 90))
    return f"off by {100 * median:.0f} % (median), nine of ten by at most {100 * most:.0f} %"


def _held_out(checked: Sequence[Checked], held: int) -> str:
    return f"{_error(checked)}; {_undisturbed(len(checked), held)}"


def _undisturbed(clean: int, held: int) -> str:
    return f"{clean} of {held} undisturbed"


def _context(c: Calibration) -> str:
    return f"; CUDA takes {mib(c.context_bytes)} of the device" if c.context_bytes else ""


def _threads(c: Calibration) -> str:
    return f"{c.threads} thread{'s' * (c.threads != 1)}"


def _versions(c: Calibration) -> str:
    return ", ".join(f"{k} {v}" for k, v in c.versions.items() if k in ("torch", "bitsandbytes"))


def _devices() -> Table:
    shown = table()
    shown.add_column("device", overflow="fold")
    shown.add_column("GiB", justify="right", no_wrap=True)
    for name in ("fp32", "bf16", "fp16 TFLOP/s"):
        shown.add_column(name, justify="right", no_wrap=True)
    shown.add_column("GB/s", justify="right", no_wrap=True)
    shown.add_column("", no_wrap=True)
    return shown


def _device(c: Calibration, name: str, when: str) -> list[str | Text]:
    peaks = [c.ceilings.flops_per_s.get(dtype) for dtype in ("fp32", "bf16", "fp16")]
    shown = ["" if peak is None else _figure(peak / 1e12) for peak in peaks]
    memory, bandwidth = c.memory_bytes / 2**30, c.ceilings.bytes_per_s / 1e9
    return [Text(name), f"{memory:.1f}", *shown, _figure(bandwidth), when]


def _figure(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _si(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{value / size:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def _time(seconds: float) -> str:
    for size, unit in ((1.0, "s"), (1e-3, "ms")):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e6 * seconds:.2g} us" if seconds < 1e-5 else f"{1e6 * seconds:.0f} us"
