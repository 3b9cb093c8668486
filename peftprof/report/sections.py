"""What stands below a run's table: operators, layers, work, and what placed them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from peftprof.breakdowns import Breakdown, Ceilings, Layer, Operator, Placed, Spread, Work
from peftprof.report import pieces, words
from peftprof.report.pieces import STYLES, WIDE_FROM, Bar

NAMED_FROM = 0.01  # a share of unattributed time that is worth listing its operators for
GAINS = 6  # categories of which it is said what their absence would gain
WORTH = 1.01  # times as fast from which a gain is told
SCRAPS = 0.05  # share of a category's time with known operands, below which it tells nothing
UNLIKE = 1.5  # longest over shortest step from which the reader is told
RULE_WIDTH = 28


@dataclass(frozen=True)
class Operators:
    """Names with their self time; where there is room with the rule that placed each."""

    title: str
    operators: Sequence[Operator]
    step_ns: float

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The table at the width given."""
        rules = options.max_width >= WIDE_FROM and any(o.rule for o in self.operators)
        means = any(o.mean_ns is not None for o in self.operators)
        table = pieces.table(expand=True)
        table.add_column(self.title, ratio=1, no_wrap=True, overflow="ellipsis")
        table.add_column("category", no_wrap=True)
        for name in ("ms/step", "share", "calls", *["mean us"] * means):
            table.add_column(name, justify="right", no_wrap=True)
        if rules:
            table.add_column("rule", no_wrap=True, overflow="ellipsis", max_width=RULE_WIDTH)
        decimals = words.digits(self.step_ns)
        for operator in self.operators:
            cells: list[Text | str] = [
                Text(words.called(operator.name)),
                Text(words.label(operator.category), STYLES[operator.category]),
                words.ms(operator.ns, decimals),
                words.percent(operator.share),
                Text(f"{operator.count:,.0f}", "dim"),
            ]
            if means:
                mean = operator.mean_ns
                cells.append(Text("-" if mean is None else words.figures(mean / 1e3), "dim"))
            if rules:
                cells.append(Text(words.clean(operator.rule), "dim"))
            table.add_row(*cells)
        yield table


