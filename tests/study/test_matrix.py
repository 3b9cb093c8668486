"""The cells of small real studies: run once, gone on with, failed and tried again, side by side."""

import re

import pytest
import torch

from peftprof.config import RunConfig
from peftprof.errors import BusyError, ConfigError, FolderError, StudyError
from peftprof.records import read_record
from peftprof.run import runner
from peftprof.run.folder import RunFolder
from peftprof.run.loop import TimedLoop
from peftprof.studies import CellResult
from peftprof.study import results, runs
from tests.study import again
from tests.study.conftest import Heard, outcomes

NAMES = ["full-s1", "lora-r2-s1", "qlora-r2-s1"]
LADDER = """
[ladder]
settings = { max_steps = 7, rank = 2 }
[[ladder.rungs]]
method = "full"
[[ladder.rungs]]
cause = "batch size"
settings = { batch_size = 16 }
[[ladder.rungs]]
cause = "precision"
settings = { precision = "auto" }
[[ladder.rungs]]
cause = "gradient work"
method = "lora"
"""
SEARCH = "[search]\nseed = 7\nrank = 2\n[search.rates]\nlora = [1e-5, 3e-2]\n"


def complete(opened) -> dict[str, CellResult]:
    found = results.read(opened.folder).results
    assert {r.state for r in found} == {"complete"}
    return {r.cell.name: r for r in found}


@pytest.mark.slow
def test_a_study_is_run_judged_and_nothing_twice(opened, recipe, heard, in_process):
    study = opened(recipe())
    assert study.names() == NAMES
    study.run(heard)
    assert heard.cells == NAMES
    assert heard.begun == (3, 0)
    assert all(re.fullmatch(r"accuracy \d+\.\d %", what) for what in heard.what.values())
    assert heard.left[0] is None
    assert heard.left[-1] is None  # nothing is left
    assert all(left is not None and left >= 0 for left in heard.left[1:-1])
    assert [what for what, _, _ in heard.passes] == ["training"] * 3
    assert not list((study.folder.path / "logs").iterdir())
    judged = study.judge()
    told = {one.claim: one.verdict for one in judged.verdicts}
    assert told == again.verdicts(study.folder.path)
    before = complete(study)
    made = len(in_process)
    anew, again_heard = opened(recipe()), Heard()
    assert anew.stored == study.stored
    anew.run(again_heard)
    assert again_heard.begun == (3, 3)
    assert again_heard.cells == []
    assert len(in_process) == made
    assert complete(anew) == before


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_stock_peft_makes_the_recorded_answers_of_the_saved_adapter(
    method, opened, recipe, heard, sentences
):
    study = opened(recipe())
    name = f"{method}-r2-s1"
    study.run(heard, only=(name,))
    folder = RunFolder(study.folder.run(name))
    record = folder.read_record()
    recorded = folder.read_evaluations()[-1]
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    quantised = {}
    if method == "qlora":
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=list(record.head_modules),
        )
    base = AutoModelForSequenceClassification.from_pretrained(
        record.config["model"], num_labels=2, **quantised
    )
    model = PeftModel.from_pretrained(base, folder.path / "adapter").eval()
    prepared = runner.prepare(RunConfig.from_json(record.config))
    predicted = []
    texts = prepared.loaded.validation.texts
    with torch.inference_mode():
        for (text,) in texts:
            inputs = prepared.tokenizer(text, return_tensors="pt", truncation=True, max_length=32)
            predicted.append(int(model(**inputs).logits.argmax()))
    labels = prepared.loaded.validation.labels
    right = sum(a == b for a, b in zip(labels, predicted, strict=True))
    assert record.accuracy is not None
    assert (right, len(texts)) == (record.accuracy.correct, record.accuracy.examples)
    assert tuple(predicted) == recorded.predicted
    assert study.stored.labels == tuple(labels)


def test_a_loss_that_is_not_finite_is_recorded_and_the_rest_goes_on(opened, recipe, heard):
    study = opened(recipe("[lora]\nlearning_rate = 1e30\n"))
    study.run(heard)
    assert heard.cells == NAMES
    assert heard.what["lora-r2-s1"].startswith("failed: ")
    found = {r.cell.name: r for r in results.read(study.folder).results}
    assert [found[name].state for name in NAMES] == ["complete", "failed", "complete"]
    assert "\n" not in found["lora-r2-s1"].why
    assert "loss" in found["lora-r2-s1"].why
    judged = study.judge()
    assert {one.claim: one.verdict for one in judged.verdicts} == again.verdicts(study.folder.path)
    # It is not tried again unless asked for.
    later = Heard()
    opened(recipe("[lora]\nlearning_rate = 1e30\n")).run(later)
    assert (later.cells, later.begun) == ([], (3, 3))
    study.run(later, again=True)
    assert later.cells == ["lora-r2-s1"]
    assert later.what["lora-r2-s1"].startswith("failed: ")
    assert study.folder.failure("lora-r2-s1") is not None


