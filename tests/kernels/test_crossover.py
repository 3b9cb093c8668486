"""Which rows the fused NF4 product takes: the table, its file, and that it is obeyed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftprof_kernels import NF4Weight, nf4_linear
from peftprof_kernels.crossover import (
    DEFAULT_MAX_M,
    Crossover,
    lookup,
    read_crossovers,
    set_crossovers,
    write_crossovers,
)
from peftprof_kernels.reference import dequantize_reference
from tests.kernels.cases import heard
from tests.kernels.nf4_weights import DEVICE, random_weight
from tests.tolerances import GEMM, relative_error


@pytest.fixture(autouse=True)
def _the_default_before_and_after() -> Iterator[None]:
    before = set_crossovers(None)
    yield
    set_crossovers(before)


def test_without_measurements_the_default_holds() -> None:
    assert lookup(768, 3072) == Crossover(768, 3072, DEFAULT_MAX_M, DEFAULT_MAX_M)
    set_crossovers([])
    assert lookup(1, 1) == Crossover(1, 1, DEFAULT_MAX_M, DEFAULT_MAX_M)


def test_the_nearest_entry_by_ratio_holds() -> None:
    small, wide, large = (
        Crossover(100, 100, 1, 2),
        Crossover(100, 1600, 3, 4),
        Crossover(10_000, 10_000, 5, 6),
    )
    set_crossovers([large, small, wide])
    assert lookup(100, 100) is small
    assert lookup(100, 399) is small  # four times as far from one as from the other
    assert lookup(100, 401) is wide
    # By difference 3000 is nearer to 100; by ratio to 10 000.
    assert lookup(3000, 3000) is large
    assert lookup(1, 1) is small


def test_setting_gives_back_what_was_set() -> None:
    table = [Crossover(1, 2, 3, 4)]
    assert set_crossovers(table) == ()
    table.append(Crossover(5, 6, 7, 8))  # the caller's list is the caller's
    assert set_crossovers(None) == (Crossover(1, 2, 3, 4),)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "card.json"
    table = [Crossover(768, 768, 32, 0), Crossover(768, 3072, 64, 16)]
    write_crossovers(path, "A Card 9000", table, {"torch": "2.13"})
    assert read_crossovers(path) == table
    content = json.loads(path.read_text())
    assert (content["device"], content["environment"]) == ("A Card 9000", {"torch": "2.13"})
    write_crossovers(path, "A Card 9000", table[:1], {})
    assert read_crossovers(path) == table[:1]
    assert [p.name for p in path.parent.iterdir()] == ["card.json"]  # nothing half-written


ENTRY = {"N": 8, "K": 8, "forward_max_m": 1, "dx_max_m": 1}


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "",
        "{",
        "[]",
        "3",
        "{}",
        {"crossovers": None},
        {"crossovers": "text"},
        {"crossovers": [3]},
        {"crossovers": [{"N": 8}]},
        {"crossovers": [ENTRY | {"more": 1}]},
        {"crossovers": [ENTRY | {"N": 0}]},
        {"crossovers": [ENTRY | {"K": -8}]},
        {"crossovers": [ENTRY | {"dx_max_m": 1.5}]},
        {"crossovers": [ENTRY | {"dx_max_m": True}]},
        {"crossovers": [ENTRY | {"forward_max_m": "1"}]},
        {"crossovers": [ENTRY, ENTRY | {"forward_max_m": None}]},
    ],
)
def test_a_damaged_file_is_refused(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "card.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=r"no table of crossovers: .|no crossover: ."):
        read_crossovers(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="no table of crossovers"):
        read_crossovers(tmp_path / "card.json")
    with pytest.raises(FileNotFoundError):
        read_crossovers(tmp_path / "none.json")


N, K = 40, 64


def roads(
    weight: NF4Weight, M: int, dtype: torch.dtype = torch.bfloat16, backend: str = "triton"
) -> list[str]:
    """Fused or dequantised, forward and dX; both results are held against float64."""
    generator = torch.Generator().manual_seed(M)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    rows, columns = weight.shape
    x, bias, dy = normal(M, columns).requires_grad_(), normal(rows), normal(M, rows)
    W = dequantize_reference(weight, x.dtype).double()
    taken = []
    with heard() as names:
        y = nf4_linear(x, weight, bias, backend=backend)
    taken.append("dequantised" if "op:dequant" in names else "fused")
    assert names.count("op:base_gemm") == 1
    truth = x.detach().double() @ W.T + bias.double()
    assert relative_error(y.detach(), truth) < GEMM[x.dtype]
    with heard() as names:
        (dx,) = torch.autograd.grad(y, x, dy)
    taken.append("dequantised" if "op:dequant" in names else "fused")
    assert names.count("op:base_gemm") == 1
    assert relative_error(dx, dy.double() @ W) < GEMM[x.dtype]
    return taken


def test_the_fused_kernel_goes_up_to_the_crossover_and_no_further() -> None:
    weight = random_weight(N, K, nested=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert roads(weight, DEFAULT_MAX_M, dtype) == ["fused", "fused"]
        assert roads(weight, DEFAULT_MAX_M + 1, dtype) == ["dequantised", "dequantised"]
    # Forward and dX each by its own entry, and the shape's, not another's.
    set_crossovers([Crossover(N, K, 5, 3), Crossover(64 * N, 64 * K, 1000, 1000)])
    assert roads(weight, 3) == ["fused", "fused"]
    assert roads(weight, 4) == ["fused", "dequantised"]
    assert roads(weight, 5) == ["fused", "dequantised"]
    assert roads(weight, 6) == ["dequantised", "dequantised"]
    set_crossovers([Crossover(N, K, 0, 70)])
    assert roads(weight, 1) == ["dequantised", "fused"]
    assert roads(weight, 70) == ["dequantised", "fused"]  # more than one tile of rows


def test_without_tensor_cores_no_more_than_the_default() -> None:
    # What is measured is measured in half precision; fewer rows than the default hold for all.
    weight, float32 = random_weight(N, K), torch.float32
    set_crossovers([Crossover(N, K, 70, 5)])
    assert roads(weight, 5, float32) == ["fused", "fused"]
    assert roads(weight, DEFAULT_MAX_M, float32) == ["fused", "dequantised"]
    assert roads(weight, DEFAULT_MAX_M + 1, float32) == ["dequantised", "dequantised"]


def test_where_the_fused_kernel_cannot_go_the_other_road_is_taken() -> None:
    # An odd K: every other row starts inside a byte.
    assert roads(random_weight(N, K - 1), 1) == ["dequantised", "dequantised"]
    # The torch backend has no fused kernel, whatever the table says.
    assert roads(random_weight(N, K), 1, backend="torch") == ["dequantised", "dequantised"]
