import io

import pytest
from rich.console import Console

from peftprof.report.breakdown import render
from peftprof.report.console import plain, put, show
from peftprof.report.picture import save_svg
from tests.report.samples import full, loaded


@pytest.fixture(autouse=True)
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_file_gets_80_columns_without_colours_or_spaces_at_the_ends() -> None:
    text = plain(render(loaded(full())))
    lines = text.split("\n")
    assert lines.pop() == ""  # the last line is whole
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in lines)
    assert 72 < max(len(line) for line in lines) <= 80


def test_columns_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert 112 < max(len(line) for line in plain(render(loaded(full()))).splitlines()) <= 120
    monkeypatch.setenv("COLUMNS", "many")
    assert max(len(line) for line in plain(render(loaded(full()))).splitlines()) <= 80


def test_an_encoding_without_blocks_gets_ascii_bars() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    show(render(loaded(full("größe"))), out)
    out.flush()
    text = raw.getvalue().decode("ascii")
    assert "####" in text
    assert "gr??e" in text
    assert "█" in plain(render(loaded(full())))


def test_text_is_put_out_as_it_is() -> None:
    raw = io.BytesIO()
    out = io.TextIOWrapper(raw, encoding="ascii")
    put("a  \ngröße\n", out)
    out.flush()
    assert raw.getvalue() == b"a  \ngr??e\n"


def test_a_terminal_gets_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    show(render(loaded(full())), out)
    assert "\x1b[" in out.getvalue()


def test_a_picture_keeps_its_colours_when_the_output_is_a_file(tmp_path) -> None:
    out = io.StringIO()
    console = show(render(loaded(full())), out, record=True)
    assert isinstance(console, Console)
    save_svg(console, tmp_path / "x.svg", "title")
    drawn = (tmp_path / "x.svg").read_text()
    assert "dequant" in drawn
    assert len(set(drawn.split("fill: #")[1:])) > 5  # classes of different colours
