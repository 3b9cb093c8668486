"""Each claim's verdict where it must hold, must fail and cannot be told; and what goes with it."""

import json
import math
from dataclasses import replace

import pytest

from peftprof.records import Energy, encode
from peftprof.studies import VERDICTS, Judged, Study
from peftprof.study import claims, evidence
from tests.study import cases, samples

ORDER = [f"C{number}" for number in range(1, 14)]


def verdicts(made: Study) -> dict:
    return {one.claim: one for one in claims.judge(made).verdicts}


def named(case: cases.Case) -> str:
    return f"{case.claim} {case.verdict}: {case.why}"


@pytest.mark.parametrize("case", cases.CASES, ids=named)
def test_the_verdict(case):
    judged = claims.judge(case.make())
    check(judged)
    found = {one.claim: one for one in judged.verdicts}[case.claim]
    assert found.verdict == case.verdict, found


def test_every_claim_has_cases_of_every_verdict_that_it_can_have():
    found = {(case.claim, case.verdict) for case in cases.CASES}
    never = {("C12", cases.HOLDS), ("C12", cases.FAILS)}
    # No pair of ranks differs, and rank 8 differs from every other: it cannot be both.
    never |= {("C9", cases.HOLDS)}
    assert found == {(claim, verdict) for claim in ORDER for verdict in VERDICTS} - never


def check(judged: Judged) -> None:
    """What is true of every judged study."""
    assert [one.claim for one in judged.verdicts] == ORDER
    for one in judged.verdicts:
        assert one.verdict in VERDICTS
        assert one.text
        assert one.evidence
        for figure in one.figures:
            assert figure.what
            for value in (figure.value, figure.low, figure.high):
                assert value is None or math.isfinite(value), one
            assert (figure.low is None) == (figure.high is None)
            if figure.low is not None and figure.value is not None:
                assert figure.low <= figure.value <= figure.high
    # Strict JSON: a figure that is not known is null.
    json.dumps(encode(judged), allow_nan=False)


ODD = {
    "empty": lambda: replace(samples.study(), results=(), labels=()),
    "missing only": lambda: samples.ended(samples.study(), "", "missing"),
    "failed only": lambda: samples.ended(cases.ladder(2, 2), ""),
    "failed with its ladder": lambda: samples.ended(
        samples.ended(cases.ladder(2, 2), ""), "", "failed", "ladder"
    ),
    "one run of full": lambda: replace(samples.study(), results=samples.study().results[:1]),
    "one run of LoRA": lambda: replace(samples.study(), results=samples.study().results[1:2]),
    "one run of QLoRA": lambda: replace(samples.study(), results=samples.study().results[-1:]),
    "one seed": lambda: samples.study(seeds=(1,)),
    "no full": lambda: samples.ended(samples.study(), "full"),
    "no steps after the warm-up": lambda: samples.changed(
        samples.study(), "", lambda r: replace(r, step_ns=(), step_samples=(), step_tokens=())
    ),
    "nothing measured": lambda: samples.of_record(samples.study(), "", memory=None, energy=None),
    "one example": lambda: replace(
        samples.changed(samples.study(), "", lambda r: replace(r, predicted=r.predicted[:1])),
        labels=samples.LABELS[:1],
    ),
    "ladder only": lambda: samples.ended(cases.ladder(2, 2), "", "missing"),
    "breakdowns without anything": lambda: samples.profiled(
        samples.study(), "", samples.breakdown({}, parts={})
    ),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD)
def test_nothing_crashes_on_what_is_hardly_a_study(make):
    check(claims.judge(make()))


@pytest.mark.parametrize("make", list(ODD.values())[:4], ids=list(ODD)[:4])
def test_of_nothing_nothing_can_be_told(make):
    told = {one.claim: one.verdict for one in claims.judge(make()).verdicts}
    if make is not ODD["failed only"]:
        assert set(told.values()) == {cases.UNTESTABLE}
    else:  # the ladder is complete there
        assert {claim for claim, one in told.items() if one != cases.UNTESTABLE} == {"C2"}


