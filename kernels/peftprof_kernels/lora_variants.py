"""The configurations of the adapter's kernels that ``lora_launch.py`` can launch."""

from collections.abc import Iterator
from typing import Final

from peftprof_kernels.lora_kernels import (
    _lora_down_backward_kernel,
    _lora_down_kernel,
    _lora_sum_kernel,
    _lora_up_backward_kernel,
)
from peftprof_kernels.lora_launch import (
    SUM_BLOCK,
    Tiles,
    down_backward_tiles,
    down_tiles,
    launch_options,
    up_backward_tiles,
)
from peftprof_kernels.variant import TARGETS, Variant

# dtype, rank: every tile once for tensor cores, and what differs by dtype once.
_TENSOR_CORES: Final = [("bf16", rank) for rank in (8, 16, 32, 64, 128, 256)] + [("fp16", 16)]
_FMA: Final = [("fp32", 16), ("fp32", 32)]
# Scalar code, which is all that Triton makes for sm_75.
_TURING: Final = [("fp16", 16), ("fp16", 32)]


def variants() -> list[Variant]:
    """By rank and dtype, with and without dropout; adapters in fp32, as PEFT keeps them."""
    made = []
    for dtype, rank, tensor_cores, targets in _cases():
        for dropout in (False, True):
            made.append(_down(dtype, rank, tensor_cores, targets, dropout))
            made.append(_down_backward(dtype, rank, tensor_cores, targets, dropout))
        tiles = up_backward_tiles(rank, tensor_cores)
        if tiles is not None:
            made.append(_up_backward(dtype, rank, tiles, tensor_cores, targets))
    bf16 = ("bf16", 16, True, TARGETS[1:])
    made += [
        _down(*bf16, dropout=True, aligned=False),
        *(_down_backward("bf16", rank, True, TARGETS[1:], True, False) for rank in (16, 256)),
        _down_backward(*bf16, dropout=True, dx=False),
        _down_backward(*bf16, dropout=True, dA=False),
    ]
    return [*made, _sum("fp32", False), _sum("bf16", False), _sum("bf16", True)]


def _cases() -> Iterator[tuple[str, int, bool, tuple[int, ...]]]:
    for dtype, rank in _TENSOR_CORES:
        yield dtype, rank, True, TARGETS[1:]
    for dtype, rank in _FMA:
        yield dtype, rank, False, TARGETS
    for dtype, rank in _TURING:
        yield dtype, rank, False, TARGETS[:1]


def _down(
    dtype: str,
    rank: int,
    tensor_cores: bool,
    targets: tuple[int, ...],
    dropout: bool,
    aligned: bool = True,
) -> Variant:
    tiles = down_tiles(rank, tensor_cores)
    return Variant(
        name=_name(dtype, rank, tensor_cores, "dropout" * dropout, "odd" * (not aligned)),
        kernel=_lora_down_kernel,
        signature={
            "x_ptr": f"*{dtype}",
            "A_ptr": "*fp32",
            **({"seed_ptr": "*i64"} if dropout else {}),
            "out_ptr": "*fp32",
            **dict.fromkeys(("M", "K", "stride_xm", "k_per_split", "kept"), "i32"),
        },
        constexprs={
            **({} if dropout else {"seed_ptr": None}),
            "r": rank,
            "R": tiles.rank,
            "BLOCK_M": tiles.rows,
            "BLOCK_K": tiles.columns,
        },
        outputs=tiles.rows * tiles.rank,
        kind="gemm",
        options=launch_options(tiles),
        aligned=("K", "stride_xm", "k_per_split") if aligned else ("k_per_split",),
        tensor_cores=tensor_cores,
        targets=targets,
    )


def _up_backward(
    dtype: str, rank: int, tiles: Tiles, tensor_cores: bool, targets: tuple[int, ...]
) -> Variant:
    return Variant(
        name=_name(dtype, rank, tensor_cores),
        kernel=_lora_up_backward_kernel,
        signature={
            "dy_ptr": f"*{dtype}",
            "B_ptr": "*fp32",
            "S_ptr": f"*{dtype}",
            "dS_ptr": "*fp32",
            "dB_ptr": "*fp32",
            **dict.fromkeys(("M", "N", "stride_dym", "n_per_split"), "i32"),
        },
        constexprs={
            "r": rank,
            "stride_sm": rank,
            "R": tiles.rank,
            "BLOCK_M": tiles.rows,
            "BLOCK_N": tiles.columns,
        },
        outputs=tiles.rank * (tiles.rows + tiles.columns),
        kind="gemm",
        options=launch_options(tiles),
        aligned=("N", "stride_dym", "n_per_split"),
        tensor_cores=tensor_cores,
        targets=targets,
    )


def _down_backward(
    dtype: str,
    rank: int,
    tensor_cores: bool,
    targets: tuple[int, ...],
    dropout: bool,
    aligned: bool = True,
    dA: bool = True,
    dx: bool = True,
) -> Variant:
    tiles = down_backward_tiles(rank, tensor_cores)
    pointers = {
        "x_ptr": f"*{dtype}" if dA else None,
        "dS_ptr": f"*{dtype}",
        "A_ptr": "*fp32",
        "seed_ptr": "*i64" if dropout else None,
        "dA_ptr": "*fp32" if dA else None,
        "dx_ptr": f"*{dtype}" if dx else None,
    }
    parts = ("dropout" * dropout, "odd" * (not aligned), "no-dA" * (not dA), "no-dX" * (not dx))
    sizes = ("M", "K", "stride_xm", "m_per_split", "kept")
    return Variant(
        name=_name(dtype, rank, tensor_cores, *parts),
        kernel=_lora_down_backward_kernel,
        signature={
            **{name: type_ for name, type_ in pointers.items() if type_},
            **dict.fromkeys(sizes, "i32"),
            "alpha": "fp32",
        },
        constexprs={
            **{name: None for name, type_ in pointers.items() if not type_},
            "r": rank,
            "R": tiles.rank,
            "BLOCK_M": tiles.rows,
            "BLOCK_K": tiles.columns,
        },
        outputs=tiles.columns * (tiles.rank * dA + tiles.rows * dx),
        kind="gemm",
        options=launch_options(tiles),
        aligned=("K", "stride_xm", "m_per_split") if aligned else ("m_per_split",),
        tensor_cores=tensor_cores,
        targets=targets,
    )


def _sum(dtype: str, bias: bool) -> Variant:
    return Variant(
        name=f"{dtype}{'-bias' * bias}",
        kernel=_lora_sum_kernel,
        signature={
            "parts_ptr": "*fp32",
            **({"bias_ptr": f"*{dtype}"} if bias else {}),
            "out_ptr": f"*{dtype}",
            **dict.fromkeys(("parts", "size", "columns"), "i32"),
            "alpha": "fp32",
        },
        constexprs={**({} if bias else {"bias_ptr": None}), "BLOCK": SUM_BLOCK},
        outputs=SUM_BLOCK,
        kind="stream",
        options={"num_warps": 4, "enable_fp_fusion": True},
        aligned=("size", "columns"),
    )


def _name(dtype: str, rank: int, tensor_cores: bool, *parts: str) -> str:
    scalar = "" if tensor_cores or dtype == "fp32" else "scalar"
    return "-".join(part for part in (dtype, f"r{rank}", scalar, *parts) if part)
