"""Every variant of every kernel, compiled for seven GPUs that are not here."""

import dataclasses
import re
from pathlib import Path

import pytest
import triton
import triton.language as tl

from bench import codegen as bench
from bench.stock_sass import NoStockError, stock_dequantise
from peftprof_kernels import codegen
from peftprof_kernels.codegen import CompileError, Listing
from peftprof_kernels.variant import TARGETS, Variant

SOURCES = Path(codegen.__file__).parent


@pytest.fixture(scope="session")
def variants() -> list[Variant]:
    return codegen.all_variants()


@pytest.fixture(scope="session")
def outcomes(variants) -> list[Listing | CompileError]:
    return bench.compile_all(variants)


@pytest.fixture(scope="session")
def listings(outcomes) -> list[Listing]:
    return [o for o in outcomes if isinstance(o, Listing)]


@pytest.mark.slow
def test_every_variant_compiles_for_every_target(variants, outcomes):
    assert len(outcomes) == sum(len(variant.targets) for variant in variants)
    assert not [str(o) for o in outcomes if isinstance(o, CompileError)]


@pytest.mark.slow
def test_no_kernel_spills_or_stores_narrowly_or_leaves_the_tensor_cores(variants, outcomes):
    assert not bench.faults(variants, outcomes)


@pytest.mark.slow
def test_no_kernel_grew(listings):
    made_by, baseline = bench.read_baseline()
    if made_by != triton.__version__:
        pytest.skip(f"Triton {made_by} made the baseline, {triton.__version__} makes other code")
    assert not bench.regressions(listings, baseline)
    assert set(baseline) == {listing.name for listing in listings}, "bench.codegen --write-baseline"


@pytest.mark.slow
def test_dequantise_needs_fewer_instructions_than_bitsandbytes(listings):
    try:
        stock = stock_dequantise(90)
    except NoStockError as error:
        pytest.skip(str(error))
    ours = {x.variant: x.per_output for x in listings if x.capability == stock.capability}
    assert ours["plain-bf16"] < stock.plain
    assert ours["nested-bf16"] < stock.nested(64)


def test_every_file_with_variants_is_asked_for_them():
    having = {
        f"peftprof_kernels.{path.stem}"
        for path in SOURCES.glob("*.py")
        if re.search(r"^def variants\(", path.read_text(), re.M)
    }
    assert having == set(codegen.MODULES)
    assert set(codegen.SHARED_LIMITS) == set(TARGETS)


# Controls: each check must see what it is for, and nothing in a listing that is well.


@triton.jit
def _example_kernel(x_ptr, n, BLOCK: tl.constexpr):
    pass


def example(**changes) -> Variant:
    fields = {
        "name": "example",
        "kernel": _example_kernel,
        "signature": {"x_ptr": "*bf16", "n": "i32"},
        "constexprs": {"BLOCK": 128},
        "outputs": 1024,
        "kind": "stream",
        "options": {"num_warps": 4},
    }
    return Variant(**(fields | changes))


def listing(**changes) -> Listing:
    well = Listing(
        kernel="example",
        variant="example",
        capability=90,
        registers=60,
        stack_bytes=0,
        shared_bytes=1000,
        instructions=200,
        per_output=25.0,
        local=0,
        tensor_core=4,
        atomics=0,
        memory={"LDG.8": 1, "STG.128": 4},
    )
    return dataclasses.replace(well, **changes)


@pytest.mark.parametrize("kind", ["stream", "gemm"])
def test_a_kernel_that_is_well_has_no_faults(kind):
    assert codegen.faults(example(kind=kind), listing()) == []


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ({}, {"local": 3}, "3 spill"),
        ({}, {"stack_bytes": 16}, "16 stack bytes"),
        ({}, {"shared_bytes": 227 * 1024 + 1}, "the limit is 232448"),
        ({}, {"capability": 75, "shared_bytes": 64 * 1024 + 1}, "the limit is 65536"),
        ({}, {"atomics": 1}, "atomics"),
        ({}, {"memory": {"STG.128": 4, "STG.32": 1}}, "[32, 128] bits"),
        ({}, {"memory": {"LDG.128": 4}}, "[] bits"),
        ({"kind": "gemm"}, {"tensor_core": 0}, "no tensor-core"),
    ],
)
def test_each_fault_is_found(variant, changes, said):
    (fault,) = codegen.faults(example(**variant), listing(**changes))
    assert said in fault


