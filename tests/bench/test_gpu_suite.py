"""The suite's parts as processes, its time, and its page."""

import html.parser
import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from bench import gpu_suite, suite_inputs
from bench.gpu_suite import Outcome, Part
from bench.picture import draw
from bench.suite_page import render

HOSTILE = "<script>alert('x')</script>\"&\x1b[31m\x00]]>"


def python(name: str, code: str, **settings) -> Part:
    return Part(name, [sys.executable, "-c", code], 1, **settings)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    assert gpu_suite.main([]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("bench.gpu_suite: needs a GPU, and ")
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_a_time_that_cannot_be_is_one_line(seconds, tmp_path, capsys):
    assert gpu_suite.main(["--rehearse", f"--seconds={seconds}", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"bench.gpu_suite: --seconds {float(seconds)} is not above 0\n"
    )


def test_a_folder_that_cannot_be_is_said_first(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path / "file" / "x")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_running_nothing_is_no_success(tmp_path, capsys):
    assert gpu_suite.main(["--rehearse", "--seconds", "1", "--out", str(tmp_path)]) == 1
    assert "nothing was run" in capsys.readouterr().err


def test_an_interruption_keeps_what_was_done():
    def run(part, seconds):
        if part.name == "second":
            raise KeyboardInterrupt
        return gpu_suite.Outcome(part.name, "ok", "", 1.0)

    parts = [gpu_suite.Part(name, [], 1.0) for name in ("first", "second", "third")]
    outcomes = gpu_suite.run_all(parts, 100.0, run)
    assert [(o.name, o.status) for o in outcomes] == [("first", "ok"), ("second", "failed")]


def test_a_part_that_crashes_is_failed_with_its_signal():
    done = gpu_suite.run_part(python("crash", "import os; os.abort()"), 20)
    assert (done.status, done.why[:9]) == ("failed", "signal 6:")


def test_a_part_that_fails_is_failed_with_its_last_line():
    code = "import sys; print('fine'); print('it broke', file=sys.stderr); sys.exit(3)"
    done = gpu_suite.run_part(python("bad", code), 20)
    assert (done.status, done.why) == ("failed", "exit 3: it broke")
    assert done.output == "fine\n"


def test_a_part_that_takes_too_long_is_ended_and_keeps_what_it_said():
    code = "import time; print('half', flush=True); time.sleep(60)"
    done = gpu_suite.run_part(python("slow", code), 1)
    assert (done.status, done.output) == ("cut short", "half\n")
    assert done.seconds < 10


def test_tests_are_summed_up_by_their_last_line_of_output():
    code = "import sys; print('12 passed'); print('advice', file=sys.stderr)"
    assert gpu_suite.run_part(python("tests", code, sums_up=True), 20).why == "12 passed"


def test_a_part_is_told_what_to_aim_at():
    part = Part("aim", [sys.executable, "-c", "import sys; print(sys.argv[1])", "{seconds}"], 1)
    assert gpu_suite.run_part(part, 100).output == "85\n"
    assert gpu_suite.run_part(part, 20).output == "15\n"


def test_time_left_over_goes_to_the_parts_that_follow():
    now, given = [0.0], []

    def run(part, seconds):
        given.append(seconds)
        now[0] += 10
        return Outcome(part.name, "ok", "", 10)

    parts = [Part("a", [], 50), Part("b", [], 25), Part("c", [], 25)]
    gpu_suite.run_all(parts, 100, run, lambda: now[0])
    assert given == [50, 45, 80]


def test_what_comes_after_a_failure_is_skipped_and_no_time_too():
    now = [0.0]

    def run(part, seconds):
        now[0] += 100
        return Outcome(part.name, "failed" if part.name == "train" else "ok", "", 100)

    parts = [Part("train", [], 1), Part("breakdown", [], 1, after="train"), Part("last", [], 1)]
    done = gpu_suite.run_all(parts, 100, run, lambda: now[0])
    assert [(d.status, d.why) for d in done[1:]] == [
        ("skipped", "'train' did not end well"),
        ("skipped", "no time was left"),
    ]


def test_parts_wait_for_parts_that_are_there(tmp_path):
    for rehearse in (False, True):
        parts = gpu_suite.plan(tmp_path, rehearse)
        names = [part.name for part in parts]
        assert len(set(names)) == len(names)
        assert all(part.after in (None, *names[:i]) for i, part in enumerate(parts))


def test_one_failing_part_is_named_and_the_rest_is_kept(tmp_path, monkeypatch, capsys):
    results = "import pathlib, json; p = pathlib.Path(r'{}') / 'results' / 'gpu'; p.mkdir("
    results += "parents=True); (p / 'dequantize.jsonl').write_text(json.dumps("
    results += "dict(kind='end', planned=3, done=1, cut_short=True)))"

    def plan(work, rehearse):
        write = results.replace("{}", str(work))
        return [python("dequantize", write), python("nf4_linear", "raise SystemExit(1)")]

    monkeypatch.setattr(gpu_suite, "plan", plan)
    assert gpu_suite.main(["--rehearse", "--out", str(tmp_path / "out")]) == 1
    assert "failed: nf4_linear" in capsys.readouterr().err
    kept = json.loads((tmp_path / "out" / "suite.json").read_text())
    assert kept["failed"] == ["nf4_linear"]
    assert [part["status"] for part in kept["parts"]] == ["cut short", "failed"]
    assert kept["parts"][0]["why"] == "1 of 3 cases in its time"
    assert "nf4_linear" in (tmp_path / "out" / "suite.html").read_text()


def row(provider: str, status: str, **values):
    case = {"layer": HOSTILE, "N": 4, "K": 4, "M": 2, "direction": HOSTILE}
    empty = {"why": "", "error": None, "ms": None, "light": None, "ratio": None, "notes": {}}
    return {"kind": "row", "case": case, "provider": provider, "status": status} | empty | values


def made_up() -> dict:
    described = gpu_suite.environment.describe()
    header = {
        "question": HOSTILE,
        "device": HOSTILE,
        "dtype": "bfloat16",
        "date": "2026-01-01T00:00:00+00:00",
        "l2": "cold",
        "ceilings": None,
        "load": 0.5,
        "environment": described,
    }
    ratio = {"to": "x", "median": 2.0, "verdict": "faster"}
    times = {"p20": 1.0, "p50": 1.5, "p80": 2.0}
    rows = [
        row(HOSTILE, "timed", ms=times, ratio=ratio, notes={"saved_bytes": 2**20}),
        row("liar", "wrong", why=HOSTILE),
        row("away", "absent", why=HOSTILE),
    ]
    part = {"name": HOSTILE, "status": "failed", "why": HOSTILE, "seconds": 1.0}
    part |= {"output": HOSTILE, "errors": f"{HOSTILE}\nsecond"}
    limits = {"layer": HOSTILE, "N": 4, "K": 4, "forward_max_m": 16, "dx_max_m": 0}
    steps = {"median": 2e6, "min": 1e6, "max": 3e6}
    spent = {"rows": [{"phase": "forward", "category": HOSTILE, "ns": 1e6}]}
    spent |= {"idle_ns": 5e5, "step_ns": steps}
    timed = {"samples_per_s": 10.0, "step_p50_ms": 3.0, "step_p95_ms": 4.0, "last_loss": 0.5}
    return {
        "date": "2026-01-01",
        "seconds": 3.0,
        "rehearsal": False,
        "environment": described,
        "parts": [part],
        "failed": [HOSTILE],
        "benchmarks": {
            HOSTILE: {"header": header, "rows": rows, "crossovers": [limits], "end": None},
            "empty": {"header": None, "rows": [], "crossovers": [], "end": None},
        },
        "training": {HOSTILE: {"timed": timed, "memory": {"allocated_bytes": None}}, "x": {}},
        "breakdowns": {HOSTILE: {"runs": [spent]}},
    }


class Elements(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


def test_the_page_shows_everything_and_trusts_nothing():
    page = render(made_up())
    found = Elements()
    found.feed(page)
    assert "script" not in found.names
    assert not {name for name in found.attributes if name.startswith("on")}
    assert not found.attributes & {"href", "src"}
    assert "\x1b" not in page
    assert "\x00" not in page
    assert page.count("&lt;script&gt;") > 10
    for shown in ("1 failed", "Cut short", "broke off before", "16", "1.5 (2.00x)", "3.00"):
        assert shown in page


def test_a_picture_is_xml_that_starts_at_zero():
    tree = ElementTree.fromstring(draw(made_up()["benchmarks"][HOSTILE]["rows"], HOSTILE, HOSTILE))
    names = {element.tag.rpartition("}")[2] for element in tree.iter()}
    assert names == {"svg", "title", "style", "rect", "text", "g", "line"}
    bars = [e for e in tree.iter() if e.get("fill", "#fff") != "#fff"]
    axis = next(e for e in tree.iter() if e.get("class") == "a")
    assert bars
    assert {bar.get("x") for bar in bars} == {axis.get("x1")}


def test_the_data_fill_their_tokens_and_have_two_labels(tmp_path):
    path = tmp_path / "sentences.csv"
    suite_inputs.make_data(path, 6)
    head, *rows = path.read_text().splitlines()
    assert head == "text,label"
    assert [line.rsplit(",", 1)[1] for line in rows] == ["0", "1"] * 3
    assert {len(line.rsplit(",", 1)[0].split()) for line in rows} == {suite_inputs.WORDS}
