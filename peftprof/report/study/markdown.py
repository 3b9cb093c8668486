"""A study as Markdown."""

from collections.abc import Sequence

from peftprof.report.study.sheets import Sheet, mark, sheets, shown
from peftprof.report.words import clean
from peftprof.studies import Judged

# As references: a backslash would mean something else after another one.
ESCAPED = {ord(letter): f"&#{ord(letter)};" for letter in "\\`*[]|"} | {
    ord("&"): "&amp;",
    ord("<"): "&lt;",
}


def to_markdown(judged: Judged, figures: Sequence[tuple[str, str]]) -> str:
    """The summary: verdicts with their evidence, tables, figures (file and caption)."""
    study = judged.study
    lines = [f"# {_text(study.about or study.recipe)}", ""]
    lines += [f"Recipe {_text(study.recipe)}, begun {_text(study.created)}.", ""]
    if study.quick:
        lines += [f"**{_text(mark(judged))}.**", ""]
    lines += ["## The paper's claims", ""]
    for verdict in judged.verdicts:
        lines += [f"### {verdict.claim}: {_text(verdict.text)}", ""]
        lines += [f"**{verdict.verdict}.** {_text(verdict.evidence)}", ""]
        if verdict.caveat:
            lines += [f"*{_text(verdict.caveat)}*", ""]
        lines += [f"- {_text(shown(figure))}" for figure in verdict.figures]
        lines.append("")
    for sheet in sheets(judged):
        lines += [f"## {_text(sheet.title)}", "", *_table(sheet), ""]
    if figures:
        lines += ["## Figures", ""]
        lines += [f"![{_text(caption)}](figures/{name})\n" for name, caption in figures]
    return "\n".join(lines).rstrip() + "\n"


def _table(sheet: Sheet) -> list[str]:
    rows = [sheet.head, ("---", *("---:" for _ in sheet.head[1:])), *sheet.rows]
    lines = ["| " + " | ".join(_text(cell) for cell in row) + " |" for row in rows]
    return [*lines, "", f"{_text(sheet.note)}."] if sheet.note else lines


def _text(words: str) -> str:
    """Words that cannot end a cell, begin an element, or be a link, a picture or code."""
    return clean(words).translate(ESCAPED)
