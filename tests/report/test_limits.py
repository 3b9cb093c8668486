from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftprof.errors import ConfigError
from peftprof.report.limits import MEMORIES, TIMES, broken, parse
from tests.report.samples import EVIL, full, made

# In the full sample, whose step is 20 ms.
KNOWN = {
    "dequant": 3e6,
    "optimizer": 0.0,
    "forward": 11e6,
    "backward": 4e6,
    "forward.dequant": 3e6,
    "backward.dequant": 0.0,
    "idle": 4e6,
    "idle.launch": 2.5e6,
    "idle.data": 0.0,
    "unattributed": 1e6,
    "overlap": 0.5e6,
    "communication": 1e6,
    "communication.exposed": 0.4e6,
    "step": 20e6,
}


@pytest.mark.parametrize(("term", "ns"), KNOWN.items())
def test_every_term_means_its_time(term: str, ns: float) -> None:
    us = ns / 1e3
    for op, limit in ((">", us - 1), (">=", us), ("<", us + 1), ("<=", us)):
        if limit >= 0:
            assert parse(f"{term}{op}{limit}us").broken(full()), op
    for op, limit in ((">", us), (">=", us + 1), ("<", us), ("<=", us - 1)):
        if limit >= 0:
            assert parse(f"{term}{op}{limit}us").broken(full()) is None, op


def test_units_mean_what_they_say() -> None:
    assert parse("dequant > 14.9 %").broken(full())
    assert parse("dequant>15.1%").broken(full()) is None
    assert parse("step>19ms").broken(full())
    assert parse("step>0.019s").broken(full())
    assert parse("step>0.021s").broken(full()) is None
    assert parse("memory.peak>911MiB").broken(full())
    assert parse("memory.peak>0.9GiB").broken(full()) is None
    assert parse("memory.activations>=480MiB").broken(full())
    assert parse("memory.gradients>0MiB").broken(full()) is None  # known, and none


def test_the_line_says_by_how_much() -> None:
    run = replace(full("qlora-minilm"), idle_ns=5.002e6)
    assert parse("dequant>12.5%").broken(run) == (
        "run qlora-minilm: dequant is 15.0 % of the step, over the limit of 12.5 %"
    )
    assert parse("memory.peak>=1MiB").broken(run) == (
        "run qlora-minilm: memory.peak is 912.0 MiB, not under the limit of 1 MiB"
    )
    # As many figures as tell the two apart.
    assert "idle is 25.01 % of the step, over the limit of 25 %" in str(
        parse("idle>25%").broken(run)
    )
    assert "step is 20 ms, not over the limit of 20 ms" in str(parse("step<=20ms").broken(run))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dequant",
        "dequant>",
        "dequant>25",
        "dequant=25%",
        "dequant=>25%",
        "dequant>-1%",
        "dequant>1e3%",
        "dequant>nan%",
        "dequant>٣%",
        "dequant>25%%",
        "dequant>2MiB",
        "memory.peak>25%",
        "memory.peak>2",
        "memory.everything>2MiB",
        "step>25%",
        "idle.forward>2ms",
        "forward.idle>2ms",
        "Dequant>25%",
        "dequant>25%\n[bold]\x1b",
        "dequant>25% idle>3%",
    ],
)
def test_anything_else_is_refused_in_a_line_with_examples(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    message = str(caught.value)
    assert "--fail-if" in message
    assert "dequant>25%" in message
    assert message.isprintable()


@given(st.text(max_size=40) | st.from_regex(r"[a-z._]{1,20}[<>]=?[0-9.]{1,5}[a-zA-Z%]{0,3}"))
def test_any_text_is_a_limit_or_refused(text: str) -> None:
    try:
        limit = parse(text)
    except ConfigError as error:
        said = str(error)
    else:
        assert limit.term in (*TIMES, *MEMORIES)
        said = limit.broken(full()) or "kept"
    assert said.isprintable()
    assert said.startswith(("--fail-if", "run qlora", "kept"))


@pytest.mark.parametrize("term", ["idle.launch", "communication.exposed", "memory.peak"])
def test_what_a_run_does_not_know_never_passes(term: str) -> None:
    unit = "MiB" if term.startswith("memory") else "ms"
    with pytest.raises(ConfigError, match=rf"run x: {term} is not known here"):
        parse(f"{term}>1000{unit}").broken(made("x"))


def test_a_step_without_idle_time_knows_its_causes() -> None:
    assert parse("idle.launch>0ms").broken(replace(made(), idle_ns=0.0)) is None


def test_every_run_is_held_against_every_limit() -> None:
    limits = [parse("dequant>14%"), parse("step>30ms")]
    lines = broken(limits, [made("one"), made("two", 2.0), replace(made(EVIL), rows=())])
    assert [line.split(" is ")[0] for line in lines] == [
        "run one: dequant",
        "run two: dequant",
        "run two: step",
    ]
    assert all(line.isprintable() for line in lines)
