import itertools
import math
import re
from dataclasses import replace
from functools import cache
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from peftprof.report.study.figures import drawing, figures
from peftprof.report.study.figures.drawing import METHODS, called, rank_of, short
from peftprof.report.study.figures.pareto import _apart
from peftprof.report.study.sheets import mark
from peftprof.studies import Interval, Rung
from tests.report.study import samples

NEW = ["operators", "ladder", "memory-parts", "roofline", "pareto"]
SVG = "{http://www.w3.org/2000/svg}"
EVERY = sorted(samples.JUDGED)


@cache
def painted() -> dict[str, Figure]:
    """The figures of the whole study by their files, to look at their axes."""
    found: list[Figure] = []

    class Kept(Figure):
        def __init__(self, *args: object, **kwargs: object) -> None:
            super().__init__(*args, **kwargs)  # type: ignore[arg-type]
            found.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "Figure", Kept)
        drawn = figures(samples.whole())
    return {one.file: figure for one, figure in zip(drawn, found, strict=True)}


def names(which: str) -> list[str]:
    return [
        re.sub(r"^(fig\d+).*", r"\1", d.file).removesuffix(".svg") for d in samples.drawn(which)
    ]


def test_the_papers_figures_and_those_it_lacks_are_all_there() -> None:
    numbers = [n for n in range(1, 19) if n != 4]  # the fourth is a photograph
    assert names("whole") == [*(f"fig{n:02}" for n in numbers), *NEW]
    assert len({one.file for one in samples.drawn("whole")}) == len(numbers) + len(NEW)


def test_figures_without_data_are_left_out() -> None:
    lora = [f"fig{n:02}" for n in range(5, 12)]
    assert names("empty") == []
    assert names("single") == ["fig01", "fig02", "fig03", *lora]
    assert names("single full") == ["fig01", "fig02", "fig03"]
    assert names("failed") == ["fig01", "fig02", "fig03", *lora, *NEW]


@pytest.mark.parametrize("which", EVERY)
def test_an_svg_is_alone_and_harmless(which: str) -> None:
    for one in samples.drawn(which):
        root = ElementTree.fromstring(one.svg)
        assert root.tag == f"{SVG}svg"
        tags = {element.tag.removeprefix(SVG) for element in root.iter()}
        assert not tags & {"script", "foreignObject", "image", "a", "metadata"}, one.file
        for element in root.iter():
            for key, value in element.attrib.items():
                assert not key.lower().startswith("on")
                if key.endswith("href"):
                    assert value.startswith("#")
        words = "".join(root.itertext())
        links = re.findall(r'(?<!xmlns=")(?<!xmlns:xlink=")https?:', one.svg)
        assert len(links) == len(re.findall("https?:", words))
        assert not re.search(r"[\x00-\x08\x0b-\x1f]", one.svg)
        assert not re.search(r'="(nan|inf)', one.svg)
        assert "font-family: 'DejaVu Sans', sans-serif" in one.svg


@pytest.mark.slow
def test_the_same_study_gives_the_same_figures() -> None:
    assert tuple(figures(samples.quick())) == samples.drawn("quick")


def test_a_users_own_style_changes_nothing_and_is_kept() -> None:
    drawn = samples.drawn("single")
    with matplotlib.rc_context({"font.size": 31, "axes.facecolor": "red", "text.usetex": True}):
        assert tuple(figures(samples.single())) == drawn
        assert matplotlib.rcParams["font.size"] == 31


@pytest.mark.parametrize("which", ["quick", "hostile"])
def test_a_quick_look_says_so_on_every_figure(which: str) -> None:
    told = drawing.clean(mark(samples.JUDGED[which]()))
    for one in samples.drawn(which):
        assert told in one.caption
        words = " ".join("".join(ElementTree.fromstring(one.svg).itertext()).split())
        assert told[:40] in words, one.file
    assert all("quick look" not in one.svg + one.caption for one in samples.drawn("whole"))


def test_titles_and_captions_are_on_one_line_and_say_what_whiskers_are() -> None:
    for one in (*samples.drawn("hostile"), *samples.drawn("whole")):
        assert one.title
        assert one.caption.endswith(".")
        assert (one.title + one.caption).isprintable()
    captions = {one.file: one.caption for one in samples.drawn("whole")}
    assert "95 % intervals" in captions["fig01-accuracy.svg"]
    assert "lowest and the highest run" in captions["fig02-memory.svg"]
    assert "does not begin at zero" in captions["pareto.svg"]


def test_bars_and_axes_begin_at_zero() -> None:
    bars = 0
    for file, figure in painted().items():
        for axes in figure.axes:
            if file in ("pareto.svg", "roofline.svg", "fig03-trained-parameters.svg"):
                assert not any(isinstance(c, BarContainer) for c in axes.containers)
                continue
            along = axes.get_xlim() if file == "ladder.svg" else axes.get_ylim()
            assert along[0] == 0, file
            for container in axes.containers:
                if isinstance(container, BarContainer) and file.startswith("fig"):
                    assert {bar.get_y() for bar in container} == {0}
                    bars += len(container)
    assert bars == 2 * 9


