"""A small real calibration on this CPU, through the command line; no time is asserted."""

import dataclasses
import json
import sys

import pytest
import torch

from peftprof import devices
from peftprof.calibrations import FLOPS, KINDS, MOVES, NARROW, Calibration
from peftprof.errors import DeviceError, InputError
from peftprof.records import decode
from peftprof.report import calibration as show
from peftprof.report.console import plain
from peftprof.run import calibrate, footprint, probes, timing
from peftprof.trace import costs
from peftprof.trace.events import Operands

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _here(cache, monkeypatch):
    """Small: no second for the calls, a hundredth of the sizes, one process measured once."""
    monkeypatch.setenv("PEFTPROF_CACHE", str(cache))
    monkeypatch.setattr(calibrate, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(timing, "_MOST_CALLS", 2)
    monkeypatch.setattr(calibrate, "MOST", 0.01)
    monkeypatch.setattr(calibrate, "process_bytes", lambda: 600 * 2**20)


def run(monkeypatch, capsys, *arguments):
    from peftprof import cli

    monkeypatch.setattr(sys, "argv", ["peftprof", "calibrate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    return ended.value.code, out, err


@pytest.fixture(scope="module")
def calibrated(cache):
    """What the command printed as JSON, and the record that it stored."""
    patched = pytest.MonkeyPatch()
    with patched.context() as monkeypatch:
        monkeypatch.setenv("PEFTPROF_CACHE", str(cache))
        monkeypatch.setattr(timing, "_LEAST_ROUNDS", 1)
        monkeypatch.setattr(timing, "_MOST_CALLS", 2)
        monkeypatch.setattr(calibrate, "process_bytes", lambda: 600 * 2**20)
        made = calibrate.measure(CPU, seconds=0.0, most=0.01)
    return made


def test_the_command_measures_and_stores(monkeypatch, capsys):
    code, out, _ = run(monkeypatch, capsys, "--device", "cpu", "--json")
    assert code == 0
    printed = json.loads(out)
    made = decode(Calibration, printed["calibration"])
    assert made == devices.load(printed["key"]) == calibrate.stored(CPU)
    assert printed["key"] == made.key == calibrate.key(CPU)
    assert made.basis == "measured"
    assert made.kind == "cpu"
    assert made.threads == torch.get_num_threads()
    assert made.versions["torch"] == torch.__version__
    assert made.process_bytes == 600 * 2**20
    assert 2**30 < made.memory_bytes < 2**50
    assert all(one["measured_s"] > 0 for one in printed["checked"])

    code, out, _ = run(monkeypatch, capsys, "--list")
    assert code == 0
    assert made.device.split()[0] in out
    assert "RTX 4090" in out
    code, out, _ = run(monkeypatch, capsys, "--list", "--json")
    listed = json.loads(out)
    assert [one["key"] for one in listed["measured"]] == [made.key]
    assert len(listed["datasheet"]) == len(devices.shipped())
    code, out, _ = run(monkeypatch, capsys, "--check")
    assert code == 0
    assert "Held-out calls" in out


def test_every_kind_is_measured(calibrated):
    made = calibrated.calibration
    assert {curve.kind for curve in made.curves} == set(KINDS)
    for dtype in ("fp32", "bf16"):
        for kind in KINDS:
            if kind != "optimizer":
                assert made.seconds(kind, dtype, 1e6, 1e6)[0] > 0
        assert made.curve("gemm", dtype, NARROW) is not None
        assert made.ceilings.flops_per_s[dtype] >= made.curve("gemm", dtype, FLOPS).rate
    overheads = made.overheads
    assert overheads.call_s > 0
    assert min(overheads.record_s, overheads.node_s, overheads.module_s) >= 0
    assert overheads.kernel_s == 0


def test_held_out_calls_are_in_no_curve(calibrated):
    pool = probes.Pool(CPU)
    points = {
        (p.kind, p.dtype, p.label) for ladder in probes.ladders(CPU, pool, 0.01) for p in ladder
    }
    held = {(p.kind, p.dtype, p.label) for p in probes.held_out(CPU, pool)}
    assert held
    assert not held & points
    assert {kind for kind, _, _ in held} == set(KINDS)
    assert 0 < calibrated.held < calibrate._count(probes.held_out(CPU, pool))


@pytest.mark.parametrize("width", [80, 120])
def test_the_tables_fit(calibrated, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    made = calibrated.calibration
    for shown in (
        show.render(made, calibrated.checked, calibrated.held, "/a/path.json"),
        show.render_check(made, calibrated.checked, calibrated.held),
        show.render_list([made], ["a file"], devices.shipped()),
    ):
        text = plain(shown)
        assert "…" not in text
        assert max(map(len, text.splitlines())) <= width
    for kind in MOVES:
        assert kind in plain(show.render(made, calibrated.checked, calibrated.held, "x"))


def test_the_tables_do_without_held_out_calls(calibrated):
    made = calibrated.calibration
    assert "none was had undisturbed" in plain(show.render_check(made, (), 12))
    for sheet in devices.shipped():
        assert sheet.device in plain(show.render(sheet, (), 0, "-"))


# --- Errors


def test_a_device_that_is_not_here(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "--device", "cuda:7")
    assert code == 2
    assert "there is no device cuda:7" in err
    assert err.count("\n") == 1


def test_a_cache_that_cannot_be_written_is_said_before_measuring(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(calibrate, "measure", None)
    code, out, err = run(monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert "cannot write to" in err
    assert err.count("\n") == 1


def test_check_without_a_calibration(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    code, _, err = run(monkeypatch, capsys, "--check")
    assert code == 2
    assert "has no calibration" in err


def test_a_damaged_one_is_never_believed(monkeypatch, capsys, tmp_path, calibrated):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    path = devices.store(calibrated.calibration)
    path.write_text(path.read_text()[:500])
    with pytest.raises(InputError, match="measure again"):
        calibrate.stored(CPU)
    code, _, err = run(monkeypatch, capsys, "--check")
    assert code == 2
    assert str(path) in err
    monkeypatch.setattr(calibrate, "measure", lambda *_: calibrated)
    code, _, err = run(monkeypatch, capsys)
    assert code == 0
    assert f"replaced: {path}" in err
    assert devices.load(path.stem) == calibrated.calibration


def test_one_of_a_busy_machine_replaces_no_better_one(monkeypatch, tmp_path, calibrated):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    quiet = dataclasses.replace(calibrated.calibration, disturbed=0.01)
    busy = dataclasses.replace(quiet, disturbed=0.5)
    assert calibrate.keep(busy)[1]
    assert calibrate.keep(quiet)[1]
    path, kept = calibrate.keep(busy)
    assert not kept
    assert devices.load(path.stem) == quiet
    path.write_text("damaged")
    assert calibrate.keep(busy) == (path, True)


def test_list_and_check_are_not_given_together(monkeypatch, capsys):
    code, _, err = run(monkeypatch, capsys, "--list", "--check")
    assert code == 2
    assert "give one of them" in err


# --- What is counted


def test_probes_count_as_traces_do():
    pool = probes.Pool(CPU)
    calls = {
        "aten::mm": probes.product(pool, "fp32", 7, 5, 3, "dYW"),
        "aten::bmm": probes.batched(pool, "fp32", 6, 4, 8),
    }
    shapes = {
        "aten::mm": (((7, 5), (5, 3)), ("float", "float")),
        "aten::bmm": (((6, 4, 8), (6, 8, 4)), ("float", "float")),
    }
    for name, probe in calls.items():
        taken = costs.cost(costs.rule(name), operands(*shapes[name]))
        assert (taken.flops, taken.bytes) == (probe.flops, probe.bytes)


def operands(shapes, dtypes):
    return Operands(
        json.dumps([list(shape) for shape in shapes]).encode(), json.dumps(dtypes).encode(), b""
    )


@pytest.mark.parametrize("form", probes.FORMS)
def test_the_forms_of_a_product_have_their_shapes(form):
    made = probes.product(probes.Pool(CPU), "fp32", 7, 5, 3, form).call()
    assert tuple(made.shape) == {"XW": (7, 5), "dYW": (7, 3), "dYX": (5, 3)}[form]


# --- Noise


def times(best, clean=1):
    return timing.Times(best, 2 * best, 0.1, 4, clean)


def points(*sizes, per="bytes"):
    return [
        probes.Probe("gemm", "fp32", per, size, size, None, str(size), lambda: None)
        for size in sizes
    ]


def test_a_disturbed_point_inside_a_curve_is_left_out():
    made = calibrate._curve(points(1, 2, 4), [times(1.0), times(9.0, clean=0), times(2.0)])
    assert made.sizes == (1, 4)
    made = calibrate._curve(points(1, 2, 4), [times(3.0, clean=0), times(1.5), times(2.0)])
    assert (made.sizes, made.best_s) == ((1, 2, 4), (1.5, 1.5, 2.0))


@pytest.mark.parametrize(("rate", "last"), [(4.0, 3.0), (1.0, 4.0), (0.1, 9.0)])
def test_a_disturbed_end_is_bounded_by_what_is_plausible(rate, last):
    taken = [times(1.0), times(1.5), times(9.0, clean=0)]
    made = calibrate._curve(points(1, 2, 4), taken, rate)
    assert made.best_s == (1.0, 1.5, last)


def test_no_call_is_slower_than_a_larger_one():
    made = calibrate._curve(points(1, 2, 4), [times(5.0), times(3.0), times(4.0)])
    assert made.best_s == (3.0, 3.0, 4.0)
    assert made.median_s == (10.0, 6.0, 8.0)


def test_a_larger_product_is_at_least_as_near_to_the_peak():
    made = calibrate._curve(points(1, 2, 4, per="flops"), [times(1.0), times(1.0), times(9.0)])
    assert made.best_s == (1.0, 1.0, 2.0)


def test_calls_of_one_size_are_one_point():
    made = calibrate._curve(points(1, 1, 2), [times(1.0), times(3.0), times(4.0)])
    assert made.sizes == (1, 2)
    assert made.best_s == (2.0, 4.0)


def test_waiting_is_summed_over_threads(tmp_path):
    for thread, waited in (("1", 100), ("2", 250)):
        (tmp_path / thread).mkdir()
        (tmp_path / thread / "schedstat").write_text(f"5000 {waited} 3\n")
    (tmp_path / "3").mkdir()  # a thread that has just ended
    waiting = timing.Waiting(tmp_path)
    waiting.look_round()
    assert waiting.ns() == 350
    (tmp_path / "1" / "schedstat").write_text("9000 400 4\n")
    assert waiting.ns() == 650
    waiting.close()
    nowhere = timing.Waiting(tmp_path / "none")
    nowhere.look_round()
    assert nowhere.ns() == 0


def test_calls_go_on_until_they_were_had_undisturbed(monkeypatch):
    monkeypatch.setattr(timing, "_LEAST_ROUNDS", 2)
    monkeypatch.setattr(timing, "_MOST_CALLS", 1)
    monkeypatch.setattr(timing, "_ENOUGH", 2)
    waits = iter([0, 0, 0, 9**9, 0, 0, *[0, 9**9] * 3, *[0] * 100])
    monkeypatch.setattr(timing.Waiting, "ns", lambda self: next(waits))
    (one,) = timing.time_in_turn([lambda: None], CPU, 60.0)
    assert one.clean == 2
    assert one.repeats > 2


# --- A process


@pytest.mark.slow
def test_a_process_takes_what_the_imports_take():
    # Between torch alone and all libraries at once: units are right.
    assert 200 * 2**20 < footprint.process_bytes() < 4 * 2**30


def test_a_process_that_fails_is_an_error(monkeypatch):
    monkeypatch.setattr(footprint, "_MODULE", "peftprof.no_such_module")
    with pytest.raises(DeviceError, match="could not be measured"):
        footprint.process_bytes()