def layers(found: Sequence[Layer], top: int, step_ns: float) -> Table:
    """The `top` layers that take longest, forward and backward apart."""
    table = pieces.table(expand=True)
    table.add_column("longest layers", no_wrap=True, overflow="ellipsis", max_width=44)
    for name in ("forward ms", "backward ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("", ratio=1)
    decimals = words.digits(step_ns)
    chosen = longest_layers(found, top)
    longest = max([layer.share for layer in chosen] + [1e-9])
    for layer in chosen:
        table.add_row(
            Text(words.clean(layer.path)),
            words.ms(layer.forward_ns, decimals),
            words.ms(layer.backward_ns, decimals),
            words.percent(layer.share),
            Bar(layer.share / longest, "dim"),
        )
    return table


def longest_layers(found: Sequence[Layer], top: int) -> list[Layer]:
    """The `top` layers by time, the longest first."""
    return sorted(found, key=lambda layer: -(layer.forward_ns + layer.backward_ns))[:top]


def known_work(breakdown: Breakdown) -> list[Work]:
    """Categories of which the trace tells more than scraps; the longest first."""
    return sorted((w for w in breakdown.work if w.known >= SCRAPS), key=lambda w: -w.ns)


def work(found: Sequence[Work], has_ceilings: bool) -> Table:
    """Operations and bytes of each category, and how near they come to the ceilings.

    Rates are over the time whose operands are known.
    """
    table = pieces.table()
    table.add_column("work a step", no_wrap=True)
    rates = ("of FLOP/s", "of bytes/s") if has_ceilings else ("GFLOP/s", "GB/s")
    for name in ("GFLOP", "MB", *rates):
        table.add_column(name, justify="right", no_wrap=True)
    if has_ceilings:
        table.add_column("bound by", no_wrap=True)
    table.add_column("known", justify="right", no_wrap=True)
    for item in found:
        table.add_row(
            Text(words.label(item.category), STYLES[item.category]),
            words.figures(item.flops / 1e9),
            words.figures(item.bytes / 1e6),
            *achieved(item, has_ceilings),
            *[item.bound or "-"] * has_ceilings,
            Text(words.percent(item.known), "dim"),
        )
    return table


def achieved(item: Work, has_ceilings: bool) -> list[str]:
    """Operations and bytes a second: as shares of the ceilings, else as they are."""
    if has_ceilings:
        shares = (item.flops_share, item.bytes_share)
        return ["-" if share is None else words.percent(share) for share in shares]
    time_ns = item.ns * item.known
    return [words.figures(done / time_ns) if time_ns else "-" for done in (item.flops, item.bytes)]


def _tera(rate: float) -> str:
    # A CPU without bf16 reaches less than a thousandth.
    return words.figures(rate / 1e12) if rate >= 1e12 else f"{rate / 1e12:.3g}"


def ceilings(measured: Ceilings) -> str:
    """What the device was measured to reach, and by whom."""
    products = ", ".join(
        f"{words.clean(dtype)} {_tera(rate)} TFLOP/s"
        for dtype, rate in measured.flops_per_s.items()
    )
    copies = f"copies {words.figures(measured.bytes_per_s / 1e9)} GB/s"
    both = f"{products}; {copies}" if products else copies
    return f"Ceilings: {both} ({words.clean(measured.source)})."


def placed(rules: Sequence[Placed], top: int) -> Table:
    """Which rules placed how much of the time."""
    table = pieces.table()
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("placed by", no_wrap=True, overflow="ellipsis")
    for rule in rules[:top]:
        table.add_row(words.percent(rule.share), Text(words.clean(rule.rule)))
    if len(rules) > top:
        rest = sum(rule.share for rule in rules[top:])
        table.add_row(words.percent(rest), Text(f"{len(rules) - top} more", "dim"))
    return table


def notes(breakdown: Breakdown) -> Iterator[str]:
    """Sentences on how the table is to be read."""
    step_ns = breakdown.step_ns
    decimals = words.digits(step_ns.median)
    steps_by = words.steps_by(breakdown.steps_by)
    if steps_by:
        yield steps_by
    if breakdown.device == "cpu":
        yield "Idle: no operator runs (Python, hooks, the framework between operators)."
    else:
        yield "Idle: nothing runs on the device, which waits for the phase named."
    if step_ns.max > UNLIKE * step_ns.min:
        yield "The steps differ much: something else used the machine, or their work is unlike."
    if breakdown.overlap_ns > 0.001 * step_ns.median:
        overlap = words.ms(breakdown.overlap_ns, decimals)
        yield f"Overlap: {overlap} ms of further work a step ran beside what is counted here."
    if breakdown.communication is not None:
        talk = breakdown.communication
        total, hidden, exposed = (
            words.ms(ns, decimals) for ns in (talk.total_ns, talk.hidden_ns, talk.exposed_ns)
        )
        yield f"Communication: {total} ms a step, {hidden} hidden by other work, {exposed} exposed."
    if breakdown.totals is not None and breakdown.device != "cpu":
        whole = breakdown.totals
        shares = (whole.busy_ns, whole.compute_ns, whole.communication_ns, whole.memory_ns)
        busy, compute, communication, memory = (
            f"{100 * ns / whole.span_ns if whole.span_ns else 0.0:.1f}" for ns in shares
        )
        yield (
            f"Whole trace: {words.ms(whole.span_ns, decimals)} ms, busy {busy} %: "
            f"compute {compute}, communication {communication}, copies {memory}."
        )
    gains = if_free(breakdown)
    if gains:
        yield gains
    yield from (words.clean(text) for text in breakdown.notes)


def if_free(breakdown: Breakdown) -> str:
    """What a step would gain at most without its longest categories; empty for nothing."""
    gains = [(n, gain) for n, gain in breakdown.if_free.items() if gain.median >= WORTH][:GAINS]
    said = "; ".join(f"{words.label(name)} {_times(gain)}" for name, gain in gains)
    return f"As fast at most if it took no time: {said}." if said else ""


def _times(gain: Spread) -> str:
    if gain.median > 100:
        return "over 100x"
    span = f"{gain.min:.2f}-{gain.max:.2f}"
    return f"{gain.median:.2f}x" + (f" ({span})" if gain.max > gain.min else "")


def below(breakdown: Breakdown, top: int) -> Iterator[Padding]:
    """The tables below a run's own, as far as it has them."""
    step_ns = breakdown.step_ns.median
    if top and breakdown.operators:
        title = "longest operators" if breakdown.device == "cpu" else "longest kernels"
        yield _block(Operators(title, breakdown.operators[:top], step_ns))
    if breakdown.unattributed_ns > NAMED_FROM * step_ns and breakdown.unattributed_operators:
        unknown = breakdown.unattributed_operators[: max(top, 5)]
        yield _block(Operators("what no rule places", unknown, step_ns))
    if top and breakdown.layers:
        yield _block(layers(breakdown.layers, top, step_ns))
    known = known_work(breakdown)
    if known:
        yield _block(work(known, breakdown.ceilings is not None))
        if breakdown.ceilings is not None:
            yield Padding(pieces.note(ceilings(breakdown.ceilings)), 0)


def rules(breakdown: Breakdown, top: int) -> Iterator[Padding]:
    """The list of the rules that placed most."""
    if top and breakdown.rules:
        yield _block(placed(breakdown.rules, top))


def _block(content: Operators | Table) -> Padding:
    return Padding(content, (1, 0, 0, 0))
