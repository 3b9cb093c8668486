"""A breakdown as one HTML file, which needs nothing else and calls nowhere.

Whatever comes from a trace is cleaned and escaped (`markup`). Should anything slip through,
the page's own policy runs no script and takes no style but the two written here, known by
their SHA-256, and lets nothing be loaded from anywhere.
"""

import base64
import hashlib
from importlib import resources

from peftprof.report.export import to_json
from peftprof.report.page import (
    colours,
    comparison,
    details,
    memory,
    parts,
    roofline,
    step,
    timeline,
)
from peftprof.report.page.markup import Html, join, tag
from peftprof.trace import Loaded

PROFILER = (
    "The steps were recorded with a profiler on, which slows them, short operators most. "
    "How fast a run is stands in its run.json, measured without one."
)
ADDS_UP = (
    "Medians over the profiled steps, scaled by one factor so that they add up to the median step."
)


def render(loaded: Loaded, title: str = "peftprof breakdown") -> str:
    """`loaded` as a whole HTML document; write it as UTF-8.

    Holds every figure of `to_json(loaded)` that it shows as `data-ns` (nanoseconds) or
    `data-bytes`, `data-at` saying where that JSON has it, and the JSON itself.
    """
    style = _package_text("page.css") + colours.css()
    script = _package_text("timeline.js")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style, script)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    body = tag(
        "body",
        tag("header", tag("h1", title)),
        tag("main", *_sections(loaded)),
        tag(
            "script",
            timeline.script_text(to_json(loaded)),
            type="application/json",
            id="peftprof-json",
        ),
        Html(f"<script>{script}</script>"),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _sections(loaded: Loaded) -> list[Html]:
    runs = loaded.breakdowns

    def each(absent: str, content: parts.Content) -> Html:
        return parts.for_each_run(runs, absent, content)

    return [
        parts.section("read", "What was read", step.what_was_read(runs), _missing(loaded),
                      comparison.verdict(loaded)),
        parts.section("step", "The step", step.stacked_bars(runs)),
        parts.section("phases", "By phase and category", step.phase_tables(runs),
                      parts.note(ADDS_UP)),
        parts.section("waterfall", "Why one is slower", comparison.waterfalls(loaded)),
        parts.section("idle", "Why the device was idle",
                      each("Its idle time has no cause told.", details.idle_by_cause)),
        parts.section("work", "Work, and the device's ceilings",
                      each("The trace has no operands.", roofline.work)),
        parts.section("layers", "Layers", each("The trace names no layers.", details.layers)),
        parts.section("operators", "Longest operators",
                      each("No operators.", details.operators)),
        parts.section("memory", "Memory at its peak",
                      each("Memory was not recorded.", memory.memory_peak)),
        parts.section("timeline", "One step, drawn out",
                      timeline.timelines(runs, loaded.timelines)),
        parts.section("trace", "The whole trace",
                      each("It has no totals.", details.whole_trace)),
        parts.section("rules", "How the time was placed",
                      each("No rules are told.", details.rules)),
        parts.section("notes", "What the figures do not say", tag("p", PROFILER),
                      each("", details.notes)),
    ]  # fmt: skip


def _missing(loaded: Loaded) -> Html:
    """What was found but not read."""
    said = [parts.note(words) for words in loaded.unreadable]
    if loaded.left_out:
        one = loaded.left_out == 1
        words = f"{loaded.left_out} older {'run is' if one else 'runs are'} left out"
        said.append(parts.note(f"{words}; --all shows every run."))
    return join(*said)


def _policy(style: str, script: str) -> str:
    """The page's Content-Security-Policy: this style, this script, nothing else at all."""
    return (
        f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(content: str) -> str:
    digest = hashlib.sha256(content.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _package_text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text("utf-8")
