"""Tables, Markdown, the terminal, and what is written."""

import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from peftprof.errors import FolderError
from peftprof.report.study import render, write
from peftprof.report.study.markdown import to_markdown
from peftprof.report.study.sheets import configurations, ordered, sheets, shown
from peftprof.report.words import clean
from peftprof.studies import Figure, Judged
from tests.report.study import samples

EVERY = sorted(samples.JUDGED)
LETTERS = {"&lt;": "<", "&amp;": "&"} | {f"&#{ord(c)};": c for c in "\\`*[]|"}


def markdown(which: str) -> str:
    named = [(one.file, one.caption) for one in samples.drawn(which)]
    return to_markdown(samples.JUDGED[which](), named)


def plain(text: str) -> str:
    """Markdown's text as it is read."""
    return re.sub("|".join(map(re.escape, LETTERS)), lambda found: LETTERS[found[0]], text)


def rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[plain(cell).strip() for cell in line[1:-1].split("|")] for line in lines]


@pytest.mark.parametrize("which", EVERY)
def test_every_row_of_every_table_stands_in_markdown(which: str) -> None:
    found = rows(markdown(which))
    for sheet in sheets(samples.JUDGED[which]()):
        assert [clean(title) for title in sheet.head] in found
        for row in sheet.rows:
            assert [clean(cell) for cell in row] in found


@pytest.mark.parametrize("which", EVERY)
def test_every_row_of_a_table_has_its_columns(which: str) -> None:
    for sheet in sheets(samples.JUDGED[which]()):
        assert sheet.rows
        assert {len(row) for row in sheet.rows} == {len(sheet.head)}


@pytest.mark.parametrize("which", EVERY)
def test_every_claim_and_figure_stands_in_markdown(which: str) -> None:
    judged = samples.JUDGED[which]()
    text = plain(markdown(which))
    for verdict in judged.verdicts:
        assert f"### {verdict.claim}: {verdict.text}" in text
        assert f"**{verdict.verdict}.** {clean(verdict.evidence)}" in text
        assert clean(verdict.caveat) in text
        for figure in verdict.figures:
            assert f"- {clean(shown(figure))}" in text
    for one in samples.drawn(which):
        assert f"](figures/{one.file})" in text


def test_hostile_words_are_no_markdown() -> None:
    text = markdown("hostile")
    assert "<script" not in text
    assert "![i](" not in text
    assert "a|b" not in text
    assert "`" not in text
    assert "\x1b" not in text
    for line in text.splitlines():
        assert not line.startswith("next")
    pictures = re.findall(r"!\[[^\[\]]*\]\(([^)]*)\)", text)
    assert pictures == [f"figures/{one.file}" for one in samples.drawn("hostile")]


def test_a_quick_look_says_so_over_every_table() -> None:
    told = f"quick look: {samples.QUICK}"
    assert f"**{told}.**" in markdown("quick")
    # Counts of parameters and reasons of failures are what they are however short the runs.
    exempt = {"Trainable parameters of the paper's DistilBERT", "Runs without a result"}
    for sheet in sheets(samples.quick()):
        assert sheet.note.startswith(told) or sheet.title in exempt
    assert "quick look" not in markdown("whole")


def test_a_configuration_without_a_time_is_in_the_tables() -> None:
    made = samples.whole()
    without = {k: v for k, v in made.throughput.items() if k != "lora-r8"}
    judged = replace(made, throughput=without)
    assert configurations(judged) == configurations(made)
    lora = next(s for s in sheets(judged) if s.title.startswith("LoRA"))
    row = next(row for row in lora.rows if row[0] == "lora-r8")
    assert row[1] != ""
    assert row[7] == ""


def test_configurations_are_in_order() -> None:
    names = ["qlora-r8", "lora-r16", "odd", "lora-r4", "full"]
    assert ordered(names) == ["full", "lora-r4", "lora-r16", "qlora-r8", "odd"]


def test_failed_and_missing_runs_are_told_with_their_reasons() -> None:
    lacking = next(s for s in sheets(samples.failed()) if s.title == "Runs without a result")
    states = {row[0]: row[1:] for row in lacking.rows}
    assert states["matrix-qlora-8-s42-0"] == ("failed", "out of memory: tried to allocate 2 GiB")
    assert states["matrix-lora-16-s42-0"][0] == "missing"
    assert states["ladder-4-s42"] == ("left out", "bf16 is slow here")
    assert not any(s.title.startswith("QLoRA") for s in sheets(samples.failed()))


@pytest.mark.parametrize(
    ("figure", "words"),
    [
        (Figure("a", None), "a: not known"),
        (Figure("a", 0.5), "a: 0.5"),
        (Figure("a", 1.5, 1.2, 1.9, "x", 3.6), "a: 1.50x (1.20x to 1.90x); paper 3.60x"),
        (Figure("a", 2.0, unit="ms"), "a: 2 ms"),
    ],
)
def test_a_figure_in_words(figure: Figure, words: str) -> None:
    assert shown(figure) == words


def printed(judged: Judged, width: int = 120) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(render(judged, Path("study")))
    return console.export_text()


@pytest.mark.parametrize("which", EVERY)
def test_the_terminal_shows_runs_verdicts_and_files(which: str) -> None:
    judged = samples.JUDGED[which]()
    text = printed(judged)
    for name in configurations(judged):
        assert re.search(rf"^{name}\s", text, re.MULTILINE)
    for verdict in judged.verdicts:
        assert re.search(rf"^{verdict.claim}\s+{verdict.verdict}\s+{re.escape(verdict.text)}", text,
                         re.MULTILINE)  # fmt: skip
    assert "study/index.html" in text
    assert ("quick look" in text) == bool(judged.study.quick)
    assert "\x1b" not in text


def test_everything_is_written_whole(tmp_path: Path) -> None:
    judged = samples.single("full")
    assert write(judged, tmp_path) == tmp_path
    drawn = samples.drawn("single full")
    assert sorted(p.name for p in (tmp_path / "figures").iterdir()) == [d.file for d in drawn]
    for one in drawn:
        assert (tmp_path / "figures" / one.file).read_text("utf-8") == one.svg
        assert f"](figures/{one.file})" in (tmp_path / "summary.md").read_text("utf-8")
    assert (tmp_path / "index.html").read_text("utf-8").startswith("<!DOCTYPE html>")
    assert not list(tmp_path.glob(".new-*"))


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "figures").write_text("in the way")
    with pytest.raises(FolderError, match="figures"):
        write(samples.empty(), tmp_path)
