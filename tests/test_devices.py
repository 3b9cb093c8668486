import contextlib
import dataclasses
import json
import re
import tomllib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftprof import devices
from peftprof.breakdowns import Ceilings
from peftprof.calibrations import (
    BYTES,
    FLOPS,
    ITEMSIZE,
    KINDS,
    NARROW,
    PRODUCTS,
    VERSION,
    Calibration,
    Curve,
    Overheads,
    moved,
)
from peftprof.errors import ConfigError, FolderError, InputError
from peftprof.records import decode, encode
from tests import tolerances

SIZES = st.floats(1e2, 1e12)
SHIPPED = devices.shipped()
TABLE = tomllib.loads(devices._TABLE.read_text(encoding="utf-8"))["device"]


def ladder(kind="elementwise", dtype="fp32", per=BYTES, sizes=(1e3, 1e6, 1e8), rate=1e10):
    seconds = tuple(5e-6 + size / rate for size in sizes)
    return Curve(kind, dtype, per, tuple(sizes), seconds, seconds, (0.0,) * len(sizes))


@st.composite
def curves(draw):
    # Apart by a quarter at least: logarithms of nearer ones have too few digits between them.
    sizes = [10 ** (n / 10) for n in sorted(draw(st.sets(st.integers(20, 120), min_size=1)))]
    seconds = np.cumsum(
        draw(st.lists(st.floats(1e-7, 1.0), min_size=len(sizes), max_size=len(sizes)))
    )
    best = tuple(float(s) for s in seconds)
    return Curve("elementwise", "fp32", BYTES, tuple(sizes), best, best, (0.0,) * len(sizes))


def calibration(**changes):
    made = Calibration(
        version=VERSION,
        basis="measured",
        source="a test",
        device="Test CPU",
        kind="cpu",
        memory_bytes=2**34,
        threads=2,
        created="2026-11-27T10:00:00+00:00",
        versions={"torch": "2.13.0+cpu"},
        ceilings=Ceilings("a test", {"fp32": 1e11}, 1e10),
        curves=(
            ladder(),
            ladder("gemm", per=FLOPS, rate=1e11),
            ladder("gemm", per=BYTES, rate=1e9),
            ladder("gemm", per=NARROW, rate=1e10),
        ),
        overheads=Overheads(1e-6, 1e-6, 1e-6, 1e-6, 1e-6, 0.0),
        process_bytes=2**29,
        context_bytes=0,
        interval=0.2,
    )
    return dataclasses.replace(made, **changes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTPROF_CACHE", str(tmp_path))
    return tmp_path


# --- Curves


@given(curves())
def test_a_curve_goes_through_its_points(curve):
    found = curve.at(np.array(curve.sizes))
    np.testing.assert_allclose(found, curve.best_s, rtol=tolerances.LOGARITHMS)


@given(curves(), st.lists(SIZES, min_size=2, max_size=30))
def test_a_curve_is_positive_and_never_falls(curve, sizes):
    sizes = np.sort(np.array([0.0, *sizes]))
    found = curve.at(sizes)
    assert (found > 0).all()
    assert (np.diff(found) >= -tolerances.LOGARITHMS * found[1:]).all()


@given(curves(), st.floats(1.0, 1e3))
def test_beyond_its_ends_a_curve_is_constant_or_in_proportion(curve, factor):
    below = curve.at(np.array([0.0, curve.sizes[0] / factor]))
    np.testing.assert_allclose(below, curve.best_s[0], rtol=tolerances.LOGARITHMS)
    above = curve.at(np.array([curve.sizes[-1] * factor]))
    np.testing.assert_allclose(above, curve.best_s[-1] * factor, rtol=tolerances.LOGARITHMS)


@pytest.mark.parametrize(
    "change",
    [
        {"sizes": (1e3, 1e3, 1e4)},
        {"sizes": (0.0, 1e3, 1e4)},
        {"best_s": (1.0, 0.5, 2.0)},
        {"best_s": (-1.0, 0.5, 2.0)},
        {"best_s": (1.0, float("nan"), 2.0)},
        {"best_s": (1.0, 2.0)},
        {"per": "hour"},
    ],
)
def test_what_is_no_curve_is_refused(change):
    with pytest.raises(ValueError, match="curve"):
        dataclasses.replace(ladder(), **change)


# --- Seconds


@given(st.lists(st.tuples(SIZES, SIZES), min_size=1, max_size=8), st.sampled_from(KINDS))
def test_seconds_are_of_each_call_by_itself(calls, kind):
    made = calibration()
    flops, bytes_ = (np.array(column) for column in zip(*calls, strict=True))
    together = made.seconds(kind, "fp32", flops, bytes_)
    apart = [made.seconds(kind, "fp32", f, b)[0] for f, b in calls]
    np.testing.assert_allclose(together, apart)
    assert (together > 0).all()


@given(SIZES, SIZES, st.floats(1.0, 100.0), st.sampled_from(KINDS))
def test_more_work_takes_no_less(flops, bytes_, factor, kind):
    made = calibration()
    less, more = (made.seconds(kind, "fp32", flops * f, bytes_ * f)[0] for f in (1.0, factor))
    assert more >= less * (1 - tolerances.LOGARITHMS)


@given(st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 4096))
def test_a_product_takes_what_its_arithmetic_or_its_traffic_takes_or_both(M, N, K):
    made = calibration(curves=calibration().curves[:3])
    flops, bytes_ = 2.0 * M * N * K, 4.0 * (M * N + N * K + M * K)
    found = made.seconds("gemm", "fp32", flops, bytes_, M)[0]
    work = made.curve("gemm", "fp32", FLOPS).at(np.array([flops]))[0]
    least = max(work, made.curve("gemm", "fp32").at(np.array([4.0 * N * K]))[0])
    assert found >= least * (1 - tolerances.LOGARITHMS)
    assert found <= (made.seconds("gemm", "fp32", flops, bytes_)[0] + bytes_ / 1e9 + work) * 2


