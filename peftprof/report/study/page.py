"""A study as one HTML file, which needs nothing else, calls nowhere and runs no script.

Whatever comes from a study is cleaned and escaped (`markup`). Should anything slip through,
the page's own policy runs nothing, takes no style but its own, known by its SHA-256, and
loads nothing but the figures that stand in it.
"""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from peftprof.report.page import parts
from peftprof.report.page.markup import SPACE, Html, join, tag
from peftprof.report.study.figures import Drawn
from peftprof.report.study.sheets import Sheet, mark, sheets, shown
from peftprof.studies import Judged, Verdict

BADGES = {"holds": "holds", "fails": "fails"}  # the classes; any other verdict is open
LONG = 48  # characters from which a cell of a table is text that may break
WIDE = 500  # points from which a figure takes the whole width
FIGURE = re.compile(r"[-+<]?\d")
WIDTH = re.compile(r'<svg[^>]*?\swidth="([0-9.]+)pt"')
RULE = (
    "A claim holds where the whole 95 % interval is on its side, fails where the whole interval "
    "is on the other, and is not testable here where both sides are in it or nothing was measured."
)
# Figures that show what a claim is about, by the beginning of their files' names.
SHOWN_BY = {
    "C1": ("ladder", "fig11", "operators"),
    "C2": ("ladder", "operators"),
    "C3": ("operators",),
    "C4": ("roofline",),
    "C5": ("operators", "fig18"),
    "C6": ("ladder", "fig18"),
    "C7": ("fig02", "memory-parts"),
    "C8": ("memory-parts",),
    "C9": ("fig07", "fig14"),
    "C10": ("fig01",),
}


def to_html(judged: Judged, drawn: Sequence[Drawn]) -> str:
    """`judged` with its figures as a whole HTML document; write it as UTF-8."""
    study = judged.study
    title = study.about or study.recipe or "Study"
    style = _text("peftprof.report.page", "page.css") + _text(__package__, "study.css")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        Html(f"<style>{style}</style>"),
    )
    quick = mark(judged)
    body = tag(
        "body",
        tag(
            "header",
            tag("h1", title),
            tag("p", f"Recipe {study.recipe}, begun {study.created}.", class_="quiet"),
            tag("p", f"{quick}.", class_="mark") if quick else Html(""),
        ),
        tag("main", *_sections(judged, drawn)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _sections(judged: Judged, drawn: Sequence[Drawn]) -> list[Html]:
    paper = [one for one in drawn if one.file.startswith("fig")]
    new = [one for one in drawn if one not in paper]
    study = judged.study
    return [
        parts.section("claims", "The paper's claims", _overview(judged.verdicts)),
        parts.section("new", "What the paper does not show", _drawings(new)),
        parts.section("evidence", "Claim by claim",
                      *(_claim(verdict, drawn) for verdict in judged.verdicts)),
        parts.section("tables", "Tables", *(_sheet(sheet) for sheet in sheets(judged))),
        parts.section("paper", "The paper's figures, drawn again", _drawings(paper)),
        parts.section("settings", "Settings and machine",
                      _values("Settings", study.settings), _values("Machine", study.environment)),
    ]  # fmt: skip


def _overview(verdicts: Sequence[Verdict]) -> Html:
    if not verdicts:
        return Html("")
    rows = [
        tag(
            "tr",
            tag("td", tag("a", verdict.claim, href=f"#{_anchor(verdict)}")),
            tag("td", verdict.text, class_="text"),
            tag("td", _badge(verdict)),
        )
        for verdict in verdicts
    ]
    return join(parts.table(["claim", "", "verdict"], rows, "overview"), parts.note(RULE))


def _badge(verdict: Verdict) -> Html:
    return tag("span", verdict.verdict, class_=f"badge {BADGES.get(verdict.verdict, 'open')}")


def _claim(verdict: Verdict, drawn: Sequence[Drawn]) -> Html:
    figures = [tag("li", shown(figure)) for figure in verdict.figures]
    seen = [
        tag("a", one.title, href=f"#{_name(one)}")
        for start in SHOWN_BY.get(verdict.claim, ())
        for one in drawn
        if one.file.startswith(start)
    ]
    links = [piece for link in seen for piece in (Html("; "), link)][1:]
    return tag(
        "div",
        tag("h3", f"{verdict.claim}: {verdict.text}", SPACE, _badge(verdict)),
        tag("p", verdict.evidence) if verdict.evidence else Html(""),
        tag("ul", *figures) if figures else Html(""),
        parts.note(verdict.caveat) if verdict.caveat else Html(""),
        tag("p", "See", SPACE, *links, ".", class_="quiet") if links else Html(""),
        class_="claim",
        id=_anchor(verdict),
    )


def _anchor(verdict: Verdict) -> str:
    return f"claim-{verdict.claim}"


def _name(one: Drawn) -> str:
    return f"figure-{one.file.removesuffix('.svg')}"


def _sheet(sheet: Sheet) -> Html:
    right = [_is_figures(column) for column in zip(*sheet.rows, strict=True)]
    head = [f">{title}" if n else title for title, n in zip(sheet.head, right, strict=True)]
    rows = [tag("tr", *map(_cell, row, right)) for row in sheet.rows]
    return tag(
        "div",
        tag("h3", sheet.title),
        parts.table(head, rows),
        parts.note(f"{sheet.note}.") if sheet.note else Html(""),
        class_="sheet",
    )


def _is_figures(column: Sequence[str]) -> bool:
    """Whether most of a column's cells are figures, which stand to the right."""
    told = [words for words in column if words]
    return 2 * sum(FIGURE.match(words) is not None for words in told) > len(told)


def _cell(words: str, right: bool) -> Html:
    """A cell; long words may break."""
    if len(words) > LONG:
        return tag("td", words, class_="long")
    return tag("td", words, class_="n" if right else None)


def _drawings(drawn: Sequence[Drawn]) -> Html:
    return tag("div", *map(_drawing, drawn), class_="drawings") if drawn else Html("")


def _drawing(one: Drawn) -> Html:
    data = base64.b64encode(one.svg.encode()).decode()
    width = WIDTH.match(one.svg)
    source = f"data:image/svg+xml;base64,{data}"
    image = tag("img", src=source, alt=f"{one.title}. {one.caption}")
    large = width is not None and float(width[1]) > WIDE
    return tag(
        "figure",
        image,
        tag("figcaption", one.caption),
        id=_name(one),
        class_="large" if large else None,
    )


def _values(title: str, values: Mapping[str, Any]) -> Html:
    """A table of names and values, whatever they are."""
    rows = [
        tag("tr", tag("td", key), _cell(_plain(value), right=False))
        for key, value in values.items()
    ]
    if not rows:
        return Html("")
    return tag("div", tag("h3", title), parts.table(["", ""], rows), class_="sheet")


def _plain(value: Any, inside: bool = False) -> str:
    """A value in words, tables as their names and values; what is not known is left out."""
    if isinstance(value, Mapping):
        pairs = [f"{k} {_plain(v, True)}" for k, v in value.items() if v is not None]
        told = ", ".join(pairs) or "none"
        return f"({told})" if inside else told
    if isinstance(value, list | tuple):
        return ", ".join(_plain(one, True) for one in value) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def _policy(style: str) -> str:
    """The page's Content-Security-Policy: this style and the figures in it, nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )


def _text(package: str, name: str) -> str:
    return resources.files(package).joinpath(name).read_text("utf-8")
