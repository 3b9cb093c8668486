"""Formulas of single calls: against what operators register, and what no call can be."""

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import flop_counter
from torch.utils.flop_counter import FlopCounterMode

from peftprof.trace import costs
from peftprof.trace.costs import Cost
from peftprof.trace.events import Operands
from peftprof.trace.operands import OperandsError, parse
from tests.kernels.nf4_weights import random_weight

KERNELS = torch.ops.peftprof


def recorded(dims: list[Any], types: list[str], values: list[str] | None = None) -> Operands:
    return Operands(json.dumps(dims), json.dumps(types), json.dumps(values or []))


def cost(name: str, operands: Operands) -> Cost | None:
    rule = costs.rule(name)
    assert rule is not None
    return costs.cost(rule, operands)


@pytest.mark.parametrize("name", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("backward", [False, True])
def test_a_gpus_attention_is_priced_like_a_cpus(name: str, backward: bool) -> None:
    q, k, v = [2, 6, 5, 8], [2, 3, 7, 8], [2, 3, 7, 4]
    out = [2, 6, 5, 4]
    operands = [*([out] if backward else []), q, k, v, *([out] if backward else [])]
    name = f"aten::_scaled_dot_product_{name}_attention" + "_backward" * backward
    found = cost(name, recorded(operands, ["c10::Half"] * len(operands)))
    assert found is not None
    expected = (
        flop_counter.sdpa_backward_flop_count(out, q, k, v)
        if backward
        else flop_counter.sdpa_flop_count(q, k, v)
    )
    assert (found.flops, found.dtype) == (expected, "fp16")
    results = [q, k, v] if backward else [out]
    assert found.bytes == 2 * sum(math.prod(shape) for shape in [*operands, *results])


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


TYPES = {torch.bfloat16: "c10::BFloat16", torch.float32: "float", torch.int64: "long int"}


def as_recorded(*arguments: Any) -> Operands:
    """The operands as Kineto records them."""
    dims: list[Any] = []
    types, values = [], []
    for argument in arguments:
        tensors = isinstance(argument, list) and isinstance(argument[0], Tensor)
        one = isinstance(argument, Tensor)
        dims.append(
            list(argument.shape) if one else [list(t.shape) for t in argument] if tensors else []
        )
        if one:
            types.append(TYPES[argument.dtype])
        elif tensors:
            types.append("TensorList")
        else:
            types.append("" if argument is None or isinstance(argument, str) else "Scalar")
        plain = isinstance(argument, int | float | list) and not tensors
        value = (
            {torch.bfloat16: "15", torch.float32: "6"}.get(argument)
            if isinstance(argument, torch.dtype)
            else None
        )
        values.append(value or (str(argument) if plain else ""))
    return recorded(dims, types, values)


def moved(*arguments: Any) -> int:
    """Bytes of the tensors among `arguments`; of an NF4 weight without its table of pairs."""
    total = 0
    for argument in arguments:
        if isinstance(argument, Tensor):
            total += argument.nbytes
        elif isinstance(argument, list | tuple):
            kept = argument if isinstance(argument, tuple) else argument[:3] + argument[4:]
            total += sum(t.nbytes for t in kept if isinstance(t, Tensor))
    return total


@given(st.data())
def test_our_operators_agree_with_the_formulas_they_register(data: st.DataObject) -> None:
    M, N, K, r = (data.draw(st.integers(1, 300)) for _ in range(4))
    weight = random_weight(N, K, nested=data.draw(st.booleans()))
    # As many bytes as the shapes say, without the numbers.
    stored = [t.to("meta") for t in weight.tensors()]
    x, dy, A, B, S = meta(M, K), meta(M, N), meta(r, K), meta(N, r), meta(M, r)
    bias = data.draw(st.sampled_from([None, meta(N)]))
    maybe_S, maybe_x, dx = (data.draw(st.sampled_from([None, t])) for t in (S, x, meta(M, K)))
    layout, need_dS = weight.layout(), data.draw(st.booleans())
    for name, arguments in {
        "nf4_dequantize": (stored, layout, torch.bfloat16, "triton"),
        "nf4_linear": (x, stored, layout, bias, "triton"),
        "nf4_linear_dx": (dy, stored, layout, "triton"),
        "lora_down": (x, A, None, 0.0),
        "lora_up_backward": (dy, B, maybe_S, 2.0, need_dS),
        "lora_down_backward": (maybe_x, S, A, dx, None, 0.0, 2.0),
    }.items():
        operator = getattr(KERNELS, name)
        with FlopCounterMode(display=False) as counter:
            results = operator(*arguments)
        found = cost(f"peftprof::{name}", as_recorded(*arguments))
        assert found is not None
        assert found.flops == counter.get_total_flops()
        written = moved(results) + (moved(dx) if name == "lora_down_backward" else 0)
        assert found.bytes == moved(*arguments) + written


def test_one_fused_operator_for_few_rows() -> None:
    M, N, K = 1, 768, 3072
    packed, scales = [N * K // 2, 1], [N * K // 64]
    for name, more in (("gemv_4bit", 3), ("gemm_4bit", 1)):
        dims = [[M, K], packed, [], scales, *[[]] * more]
        types = ["c10::BFloat16", "unsigned char", "ScalarList", "float", *["Scalar"] * more]
        values = ["", "", f"[{N}, {K}]", "", *["64"] * more]
        moved = 2 * M * (N + K) + N * K // 2 + 4 * N * K // 64
        assert cost(f"bitsandbytes::{name}", recorded(dims, types, values)) == Cost(
            2 * M * N * K, moved, "bf16"
        )


def test_nested_scales_are_dequantised_to_what_is_asked_for() -> None:
    dims = [[32], [1], [256], [], []]
    types = ["unsigned char", "float", "float", "Scalar", "Scalar"]
    for number, size in (("6", 4), ("15", 2)):
        operands = recorded(dims, types, ["", "", "", "256", number])
        expected = Cost(0, 32 + 4 + 4 * 256 + 32 * size)
        assert cost("bitsandbytes::dequantize_blockwise", operands) == expected


def test_products_of_bytes() -> None:
    M, K, N = 16, 32, 48
    operands = recorded([[M, K], [K, N]], ["signed char", "signed char"])
    expected = Cost(2 * M * N * K, M * K + K * N + 4 * M * N, "int8")
    assert cost("aten::_int_mm", operands) == expected
    types = ["c10::Float8_e4m3fn"] * 2 + ["float", "float", "", "", "Scalar", "Scalar"]
    dims = [[M, K], [K, N], [], [], [], [], [], []]
    operands = recorded(dims, types, ["", "", "", "", "", "", "15", "False"])
    expected = Cost(2 * M * N * K, M * K + K * N + 8 + 2 * M * N, "fp8")
    assert cost("aten::_scaled_mm", operands) == expected


def test_a_compiled_kernel_has_its_results_among_its_operands() -> None:
    operands = recorded([[10, 10], [10, 10], [10, 10], []], ["float"] * 3 + ["Scalar"])
    assert cost("triton_poi_fused_add_cos_sin_0", operands) == Cost(0, 3 * 400)
    assert costs.rule("triton_tem_fused_mm_1") is None  # a product whose sizes are unknown


HOSTILE_DIMS = st.one_of(
    st.integers(-(10**30), 10**30), st.floats(), st.text(max_size=3), st.none(), st.booleans()
)
HOSTILE = st.recursive(HOSTILE_DIMS, lambda inner: st.lists(inner, max_size=5), max_leaves=12)
NAMES = [
    *costs._RULES,
    "aten::addmm_",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_backward",
    "triton_poi_fused_add_0",
]


def check(operands: Operands) -> None:
    for name in NAMES:
        found = cost(name, operands)
        if found is not None:
            assert found.flops >= 0
            assert found.bytes >= 0
            assert math.isfinite(float(found.flops) + float(found.bytes))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(st.lists(st.integers(0, 2**63 - 1), max_size=5), HOSTILE), max_size=8),
    st.sampled_from(["float", "c10::BFloat16", "TensorList", "Scalar", "", "c10::Strange"]),
    st.one_of(
        st.lists(st.sampled_from(["[2, 2]", "[-1]", "[]", "[1e300]", "True", "3", "", "[[]]"])),
        HOSTILE,
    ),
)
def test_hostile_operands_are_unknown_or_finite(dims: Any, kind: str, values: Any) -> None:
    types = [kind] * len(dims)
    check(Operands(json.dumps(dims), json.dumps(types), json.dumps(values)))