def test_a_narrow_product_goes_by_those_of_an_adapter():
    made, M = calibration(), 512
    wide = calibration(curves=made.curves[:3])

    def seconds(of, N, K):
        return of.seconds("gemm", "fp32", 2 * M * N * K, 4 * (M * N + N * K + M * K), M)[0]

    assert seconds(made, 8, 384) > 2 * seconds(wide, 8, 384)
    assert seconds(made, 384, 8) == pytest.approx(seconds(made, 8, 384))
    between = seconds(made, 24, 384) / seconds(wide, 24, 384)
    assert 1 < between < seconds(made, 8, 384) / seconds(wide, 8, 384)
    assert seconds(made, 64, 384) == pytest.approx(seconds(wide, 64, 384))
    # A head of two classes is no faster than a rank of eight.
    assert seconds(made, 2, 384) == pytest.approx(seconds(made, 8, 384))


def test_an_unknown_kind_moves_its_bytes():
    made = calibration()
    known = made.seconds("elementwise", "fp32", 0, 1e7)
    assert made.seconds("sorcery", "fp32", 0, 1e7) == known
    assert made.seconds("normalisation", "bf16", 0, 1e7) == known


def test_products_in_a_dtype_without_a_rate_are_an_error():
    with pytest.raises(ValueError, match="no rate of gemm in fp16"):
        calibration().seconds("gemm", "fp16", 1e9, 1e6)


def test_moved_counts_as_the_formulas_do():
    assert moved("dequant", "fp32", 64) == 32 + 4 + 256
    assert moved("dropout", "int8", 100) == 100
    assert moved("optimizer", "fp32", 10) == 280


# --- In the cache


def test_what_is_stored_is_loaded_alike():
    made = calibration(notes=("a note",), context_bytes=3)
    path = devices.store(made)
    assert devices.load(made.key) == made
    assert devices.known() == devices.Known((made,), ())
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("made", SHIPPED, ids=lambda c: c.device)
def test_a_record_survives_json(made):
    assert decode(Calibration, json.loads(json.dumps(encode(made)))) == made


def test_one_that_is_not_there_is_none():
    assert devices.load("nothing") is None
    assert devices.known() == devices.Known((), ())


def damage(path, how):
    record = json.loads(path.read_text())
    if how == "half":
        path.write_text(path.read_text()[:1000])
    elif how == "binary":
        path.write_bytes(b"\xff\xfe\x00")
    elif how == "list":
        path.write_text("[" * 5000)
    else:
        if how == "falls":
            record["curves"][0]["best_s"].reverse()
        elif how == "version":
            record["version"] += 1
        elif how == "other":
            record["threads"] += 1
        elif how == "no curve":
            record["curves"] = record["curves"][1:]
        elif how == "text":
            record["process_bytes"] = "much"
        path.write_text(json.dumps(record))


@pytest.mark.parametrize(
    "how", ["half", "binary", "list", "falls", "version", "other", "no curve", "text"]
)
def test_a_damaged_one_is_an_error_in_one_line(how):
    made = calibration()
    path = devices.store(made)
    damage(path, how)
    with pytest.raises(InputError, match="remove it, or measure again") as caught:
        devices.load(made.key)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    found = devices.known()
    assert found.calibrations == ()
    assert len(found.unreadable) == 1


def test_a_cache_that_cannot_be_written_is_an_error(cache):
    (cache / "calibrations").write_text("in the way")
    with pytest.raises(FolderError, match="PEFTPROF_CACHE"):
        devices.store(calibration())
    with pytest.raises(FolderError, match="PEFTPROF_CACHE"):
        devices.check_writable()


def test_a_full_disk_leaves_what_was_there(monkeypatch):
    made = calibration()
    path = devices.store(made)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(FolderError, match="No space left"):
        devices.store(dataclasses.replace(made, interval=0.9))
    assert devices.load(made.key) == made
    assert [p.name for p in path.parent.iterdir()] == [path.name]