@pytest.mark.parametrize(
    ("variant", "changes"),
    [
        ({"wide": False}, {"memory": {"STG.16": 4}}),
        ({"kind": "gemm"}, {"memory": {"STG.16": 4}}),
        ({"kind": "gemm", "tensor_cores": False}, {"tensor_core": 0}),
        ({"kind": "gemm"}, {"tensor_core": 0, "capability": 75}),
        ({}, {"tensor_core": 0}),
    ],
)
def test_what_is_not_demanded_is_no_fault(variant, changes):
    assert codegen.faults(example(**variant), listing(**changes)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"registers": 67}, "60 -> 67 registers"),
        ({"shared_bytes": 1101}, "1000 -> 1101 shared bytes"),
        ({"instructions": 211}, "200 -> 211 instructions"),
        ({"variant": "other"}, "not in the baseline"),
    ],
)
def test_growth_over_the_margin_is_a_regression(changes, said, tmp_path):
    path = tmp_path / "baseline.json"
    bench.write_baseline([listing()], path)
    made_by, baseline = bench.read_baseline(path)
    assert made_by == triton.__version__
    small = listing(registers=66, shared_bytes=1100, instructions=210)
    assert bench.regressions([small, listing()], baseline) == []
    (line,) = bench.regressions([listing(**changes)], baseline)
    assert said in line
    assert line.startswith("example/")


def test_many_registers_may_grow_by_one_step_only():
    baseline = {"example/example/sm_90": [160, 1000, 200]}
    assert bench.regressions([listing(registers=168)], baseline) == []
    assert len(bench.regressions([listing(registers=169)], baseline)) == 1


def test_a_compile_error_is_a_fault():
    assert bench.faults([], [CompileError("why")]) == ["why"]


def test_accesses_are_counted_by_what_a_thread_moves():
    opcodes = ["LDG.E.128.CONSTANT", "LDG.E.U8", "LDG.E", "STG.E.U16", "LDS.128", "UTMALDG.2D"]
    opcodes += ["LDGSTS.E.BYPASS.LTC128B.128", "LDGDEPBAR", "STG.E.128", "STG.E.128"]
    assert codegen.global_accesses(opcodes) == {
        "LDG.128": 1,
        "LDG.32": 1,
        "LDG.8": 1,
        "LDGSTS.128": 1,
        "STG.128": 2,
        "STG.16": 1,
        "UTMALDG": 1,
    }


def test_the_padding_at_a_kernels_end_is_no_instruction():
    code = ["NOP", "BRA", "STG.E", "EXIT"]
    assert codegen._without_padding([*code, "BRA", "NOP", "NOP"]) == code
    assert codegen._without_padding([]) == []


def test_a_missing_bitsandbytes_is_said(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NoStockError, match="not installed"):
        stock_dequantise()


def test_a_variant_says_each_argument_once():
    with pytest.raises(ValueError, match=r"example/example.*: n$"):
        example(signature={"x_ptr": "*bf16"})
    with pytest.raises(ValueError, match="y_ptr"):
        example(constexprs={"BLOCK": 1, "y_ptr": None})
    with pytest.raises(ValueError, match="BLOCK"):
        example(aligned=("BLOCK",))
    with pytest.raises(ValueError, match="x_ptr"):
        example(constexprs={"BLOCK": 1, "x_ptr": None})


def test_the_interpreter_cannot_compile(monkeypatch):
    monkeypatch.setattr(codegen, "INTERPRETED", tl.constexpr(True))
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        codegen.listings([example()], 90)


def test_a_triton_without_tools_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(FileNotFoundError, match="has no nvdisasm"):
        codegen.run_tool("nvdisasm")