def test_a_failure_that_is_over_is_forgotten_by_again(opened, recipe, heard):
    study = opened(recipe())
    study.folder.fail("full-s1", "out of memory")
    study.run(heard)
    assert heard.cells == NAMES[1:]
    with pytest.raises(StudyError, match="full-s1 failed: out of memory; --again"):
        study.run(heard, only=("full-s1",))  # a scheduler must hear of it
    study.run(heard, only=("full-s1",), again=True)
    assert heard.cells == [*NAMES[1:], "full-s1"]
    complete(study)


def test_a_library_that_breaks_a_run_breaks_no_study(opened, recipe, heard, monkeypatch):
    """What is no error of ours is told by its last line."""
    study = opened(recipe())
    real = runner.train

    def broken(config, *others):
        if config.method == "full":
            raise RuntimeError("a library\nhas broken")
        return real(config, *others)

    monkeypatch.setattr(runner, "train", broken)
    study.run(heard)
    why = study.folder.failure("full-s1")
    assert why is not None
    assert "exit code 1: has broken" in why
    assert heard.cells == NAMES
    assert study.folder.log("full-s1").read_text().startswith("Traceback")


def test_what_every_run_would_meet_stops_the_study_and_fails_no_run(
    opened, recipe, heard, monkeypatch
):
    study = opened(recipe())

    def full(*arguments):
        raise FolderError("cannot write: No space left on device")

    monkeypatch.setattr(runner, "train", full)
    with pytest.raises(FolderError, match="No space left"):
        study.run(heard)
    monkeypatch.undo()
    assert study.folder.failure("full-s1") is None
    assert heard.cells == ["full-s1"]


@pytest.mark.slow
def test_runs_that_were_interrupted_go_on_and_those_that_never_began_begin(
    opened, recipe, heard, monkeypatch
):
    whole = opened(recipe())
    whole.run(heard)
    complete(whole)
    other = opened(recipe(), out=whole.folder.path.parent / "other")
    real, left = TimedLoop._step, [0]

    def dying(self, number, warmup):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        real(self, number, warmup)

    monkeypatch.setattr(TimedLoop, "_step", dying)
    for steps in (0, 5, 2, 7, 4):  # of a run's 8, checkpoints every third
        left[0] = steps
        with pytest.raises(KeyboardInterrupt):
            other.run(Heard())
    (other.folder.run("qlora-r2-s1")).mkdir(exist_ok=True)  # killed before it had a record
    left[0] = 1000
    other.run(heard)
    complete(other)
    assert outcomes(other.folder) == outcomes(whole.folder)


def test_single_runs_by_name_and_their_errors(opened, recipe, heard):
    study = opened(recipe())
    study.run(heard, only=("lora-r2-s1",))
    assert heard.cells == ["lora-r2-s1"]
    assert heard.begun == (1, 0)
    with pytest.raises(ConfigError, match="--only soup: the study has no such cell"):
        study.run(heard, only=("soup",))
    with study.folder.held():  # a whole study at work keeps no single run from its turn
        study.run(heard, only=("full-s1",))
        with pytest.raises(BusyError, match="another study is at work"):
            study.run(heard)
    study.run(heard)
    assert heard.cells == ["lora-r2-s1", "full-s1", "qlora-r2-s1"]
    complete(study)


def test_a_run_that_another_process_holds_is_not_made_twice(opened, recipe, heard, monkeypatch):
    monkeypatch.setattr("peftprof.study.child.WAITS", 2)
    study = opened(recipe())
    with (
        RunFolder(study.folder.run("full-s1")).held(new=True),
        pytest.raises(BusyError, match="another run is at work"),
    ):
        study.run(heard, only=("full-s1",))
    assert study.folder.failure("full-s1") is None
    study.run(heard, only=("full-s1",))
    assert read_record(study.folder.run("full-s1")).state == "complete"


