"""What a terminal report is put together from: tables without lines, bars, quiet notes."""

from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

STYLES = {
    "dequant": "red",
    "base_gemm": "blue",
    "adapter_gemm": "cyan",
    "attention": "magenta",
    "elementwise": "yellow",
    "embedding": "bright_magenta",
    "head_loss": "bright_blue",
    "optimizer": "green",
    "memcpy": "bright_yellow",
    "communication": "bright_cyan",
    "unattributed": "bright_red",
    "idle": "bright_black",
}
BAR_WIDTH = 60
NAME_WIDTH = 16  # of the first column: four runs side by side fit 80 columns
WIDE_FROM = 100  # columns from which tables say more
EIGHTHS = " ▏▎▍▌▋▊▉"


@dataclass(frozen=True)
class Bar:
    """A bar `share` of the whole width long; ASCII where the output knows no blocks."""

    share: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar at the width given."""
        length = self.share * min(options.max_width, BAR_WIDTH)
        if options.ascii_only:
            yield Text("#" * round(length), self.style)
            return
        whole, rest = divmod(round(length * 8), 8)
        yield Text("█" * whole + (EIGHTHS[rest] if rest else ""), self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Anything from 4 columns on."""
        return _bar_measure(options)


@dataclass(frozen=True)
class Floating:
    """A bar from `start` to `end` of the width (both 0 to 1), at least one column long."""

    start: float
    end: float
    style: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """The bar at the width given."""
        width = min(options.max_width, BAR_WIDTH)
        low, high = sorted((self.start, self.end))
        first = min(round(low * width), width - 1)
        length = round(high * width) - first
        if length < 1:
            first, length = max(0, first - (self.end < self.start)), 1
        yield Text(" " * first + ("#" if options.ascii_only else "█") * length, self.style)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        """Anything from 4 columns on."""
        return _bar_measure(options)


def _bar_measure(options: ConsoleOptions) -> Measurement:
    return Measurement(min(4, options.max_width), min(BAR_WIDTH, options.max_width))


def table(expand: bool = False) -> Table:
    """A table without lines; with `expand` its last column takes the width that is left."""
    return Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        collapse_padding=True,
        expand=expand,
    )


def note(text: str) -> Text:
    """A remark under a table."""
    return Text(text, "dim")


def line(*parts: str | tuple[str, str]) -> Text:
    """One line, cut where it is too long."""
    return Text.assemble(*parts, no_wrap=True, overflow="ellipsis")