def test_more_than_can_be_is_unknown() -> None:
    wide = [[2**62 if i == n else 1 for i in range(40)] for n in range(40)]
    assert cost("aten::add", recorded(wide, ["float"] * 40)) is None


@given(st.text(), st.text(), st.text())
def test_hostile_text_is_unknown(dims: str, types: str, values: str) -> None:
    check(Operands(dims, types, values))


@pytest.mark.parametrize(
    ("dims", "types"),
    [
        ("[" * 100_000, '["float"]'),
        ("[" * 100_000 + "]" * 100_000, '["float"]'),
        (json.dumps([[2] * 50_000]), '["float"]'),
        (json.dumps([[1]] * 100_000), '["float"]'),
        ("[[1e300, 4]]", '["float"]'),
        ("[[-1, 4]]", '["float"]'),
        ("[[true, 4]]", '["float"]'),
        ("[[NaN]]", '["float"]'),
        (json.dumps([[10**400]]), '["float"]'),
        ('[["8", "8"]]', '["float"]'),
        ("[[8, 8]]", '["c10::Strange"]'),
        ("[[8, 8]]", '["float", "float"]'),
        ("[[9223372036854775807, 9223372036854775807]]", '["float"]'),
        ("\ud800", '["float"]'),
    ],
)
def test_what_is_no_call_is_said_to_be_none(dims: str, types: str) -> None:
    with pytest.raises(OperandsError):
        parse(Operands(dims, types))
    check(Operands(dims, types))
