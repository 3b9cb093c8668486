import base64
import hashlib
import itertools
import json
import math
import re
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof.breakdowns import PHASES, Spread, Timeline, Work
from peftprof.report.export import to_json
from peftprof.report.page import render
from peftprof.report.page.colours import COLOURS, ORDER, ink, luminance
from peftprof.report.page.timeline import script_text
from peftprof.trace import Loaded
from tests.report.page_samples import loaded, run
from tests.report.reading import Read

HOSTILE = (
    "</script><script>document.title='pwned'</script><!--",
    "<img src=x onerror=\"document.title='pwned'\">",
    "\" onmouseover='document.title=1' x='",
    "javascript:document.title='pwned'",
    "</style></title></textarea>]]>&lt;b&gt;&#60;",
    "\u202e\u2066evil\u2028\u2029\x00\x1b[31m\x07\ud800\udfff\n",
    "x" * 4096,
    "\u0645\u0631\u062d\u0628\u0627 " + "e\u0301\u0302\u0303\u0304\u0305" * 20,
)


def found_at(document: object, at: str) -> object:
    """The value of a JSON document at a path such as `/runs/0/rows/3/ns`."""
    for key in at.strip("/").split("/"):
        document = document[int(key)] if isinstance(document, list) else document[key]  # type: ignore[index]
    return document


def figures(page: str) -> list[tuple[str, float, str]]:
    """Every figure that says where the JSON has it: element, value, place."""
    return [
        (name, float(a.get("data-ns") or a["data-bytes"] or "nan"), a["data-at"])  # type: ignore[misc]
        for name, a in Read(page).elements
        if a.get("data-at")
    ]


