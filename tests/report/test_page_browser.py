"""The page in a real browser: it shows the JSON, asks for nothing, runs nothing of a trace's."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from peftprof.report.export import to_json
from peftprof.report.page import render
from peftprof.report.page.colours import COLOURS
from tests.report.browser import chromium, complaints, open_page, requests
from tests.report.page_samples import loaded, run
from tests.report.test_page import HOSTILE, found_at

FIGURES = """return Array.from(document.querySelectorAll("[data-at]"),
    (e) => [e.dataset.at, e.dataset.ns ?? e.dataset.bytes]);"""
PAINTED = """const canvas = document.querySelector("canvas");
    const pen = canvas.getContext("2d");
    const dots = pen.getImageData(0, 0, canvas.width, canvas.height).data;
    const seen = new Set();
    for (let i = 0; i < dots.length; i += 4) {
        const hex = Array.from(dots.slice(i, i + 3), (v) => v.toString(16).padStart(2, "0"));
        if (dots[i + 3] === 255) seen.add("#" + hex.join(""));
    }
    return Array.from(seen);"""
VIEW = """const {from, to} = document.querySelector("canvas").dataset;
    return [Number(from), Number(to)];"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as driver:
        yield driver


def settle(browser: Any) -> None:
    """Wait until what was asked to be drawn is drawn."""
    browser.execute_async_script(
        "const done = arguments[0];requestAnimationFrame(() => requestAnimationFrame(() => done()))"
    )


def view(browser: Any) -> tuple[float, float]:
    settle(browser)
    start, end = browser.execute_script(VIEW)
    return start, end


def press(browser: Any, *keys: str) -> None:
    from selenium.webdriver.common.by import By

    for key in keys:
        browser.find_element(By.CSS_SELECTOR, "canvas").send_keys(key)
    settle(browser)


def wheel(browser: Any, x: int, y: int, by: int) -> None:
    """The wheel turned over the middle of the canvas, moved by (x, y)."""
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.by import By

    canvas = browser.find_element(By.CSS_SELECTOR, "canvas")
    where = ScrollOrigin.from_element(canvas, x, y)
    ActionChains(browser).scroll_from_origin(where, 0, by).perform()


def test_the_figures_on_the_page_are_those_of_the_json(browser: Any, tmp_path: Path) -> None:
    what = loaded(run("lora", 150e6, 1), run("qlora"), run("third", 90e6, 2), spans=400)
    open_page(browser, tmp_path / "page.html", render(what))
    text = browser.execute_script("return document.getElementById('peftprof-json').textContent")
    document = json.loads(text)
    assert document == json.loads(to_json(what))
    shown = browser.execute_script(FIGURES)
    assert len(shown) > 300
    for at, value in shown:
        assert float(value) == found_at(document, at), at
    assert complaints(browser) == []
    assert requests(browser) == [(tmp_path / "page.html").as_uri()]


def test_what_the_page_must_not_do_would_be_seen(browser: Any, tmp_path: Path) -> None:
    """The control: were a picture, a style or a script to slip in, the checks here would tell."""
    evil = (
        '<img src="http://127.0.0.1:9/x.png"><p style="color:red">x</p>'
        "<script>document.title = 'pwned'</script>"
    )
    page = render(loaded(run()), title="calm").replace("</main>", f"{evil}</main>")
    open_page(browser, tmp_path / "page.html", page)
    said = " ".join(complaints(browser))
    assert "img-src" in said
    assert "style-src" in said
    assert "script-src" in said
    assert browser.title == "calm"  # and the policy stops them even so
    assert "http://127.0.0.1:9/x.png" in requests(browser)
    without = page.replace("Content-Security-Policy", "x-no-policy")
    open_page(browser, tmp_path / "page.html", without)
    assert browser.title == "pwned"


@pytest.mark.parametrize("width", [1200, 400])
@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_names_neither_run_nor_break_the_page(
    browser: Any, tmp_path: Path, words: str, width: int
) -> None:
    what = loaded(
        run(words=words), run("b", words=words), spans=40, words=words, comparable=False,
        differences=(f"model: {words}",),
    )  # fmt: skip
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    open_page(browser, tmp_path / "page.html", render(what, title="calm"))
    press(browser, ".")
    assert browser.title == "calm"
    counted = browser.execute_script(
        "return [document.images.length, document.links.length, document.scripts.length,"
        " document.querySelectorAll('iframe, object, embed, form, [onerror], [style]').length]"
    )
    # The canvas and its tip are placed by the script, two timelines: nothing else has a style.
    assert counted[:3] == [0, 0, 4]
    assert counted[3] == 3
    wide = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    scroll, client = browser.execute_script(wide)
    assert scroll <= client
    assert complaints(browser) == []
    assert requests(browser) == [(tmp_path / "page.html").as_uri()]


