"""Operations and bytes: against PyTorch's own counter, on traces of what really ran."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from peftprof.breakdowns import Ceilings, Work
from peftprof.trace import kineto
from peftprof.trace.attribute import attribute
from peftprof.trace.work import NEAR, work
from tests.kernels.nf4_weights import random_weight
from tests.trace.build import Trace

DIMS = st.integers(1, 9)
few = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
KERNELS = torch.ops.peftprof


def traced(folder: Path, task: Callable[[], object], steps: int = 1) -> dict[str, Work]:
    """The work by category of a real trace of `task`, run once a step."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as found:
        for number in range(steps):
            with record_function(f"step:{number}"):
                task()
    found.export_chrome_trace(str(folder / "trace.json"))
    return read(folder / "trace.json")


def read(path: Path, ceilings: Ceilings | None = None) -> dict[str, Work]:
    results = work(attribute(kineto.read(path)), ceilings)
    return {result.category: result for result in results}


def flops(results: dict[str, Work]) -> float:
    return sum(result.flops for result in results.values())


def counted(task: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        task()
    return int(counter.get_total_flops())


@few
@given(DIMS, DIMS, DIMS, DIMS)
def test_products_are_counted_as_pytorch_counts_them(
    tmp_path: Path, M: int, K: int, N: int, batch: int
) -> None:
    x = torch.randn(batch, M, K, requires_grad=True)
    y = torch.randn(batch, K, N, requires_grad=True)
    layer = nn.Linear(K, N)

    def task() -> None:
        torch.bmm(x, y).sum().backward()  # type: ignore[no-untyped-call]
        torch.baddbmm(torch.randn(batch, M, N), x, y)
        layer(x).sum().backward()
        torch.addmm(torch.randn(N), x[0], y[0])
        (x @ y[0]).sum().backward()

    results = traced(tmp_path, task, steps=2)
    assert flops(results) == counted(task)  # a mean over the steps: of one step
    assert {r.dtype for r in results.values() if r.flops} == {"fp32"}


@few
@given(st.data())
def test_convolutions_are_counted_as_pytorch_counts_them(
    tmp_path: Path, data: st.DataObject
) -> None:
    spatial = data.draw(st.integers(1, 2))
    transposed = data.draw(st.booleans())
    options = {
        name: data.draw(st.integers(low, high))
        for name, low, high in (("stride", 1, 3), ("padding", 0, 1), ("dilation", 1, 2))
    }
    kinds: dict[tuple[bool, int], Any] = {
        (False, 1): nn.Conv1d,
        (False, 2): nn.Conv2d,
        (True, 1): nn.ConvTranspose1d,
        (True, 2): nn.ConvTranspose2d,
    }
    # PyTorch's counter multiplies all channels by all in the backward of groups.
    layer = kinds[transposed, spatial](data.draw(DIMS), data.draw(DIMS), 3, **options)
    sizes = [data.draw(st.integers(7, 12)) for _ in range(spatial)]
    x = torch.randn(data.draw(DIMS), layer.in_channels, *sizes, requires_grad=True)

    def task() -> None:
        layer(x).sum().backward()

    assert flops(traced(tmp_path, task)) == counted(task)


def test_groups_divide_the_products(tmp_path: Path) -> None:
    layer, x = nn.Conv2d(8, 12, 3, groups=4), torch.randn(2, 8, 7, 7, requires_grad=True)

    def task() -> None:
        layer(x).sum().backward()

    assert flops(traced(tmp_path, task)) == 3 * 2 * 2 * 25 * 12 * (8 // 4) * 9


@few
@given(DIMS, st.integers(1, 3), st.integers(1, 3), DIMS, DIMS, DIMS, st.booleans())
def test_attention_is_counted_as_pytorch_counts_it(
    tmp_path: Path, B: int, groups: int, heads: int, q: int, k: int, width: int, fused: bool
) -> None:
    query = torch.randn(B, heads * groups, q, width, requires_grad=True)
    key = torch.randn(B, heads if fused else heads * groups, k, width, requires_grad=True)

    def task() -> None:
        # With dropout a CPU has no fused kernel and makes it of batched products.
        functional.scaled_dot_product_attention(
            query, key, key, dropout_p=0.0 if fused else 0.5, enable_gqa=fused
        ).sum().backward()  # type: ignore[no-untyped-call]

    shapes = [tuple(tensor.shape) for tensor in (query, key, key)]
    forward = flop_counter.sdpa_flop_count(*shapes)
    backward = flop_counter.sdpa_backward_flop_count(shapes[0], *shapes) if fused else 2 * forward
    results = traced(tmp_path, task)
    assert flops(results) == forward + backward
    assert results["attention"].flops == forward + backward


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_product_is_counted_for_a_frozen_weights_gradient(
    tmp_path: Path, frozen: bool, dtype: torch.dtype
) -> None:
    M, K, N = 24, 16, 40
    layer = nn.Linear(K, N, bias=False).to(dtype)
    layer.weight.requires_grad_(not frozen)
    x = torch.randn(M, K, dtype=dtype, requires_grad=True)

    def task() -> None:
        layer(x).sum().backward()

    results = traced(tmp_path, task)
    products = 2 if frozen else 3
    assert flops(results) == products * 2 * M * N * K
    base = results["base_gemm"]
    assert base.bytes == products * (M * K + K * N + M * N) * dtype.itemsize
    assert base.dtype == {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    assert base.known == 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("M", [1, 32])
def test_a_quantised_layer_costs_what_its_dense_form_does(
    tmp_path: Path, nested: bool, M: int
) -> None:
    N, K = 128, 64
    dense = torch.randn(N, K)
    packed, state = bnb.functional.quantize_4bit(
        dense, quant_type="nf4", compress_statistics=nested
    )
    x = torch.randn(M, K, requires_grad=True)

    def task() -> None:
        bnb.matmul_4bit(x, packed.t(), state).sum().backward()

    # Forward and dX: the weight is frozen.
    results = traced(tmp_path, task)
    assert flops(results) == 2 * 2 * M * N * K
    # A CPU dequantises first, so that the products read the dense weight.
    assert results["base_gemm"].bytes == 2 * 4 * (M * K + N * K + M * N)


def test_dequantising_reads_codes_and_scales_and_writes_weights(tmp_path: Path) -> None:
    N, K = 128, 96
    packed, state = bnb.functional.quantize_4bit(torch.randn(N, K), quant_type="nf4")

    def task() -> None:
        bnb.functional.dequantize_4bit(packed, state)

    results = traced(tmp_path, task)
    assert results["dequant"].bytes == packed.nbytes + state.absmax.nbytes + N * K * 4
    assert flops(results) == 0


@pytest.mark.parametrize("nested", [False, True])
def test_our_operators_are_read_from_a_real_trace(tmp_path: Path, nested: bool) -> None:
    M, N, K = 6, 96, 128
    weight = random_weight(N, K, nested=nested)
    x, dy = torch.randn(M, K), torch.randn(M, N)

    def task() -> None:
        KERNELS.nf4_dequantize(weight.tensors(), weight.layout(), torch.float32, "torch")
        KERNELS.nf4_linear(x, weight.tensors(), weight.layout(), None, "torch")
        KERNELS.nf4_linear_dx(dy, weight.tensors(), weight.layout(), "torch")

    results = traced(tmp_path, task)
    assert flops(results) == counted(task) == 2 * 2 * M * N * K


def test_elementwise_operators_move_their_operands_and_one_result(tmp_path: Path) -> None:
    x, row = torch.randn(64, 32), torch.randn(32)

    def task() -> None:
        torch.add(x, row)

    result = traced(tmp_path, task)["elementwise"]
    assert (result.flops, result.bytes) == (0, 4 * (2 * 64 * 32 + 32))
    assert (result.flops_share, result.bytes_share, result.bound) == (None, None, None)


def nested_calls(folder: Path, *calls: tuple[str, list[list[int]]]) -> dict[str, Work]:
    """A trace of operators each inside the one before it, all fp32."""
    trace = Trace()
    trace.range("step:0", 0, 9000)
    for depth, (name, dims) in enumerate(calls):
        types = ["float" if shape else "Scalar" for shape in dims]
        args = {"Input Dims": dims, "Input type": types}
        trace.add("cpu_op", name, 100 + 100 * depth, 8000 - 100 * depth, **args)
    return read(trace.write(folder))


def total(results: dict[str, Work]) -> tuple[float, float]:
    return flops(results), sum(result.bytes for result in results.values())


MM = ("aten::mm", [[2, 3], [3, 4]])
MM_TAKES = (2 * 2 * 3 * 4, 4 * (2 * 3 + 3 * 4 + 2 * 4))


@pytest.mark.parametrize(
    ("calls", "takes"),
    [
        ([("aten::linear", [[2, 3], [4, 3], [4]])], (48, 4 * (6 + 12 + 4 + 8))),
        ([("aten::mkldnn_linear", [[5, 2, 3], [4, 3]])], (240, 4 * (30 + 12 + 40))),
        # Shapes that differ show whose are taken.
        ([("aten::linear", [[9, 3], [4, 3]]), MM], MM_TAKES),
        ([MM, ("aten::copy_", [[2, 4], [2, 4]])], MM_TAKES),
        ([("aten::linear", [[9, 3], [7, 8]]), MM], MM_TAKES),
        ([("aten::mean", [[8, 8]]), ("aten::sum", [[8, 8]])], (0, 256)),
        ([("aten::sum", [[8, 8]]), ("aten::zero_", [[8]])], (0, 256 + 32)),
        ([("aten::clone", [[8]]), ("aten::copy_", [[8], [8]])], (0, 64)),
        ([("aten::add_", [[8], [8]]), ("aten::view", [[8]])], (0, 96)),
        ([("aten::eq", [[8], [8]])], (0, 64 + 8)),
        ([("aten::native_dropout", [[8]])], (0, 64 + 8)),
        ([("aten::gather", [[8], [], [3]])], (0, 12 + 24)),
        ([("aten::index_select", [[8], [], [3]])], (0, 12 + 24)),
        ([("aten::embedding", [[8, 5], [3]]), ("aten::index_select", [[8, 5], [], [3]])], (0, 132)),
        ([("aten::native_layer_norm", [[2, 8], [8], [8]])], (0, 4 * (16 + 8 + 8 + 16))),
    ],
)
def test_who_counts_where_operators_call_operators(
    tmp_path: Path, calls: list[tuple[str, list[list[int]]]], takes: tuple[int, int]
) -> None:
    assert total(nested_calls(tmp_path, *calls)) == takes


def shaped(name: str, *dims: list[int], dtype: str = "c10::BFloat16") -> dict[str, Any]:
    return {"name": name, "Input Dims": [*dims], "Input type": [dtype] * len(dims)}


def device_trace(folder: Path) -> Path:
    """Two steps: a product in two kernels, a copy on the device, one to it, a stranger."""
    trace = Trace()
    for number, begin in enumerate((0, 10_000)):
        trace.range(f"step:{number}", begin, begin + 9_000)
        args = shaped("aten::mm", [64, 32], [32, 16])
        outer = shaped("aten::linear", [64, 32], [16, 32])
        for start, end, op in ((0, 1000, outer), (100, 900, args)):
            op = dict(op)
            trace.add("cpu_op", op.pop("name"), begin + start, begin + end, **op)
        trace.kernel("ampere_bf16_gemm", begin + 1000, begin + 3000, launched=begin + 200)
        trace.kernel("splitKreduce_kernel", begin + 3000, begin + 4000, launched=begin + 300)
        for start, name in ((4000, "Memcpy DtoD (Device -> Device)"), (4500, "Memcpy HtoD")):
            trace.kernel(name, begin + start, begin + start + 500, begin + 1000, cat="gpu_memcpy")
            trace.events[-1]["args"]["bytes"] = 4096
        trace.add("cpu_op", "mylib::gemm", begin + 2000, begin + 2100)
        trace.kernel("ampere_gemm_of_mylib", begin + 5000, begin + 7000, launched=begin + 2050)
    return trace.write(folder)


def test_work_on_a_device_goes_where_its_kernels_do(tmp_path: Path) -> None:
    ceilings = Ceilings("a test", {"bf16": 2 * 64 * 32 * 16 / 3e-6}, 1e12)
    results = read(device_trace(tmp_path), ceilings)
    base, copies = results["base_gemm"], results["memcpy"]
    known_ns, all_ns = 3000, 5000
    assert base == Work(
        category="base_gemm",
        ns=all_ns,
        known=known_ns / all_ns,
        flops=2 * 64 * 32 * 16,
        bytes=2 * (64 * 32 + 32 * 16 + 64 * 16),
        dtype="bf16",
        flops_share=pytest.approx(1.0),
        bytes_share=pytest.approx(base.bytes / 1e12 / (known_ns / 1e9)),
        bound="compute",
    )
    assert copies.bytes == 2 * 4096 + 4096
    assert copies.known == 1
    assert copies.bytes_share == pytest.approx(3 * 4096 / 1e12 / 1e-6)


@pytest.mark.parametrize(
    ("flops_per_s", "bytes_per_s", "bound"),
    [
        ({"bf16": 1e10}, 1e12, "compute"),
        ({"bf16": 1e15}, 1e9, "memory"),
        ({"bf16": 1e15}, 1e15, "overhead"),
        ({"fp32": 1e15}, 1e15, None),  # its products have no ceiling: any of the two may be
        ({"fp32": 1e15}, 1e9, "memory"),
    ],
)
def test_the_nearer_ceiling_is_the_bound(
    tmp_path: Path, flops_per_s: dict[str, float], bytes_per_s: float, bound: str | None
) -> None:
    result = read(device_trace(tmp_path), Ceilings("", flops_per_s, bytes_per_s))["base_gemm"]
    assert result.bound == bound
    near = [s for s in (result.flops_share, result.bytes_share) if s is not None and s >= NEAR]
    assert bool(near) == (bound in ("compute", "memory"))


def test_no_bound_where_most_is_unknown(tmp_path: Path) -> None:
    trace = json.loads(device_trace(tmp_path).read_text())
    for event in trace["traceEvents"]:
        if event["name"] == "ampere_gemm_of_mylib":
            event["dur"] = 3.5  # microseconds, to 3 that are known
    (tmp_path / "trace.json").write_text(json.dumps(trace))
    base = read(tmp_path / "trace.json", Ceilings("", {"bf16": 1e10}, 1e9))["base_gemm"]
    assert base.known == pytest.approx(3 / 6.5)
    assert base.flops_share is not None
    assert base.flops_share > 1
    assert base.bound is None


def test_a_trace_without_shapes_has_no_work(tmp_path: Path) -> None:
    trace = Trace()
    trace.range("step:0", 0, 9000)
    trace.op("aten::view", 100, 900)
    trace.op("aten::mm", 1000, 1900)
    assert read(trace.write(tmp_path)) == {}