def test_no_words_are_cut_off() -> None:
    for file, figure in painted().items():
        page = figure.bbox
        words = [figure._suptitle, *figure.texts]
        words += [text for legend in figure.legends for text in legend.get_texts()]
        for axes in figure.axes:
            words += [axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        for text in words:
            if text is not None and text.get_text():
                box = text.get_window_extent()
                inside = min(box.x0, box.y0) >= -1 and box.x1 <= page.x1 and box.y1 <= page.y1
                assert inside, (file, text.get_text())


def test_stacks_and_the_waterfall_add_up() -> None:
    judged, drawn = samples.whole(), painted()
    steps = [
        run.breakdown.step_ns.median / 1e6
        for run in judged.study.results
        if run.breakdown is not None and run.cell.part == "matrix"
    ]
    whole, phases = drawn["operators.svg"].axes
    assert tops(whole) == pytest.approx(steps)
    unattributed = sum(
        run.breakdown.unattributed_ns / 1e6
        for run in judged.study.results
        if run.breakdown is not None and run.cell.part == "matrix"
    )
    assert math.fsum(tops(phases)) == pytest.approx(math.fsum(steps) - unattributed)
    assert tops(drawn["memory-parts.svg"].axes[0]) == pytest.approx([17 * 1024] * 3)
    bars = [c[0] for c in drawn["ladder.svg"].axes[0].containers if isinstance(c, BarContainer)]
    assert [bar.get_width() for bar in bars[:-1]] == pytest.approx(
        [rung.ns / 1e6 for rung in judged.ladder]
    )
    end = math.fsum(rung.ns for rung in judged.ladder) / 1e6
    assert (bars[-1].get_x(), bars[-1].get_width()) == (0, pytest.approx(end))


def tops(axes: object) -> list[float]:
    """The height that each stack of bars ends at, from left to right."""
    found: dict[float, float] = {}
    for container in axes.containers:  # type: ignore[attr-defined]
        for bar in container:
            middle = bar.get_x() + bar.get_width() / 2
            assert bar.get_y() == pytest.approx(found.get(middle, 0.0), abs=1e-9)
            found[middle] = bar.get_y() + bar.get_height()
    return [found[place] for place in sorted(found)]


def test_a_method_has_the_same_colour_everywhere() -> None:
    for one in samples.drawn("whole"):
        if one.file in ("operators.svg", "memory-parts.svg", "ladder.svg"):
            continue
        method = next((m for m in ("qlora", "lora") if f"-{m}-" in one.file), None)
        if method:
            other = "lora" if method == "qlora" else "qlora"
            assert METHODS[method] in one.svg
            assert METHODS[other] not in one.svg
        else:
            assert all(colour in one.svg for colour in METHODS.values()), one.file


def test_the_papers_values_are_marked_and_of_another_size_have_their_own_axis() -> None:
    drawn = {one.file: one for one in samples.drawn("whole")}
    assert "paper (A100)" in drawn["fig01-accuracy.svg"].svg
    assert "Open diamonds: what the paper prints" in drawn["fig01-accuracy.svg"].caption
    throughput = drawn["fig11-lora-throughput.svg"]
    assert "on the axis to the right" in throughput.caption
    assert len(painted()["fig11-lora-throughput.svg"].axes) == 2
    assert len(painted()["fig07-lora-accuracy.svg"].axes) == 1


def test_numbers_that_are_none_break_nothing() -> None:
    made = samples.whole()
    odd = Interval(0.8, math.nan, math.nan, 1)
    twisted = Interval(100.0, 110.0, 90.0, 1)
    judged = replace(
        made,
        accuracy={"full": odd, "lora-r8": Interval(math.nan, 0, 1, 1), "lora-r4": odd},
        throughput={"full": twisted, "lora-r4": Interval(math.inf, 0, 1, 1), "odd-r1": twisted},
        memory={"full": Interval(0.0, 0.0, 0.0, 1), "odd-r1": Interval(2.0**30, 0, 2.0**31, 2)},
        ladder=(Rung("start", 0.0, odd), Rung("more", 0.0, odd)),
    )
    for one in figures(judged):
        ElementTree.fromstring(one.svg)
        assert not re.search(r"\b(nan|inf)\b", one.svg), one.file


def test_a_negative_and_a_slower_rung_are_drawn() -> None:
    factor = Interval(0.5, 0.4, 0.6, 1)
    ladder = (Rung("start", 2e6, factor), Rung("worse", 1e6, factor), Rung("gone", -3e6, factor))
    drawn = figures(replace(samples.empty(), ladder=ladder))
    assert [one.file for one in drawn] == ["ladder.svg"]
    assert "+1 ms" in drawn[0].svg


@pytest.mark.parametrize(
    ("number", "said"),
    [(0, "0"), (12, "12"), (740_000, "740 K"), (67e6, "67 M"), (1.18e6, "1.18 M")],
)
def test_counts_are_short(number: float, said: str) -> None:
    assert short(number) == said


def test_configurations_have_names_whatever_they_are() -> None:
    assert called("lora-r16") == "LoRA r16"
    assert called("full") == "full"
    assert called("odd\n-rx") == "odd"
    assert rank_of("odd-rx") == 0


def test_labels_do_not_meet() -> None:
    placed = sorted(_apart([0.5] * 9 + [0.0, 1.0]))
    assert all(b - a > 0.05 for a, b in itertools.pairwise(placed))
    assert placed[0] >= 0
    assert placed[-1] <= 1
