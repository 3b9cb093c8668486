"""What stands behind the step: idle by cause, the whole trace, layers, operators, rules, notes."""

from collections.abc import Sequence

from peftprof.breakdowns import Breakdown, Operator
from peftprof.report.page import numbers, parts
from peftprof.report.page.markup import Html, join, tag
from peftprof.report.sections import if_free
from peftprof.report.words import called, digits

TOP = 20  # operators that are listed
LAYERS = 200  # layers that are listed: enough for every model there is
NAMED_FROM = 0.01  # a share of unattributed time that is worth listing its operators for
UNLIKE = 1.5  # longest over shortest step from which the reader is told
CAUSES = {
    "launch": "launch-bound: the CPU had not launched the next work",
    "data": "the CPU was loading data",
    "sync": "the CPU had waited for the device and began anew",
    "queued": "the work was launched, and waited for other work or for its start",
}


def idle_by_cause(number: int, run: Breakdown) -> Html:
    """Why the device had nothing to do."""
    total = run.step_ns.median or 1.0
    places = digits(total)
    causes = run.idle_by_cause_ns
    if not any(causes.values()):
        return Html("")
    longest = max([*causes.values(), 1.0])
    rows = [
        tag(
            "tr",
            tag("td", CAUSES.get(cause, cause)),
            parts.row_bar([(0, ns / longest, "c-idle")]),
            parts.time(ns, places, f"/runs/{number}/idle_by_cause_ns/{cause}"),
            parts.number(numbers.percent(ns / total)),
        )
        for cause, ns in causes.items()
    ]
    return parts.table(["cause", "", ">ms/step", ">of the step"], rows, "causes")


def whole_trace(number: int, run: Breakdown) -> Html:
    """Communication of a step, hidden and exposed, and the totals of the whole trace."""
    content = []
    places = digits(run.step_ns.median)
    if run.communication is not None and run.communication.total_ns > 0:
        found = run.communication
        where = f"/runs/{number}/communication"
        named = (
            ("collectives", "total_ns", found.total_ns),
            ("hidden behind other work", "hidden_ns", found.hidden_ns),
            ("exposed", "exposed_ns", found.exposed_ns),
        )
        rows = [
            tag("tr", tag("td", title), parts.time(ns, places, f"{where}/{key}"))
            for title, key, ns in named
        ]
        content.append(parts.table(["communication", ">ms/step"], rows))
    if run.totals is not None:
        totals = run.totals
        unions = (
            ("first to last event", "span_ns", totals.span_ns),
            ("busy", "busy_ns", totals.busy_ns),
            ("idle", "idle_ns", totals.idle_ns),
            ("compute", "compute_ns", totals.compute_ns),
            ("communication", "communication_ns", totals.communication_ns),
            ("copies and fills", "memory_ns", totals.memory_ns),
        )
        rows = [
            tag(
                "tr",
                tag("td", title),
                parts.time(ns, places, f"/runs/{number}/totals/{key}"),
                parts.number(numbers.percent(ns / (totals.span_ns or 1.0))),
            )
            for title, key, ns in unions
        ]
        content.append(parts.table(["whole trace", ">ms", ">share"], rows))
    return tag("div", *content, class_="pair") if content else Html("")


def layers(number: int, run: Breakdown) -> Html:
    """Forward and backward time of each layer, in the model's order."""
    if not run.layers:
        return Html("")
    places = digits(run.step_ns.median)
    longest = max(layer.forward_ns + layer.backward_ns for layer in run.layers) or 1.0
    rows = []
    for i, layer in enumerate(run.layers[:LAYERS]):
        forward, whole = layer.forward_ns, layer.forward_ns + layer.backward_ns
        middle, end = forward / longest, whole / longest
        stretches = [(0, middle, "forward"), (middle, end, "backward")]
        where = f"/runs/{number}/layers/{i}"
        rows.append(
            tag(
                "tr",
                parts.name(layer.path),
                parts.row_bar(stretches),
                parts.time(layer.forward_ns, places, f"{where}/forward_ns"),
                parts.time(layer.backward_ns, places, f"{where}/backward_ns"),
                parts.number(numbers.percent(layer.share)),
            )
        )
    head = ["layer", "", ">forward ms", ">backward ms", ">share"]
    meaning = [
        tag("li", tag("i", class_=f"swatch {side}", aria_hidden="true"), side)
        for side in ("forward", "backward")
    ]
    legend = tag("ul", *meaning, class_="legend")
    more = _more(len(run.layers) - LAYERS, "layers")
    return join(parts.table(head, rows, "layers"), legend, more)


def operators(number: int, run: Breakdown) -> Html:
    """The longest operators, and those that no rule places where they matter."""
    content = []
    if run.operators:
        content.append(_operators(run.operators, f"/runs/{number}/operators", run))
    if run.unattributed_operators and run.unattributed_ns > NAMED_FROM * run.step_ns.median:
        content.append(tag("h4", "What no rule places"))
        where = f"/runs/{number}/unattributed_operators"
        content.append(_operators(run.unattributed_operators, where, run))
    return join(*content)


def _operators(found: Sequence[Operator], where: str, run: Breakdown) -> Html:
    places = digits(run.step_ns.median)
    rows = [
        tag(
            "tr",
            parts.name(called(operator.name)),
            parts.category(operator.category),
            parts.time(operator.ns, places, f"{where}/{i}/ns"),
            parts.number(numbers.percent(operator.share)),
            parts.number(numbers.count(operator.count), kind="quiet"),
            _mean(operator.mean_ns, f"{where}/{i}/mean_ns"),
            parts.name(operator.rule),
        )
        for i, operator in enumerate(found[:TOP])
    ]
    head = ["operator or kernel", "category", ">ms/step", ">share", ">calls", ">mean", "placed by"]
    return parts.table(head, rows, "operators")


def _mean(ns: float | None, at: str) -> Html:
    if ns is None:
        return parts.number("-")
    return tag("td", numbers.duration(ns), class_="n", data_ns=ns, data_at=at)


def rules(number: int, run: Breakdown) -> Html:
    """Which rules placed the step's time."""
    if not run.rules:
        return Html("")
    rows = [
        tag(
            "tr",
            parts.name(placed.rule),
            parts.row_bar([(0, placed.share, "whole")]),
            parts.number(numbers.percent(placed.share)),
        )
        for placed in run.rules
    ]
    return parts.table(["rule", "", ">share of time"], rows, "rules")


def notes(number: int, run: Breakdown) -> Html:
    """What the figures do not say."""
    if run.device == "cpu":
        idle = "Idle: no operator runs (Python, hooks, the framework between operators)."
    else:
        idle = "Idle: nothing runs on the device, which waits for the phase named."
    said = [idle]
    step = run.step_ns
    if step.max > UNLIKE * step.min:
        said.append(
            "The steps differ much: something else used the machine, or their work is unlike."
        )
    if run.overlap_ns > 0.001 * step.median:
        more = numbers.duration(run.overlap_ns)
        said.append(f"Overlap: {more} of further work a step ran beside what is counted here.")
    if gains := if_free(run):
        said.append(gains)
    return tag("ul", *(tag("li", words) for words in (*said, *run.notes)))


def _more(left: int, what: str) -> Html:
    return parts.note(f"{left:,} more {what} are in the JSON.") if left > 0 else Html("")
