import base64
import hashlib
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from peftprof.report.study.page import to_html
from peftprof.report.study.sheets import sheets, shown
from peftprof.report.words import clean
from tests.report.reading import Read
from tests.report.study import samples

EVERY = sorted(samples.JUDGED)


def page(which: str) -> str:
    return to_html(samples.JUDGED[which](), samples.drawn(which))


@pytest.mark.parametrize("which", EVERY)
def test_a_page_is_whole_runs_nothing_and_calls_nowhere(which: str) -> None:
    text = page(which)
    read = Read(text)
    tags = {name for name, _ in read.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "form", "base", "svg"}
    for _, attributes in read.elements:
        assert not any(key.startswith("on") or key == "style" for key in attributes)
        for key in ("href", "src"):
            if key in attributes:
                assert str(attributes[key]).startswith(("#", "data:image/svg+xml;base64,"))
    assert "url(" not in text
    assert "@import" not in text


@pytest.mark.parametrize("which", EVERY)
def test_the_policy_allows_this_style_and_the_figures_alone(which: str) -> None:
    read = Read(page(which))
    (policy,) = [m["content"] for m in read.named("meta") if m.get("http-equiv")]
    (style,) = read.inside("style")
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    assert "prefers-color-scheme: dark" in style


@pytest.mark.parametrize("which", EVERY)
def test_every_figure_stands_in_the_page_with_its_words(which: str) -> None:
    read = Read(page(which))
    images = read.named("img")
    drawn = samples.drawn(which)
    for image, one in zip(images, drawn_order(which), strict=True):
        data = str(image["src"]).removeprefix("data:image/svg+xml;base64,")
        assert base64.b64decode(data).decode() == one.svg
        assert image["alt"] == f"{one.title}. {one.caption}"
        assert one.caption in read.inside("figcaption")
    if drawn:
        assert ElementTree.fromstring(drawn[0].svg) is not None


def drawn_order(which: str) -> list[samples.Drawn]:
    """What the paper lacks comes first on the page."""
    return sorted(samples.drawn(which), key=lambda one: one.file.startswith("fig"))


@pytest.mark.parametrize("which", EVERY)
def test_every_row_of_every_table_stands_in_the_page(which: str) -> None:
    read = Read(page(which))
    cells = read.inside("td")
    titles = read.inside("h3")
    for sheet in sheets(samples.JUDGED[which]()):
        assert sheet.title in titles
        for row in sheet.rows:
            wanted = [clean(cell) for cell in row if cell]
            assert any(cells[i : i + len(wanted)] == wanted for i in range(len(cells))), row


@pytest.mark.parametrize("which", EVERY)
def test_every_claim_has_its_verdict_figures_evidence_and_caveat(which: str) -> None:
    judged = samples.JUDGED[which]()
    read = Read(page(which))
    badges = [(a["class"], t) for a, t in spans(read)]
    assert len(judged.verdicts) == 13
    assert len(badges) == 26
    classes = {"holds": "holds", "fails": "fails", "not testable here": "open"}
    for verdict in judged.verdicts:
        assert (f"badge {classes[verdict.verdict]}", verdict.verdict) in badges
        assert verdict.text in read.inside("td")
        assert clean(verdict.evidence) in read.inside("p")
        assert not verdict.caveat or clean(verdict.caveat) in read.inside("p")
        assert {clean(shown(figure)) for figure in verdict.figures} <= set(read.inside("li"))
    anchors = {str(a["id"]) for _, a in read.elements if a.get("id")}
    assert len(anchors) == len([a for _, a in read.elements if a.get("id")])
    assert {str(a["href"]).removeprefix("#") for a in read.named("a")} <= anchors


def spans(read: Read) -> list[tuple[dict[str, str | None], str]]:
    found = [a for a in read.named("span") if str(a.get("class")).startswith("badge")]
    return list(zip(found, read.inside("span"), strict=True))


def test_a_quick_look_is_marked_at_the_top() -> None:
    words = f"quick look: {samples.QUICK}."
    assert f'<p class="mark">{words}</p>' in page("quick")
    assert 'class="mark"' not in page("whole")


def test_hostile_words_are_shown_and_are_no_elements() -> None:
    text = page("hostile")
    assert "<script" not in text
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt;" in text
    assert "\x1b" not in text
    assert not re.search(r"a\|b `c`[^<]*\n", text)
    assert f"<h1>{escaped()}</h1>" in text


def escaped() -> str:
    words = clean(samples.HOSTILE)
    return words.replace("<", "&lt;").replace(">", "&gt;").replace("'", "&#x27;")


def test_columns_of_figures_stand_to_the_right_and_words_to_the_left() -> None:
    text = page("whole")
    assert '<th scope="col" class="n">accuracy %</th>' in text
    assert '<th scope="col">verdict at 5 %</th>' in text
    assert '<th scope="col" class="n">p</th>' in text


def test_an_empty_study_has_its_claims_and_no_figures() -> None:
    read = Read(page("empty"))
    assert read.named("img") == []
    assert [a["id"] for a in read.named("section")] == ["claims", "evidence", "settings"]


def test_the_machine_is_told_in_words() -> None:
    made = samples.empty()
    machine = {
        "cpu": {"cores": 2, "bf16": False, "limit": None},
        "devices": [],
        "a": {"b": {"c": 1}},
    }
    judged = replace(made, study=replace(made.study, environment=machine))
    cells = Read(to_html(judged, [])).inside("td")
    assert cells[-6:] == ["cpu", "cores 2, bf16 no", "devices", "none", "a", "b (c 1)"]
