"""The memory-throughput front of a prediction, as an SVG picture."""

import io

from matplotlib.figure import Figure
from matplotlib.style import context
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from peftprof.advice import Advice, Prediction
from peftprof.report.study.figures.drawing import INK, METHODS, NAMES, NO_METADATA, QUIET, STYLE

GIB = 2**30


def draw(advice: Advice) -> str:
    """Peak memory against examples a second of every choice; what no other beats is joined."""
    known = [p for p in advice.predictions if p.samples_per_s is not None]
    with context(["default", STYLE]):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        axes = figure.add_subplot()
        for method, colour in METHODS.items():
            of = [p for p in known if p.choice.method == method]
            if of:
                axes.scatter(*_places(of), s=14, color=colour, alpha=0.55, label=NAMES[method])
        best = front(known)
        axes.plot(*_places(best), color=INK, linewidth=1, label="no other is better in both")
        axes.axvline(advice.memory_bytes / GIB, color=QUIET, linestyle="--", linewidth=1)
        axes.annotate(
            "memory",
            (advice.memory_bytes / GIB, 0),
            xycoords=("data", "axes fraction"),
            xytext=(3, 4),
            textcoords="offset points",
            color=QUIET,
        )
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(bottom=0)
        axes.set_xlabel("predicted peak memory, GiB")
        axes.set_ylabel("predicted examples a second")
        figure.legend(loc="outside lower left", ncols=4)
        figure.suptitle(
            f"{advice.model} on {advice.device}: memory and throughput, {advice.tokens} tokens",
            x=0.012,
            ha="left",
            fontsize=10.5,
            fontweight="bold",
        )
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    svg = buffer.getvalue()
    return svg[svg.index("<svg") :]


def front(predictions: list[Prediction]) -> list[Prediction]:
    """Those that no other beats in memory and throughput, by memory."""
    best: list[Prediction] = []
    for p in sorted(predictions, key=lambda p: (p.peak_bytes, -(p.samples_per_s or 0))):
        if not best or (p.samples_per_s or 0) > (best[-1].samples_per_s or 0):
            best.append(p)
    return best


def _places(predictions: list[Prediction]) -> tuple[list[float], list[float]]:
    return [p.peak_bytes / GIB for p in predictions], [p.samples_per_s or 0 for p in predictions]