OTHERS = {
    "another rate": lambda recipe: {"recipe": recipe("[full]\nlearning_rate = 1e-5")},
    "more seeds": lambda recipe: {"recipe": recipe(seeds=[1, 2])},
    "fewer ranks": lambda recipe: {"recipe": recipe(ranks=[4])},
    "forgetting": lambda recipe: {"recipe": recipe(top="forgetting = [2]")},
    "another name": lambda recipe: {"recipe": recipe(name="other")},
    "shorter": lambda recipe: {"recipe": recipe(), "max_steps": 2},
    "a subset": lambda recipe: {"recipe": recipe(), "subset": 40},
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
def test_a_folder_of_another_study_is_refused_and_stays(other, opened, recipe):
    study = opened(recipe())
    before = (study.folder.path / "study.json").read_bytes()
    with pytest.raises(FolderError, match="holds a study of other settings"):
        opened(**other(recipe))
    assert (study.folder.path / "study.json").read_bytes() == before


def test_a_study_made_meanwhile_is_not_written_over(opened, recipe, monkeypatch):
    """Two processes that settle at once: the second finds what the first has stored."""
    real, first = runs.matrix.make, []
    other, small = recipe("[full]\nlearning_rate = 1e-5", name="other"), recipe()

    def late(folder, plan, settings, created):
        made = real(folder, plan, settings, created)
        if not first:
            first.append(None)
            first.append(opened(other))
        return made

    monkeypatch.setattr(runs.matrix, "make", late)
    with pytest.raises(FolderError, match="other settings"):
        opened(small)
    assert opened(other).stored == first[1].stored


@pytest.mark.slow
def test_the_search_comes_first_and_its_rate_is_taken(opened, recipe, heard):
    study = opened(recipe(SEARCH))
    assert study.names() == ["search-lora-1e-05", "search-lora-0.03", *NAMES]
    with pytest.raises(StudyError, match="no rate is chosen for lora yet"):
        study.run(heard, only=("lora-r2-s1",))
    study.run(Heard())
    found = complete(study)
    tried = {
        (r.record.accuracy.accuracy, -r.record.accuracy.loss): r.cell.config["learning_rate"]
        for r in found.values()
        if r.cell.part == "search"
    }
    best = tried[max(tried)]
    assert found["lora-r2-s1"].record.config["learning_rate"] == best
    assert found["full-s1"].record.config["learning_rate"] == 1e-2
    assert results.read(study.folder).rates == {"lora": best}
    data = {name: r.record.data for name, r in found.items()}
    assert data["search-lora-0.03"].train_examples < data["lora-r2-s1"].train_examples
    assert "tuning" in data["search-lora-0.03"].split


@pytest.mark.slow
def test_a_rate_that_failed_is_out_and_if_all_failed_the_recipes_stays(opened, recipe, heard):
    study = opened(recipe(SEARCH))
    study.folder.fail("search-lora-0.03", "a loss of nan")
    study.run(heard)
    assert results.read(study.folder).rates == {"lora": 1e-5}
    other = opened(recipe(SEARCH), out=study.folder.path.parent / "other")
    for name in other.names()[:2]:
        other.folder.fail(name, "a loss of nan")
    other.run(heard, only=("lora-r2-s1",))
    assert results.read(other.folder).rates == {}
    record = read_record(other.folder.run("lora-r2-s1"))
    assert record.config["learning_rate"] == 1e-2


def test_a_rung_that_changes_nothing_here_is_left_out_and_named(opened, recipe):
    study = opened(recipe(LADDER.replace('precision = "auto"', 'precision = "fp32"')))
    assert study.stored.left_out == {"ladder-2-s1": "precision: it changes nothing on this machine"}
    assert study.names() == [*NAMES, "ladder-0-s1", "ladder-1-s1", "ladder-3-s1"]


@pytest.mark.slow
def test_a_ladder_of_real_runs_adds_up(opened, recipe, heard):
    study = opened(recipe(LADDER.replace('precision = "auto"', 'precision = "fp32"')))
    study.run(heard)
    rungs = study.judge().ladder
    assert [r.cause for r in rungs] == ["start", "batch size", "gradient work"]
    assert all(r.ns != 0 for r in rungs)
    assert again.verdicts(study.folder.path)["C2"] in ("holds", "fails")


def test_a_quick_look_cuts_epochs_and_lengthens_nothing(opened, recipe, tmp_path):
    text = "[full]\nepochs = 1.0\n[lora]\nmax_steps = 4\n"
    path = recipe(text)
    small = tmp_path / "small.toml"
    small.write_text(small.read_text().replace("max_steps = 8\n", ""))

    def steps(at_most):
        out = tmp_path / f"{at_most}"
        cells = opened(path, max_steps=at_most, out=out).stored.cells
        return {cell.method: cell.config["max_steps"] for cell in cells}

    # An epoch of 86 examples is eleven steps.
    assert steps(5) == {"full": 5, "lora": 4, "qlora": 5}
    assert steps(2) == {"full": 2, "lora": 2, "qlora": 2}
    assert steps(1000) == {"full": None, "lora": 4, "qlora": None}


@pytest.mark.slow
def test_forgetting_is_asked_of_full_and_of_the_ranks_named_once(
    opened, recipe, heard, monkeypatch, in_process
):
    measured = []

    def record(folder, general):
        measured.append(folder.path.name)
        assert general.name == "general"
        (folder.path / "forgetting.json").write_text('{"absent": "not asked here"}')

    monkeypatch.setattr("peftprof.study.forgetting.record", record)
    study = opened(recipe(top="forgetting = [2]", ranks=[2, 3], more=SEARCH))
    study.run(heard)
    assert measured == ["full-s1", "lora-r2-s1", "qlora-r2-s1"]
    # A run that was killed between its end and that is not made again, only measured.
    path = study.folder.run("lora-r2-s1")
    before = (path / "run.json").read_bytes()
    (path / "forgetting.json").unlink()
    later = Heard()
    study.run(later)
    assert later.cells == ["lora-r2-s1"]
    assert measured[3:] == ["lora-r2-s1"]
    assert later.passes == []
    assert (path / "run.json").read_bytes() == before
    assert results.read(study.folder).results[-1].no_forgetting == ""
