import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from peftprof.breakdowns import Breakdown, Operator, Row, Spread
from peftprof.report.breakdown import clean, render
from peftprof.trace import Loaded

STEP = 20e6
EVIL = "void evil<[bold red]x[/]>\x1b[31m\x07\u202e\n second line"


def made(name: str = "qlora-minilm-20260102-030405", scale: float = 1.0) -> Breakdown:
    def row(phase: str, category: str, ns: float) -> Row:
        return Row(phase, category, ns * scale, ns / STEP, 12, 0.9 * ns, 1.1 * ns)

    return Breakdown(
        name=name,
        source="kineto",
        device="cpu",
        steps=3,
        step_ns=Spread(STEP * scale, 0.9 * STEP, 1.1 * STEP),
        rows=(
            row("forward", "dequant", 3e6),
            row("forward", "base_gemm", 7e6),
            row("forward", "communication", 1e6),
            row("backward", "adapter_gemm", 4e6),
        ),
        unattributed_ns=1e6 * scale,
        idle_ns=4e6 * scale,
        idle_by_phase_ns={"forward": 3e6 * scale, "other": 1e6 * scale},
        overlap_ns=0.5e6,
        operators=(
            Operator("aten::mm", "base_gemm", 7e6, 0.35, 12),
            Operator(EVIL, "dequant", 3e6, 0.15, 24),
        ),
        unattributed_operators=(Operator("mystery::op", "unattributed", 1e6, 0.05, 1),),
    )


def loaded(*breakdowns: Breakdown, **changes: object) -> Loaded:
    return replace(Loaded(breakdowns, None, (), 0), **changes)  # type: ignore[arg-type]


def shown(what: Loaded, width: int = 80, top: int = 10, terminal: bool = False) -> str:
    out = io.StringIO()
    console = Console(
        file=out,
        width=width,
        force_terminal=terminal,
        color_system="truecolor" if terminal else None,
    )
    console.print(render(what, top))
    return out.getvalue()


def numbers(text: str, label: str) -> list[float]:
    """The milliseconds of every line that begins with `label`."""
    return [float(ms) for ms in re.findall(rf"^ *{label} +([\d.,]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("runs", [1, 2, 3, 4, 7])
def test_every_line_fits(width: int, runs: int) -> None:
    text = shown(loaded(*(made(f"run-with-a-long-name-{i}" * 3) for i in range(runs))), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert text.count("base GEMM") >= 1
    assert len([line for line in text.splitlines() if line.startswith("step")]) >= 1


def test_the_lines_add_up_to_the_step() -> None:
    text = shown(loaded(made()))
    parts = [n for p in ("forward", "backward", "idle", "unattributed") for n in numbers(text, p)]
    assert sum(parts) == pytest.approx(20.0)
    assert numbers(text, "step") == [20.0]
    assert numbers(text, "in forward") == [3.0]
    assert numbers(text, "elsewhere") == [1.0]
    assert "100.0 %" in text
    assert "0.50 ms of further work" in text


def test_the_order_is_that_of_a_step() -> None:
    text = shown(loaded(made()))
    labels = ["forward", "dequant", "base GEMM", "communication", "backward", "idle", "\nstep"]
    places = [text.index(label) for label in labels]
    assert places == sorted(places)


def test_a_file_gets_plain_text() -> None:
    text = shown(loaded(made()))
    assert "\x1b" not in text
    assert not set(text) & set("│┃─━╭╮┌┐")


def test_a_terminal_gets_colours_and_an_old_one_ascii() -> None:
    assert "\x1b[" in shown(loaded(made()), terminal=True)
    raw = io.BytesIO()
    old = io.TextIOWrapper(raw, encoding="ascii")
    Console(file=old, width=80).print(render(loaded(made()), 0))
    old.flush()
    assert b"####" in raw.getvalue()


def test_names_are_text_and_never_markup_or_control_codes() -> None:
    text = shown(loaded(replace(made(), name=EVIL, device=EVIL)), width=120)
    assert text.count("evil<[bold red]x[/]>[31m second line") == 3
    assert not set(text) & set("\x1b\x07\u202e")


def test_clean_keeps_letters_of_every_script() -> None:
    assert clean("größe 核\tz\x00\n") == "größe 核 z"


def test_unattributed_operators_are_named_when_they_matter() -> None:
    assert "mystery::op" in shown(loaded(made()))
    little = replace(made(), unattributed_ns=1.0)
    assert "mystery::op" not in shown(loaded(little))


def test_top_is_how_many_operators_are_listed() -> None:
    assert "aten::mm" in shown(loaded(made()), top=1)
    assert "evil" not in shown(loaded(made()), top=1)
    assert "aten::mm" not in shown(loaded(made()), top=0)


def test_runs_side_by_side_say_whether_they_are_comparable() -> None:
    runs = made("one"), made("two", 2.0)
    assert "not known" in shown(loaded(*runs))
    assert "Comparable:" in shown(loaded(*runs, comparable=True))
    text = shown(loaded(*runs, comparable=False, differences=("batch_size: 8 vs 32",)))
    assert "Not comparable" in text
    assert "batch_size: 8 vs 32" in text
    assert "3 older runs are left out" in shown(loaded(*runs, left_out=3))
    assert "1 older run is left out" in shown(loaded(*runs, left_out=1))


def test_two_runs_show_their_difference() -> None:
    text = shown(loaded(made("one"), made("two", 2.0)))
    assert re.search(r"^step +20\.00 +100\.0 +40\.00 +100\.0 +\+20\.00", text, re.MULTILINE)
    assert re.search(r"^  dequant +3\.00 +15\.0 +6\.00 +15\.0 +\+3\.00", text, re.MULTILINE)


def test_a_category_that_only_one_run_has_keeps_its_line() -> None:
    one = made("one")
    other = replace(made("two"), rows=one.rows[1:])
    text = shown(loaded(one, other))
    assert re.search(r"^  dequant +3\.00 +15\.0 +- +-3\.00", text, re.MULTILINE)


def test_steps_that_differ_much_are_told() -> None:
    assert "differ much" not in shown(loaded(made()))
    uneven = replace(made(), step_ns=Spread(STEP, 0.5 * STEP, 1.1 * STEP))
    assert "differ much" in shown(loaded(uneven))
