import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from peftprof.breakdowns import Bar, Breakdown, Spread
from peftprof.report.breakdown import clean, render
from peftprof.report.waterfall import grouped
from peftprof.trace import Loaded
from tests.report.samples import EVIL, STEP, compared, full, loaded, made


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


def squeezed(text: str) -> str:
    return " ".join(text.split())


def numbers(text: str, label: str) -> list[float]:
    """The milliseconds of every line that begins with `label`."""
    return [float(ms) for ms in re.findall(rf"^ *{label} +([\d.,]+)", text, re.MULTILINE)]


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("runs", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("make", [made, full])
def test_every_line_fits(make: Callable[[str], Breakdown], width: int, runs: int) -> None:
    text = shown(loaded(*(make(f"run-with-a-long-name-{i}" * 3) for i in range(runs))), width)
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
    text = shown(loaded(*runs, comparable=False, differences=("batch size: 8 vs 32",)))
    assert "Not comparable" in text
    assert "batch size: 8 vs 32" in text
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


def test_all_that_a_breakdown_may_hold_has_its_line() -> None:
    text = shown(loaded(full()))
    assert "rank 3" in text
    assert "Steps: the ranges ProfilerStep#N." in text
    assert "Communication: 2.10 ms a step, 1.70 hidden by other work, 0.40 exposed." in text
    assert "Whole trace: 70.00 ms, busy 88.6 %" in text
    assert "A note of the reader." in text
    flat = squeezed(text)
    assert "gemm<128> base GEMM 7.00 35.0 % 12 583" in flat  # the mean in microseconds
    assert "encoder.layer.11 1.20 0.20 2.0 %" in flat
    assert "base GEMM 2,100 3,200 42.0 % 31.0 % compute 90.0 %" in flat
    assert "Ceilings: bf16 690 TFLOP/s; copies 2,900 GB/s (measured on 2026-11-02)." in text
    assert "60.0 % kernel: products" in flat
    assert "No steps" in shown(loaded(replace(made(), steps_by="whole trace")))
    assert "Steps:" not in shown(loaded(replace(made(), steps_by="step:N")))


def test_idle_is_told_by_phase_and_by_cause_and_both_sum_to_it() -> None:
    text = shown(loaded(full()))
    by_phase = numbers(text, "in forward") + numbers(text, "elsewhere")
    by_cause = numbers(text, "launch-bound") + numbers(text, "after a sync")
    assert sum(by_phase) == sum(by_cause) == numbers(text, "idle")[0]
    assert "by cause" not in shown(loaded(made()))
    two = shown(loaded(full(), full(scale=2.0)))
    assert "launch-bound 2.50 12.5 5.00 12.5 +2.50" in squeezed(two)


def test_what_is_not_known_has_no_line() -> None:
    text = shown(loaded(made()))
    for words in ("by cause", "layers", "GFLOP", "memory at", "placed by", "mean us", "rank"):
        assert words not in text
    # Work without known operands says nothing.
    assert "attention" not in shown(loaded(full()))


def test_the_rule_that_placed_an_operator_is_told_where_there_is_room() -> None:
    assert re.search(r"gemm<128>.*kernel: products", shown(loaded(full()), width=120))
    assert not re.search(r"gemm<128>.*kernel: products", shown(loaded(full()), width=99))


def test_top_limits_layers_and_rules_too() -> None:
    text = shown(loaded(full()), top=1)
    assert "encoder.layer.11" in text
    assert "encoder.layer.10" not in text
    assert "40.0 % 1 more" in squeezed(text)
    none = shown(loaded(full()), top=0)
    assert "longest" not in none
    assert "placed by" not in none


def test_memory_adds_up_from_parts_to_process() -> None:
    text = shown(loaded(full()))
    parts = [n for p in ("base weights", "activations saved", "other") for n in numbers(text, p)]
    assert sum(parts) == numbers(text, "peak")[0] == 912.0
    lines = re.findall(
        r"^ *([a-z, ]+?) +\+?([\d,.]+) *$", text.split("timed pass")[1], re.MULTILINE
    )
    steps = {name: float(size.replace(",", "")) for name, size in lines}
    assert steps["allocated"] + steps["cached"] == steps["reserved"]
    assert steps["reserved"] + steps["context, libraries"] == steps["process"]
    assert "The peak was in backward, encoder.layer.5." in text


def test_memory_says_only_what_is_known() -> None:
    memory = full().memory
    assert memory is not None
    on_cpu = replace(memory, device="cpu", reserved_bytes=None, phase="", layer="", notes=())
    text = shown(loaded(replace(full(), memory=on_cpu)))
    assert "+780.0" in text  # from allocated to process at once
    assert "reserved" not in text
    assert "The peak was" not in text
    unknown = replace(on_cpu, allocated_bytes=None, process_bytes=None)
    assert "timed pass" not in shown(loaded(replace(full(), memory=unknown)))


def test_the_waterfall_leads_from_one_step_to_the_other() -> None:
    text = shown(compared())
    fall = text[text.index("1 to 2") :]
    assert numbers(fall, "step of 1") == [20.0]
    assert numbers(fall, "step of 2") == [17.4]
    changes = [float(ms) for ms in re.findall(r" ([+-]\d+\.\d+) ", fall)]
    # Milliseconds and shares of the step alternate; the largest is first.
    assert changes[::2] == [-3.0, 0.5, -0.1]
    assert 20.0 + sum(changes[::2]) == pytest.approx(17.4)


bar_lists = st.lists(
    st.builds(
        Bar,
        st.text("abc", min_size=1, max_size=3),
        st.floats(-1e9, 1e9, allow_nan=False) | st.floats(-1e3, 1e3, allow_nan=False),
    ),
    max_size=14,
)


@given(bar_lists)
def test_small_bars_go_together_and_nothing_is_lost(bars: list[Bar]) -> None:
    shown = grouped(bars)
    assert sum(b.ns for b in shown) == pytest.approx(sum(b.ns for b in bars), abs=1e-3)
    assert len(shown) <= 11
    named = [bar for bar in shown if bar.category != "the rest"]
    assert {(b.category, b.ns) for b in named} <= {(b.category, b.ns) for b in bars}
    sizes = [abs(bar.ns) for bar in named]
    assert sizes == sorted(sizes, reverse=True)


def test_a_speed_up_is_given_or_refused_with_its_reason() -> None:
    assert "2 is 1.60x as fast as 1 by the profiled steps, 1.50x by the timed pass" in shown(
        compared()
    )
    assert "timed pass" not in shown(compared(timed=None))
    unlike = {"comparable": False, "differences": ("real tokens a step: 8.0 vs 9.0",)}
    text = squeezed(shown(compared(None, None, **unlike)))
    assert "No speed-up figure: the runs are not comparable (--unfair" in text
    assert "as fast as" not in text
    text = squeezed(shown(compared(None, None, comparable=None)))
    assert "No speed-up figure: whether the runs are comparable is not known (--unfair" in text
    # Forced by --unfair, the reasons stand beside it.
    text = squeezed(shown(compared(**unlike)))
    assert "overlap. Unfair: real tokens a step: 8.0 vs 9.0." in text
    text = squeezed(shown(compared(comparable=None)))
    assert "Unfair: it is not known whether the runs are comparable." in text


def test_a_speed_up_within_the_range_of_the_steps_says_so() -> None:
    loaded = compared()
    one, two = loaded.breakdowns

    def said(shortest: float, longest: float) -> str:
        span = dataclasses.replace(two.step_ns, min=shortest, max=longest)
        other = dataclasses.replace(two, step_ns=span)
        return squeezed(shown(dataclasses.replace(loaded, breakdowns=(one, other))))

    assert "1.50x by the timed pass." in said(1.0, one.step_ns.min - 1)
    overlap = "1.50x by the timed pass; the ranges of their profiled steps overlap."
    assert overlap in said(1.0, one.step_ns.min)
    assert overlap in said(one.step_ns.max, 1e12)
    assert "overlap" not in said(one.step_ns.max + 1, 1e12)


def test_the_second_of_two_runs_has_bars_where_there_is_room() -> None:
    assert "█" in shown(compared(), width=120).split("1 to 2")[0]
    assert "█" not in shown(compared(), width=99).split("1 to 2")[0]


def test_notes_of_several_runs_name_the_runs() -> None:
    text = shown(loaded(full("one"), full("two"), made("three")))
    assert "1, 2: A note of the reader." in text
    assert "1, 2: Steps: the ranges ProfilerStep#N." in text


@given(st.text(max_size=60))
def test_any_name_keeps_its_place(name: str) -> None:
    run = full(name)
    operators = tuple(replace(operator, name=name, rule=name) for operator in run.operators)
    text = shown(loaded(replace(run, operators=operators, notes=(name,))), width=120)
    assert numbers(text, "step") == [20.0]
    assert not [c for c in text if c < " " and c != "\n"]
