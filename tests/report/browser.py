"""A real Chromium without a window, where there is one: what it saw of a page."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest


@contextmanager
def chromium() -> Iterator[Any]:
    """A driver of Chromium; skips the test, with the reason, where something is missing."""
    pytest.importorskip("selenium", reason="selenium drives the browser: pip install '.[test]'")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    driver_path = shutil.which("chromedriver")
    if not browser or not driver_path:
        pytest.skip("needs chromium and chromedriver: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for argument in ("--headless=new", "--disable-gpu", "--disable-background-networking"):
        options.add_argument(argument)
    options.add_argument("--window-size=1200,900")
    if os.geteuid() == 0:  # Chromium's sandbox refuses to run as root
        options.add_argument("--no-sandbox")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        yield driver
    finally:
        driver.quit()


def open_page(driver: Any, path: Path, text: str) -> None:
    """Write `text` to `path`, forget what was logged before, and open it."""
    path.write_text(text, encoding="utf-8")
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)
    driver.get(path.as_uri())


def complaints(driver: Any) -> list[str]:
    """Errors, warnings and refusals by the page's policy since it was opened."""
    return [entry["message"] for entry in driver.get_log("browser")]


def requests(driver: Any) -> list[str]:
    """Whatever the page asked for since it was opened, itself and what was refused included."""
    said = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    asked = [m for m in said if m["method"] == "Network.requestWillBeSent"]
    return [message["params"]["request"]["url"] for message in asked]
