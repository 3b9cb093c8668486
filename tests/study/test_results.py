"""What is in the folder is what comes out of it; its files alone give the same verdicts."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest

from peftprof.errors import FolderError
from peftprof.records import Energy
from peftprof.study import claims, results
from tests.study import again, cases, samples
from tests.study.test_claims import named


def test_what_was_written_is_read(tmp_path):
    made = cases.rises(0.3, 0.1, 0.2)
    made = samples.ended(made, "lora-r8-s2")
    found = results.read(samples.written(made, tmp_path / "study"))
    assert found == made


def test_a_run_in_the_middle_is_missing_and_its_damage_no_matter(tmp_path):
    made = samples.study(seeds=(1,), ranks=(8,))
    running = samples.of_record(made, "full", state="running")
    folder = samples.written(running, tmp_path / "study")
    found = results.read(folder)
    assert [r.state for r in found.results] == ["missing", "complete", "complete"]
    (folder.run("lora-r8-s1") / "run.json").write_text("{")
    with pytest.raises(FolderError, match="damaged"):
        results.read(folder)


def test_forgetting_that_is_damaged_or_not_measurable_is_said(tmp_path):
    folder = samples.written(samples.study(seeds=(1,), ranks=(8,)), tmp_path / "study")
    (folder.run("full-s1") / "forgetting.json").write_text("[1")
    (folder.run("lora-r8-s1") / "forgetting.json").write_text('{"absent": "no head"}')
    full, lora, qlora = results.read(folder).results
    assert (full.forgetting, lora.forgetting, qlora.forgetting) == (None, None, None)
    assert "damaged" in full.no_forgetting
    assert lora.no_forgetting == "no head"
    assert qlora.no_forgetting == ""


def test_a_trace_that_is_gone_is_no_breakdown_and_said(tmp_path):
    from peftprof.records import Profiled

    made = samples.study(seeds=(1,), ranks=(8,))
    made = samples.of_record(
        made, "full", profiled=Profiled("torch", "trace.json.gz", 3, 1.0, 1.0, True, 0.0)
    )
    found = results.read(samples.written(made, tmp_path / "study")).results[0]
    assert found.state == "complete"
    assert found.breakdown is None
    assert found.why.startswith("no breakdown: ")


def test_the_raw_results_have_every_run_step_and_answer(tmp_path):
    made = samples.ended(cases.ladder(2, 2), "qlora-r8-s3")
    made = samples.of_record(
        samples.ended(made, "lora-r8-s1", "missing"),
        "full",
        energy=Energy({"GPU": 2.0, "CPU": 1.0}),
    )
    folder = samples.written(made, tmp_path / "study")
    results.export(folder, made)
    lines = (folder.path / "results.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["cell"]["name"] for row in rows] == [r.cell.name for r in made.results]
    assert [row["state"] for row in rows] == [r.state for r in made.results]
    assert {row["why"] for row in rows if row["state"] == "failed"} == {"out of memory"}
    runs = pq.read_table(folder.path / "runs.parquet").to_pylist()
    assert [run["name"] for run in runs] == [row["cell"]["name"] for row in rows]
    by_name = {run["name"]: run for run in runs}
    assert by_name["full-s1"]["joules"] == 3
    assert by_name["full-s1"]["memory_allocated_bytes"] == 10**9
    assert by_name["lora-r8-s1"]["accuracy"] is None
    assert by_name["lora-r8-s1"]["batch_size"] == samples.SAMPLES
    done = [r for r in made.results if r.state == "complete"]
    steps = pq.read_table(folder.path / "steps.parquet").to_pylist()
    assert len(steps) == len(done) * (1 + samples.STEPS)  # the warm-up's too, marked
    assert sum(step["warmup"] for step in steps) == len(done)
    answers = pq.read_table(folder.path / "predictions.parquet").to_pylist()
    matrix = [r for r in done if r.cell.part == "matrix"]
    assert len(answers) == len(matrix) * samples.EXAMPLES
    mine = [a["predicted"] for a in answers if a["cell"] == "full-s1"]
    assert tuple(mine) == made.results[0].predicted


def test_a_study_without_a_run_can_be_exported(tmp_path):
    for name, made in (
        ("missing", samples.ended(samples.study(), "", "missing")),
        ("failed", samples.ended(samples.study(), "")),
        ("empty", replace(samples.study(), results=())),
    ):
        folder = samples.written(made, tmp_path / name)
        results.export(folder, results.read(folder))
        results.export_verdicts(folder, claims.judge(made))
        json.loads((folder.path / "verdicts.json").read_text())
        assert pq.read_table(folder.path / "steps.parquet").num_rows == 0
        if name != "empty":
            assert set(again.verdicts(folder.path).values()) == {cases.UNTESTABLE}


@pytest.mark.parametrize("case", cases.CASES, ids=named)
def test_other_code_comes_to_the_same_verdict_from_the_files(case, tmp_path, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda file: None)  # hundreds of small files
    made = case.make()
    folder = samples.written(made, tmp_path / "study")
    results.export(folder, made)
    assert again.verdicts(folder.path)[case.claim] == case.verdict


def test_verdicts_json_says_what_was_judged(tmp_path):
    made = cases.times("lora", 1 / 4, of=cases.slow())
    folder = samples.written(made, tmp_path / "study")
    results.export(folder, made)
    judged = claims.judge(made)
    results.export_verdicts(folder, judged)
    value = json.loads((folder.path / "verdicts.json").read_text())
    assert set(value) == {"accuracy", "throughput", "memory", "step_ms", "comparisons", "ladder",
                          "verdicts"}  # fmt: skip
    told = {one["claim"]: one["verdict"] for one in value["verdicts"]}
    assert told == again.verdicts(folder.path)
