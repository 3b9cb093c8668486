"""The answer: what fits, what is first, what is said when nothing fits."""

import dataclasses
import json
import shlex

import pytest
from typer.testing import CliRunner

from peftprof import devices
from peftprof.advice import TERMS, CheckedRun, Choice
from peftprof.advise import advisor, blueprint, lessons, shapes
from peftprof.advise.advisor import Wanted
from peftprof.advise.lessons import Lessons
from peftprof.advise.predict import Predictor, Size, Subject
from peftprof.errors import ConfigError
from peftprof.report import advice as show
from peftprof.report.console import plain
from peftprof.report.front import draw, front
from tests.advise.test_profile import LLAMA

GIB = 2**30


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes") / "llama.json"
    path.write_text(json.dumps(LLAMA))
    shape = shapes.find(str(path))
    facts = blueprint.facts(shape, shape.family.targets)
    return Subject(shape, facts, devices.find("rtx 4090"), 64, "packed")


@pytest.fixture(scope="module")
def answer(subject):
    return advisor.advise(subject, 24 * GIB, Wanted())


def test_every_choice_is_there_once(answer):
    ways = [p.choice for p in answer.predictions]
    assert len(set(ways)) == len(ways)
    assert {c.method for c in ways} == {"full", "lora", "qlora"}
    assert {c.kernels for c in ways if c.method != "full"} == {"bnb", "triton"}
    assert {c.checkpointing for c in ways} == {False, True}
    assert {c.precision for c in ways} == {"bf16", "fp32"}


def test_terms_add_up_and_the_interval_holds_the_peak(answer):
    for p in answer.predictions:
        assert set(p.terms) == set(TERMS)
        assert sum(p.terms.values()) == p.peak_bytes
        assert p.low_bytes < p.peak_bytes < p.high_bytes
        assert p.low_s < p.step_s < p.high_s


def test_the_fastest_that_fits_is_first_and_the_rest_is_ordered(answer):
    fits = answer.predictions[: answer.fitting]
    usual = [p for p in fits if p.choice.method == "full" or p.choice.rank == 8]
    assert fits[0].samples_per_s == max(p.samples_per_s for p in usual)
    assert all(p.needed_bytes <= answer.memory_bytes for p in fits)
    assert all(p.needed_bytes > answer.memory_bytes for p in answer.predictions[answer.fitting :])


def test_checkpointing_takes_less_memory_and_more_time(answer):
    at = {p.choice: p for p in answer.predictions}
    for choice, p in at.items():
        if choice.checkpointing or choice.batch_size < 8:
            continue
        other = at[dataclasses.replace(choice, checkpointing=True)]
        assert other.terms["activations"] < p.terms["activations"]
        assert other.step_s > p.step_s


@pytest.mark.parametrize("objective", ["memory", "accuracy"])
def test_other_objectives(subject, objective):
    wanted = Wanted(objective=objective, precisions=("bf16",), kernels=("bnb",))
    found = advisor.advise(subject, 24 * GIB, wanted)
    first = found.predictions[0]
    if objective == "memory":
        assert first.peak_bytes == min(
            p.peak_bytes for p in found.predictions if p.choice.rank == 8
        )
    else:
        assert first.choice.method == "full"


def test_when_nothing_fits_it_says_what_would_and_by_how_much(subject):
    wanted = Wanted(methods=("full",), batch_sizes=(64,), checkpointing=(False,))
    found = advisor.advise(subject, 100 << 20, wanted)
    assert not found.fitting
    assert not found.command
    least = min(p.needed_bytes for p in found.predictions)
    said = " ".join(found.instead)
    assert f"misses by {least - (100 << 20):,}" in said
    for remedy in ("smaller --batch-size", "--checkpointing", "--method qlora", "fits a"):
        assert remedy in said
    assert "nothing fits" in plain(show.render(found))


def test_the_command_is_one_that_train_takes(answer):
    from peftprof.cli import app

    words = shlex.split(answer.command)
    assert words[:4] == ["python", "-m", "peftprof", "train"]
    # A device that is not here is refused after every option has been understood.
    result = CliRunner().invoke(app, words[3:])
    assert "No such option" not in result.output
    assert type(result.exception).__name__ in ("DeviceError", "InputError")


def test_a_setting_that_the_device_has_not_is_refused(subject):
    board = dataclasses.replace(subject, device=devices.find("raspberry pi 5 8gb"))
    with pytest.raises(ConfigError, match="no bf16"):
        advisor.choices(board, Wanted(precisions=("bf16",)))
    with pytest.raises(ConfigError, match="needs a GPU"):
        advisor.choices(board, Wanted(kernels=("triton",)))