# --- Data sheets


@pytest.mark.parametrize("entry", TABLE, ids=lambda e: e["name"])
def test_an_entry_is_possible(entry):
    known = {
        *("name", "aliases", "class", "basis", "cores", "fp32_tflops", "bf16_tflops"),
        *("fp16_tflops", "memory_gb_per_s", "memory_gib", "capability", "source", "note"),
    }
    assert entry.keys() <= known
    assert entry["basis"] == "datasheet"
    assert entry["class"] in devices.TYPICAL
    assert len(entry["source"]) > 10
    assert 0.01 <= entry["fp32_tflops"] <= 150
    assert 5 <= entry["memory_gb_per_s"] <= 10_000
    assert 2 <= entry["memory_gib"] <= 300
    if entry["class"] == "board":
        assert not {"bf16_tflops", "fp16_tflops", "capability"} & entry.keys()
        return
    assert re.fullmatch(r"\d+\.\d", entry["capability"])
    # bf16 came with compute capability 8.0. Tensor cores are 2 to 30 times as fast as the
    # other units; a figure with sparsity in one of the two would be outside for most.
    assert ("bf16_tflops" in entry) == (float(entry["capability"]) >= 8.0)
    assert entry.get("bf16_tflops", entry["fp16_tflops"]) == entry["fp16_tflops"]
    assert 1.9 <= entry["fp16_tflops"] / entry["fp32_tflops"] <= 31
    # Operations for each byte: 40 to 500 for all chips with tensor cores.
    assert 40 <= 1e3 * entry["fp16_tflops"] / entry["memory_gb_per_s"] <= 500


@pytest.mark.parametrize("made", SHIPPED, ids=lambda c: c.device)
def test_a_sheet_is_slower_than_its_ceilings(made):
    assert made.basis == "datasheet"
    assert made.interval == devices.SHEET_INTERVAL
    for dtype, peak in made.ceilings.flops_per_s.items():
        for kind in PRODUCTS:
            assert made.seconds(kind, dtype, 1e13, 1e9)[0] > 1e13 / peak
        for kind in KINDS:
            size = 1e9
            assert made.seconds(kind, dtype, 0, size)[0] > size / made.ceilings.bytes_per_s
            assert made.seconds(kind, dtype, 0, 1)[0] < 1e-3
    assert {c.dtype for c in made.curves} <= ITEMSIZE.keys()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("4090", "RTX 4090"),
        ("rtx-4090", "RTX 4090"),
        ("RTX4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("a100-80gb", "A100 SXM 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 SXM 40GB"),
        ("h100 pcie", "H100 PCIe"),
        ("NVIDIA H100 80GB HBM3", "H100 SXM"),
        ("2080ti", "RTX 2080 Ti"),
        ("t4", "T4"),
        ("a6000", "RTX A6000"),
        ("rtx_6000_ada", "RTX 6000 Ada"),
        ("pi5", "Raspberry Pi 5 8GB"),
        ("orin nano", "Jetson Orin Nano 8GB"),
    ],
)
def test_names_are_written_loosely(name, device):
    assert devices.find(name).device == device


@pytest.mark.parametrize("made", SHIPPED, ids=lambda c: c.device)
def test_every_name_in_the_table_is_its_own(made):
    for name in (made.device, *made.aliases):
        assert devices.find(name) is made


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a100", "A100 SXM 40GB or A100 SXM 80GB"),
        ("h100", "H100 SXM or H100 PCIe"),
        ("orin", "Jetson Orin Nano 8GB, Jetson Orin NX 16GB or Jetson AGX Orin 64GB"),
        ("4060", "RTX 4060 Ti 16GB"),  # another card
        ("rtx 4070 ti", "RTX 4070"),
        ("rtx 4090 laptop", "RTX 4090"),
        ("rtx 6000", "RTX A6000"),
        ("40900", "RTX 4090"),
        ("", "--list"),
        ("nothing like it", "--list"),
        ("abacus\nof wood", "--list"),
    ],
)
def test_a_name_that_means_none_or_several_is_an_error(name, said):
    with pytest.raises(ConfigError) as caught:
        devices.find(name)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@settings(max_examples=50)
@given(st.text(max_size=20))
def test_any_name_is_found_or_refused(name):
    with contextlib.suppress(ConfigError):
        assert devices.find(name).device


def test_what_was_measured_comes_before_a_data_sheet():
    measured = calibration(device="NVIDIA L4", kind="cuda")
    older = calibration(device="NVIDIA L4", kind="cuda", threads=4, created="2025-01-01T00:00:00")
    assert devices.find("l4").basis == "datasheet"
    devices.store(older)
    devices.store(measured)
    assert devices.find("l4") == measured
    assert devices.find(older.key) == older