def test_a_quick_look_marks_every_verdict():
    quick = claims.judge(samples.study(quick="at most 3 steps a run"))
    assert all("A quick look: at most 3 steps a run." in one.caveat for one in quick.verdicts)
    whole = claims.judge(samples.study())
    assert not any("quick look" in one.caveat for one in whole.verdicts)
    assert [one.verdict for one in quick.verdicts] == [one.verdict for one in whole.verdicts]


def test_unequal_batches_are_named_by_every_claim_that_compares_methods():
    made = samples.batched(samples.study(), "full", 32)
    made = samples.batched(made, "qlora", 16)
    made = samples.energised(made, "", lambda seed: 1.0)
    told = verdicts(made)
    for claim in ("C1", "C5", "C6", "C7", "C10", "C13"):
        assert "batches are unequal" in told[claim].caveat, claim
    assert "full 32, lora 8" in told["C1"].caveat
    assert "lora 8, qlora 16" in told["C5"].caveat
    assert "full 32, lora 8, qlora 16" in told["C7"].caveat
    assert not any("unequal" in one.caveat for one in claims.judge(samples.study()).verdicts)


def test_a_single_pair_says_what_its_interval_does_not_know():
    told = verdicts(samples.study(seeds=(1,)))
    for claim in ("C1", "C5", "C6"):
        assert "One pair of runs" in told[claim].caveat
    assert "One pair" not in verdicts(samples.study())["C1"].caveat


def test_on_a_cpu_the_peak_of_the_process_is_said_to_be_that():
    told = verdicts(cases.of_record(cases.plain(), "", memory=cases.Memory(None, None, None, 9)))
    assert "whole process" in told["C7"].caveat
    assert "whole process" not in verdicts(cases.plain())["C7"].caveat


def test_why_energy_or_forgetting_is_not_known_is_said():
    made = samples.of_record(cases.plain(), "", energy=Energy({}, {"CPU": "no counter in here"}))
    assert "CPU: no counter in here" in verdicts(made)["C13"].evidence
    made = samples.changed(cases.plain(), "", lambda r: replace(r, no_forgetting="no head"))
    assert "no head" in verdicts(made)["C11"].evidence


def test_intervals_decide_as_a_whole():
    from peftprof.studies import Interval

    for low, high, verdict in (
        (2.0, 3.0, "holds"), (2.1, 9.0, "holds"), (1.0, 1.9, "fails"),
        (1.0, 2.0, "not testable here"), (1.9, 3.0, "not testable here"),
    ):  # fmt: skip
        assert evidence.above(Interval(2, low, high, 3), 2.0) == verdict


def test_the_arithmetic_of_7b():
    """7B in fp32 is 27 GB of weights alone; AdamW makes it four times that."""
    figures = {one.what: one for one in verdicts(cases.plain())["C12"].figures}
    weights = figures["weights in fp32"].value
    assert weights == pytest.approx(6.738e9 * 4 / 1e9, rel=1e-3)
    assert figures["weights, gradients and AdamW in fp32"].value == pytest.approx(4 * weights)
    linear = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # Four bits a weight, one byte for each 64, one float32 for each 256 of those.
    nf4 = linear / 2 + linear / 64 + linear / 64 / 256 * 4 + (6_738_415_616 - linear) * 2
    assert figures["base weights of QLoRA, the rest in bf16"].value == pytest.approx(nf4 / 1e9)


def test_holms_correction_against_its_definition():
    """Twelve pairs where the smallest p is below 5 % alone and not among twelve."""
    one = samples.answered(
        samples.study(ranks=(4, 8, 16, 32)), "lora-r8", lambda seed: set(range(6))
    )
    one = samples.answered(one, "lora-r4", lambda seed: set())
    one = samples.answered(one, "lora-r16", lambda seed: set(range(3)))
    one = samples.answered(one, "lora-r32", lambda seed: set(range(3)))
    found = verdicts(one)["C9"]
    # Six examples of one side: p = 2 / 2^6 = 0.031, above 5 % / 6.
    assert "0 of 12 pairs of ranks differ" in found.evidence
    two = samples.answered(one, "lora-r8", lambda seed: set(range(12)))
    # p = 2 / 2^12 is the smallest of six; 2 / 2^9 twice comes next, all below 5 % / 4.
    assert "3 of 12 pairs of ranks differ" in verdicts(two)["C9"].evidence