def test_a_picture_of_the_front(answer):
    best = front(list(answer.predictions))
    for p in answer.predictions:
        beaten = any(
            b.peak_bytes <= p.peak_bytes and b.samples_per_s >= p.samples_per_s for b in best
        )
        assert beaten
    assert draw(answer).startswith("<svg")


def compared(name: str, factor: float, rest: int, method: str = "lora") -> CheckedRun:
    choice = Choice(method, 8, 16, "fp32", False, "torch")
    return CheckedRun(name, "2026", "m", choice, 900, 1000 + rest, 0, 1.0, 1.0, factor)


def test_runs_correct_predictions_of_their_own_kind(subject):
    board = devices.find("raspberry pi 5 8gb")
    choice = Choice("lora", 8, 16, "fp32", False, "torch")
    none = Lessons(board)
    assert none.step(choice)[2] == none.process_bytes(choice)[1] == 0
    many = Lessons(board, tuple(compared(str(i), 2 + i / 10, i) for i in range(5)))
    factor, off, runs = many.step(choice)
    # The median of five is 2.2; 1.4, which is so without any run, counts as one more.
    assert (factor, runs) == (pytest.approx((1.4 * 2.2**5) ** (1 / 6)), 5)
    assert off >= lessons.LEAST_INTERVAL
    assert many.process_bytes(choice)[0] == round(
        (board.process_bytes + lessons.MORE + 5 * 102) / 6
    )
    other = Choice("full", 8, 16, "fp32", False, "torch")
    assert many.step(other)[2] == many.process_bytes(other)[1] == 0  # another way of computing
    assert many.step(dataclasses.replace(choice, rank=4, batch_size=1)) == many.step(choice)
    assert many.without("2026 0").step(choice)[2] == 4


def test_runs_that_corrected_are_said_with_what_they_taught(subject):
    choice = Choice("qlora", 8, 1, "bf16", False, "triton")
    run = dataclasses.replace(compared("a", 1.5, 0), choice=choice)
    taught = dataclasses.replace(subject, lessons=Lessons(subject.device, (run,)))
    wanted = Wanted(("qlora",), (8,), (1,), ("bf16",), (False,), ("triton",))
    (said,) = (t for t in advisor.advise(taught, 24 * GIB, wanted).basis if "learnt" in t)
    assert "1.45 times" in said or "1.22 times" in said  # 1.4 on a CPU, 1 on a GPU, and 1.5
    assert "1 run of" in said


def test_evaluation_may_be_the_peak(subject):
    """Where little is kept for backward, twice the batch is more, and its term is in the peak."""
    one = Predictor(dataclasses.replace(subject, device=devices.find("raspberry pi 5 8gb")))
    choice = Choice("qlora", 8, 16, "fp32", True, "torch")
    here, asked = Size(16, 64), Size(32, 64)
    without, beside = one.predict(choice, here), one.predict(choice, here, asked)
    assert (without.moment, beside.moment) == ("backward", "evaluation")
    assert beside.peak_bytes > without.peak_bytes
    assert beside.terms["gradients"] == beside.terms["activations"] == 0
    assert one.predict(choice, here, Size(1, 64)) == without


def test_what_loading_takes_must_fit_too(subject):
    board = dataclasses.replace(subject, device=devices.find("raspberry pi 5 8gb"))
    wanted = Wanted(("qlora",), (8,), (1,), ("fp32",), (False,), ("torch",))
    (one,) = advisor.advise(board, 8 * GIB, wanted).predictions
    # A file of fp32, and fp32 weights made of it.
    rest = one.loading_bytes - board.device.process_bytes
    assert rest == 8 * board.facts.parameters
    stored = dataclasses.replace(
        board.shape, values=board.shape.values | {"torch_dtype": "bfloat16"}
    )
    half = Predictor(dataclasses.replace(board, shape=stored)).predict(one.choice)
    assert half.loading_bytes == board.device.process_bytes + 6 * board.facts.parameters
    big = dataclasses.replace(one, loading_bytes=9 * GIB)
    assert big.needed_bytes == 9 * GIB
    assert dataclasses.replace(one, loading_bytes=1).needed_bytes == one.high_bytes


def test_what_was_learnt_is_kept_and_a_damaged_line_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    board = devices.find("raspberry pi 5 8gb")
    assert not lessons.read(board).checked
    lessons.keep(board, [compared("a", 2.0, 0), compared("b", 3.0, 0)])
    lessons.keep(board, [compared("a", 4.0, 0)])
    path = lessons.path_for(board)
    path.write_text(path.read_text() + '{"name": 3}\nnot json\n')
    assert {run.name: run.factor for run in lessons.read(board).checked} == {"a": 4.0, "b": 3.0}
