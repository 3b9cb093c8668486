"""The timeline's data, small: spans as five whole numbers each, names once."""

import json
import re
from collections.abc import Sequence
from functools import cache

from peftprof.breakdowns import PHASES, Breakdown, Timeline
from peftprof.report.page import numbers, parts
from peftprof.report.page.colours import ORDER
from peftprof.report.page.markup import Html, join, tag
from peftprof.report.words import clean, label

# What means something to HTML, ends a line in JavaScript, or turns the reading direction.
SPECIAL = re.compile("[<>&\u2028\u2029\u202a-\u202e\u2066-\u2069]")
HINT = "Drag to move. Click the drawing, and the wheel zooms."
NAME = 300  # characters of a kernel's name that a tooltip has room for


def timelines(runs: Sequence[Breakdown], found: Sequence[Timeline]) -> Html:
    """One drawing a run, each with its data beside it; timeline.js draws them."""
    if not found:
        return Html("")
    without = "The timeline is drawn by a script, and scripts are off. All else is on this page."
    drawn = [
        _figure(number, run, timeline)
        for number, (run, timeline) in enumerate(zip(runs, found, strict=True))
    ]
    return join(tag("noscript", parts.note(without)), *drawn)


def _figure(number: int, run: Breakdown, timeline: Timeline) -> Html:
    length = numbers.duration(timeline.length_ns)
    words = f"step {timeline.step}, {length}, the one nearest to the median"
    if timeline.left_out:
        words += f"; {timeline.left_out:,} short spans are not drawn"
    buttons = [
        tag("button", sign, type="button", data_do=do, title=title, aria_label=title)
        for sign, do, title in (
            (numbers.MINUS, "out", "Zoom out"),
            ("+", "in", "Zoom in"),
            ("\N{LEFTWARDS ARROW}", "left", "Move left"),
            ("\N{RIGHTWARDS ARROW}", "right", "Move right"),
            ("whole step", "all", "Show the whole step"),
        )
    ]
    canvas = tag(
        "canvas",
        tabindex="0",
        role="application",
        aria_label=f"Timeline of {clean(run.name)}: arrows move, plus and minus zoom, "
        "0 shows all, comma and full stop go from span to span",
    )
    tip = tag("div", class_="tip", role="status", hidden="hidden")
    return tag(
        "figure",
        tag("figcaption", parts.run_name(number, run), tag("span", words, class_="quiet")),
        tag("div", *buttons, tag("span", HINT, class_="quiet"), class_="controls", hidden="hidden"),
        tag("div", canvas, tip, class_="canvas"),
        tag("script", script_text(_encode(timeline)), type="application/json"),
        class_="timeline",
    )


def _encode(timeline: Timeline) -> str:
    """The timeline as JSON. A lane's `spans` is flat, five numbers a span: the gap since the
    end of the span before, the length (both ns), category, phase and name by number.
    """
    names: dict[str, int] = {}

    @cache
    def numbered(name: str) -> int:
        return names.setdefault(clean(name)[:NAME], len(names))

    lanes = []
    for lane in timeline.lanes:
        flat: list[int] = []
        at = 0
        for span in lane.spans:
            category = ORDER.index(span.category if span.category in ORDER else "unattributed")
            phase = PHASES.index(span.phase if span.phase in PHASES else "other")
            gap, length = span.start_ns - at, span.end_ns - span.start_ns
            flat += (gap, length, category, phase, numbered(span.name))
            at = span.end_ns
        lanes.append({"name": clean(lane.name)[:NAME], "spans": flat})
    document = {
        "length": timeline.length_ns,
        "categories": list(ORDER),
        "labels": [label(category) for category in ORDER],
        "phases": list(PHASES),
        "names": list(names),
        "lanes": lanes,
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"))


def script_text(document: str) -> Html:
    """JSON that may stand in a script element: nothing in it can end the element or begin one.

    The characters escaped stand only inside strings in JSON, so it still means the same.
    """
    return Html(SPECIAL.sub(lambda found: f"\\u{ord(found[0]):04x}", document))