def two(**changes: object) -> Loaded:
    return loaded(run("lora", 150e6, 1), run("qlora"), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("runs", [1, 2, 5])
@pytest.mark.parametrize("parts", [True, False])
@pytest.mark.parametrize("spans", [0, 40])
def test_a_page_is_well_formed_and_its_figures_are_the_json(
    runs: int, parts: bool, spans: int
) -> None:
    what = loaded(
        *(run(f"run {i}", 1e8 * (i + 1), i, parts=parts) for i in range(runs)), spans=spans
    )
    page = render(what)
    document = json.loads(to_json(what))
    shown = figures(page)
    for _, value, at in shown:
        assert value == found_at(document, at), at
    places = {at for _, _, at in shown}
    for i, one in enumerate(document["runs"]):
        assert {f"/runs/{i}/rows/{j}/ns" for j in range(len(one["rows"]))} <= places
        assert {f"/runs/{i}/{key}_ns" for key in ("idle", "unattributed")} <= places
        assert f"/runs/{i}/step_ns/median" in places
    for i, one in enumerate(document["comparisons"]):
        assert {f"/comparisons/{i}/bars/{j}/ns" for j in range(len(one["bars"]))} <= places


def test_every_optional_part_is_shown_and_left_out_where_there_is_none() -> None:
    def sections(what: Loaded) -> list[str | None]:
        return [a["id"] for a in Read(render(what)).named("section")]

    always = ["read", "step", "phases", "operators", "notes"]
    assert sections(loaded(run(parts=False))) == always
    assert set(sections(two(spans=40))) == {
        *always, "waterfall", "idle", "work", "layers", "memory", "timeline", "trace", "rules"
    }  # fmt: skip
    mixed = render(loaded(run("a"), run("b", parts=False)))
    assert "Memory was not recorded." in mixed
    assert "The trace names no layers." in mixed


def test_the_stacked_bar_adds_up_to_the_step() -> None:
    what = loaded(run())
    bars = [
        a for a in Read(render(what)).named("rect")
        if str(a.get("data-at")).startswith("/runs/0/")
    ]  # fmt: skip
    step = what.breakdowns[0].step_ns.median
    assert math.fsum(float(a["data-ns"] or 0) for a in bars) == pytest.approx(step, rel=1e-12)
    at = 0.0
    for bar in bars:
        assert float(str(bar["x"]).rstrip("%")) == pytest.approx(at, abs=2e-4)
        at += float(str(bar["width"]).rstrip("%"))
    assert at == pytest.approx(100, abs=0.01)


def test_the_waterfall_leads_from_one_step_to_the_other() -> None:
    what = two()
    cells = [(value, at) for name, value, at in figures(render(what)) if name == "td"]
    bars = math.fsum(value for value, at in cells if at.startswith("/comparisons/0/bars"))
    base, other = (one.step_ns.median for one in what.breakdowns)
    assert base + bars == pytest.approx(other)


def test_a_speed_up_is_given_or_refused_with_the_reason() -> None:
    fair = render(two(comparable=True))
    assert "0.81\N{MULTIPLICATION SIGN} as fast in the profiled steps" in fair
    assert "1.02\N{MULTIPLICATION SIGN} as fast, timed" in fair
    assert "unfair" not in re.sub(r"<style>.*?</style>", "", fair, flags=re.DOTALL)

    why = ("batch_size: 8 vs 32",)
    unfair = render(two(comparable=False, differences=why))
    assert "Unfair. The runs differ in batch_size: 8 vs 32." in unfair

    made = two(comparable=False, differences=why)
    silent = tuple(replace(c, speedup=None, timed_speedup=None) for c in made.comparisons)
    refused = render(replace(made, comparisons=silent))
    assert "No speed-up is given: the runs differ in batch_size: 8 vs 32." in refused
    assert "as fast" not in refused
    unknown = render(replace(made, comparable=None, differences=(), comparisons=silent))
    assert "whether the runs are comparable is not known" in unknown
    assert "not all have a run.json" in unknown


def test_what_was_not_read_is_told() -> None:
    page = render(loaded(run(), left_out=3, unreadable=("runs/a <b> is damaged",)))
    assert "3 older runs are left out" in page
    assert "runs/a &lt;b&gt; is damaged" in page
    assert "1 older run is left out" in render(loaded(run(), left_out=1))


def test_no_roofline_without_ceilings_or_points() -> None:
    whole = run()
    assert 'class="roofline"' in render(loaded(whole))
    bare = render(loaded(replace(whole, ceilings=None)))
    assert 'class="roofline"' not in bare
    assert "ceilings were not measured" in bare
    assert "19.1 TFLOP" in bare
    no_flops = (Work("memcpy", 1e6, 1.0, 0.0, 1e9, "bf16"),)
    assert "No category has both FLOPs and bytes" in render(loaded(replace(whole, work=no_flops)))


@settings(deadline=None, max_examples=60)
@given(
    ns=st.floats(0, 1e12), known=st.floats(0, 1), flops=st.floats(0, 1e20), size=st.floats(0, 1e15)
)
def test_any_work_is_drawn(ns: float, known: float, flops: float, size: float) -> None:
    work = (Work("base_gemm", ns, known, flops, size, "bf16"), *run().work)
    page = render(loaded(replace(run(), work=work)))
    assert not re.search(r'="-?(nan|inf)', page)
    assert Read(page).named("circle")


@settings(deadline=None, max_examples=60)
@given(step=st.floats(1e-3, 1e13), median=st.floats(0, 1e13))
def test_any_length_of_a_step_is_drawn(step: float, median: float) -> None:
    made = replace(run(step_ns=step), step_ns=Spread(median, 0.0, median))
    assert not re.search(r'="-?(nan|inf)', render(loaded(made, run())))


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_are_text(words: str) -> None:
    what = loaded(run(words=words), run("b", words=words), spans=40, words=words, comparable=False,
                  differences=(words,))  # fmt: skip
    page = render(what, title=words)
    page.encode("utf-8")
    tame = Read(render(loaded(run(), run("b"), spans=40, comparable=False, differences=("x: y",))))
    reader = Read(page)
    # The same elements with the same attributes, whatever the names are.
    assert [(n, a.keys()) for n, a in reader.elements] == [(n, a.keys()) for n, a in tame.elements]
    assert not set("\u202e\u2066\u2028\u2029\x00\x1b\x07") & set(page)
    document = json.loads(reader.inside("script")[-2])
    assert document == json.loads(to_json(what))


@settings(deadline=None, max_examples=100)
@given(words=st.text(st.characters(exclude_categories=[]), max_size=200))
def test_any_text_may_be_a_name(words: str) -> None:
    what = loaded(run(words=words), spans=8, words=words)
    page = render(what, title=words)
    page.encode("utf-8")
    reader = Read(page)
    tame = Read(render(loaded(run(), spans=8)))
    assert [n for n, _ in reader.elements] == [n for n, _ in tame.elements]
    assert json.loads(reader.inside("script")[-2]) == json.loads(to_json(what))
    assert not [k for _, a in reader.elements for k in a if k.startswith("on") or k == "style"]


def test_the_json_inside_is_that_of_the_export() -> None:
    what = two(comparable=True)
    text = Read(render(what)).inside("script")[0]
    assert text == script_text(to_json(what))
    assert json.loads(text) == json.loads(to_json(what))
    assert script_text('"<\u2028>&"') == '"\\u003c\\u2028\\u003e\\u0026"'


def test_the_policy_allows_this_style_and_this_script_and_nothing_else() -> None:
    reader = Read(render(loaded(run(), spans=8)))
    (policy,) = [a["content"] for a in reader.named("meta") if a.get("http-equiv")]
    style, script = reader.inside("style")[0], reader.inside("script")[-1]
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))

    def source(text: str) -> str:
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        return f"'sha256-{digest}'"

    assert rules == {
        "default-src": "'none'",
        "style-src": source(style),
        "script-src": source(script),
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for name, attributes in reader.elements:
        assert not {"src", "href", "style", "action"} & attributes.keys(), name
    assert "</" not in script
    assert "<!--" not in script
    assert "url(" not in style
    assert "@import" not in style


def decoded(page: str) -> list[list[tuple[int, int, str, str, str]]]:
    """The spans of the first timeline in a page: start, end, category, phase, name."""
    data = json.loads(Read(page).inside("script")[0])
    lanes = []
    for lane in data["lanes"]:
        at, spans = 0, []
        for gap, length, category, phase, name in zip(*[iter(lane["spans"])] * 5, strict=True):
            start, at = at + gap, at + gap + length
            words = data["categories"][category], data["phases"][phase], data["names"][name]
            spans.append((start, at, *words))
        lanes.append(spans)
    return lanes


def test_the_timeline_keeps_every_span() -> None:
    what = loaded(run(), spans=400)
    expected = [
        [(s.start_ns, s.end_ns, s.category, s.phase, s.name) for s in lane.spans]
        for lane in what.timelines[0].lanes
    ]
    assert decoded(render(what)) == expected
    assert decoded(render(replace(what, timelines=(Timeline(0, 0, (), 0),)))) == []


def test_four_runs_of_20000_spans_stay_under_ten_megabytes() -> None:
    page = render(loaded(*(run(f"run {i}") for i in range(4)), spans=20_000))
    assert len(page.encode()) < 10e6


# Machado, Oliveira and Fernandes 2009, severity 1.0, on linear RGB: protan, deutan, tritan.
BLINDNESS = {
    "none": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protan": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deutan": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritan": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
# Ottosson 2020: linear RGB to cone responses, and their cube roots to OKLab.
CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)
APART = 0.075  # OKLab; neighbours that are seen as the same are within about 0.02


def times(matrix: tuple[tuple[float, ...], ...], vector: list[float]) -> list[float]:
    return [sum(m * v for m, v in zip(row, vector, strict=True)) for row in matrix]


def oklab(colour: str, blindness: str) -> list[float]:
    values = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
    seen = [min(1.0, max(0.0, v)) for v in times(BLINDNESS[blindness], linear)]
    return times(OKLAB, [math.cbrt(v) for v in times(CONES, seen)])


@pytest.mark.parametrize("side", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("blindness", BLINDNESS)
def test_colours_are_told_apart(side: int, blindness: str) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        pair = oklab(COLOURS[one][side], blindness), oklab(COLOURS[other][side], blindness)
        assert math.dist(*pair) > APART, (one, other)
    assert math.dist(oklab("#d02020", "deutan"), oklab("#6b6b00", "deutan")) < APART


def test_every_category_has_a_colour_that_words_can_be_read_on() -> None:
    assert set(ORDER) == set(COLOURS)
    for colour in itertools.chain.from_iterable(COLOURS.values()):
        dark, light = sorted((luminance(colour), luminance(ink(colour))))
        assert (light + 0.05) / (dark + 0.05) > 4.5  # WCAG 2.2, 1.4.3
    assert len(PHASES) == 5
