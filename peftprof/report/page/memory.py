"""The allocator's peak: what it was made of, and how it grows to what the process holds."""

from peftprof.breakdowns import Breakdown, MemoryPeak
from peftprof.report.page import numbers, parts
from peftprof.report.page.colours import colour_class
from peftprof.report.page.markup import Html, join, tag
from peftprof.report.page.parts import x_percent
from peftprof.report.units import mib
from peftprof.report.words import MEMORY

# Parts borrow the colours of the categories that they belong to.
COLOURS = {
    "base_weights": "base_gemm",
    "quantisation_state": "dequant",
    "adapters": "adapter_gemm",
    "gradients": "attention",
    "optimizer_state": "optimizer",
    "activations": "elementwise",
    "dequant_workspace": "memcpy",
    "other": "unattributed",
}


def memory_peak(number: int, run: Breakdown) -> Html:
    """The peak as one bar, as a table, and against what was reserved and held."""
    if run.memory is None:
        return Html("")
    peak = run.memory
    content = [_where(peak)]
    if peak.parts and peak.peak_bytes > 0:
        content += [_bar(peak), _parts(number, peak)]
    content.append(_reconciled(number, peak))
    content += [parts.note(words) for words in peak.notes]
    return join(*content)


def _where(peak: MemoryPeak) -> Html:
    at = [f"in {peak.phase}" if peak.phase else "", f"at {peak.layer}" if peak.layer else ""]
    place = " ".join(words for words in at if words)
    words = f"Peak of {mib(peak.peak_bytes)} on {peak.device} {place}, by {peak.source}."
    return tag("p", words.replace(" ,", ","))


def _bar(peak: MemoryPeak) -> Html:
    pieces, at = [], 0.0
    for part in peak.parts:
        title, colour = MEMORY.get(part.part, part.part), COLOURS[part.part]
        share = part.bytes / peak.peak_bytes
        pieces.append(
            tag(
                "rect",
                tag("title", f"{title}: {mib(part.bytes)}"),
                x=x_percent(at),
                y="2",
                width=x_percent(share),
                height="28",
                class_=colour_class(colour) + ("" if share > 0.004 else " narrow"),
                data_bytes=part.bytes,
            )
        )
        at += share
    label = "The peak by kind; the table has the figures"
    drawing = tag("svg", *pieces, width="100%", height="32", role="img", aria_label=label)
    return tag("figure", drawing, class_="stack")


def _parts(number: int, peak: MemoryPeak) -> Html:
    rows = []
    for i, part in enumerate(peak.parts):
        title, colour = MEMORY.get(part.part, part.part), COLOURS[part.part]
        mark = tag("i", class_=f"swatch {colour_class(colour)}", aria_hidden="true")
        rows.append(
            tag(
                "tr",
                tag("td", mark, title, class_="category"),
                _size(part.bytes, f"/runs/{number}/memory/parts/{i}/bytes"),
                parts.number(numbers.percent(part.bytes / peak.peak_bytes)),
                parts.number(numbers.count(part.blocks), kind="quiet"),
            )
        )
    last = (
        tag("th", "peak", scope="row"),
        _size(peak.peak_bytes, f"/runs/{number}/memory/peak_bytes"),
        parts.number(numbers.percent(1.0)),
        parts.number(numbers.count(sum(part.blocks for part in peak.parts)), kind="quiet"),
    )
    rows.append(tag("tr", *last, class_="sum"))
    return parts.table(["kind", ">size", ">share", ">blocks"], rows)


def _reconciled(number: int, peak: MemoryPeak) -> Html:
    """Allocated, reserved, held by the process: each with what it adds to the one before."""
    known = [
        (title, key, size)
        for title, key, size in (
            ("allocated: tensors", "allocated_bytes", peak.allocated_bytes),
            ("reserved: with the allocator's own spare blocks", "reserved_bytes",
             peak.reserved_bytes),
            ("process: with the device's context and libraries", "process_bytes",
             peak.process_bytes),
        )
        if size is not None
    ]  # fmt: skip
    if not known:
        return Html("")
    longest = max(size for _, _, size in known) or 1
    rows, before = [], None
    for title, key, size in known:
        more = "" if before is None else _signed(size - before)
        rows.append(
            tag(
                "tr",
                tag("td", title),
                parts.row_bar([(0, size / longest, "whole")]),
                _size(size, f"/runs/{number}/memory/{key}"),
                parts.number(more, kind="quiet"),
            )
        )
        before = size
    return join(
        tag("h4", "Peaks of the timed pass"),
        parts.table(["", "", ">size", ">more than above"], rows, "causes"),
    )


def _size(size: int, at: str) -> Html:
    return tag("td", mib(size), class_="n", data_bytes=size, data_at=at)


def _signed(size: int) -> str:
    return f"+{mib(size)}" if size >= 0 else f"{numbers.MINUS}{mib(-size)}"