def test_the_timeline_is_moved_by_buttons_wheel_drag_and_keys(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    what = loaded(run(), spans=20_000)
    length = what.timelines[0].length_ns
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    open_page(browser, tmp_path / "page.html", render(what))
    assert view(browser) == (0, length)

    browser.find_element(By.CSS_SELECTOR, "button[data-do=in]").click()
    assert view(browser) == (length / 4, 3 * length / 4)
    browser.find_element(By.CSS_SELECTOR, "button[data-do=right]").click()
    assert view(browser) == pytest.approx((3 * length / 8, 7 * length / 8))
    browser.find_element(By.CSS_SELECTOR, "button[data-do=all]").click()
    assert view(browser) == (0, length)

    wheel(browser, 100, 0, -200)  # the canvas is not in use: the page scrolls, nothing zooms
    assert view(browser) == (0, length)
    canvas = browser.find_element(By.CSS_SELECTOR, "canvas")
    ActionChains(browser).move_to_element(canvas).click().perform()
    wheel(browser, 100, 0, -200)
    start, end = view(browser)
    assert end - start == pytest.approx(length * 0.6065, rel=0.01)
    width = canvas.size["width"]
    assert start + (0.5 + 100 / width) * (end - start) == pytest.approx(
        (0.5 + 100 / width) * length, rel=0.01
    )

    ActionChains(browser).drag_and_drop_by_offset(canvas, -60, 0).perform()
    moved = view(browser)
    assert moved[0] - start == pytest.approx(60 / width * (end - start), rel=0.02)

    press(browser, "+", "+")
    assert view(browser)[1] - view(browser)[0] == pytest.approx((end - start) / 4)
    press(browser, "0")
    assert view(browser) == (0, length)
    press(browser, *"+" * 30)
    assert view(browser)[1] - view(browser)[0] == pytest.approx(100)
    assert complaints(browser) == []


def test_the_tip_says_what_a_span_is(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    what = loaded(run(), spans=40)
    lanes = what.timelines[0].lanes
    open_page(browser, tmp_path / "page.html", render(what))
    tip = browser.find_element(By.CSS_SELECTOR, ".tip")
    assert not tip.is_displayed()
    press(browser, ".", ".")
    assert lanes[0].spans[1].name in tip.text
    assert lanes[0].spans[1].phase in tip.text
    press(browser, ",")
    assert lanes[0].spans[0].name in tip.text
    press(browser, "\ue015")  # arrow down
    assert tip.text.splitlines()[0] in {span.name for span in lanes[1].spans}

    canvas = browser.find_element(By.CSS_SELECTOR, "canvas")
    span = max(lanes[0].spans, key=lambda s: s.end_ns - s.start_ns)
    middle = (span.start_ns + span.end_ns) / 2 / what.timelines[0].length_ns
    x, y = (middle - 0.5) * canvas.size["width"], 24 + 18 + 12 - canvas.size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y)).perform()
    settle(browser)
    assert span.name in tip.text
    assert tip.is_displayed()


def test_without_scripts_all_but_the_timeline_is_there(browser: Any, tmp_path: Path) -> None:
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        open_page(browser, tmp_path / "page.html", render(loaded(run(), spans=40)))
        answer = browser.execute_cdp_cmd(
            "Runtime.evaluate", {"expression": "document.body.innerText", "returnByValue": True}
        )
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    text = answer["result"]["value"]
    assert "scripts are off" in text
    assert "Zoom" not in text
    for word in ("adapter GEMM", "184.30", "bf16 660 TFLOP/s", "model.layers.11", "base weights"):
        assert word in text
    assert complaints(browser) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_and_the_canvas_follow_the_readers_colours(
    browser: Any, tmp_path: Path, scheme: str
) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    open_page(browser, tmp_path / "page.html", render(loaded(run(), spans=40)))
    paper = browser.execute_script(
        "return getComputedStyle(document.documentElement).backgroundColor"
    )
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(19, 20, 22)"}[scheme]
    settle(browser)
    painted = browser.execute_script(PAINTED)
    own, other = (0, 1) if scheme == "light" else (1, 0)
    assert COLOURS["dequant"][own] in painted
    assert COLOURS["dequant"][other] not in painted
