"""HTML as text that knows it is HTML: whatever is not is cleaned and escaped on its way in."""

from html import escape

from peftprof.report.words import clean

VOID = {"br", "col", "hr", "img", "link", "meta"}


class Html(str):
    """Text that is HTML already and goes into a page as it is."""

    __slots__ = ()


SPACE = Html(" ")


def text(words: str) -> Html:
    """`words` as HTML text: on one line, without control characters, escaped with quotes."""
    return words if isinstance(words, Html) else Html(escape(clean(words)))


def tag(name: str, /, *children: str, **attributes: str | float | None) -> Html:
    """An element. Children that are not Html, and all attributes, are escaped.

    `class_` is the attribute class, `data_ns` is data-ns; an attribute of None is left out.
    A float stands with every digit it has.
    """
    head = name
    for key, value in attributes.items():
        if value is not None:
            head += f' {key.rstrip("_").replace("_", "-")}="{escape(clean(f"{value}"))}"'
    if name in VOID:
        return Html(f"<{head}>")
    return Html(f"<{head}>{join(*children)}</{name}>")


def join(*parts: str) -> Html:
    """Parts one after another; those that are not Html are escaped."""
    return Html("".join(text(part) for part in parts))
