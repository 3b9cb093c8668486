import csv
import io
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token

from peftprof.breakdowns import Breakdown, Ceilings
from peftprof.report import sections
from peftprof.report.breakdown import clean
from peftprof.report.tables import COLUMNS, code, escaped, to_csv, to_markdown
from peftprof.trace import Loaded
from tests.report.samples import EVIL, compared, full, loaded, made

HOSTILE = "|a|`b`<script>x</script>**c** _d_ [e](http://f) \\| &amp; ~~g~~ #1"


def lines(what: Loaded) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(what))))


def test_the_columns_are_those_that_were_promised() -> None:
    head = "run,source,device,steps,step_ns,phase,category,ns,share,min_ns,max_ns,count"
    assert to_csv(loaded(made())).splitlines()[0] == head == ",".join(COLUMNS)


@pytest.mark.parametrize("run", [made(), full(), replace(made(), idle_by_phase_ns={})])
def test_the_lines_of_a_run_sum_to_its_step(run: Breakdown) -> None:
    found = lines(loaded(run, made("another", 3.0)))
    own = [line for line in found if line["run"] == run.name]
    assert sum(float(line["ns"]) for line in own) == pytest.approx(run.step_ns.median)
    assert sum(float(line["share"]) for line in own) == pytest.approx(1.0)
    assert {float(line["step_ns"]) for line in own} == {run.step_ns.median}


def test_every_row_has_its_line_and_idle_its_causes() -> None:
    found = {(line["phase"], line["category"]): line for line in lines(loaded(full()))}
    assert float(found["forward", "dequant"]["ns"]) == 3e6
    assert float(found["forward", "dequant"]["max_ns"]) == pytest.approx(3.3e6)
    assert float(found["", "idle.launch"]["ns"]) == 2.5e6
    assert found["", "idle.launch"]["count"] == ""
    assert float(found["", "unattributed"]["share"]) == 0.05
    by_phase = {(line["phase"], line["category"]) for line in lines(loaded(made()))}
    assert {("forward", "idle"), ("other", "idle")} <= by_phase


@given(st.text(max_size=40) | st.sampled_from("=+-@").map(lambda c: f"{c}cmd|' /C calc'!A0"))
def test_no_name_is_a_formula_and_none_breaks_the_table(name: str) -> None:
    found = lines(loaded(replace(made(name), device=name)))
    assert len(found) == len(made().rows) + 3
    for line in found:
        assert None not in line
        for cell in (line["run"], line["device"]):
            assert not cell.startswith(("=", "+", "-", "@"))
            assert cell in (clean(name), f"'{clean(name)}")


def tokens(markdown: str) -> list[Token]:
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(markdown)
    return [*found, *(child for token in found for child in token.children or ())]


def table_rows(markdown: str) -> list[list[str]]:
    """The cells of all tables as a reader sees them."""
    rows: list[list[str]] = []
    for token in tokens(markdown):
        if token.type == "tr_open":
            rows.append([])
        elif token.type == "inline" and rows and token.level >= 4:
            rows[-1].append(
                "".join(c.content for c in token.children or () if c.type.startswith("text"))
            )
    return rows


@given(st.text(max_size=40) | st.text("|`<>&*_[]()\\~#:@!a \n", max_size=30) | st.just(HOSTILE))
def test_a_name_is_shown_letter_by_letter_and_is_never_markup(name: str) -> None:
    operators = tuple(replace(o, name=f"x{name}", rule=f"r{name}") for o in full().operators)
    run = replace(full(f"x{name}"), operators=operators, notes=(f"n{name}",))
    for what in (loaded(run), loaded(run, run)):
        markdown = to_markdown(what)
        html = [t.content for t in tokens(markdown) if t.type == "html_inline"]
        assert set(html) <= {"<code>", "</code>"}
        kinds = {token.type for token in tokens(markdown)}
        assert not kinds & {"html_block", "code_inline", "link_open", "image", "em_open", "fence"}
    (row,) = [r for r in table_rows(to_markdown(loaded(run), top=1)) if "35.0 %" in r[4:5]]
    shown = clean(f"x{name}")
    assert row[0].split() == shown.split()
    assert row[2].split() == clean(f"r{name}").split()


def test_escapes_are_what_github_reads() -> None:
    assert escaped("a|b") == r"a\|b"
    assert escaped("`<b>`") == r"\`&lt;b&gt;\`"
    assert escaped("- x") == r"\- x"
    assert escaped("1. x") == r"1\. x"
    assert code("_k<1>") == r"<code>\_k&lt;1&gt;</code>"


def test_every_row_of_a_table_is_as_wide_as_its_head() -> None:
    for what in (loaded(full(EVIL)), compared(), loaded(full(), made(), full())):
        width = 0
        for line in to_markdown(what).splitlines():
            cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
            assert not (cells and width) or cells == width
            width = cells


def test_one_run_has_its_rows_operators_layers_work_and_memory() -> None:
    rows = table_rows(to_markdown(loaded(full())))
    flat = [" ".join(row).split("\u2003")[-1] for row in rows]
    assert "dequant 3.00 15.0 % 2.70-3.30 12" in flat
    assert "of idle: launch-bound 2.50 12.5 % " in [f"{line.rstrip()} " for line in flat]
    assert any(line.startswith("step 20.00 100.0 %") for line in flat)
    assert any("gemm<128> base GEMM kernel: products 7.00 35.0 % 12 583" in line for line in flat)
    assert "encoder.layer.11 1.20 0.20 2.0 %" in flat
    assert "base GEMM 2,100 3,200 42.0 % 31.0 % compute 90.0 %" in flat
    assert any(line.startswith("cached +114.0") for line in flat)
    assert "longest" not in to_markdown(loaded(full()), top=0)


def test_several_runs_have_a_verdict_a_waterfall_and_a_speed_up() -> None:
    text = to_markdown(compared())
    assert "Comparable:" in text
    assert ["dequant", "-3.00"] in table_rows(text)
    assert ["step of 2", "17.40"] in table_rows(text)
    assert "2 is 1.60x as fast as 1" in text
    text = to_markdown(compared(None, comparable=False, differences=("batch size: 8 vs 4",)))
    assert "**Not comparable:**\n\n- batch size: 8 vs 4" in text
    assert "No speed-up figure" in text
    assert "1 older run is left out" in to_markdown(loaded(made(), left_out=1))


def test_a_slow_device_reaches_something() -> None:
    """bf16 on a CPU that has it not in hardware is under a thousandth of a TFLOP/s."""
    found = sections.ceilings(Ceilings("somebody", {"fp32": 1.15e11, "bf16": 8.4e8}, 1.69e10))
    assert "fp32 0.115 TFLOP/s, bf16 0.00084 TFLOP/s; copies 16.9 GB/s" in found
    assert "fp32 19.5 TFLOP/s" in sections.ceilings(Ceilings("somebody", {"fp32": 1.95e13}, 1e12))
