"""The pieces that sections are made of: a section, a table and its cells, a bar in a row."""

from collections.abc import Callable, Sequence

from peftprof.breakdowns import Breakdown
from peftprof.report.page import numbers
from peftprof.report.page.colours import swatch
from peftprof.report.page.markup import SPACE, Html, join, tag
from peftprof.report.words import label

Content = Callable[[int, Breakdown], Html]  # of a run, by its number from 0

ROW_HEIGHT = 24  # pixels; as high as a row of a table, so that lines meet across rows


def section(anchor: str, title: str, *content: str) -> Html:
    """A section of the page under its heading; nothing at all where it has no content."""
    if not any(content):
        return Html("")
    return tag("section", tag("h2", title), *content, id=anchor)


def note(words: str) -> Html:
    """A line that says how to read what stands above it."""
    return tag("p", words, class_="note")


def for_each_run(runs: Sequence[Breakdown], absent: str, content: Content) -> Html:
    """`content` of every run; under the run's name where there are several.

    A run without any says `absent`; where no run has any the result is empty.
    """
    made = [content(number, run) for number, run in enumerate(runs)]
    if not any(made) or len(runs) == 1:
        return join(*made)
    parts = [
        tag("div", tag("h3", run_name(number, run)), part or note(absent), class_="run")
        for number, (run, part) in enumerate(zip(runs, made, strict=True))
    ]
    return tag("div", *parts, class_="runs")


def run_name(number: int, run: Breakdown) -> Html:
    """A run by its number (from 1, as people count) and name."""
    return join(tag("span", f"{number + 1}", class_="number"), SPACE, name(run.name, "span"))


def name(words: str, element: str = "td") -> Html:
    """A name of the trace's making, on one line; the whole of it shows under the pointer."""
    return tag(element, words, class_="name", title=words)


def category(key: str) -> Html:
    """The cell of a category, with its colour."""
    return tag("td", swatch(key), label(key), class_="category")


def time(ns: float, places: int, at: str | None = None, element: str = "td") -> Html:
    """A cell of milliseconds; `at` is where the JSON holds the same nanoseconds."""
    return tag(element, numbers.ms(ns, places), class_="n", data_ns=ns, data_at=at)


def change(ns: float, places: int, at: str | None = None) -> Html:
    """A cell of milliseconds with their sign."""
    shown = numbers.signed_ms(ns, places)
    return tag("td", shown, class_="n", data_ns=ns, data_at=at)


def number(words: str, element: str = "td", kind: str = "") -> Html:
    """A cell of any other figure."""
    return tag(element, words, class_=f"n {kind}".strip())


def table(head: Sequence[str], rows: Sequence[Html], kind: str = "") -> Html:
    """A table; a heading that begins with ">" stands to the right, over figures."""
    cells = [
        tag("th", title.removeprefix(">"), scope="col", class_="n" if title[:1] == ">" else None)
        for title in head
    ]
    body = tag("table", tag("thead", tag("tr", *cells)), tag("tbody", *rows), class_=kind or None)
    return tag("div", body, class_="wide")


def row_bar(stretches: Sequence[tuple[float, float, str]], *marks: Html) -> Html:
    """A bar in a row of a table: stretches (from, to, class) as shares of the row's width."""
    rects = [
        tag(
            "rect",
            x=x_percent(start),
            y="6",
            width=x_percent(end - start),
            height=f"{ROW_HEIGHT - 12}",
            class_=kind,
        )
        for start, end, kind in stretches
    ]
    drawing = tag("svg", *marks, *rects, width="100%", height=f"{ROW_HEIGHT}", aria_hidden="true")
    return tag("td", drawing, class_="bar")


def x_percent(share: float) -> str:
    """A share of the width as SVG writes it."""
    return f"{100 * share:.4f}%"
