"""One look for every figure, and the way from a painted figure to the same SVG each time."""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.style import context

from peftprof.report.study.sheets import mark
from peftprof.report.words import clean
from peftprof.studies import Interval, Judged

INK, QUIET, RULE, WARNING = "#1b1c1e", "#63666b", "#e3e3df", "#a33b00"
# Okabe and Ito's colours, told apart with every kind of colour blindness; a method has its own.
METHODS = {"full": "#0072b2", "lora": "#e69f00", "qlora": "#009e73"}
OTHER, FASTER, SLOWER = "#999999", "#56b4e9", "#d55e00"
NAMES = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}
PAPER = "paper (A100)"
KEY = "key"  # of the legend below a figure
ROOM = 1.1  # an axis ends this much above the highest of what it shows
WIDE, SMALL = (7.6, 3.9), (5.2, 3.5)  # inches
STYLE = {
    # Ids follow from what is drawn, not from chance; text stays text.
    "svg.hashsalt": "peftprof",
    "svg.fonttype": "none",
    # A recipe's words may have a dollar in them, which is no formula.
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": QUIET,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.h_pad": 0.08,
    "figure.constrained_layout.w_pad": 0.12,
}
# matplotlib would write its version, its address and the time.
NO_METADATA = dict.fromkeys(("Date", "Creator", "Format", "Type"))


@dataclass(frozen=True)
class Drawn:
    """A figure: the name of its file, its title, what it shows in words, and the SVG itself."""

    file: str
    title: str
    caption: str
    svg: str


def draw(
    judged: Judged,
    file: str,
    title: str,
    says: Iterable[str],
    paint: Callable[[Figure], None],
    size: tuple[float, float] = WIDE,
) -> Drawn:
    """What `paint` puts on a figure, under its title; `says` are the sentences of its caption.

    A study that is a quick look says so in the figure and in the caption.
    """
    told = clean(mark(judged))
    # The user's own style and matplotlib's warnings of letters that its font lacks are no
    # part of a study; the reader's program has other fonts.
    with context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size, layout="constrained")
        paint(figure)
        figure.suptitle(title, x=0.012, ha="left", fontsize=10.5, fontweight="bold")
        if told:
            _mark(figure, textwrap.fill(told, int(17 * size[0])))
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=NO_METADATA)
    # From the element on: the declaration before it names an address.
    svg = buffer.getvalue()
    caption = " ".join(f"{clean(words).rstrip('.')}." for words in (*says, told) if words)
    return Drawn(file, title, caption, svg[svg.index("<svg") :])


def _mark(figure: Figure, words: str) -> None:
    """Words below the figure: over its key where that is there, which would cover them."""
    below = next((legend for legend in figure.legends if legend.get_gid() == KEY), None)
    if below is None:
        figure.supxlabel(words, x=0.012, ha="left", fontsize=8, color=WARNING)
        return
    below.set_title(words, prop=FontProperties(size=8))
    below.set_alignment("left")
    below.get_title().set_color(WARNING)


def method_of(name: str) -> str:
    """The method of a configuration `method` or `method-rR`."""
    return name.partition("-r")[0]


def rank_of(name: str) -> int:
    """The rank of a configuration, 0 where it has none."""
    rank = name.partition("-r")[2]
    return int(rank) if rank.isdecimal() else 0


def colour_of(name: str) -> str:
    """The colour of a configuration's method."""
    return METHODS.get(method_of(name), OTHER)


def called(name: str, between: str = " ") -> str:
    """A configuration as a figure names it."""
    method = clean(NAMES.get(method_of(name), method_of(name)))
    rank = rank_of(name)
    return f"{method}{between}r{rank}" if rank else method


def finite(*numbers: float) -> bool:
    """Whether all of these can be drawn."""
    return all(math.isfinite(number) for number in numbers)


def whiskers(intervals: Iterable[Interval]) -> list[list[float]]:
    """How far each interval reaches below and above its value; nothing where it is not known."""
    found = list(intervals)
    below = [one.value - one.low if finite(one.low) else 0.0 for one in found]
    above = [one.high - one.value if finite(one.high) else 0.0 for one in found]
    return [[max(0.0, length) for length in side] for side in (below, above)]


def ends(intervals: Iterable[Interval]) -> list[float]:
    """Values and upper ends, as far as they can be drawn."""
    return [n for one in intervals for n in (one.value, one.high) if finite(n)]


def from_zero(axes: Axes, numbers: Iterable[float], side: str = "y", room: float = ROOM) -> None:
    """Let an axis begin at zero and end above the highest of `numbers`."""
    top = max([number for number in numbers if finite(number)], default=0.0)
    limit = axes.set_ylim if side == "y" else axes.set_xlim
    limit(0, top * room if top > 0 else 1)


def short(number: float, _place: object = None) -> str:
    """A count on an axis: 1.18 M, 740 K, 12."""
    for unit, size in ((" G", 1e9), (" M", 1e6), (" K", 1e3)):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:g}"


def key(figure: Figure, handles: Iterable[Artist], columns: int = 4) -> None:
    """What the figure's marks mean, below it."""
    found = list(handles)
    if found:
        legend = figure.legend(handles=found, loc="outside lower left", ncols=columns)
        legend.set_gid(KEY)
