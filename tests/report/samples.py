"""Breakdowns with known figures: a plain one, and one that has all there can be."""

from dataclasses import replace

from peftprof.breakdowns import (
    Bar,
    Breakdown,
    Ceilings,
    Communication,
    Comparison,
    Layer,
    MemoryPart,
    MemoryPeak,
    Operator,
    Placed,
    Row,
    Spread,
    Totals,
    Work,
)
from peftprof.trace import Loaded

STEP = 20e6
MIB = 2**20
EVIL = "void evil<[bold red]x[/]>\x1b[31m\x07\u202e\n second line"


def made(name: str = "qlora-minilm-20260102-030405", scale: float = 1.0) -> Breakdown:
    def row(phase: str, category: str, ns: float) -> Row:
        return Row(phase, category, ns * scale, ns / STEP, 12, 0.9 * ns, 1.1 * ns)

    return Breakdown(
        name=name,
        source="kineto",
        device="cpu",
        steps=3,
        step_ns=Spread(STEP * scale, 0.9 * STEP, 1.1 * STEP),
        rows=(
            row("forward", "dequant", 3e6),
            row("forward", "base_gemm", 7e6),
            row("forward", "communication", 1e6),
            row("backward", "adapter_gemm", 4e6),
        ),
        unattributed_ns=1e6 * scale,
        idle_ns=4e6 * scale,
        idle_by_phase_ns={"forward": 3e6 * scale, "other": 1e6 * scale},
        overlap_ns=0.5e6,
        operators=(
            Operator("aten::mm", "base_gemm", 7e6, 0.35, 12),
            Operator(EVIL, "dequant", 3e6, 0.15, 24),
        ),
        unattributed_operators=(Operator("mystery::op", "unattributed", 1e6, 0.05, 1),),
    )


def full(name: str = "qlora-minilm-20260102-030405", scale: float = 1.0) -> Breakdown:
    """Everything that a breakdown may hold."""
    plain = made(name, scale)
    return replace(
        plain,
        device="NVIDIA H100 80GB HBM3",
        operators=(
            Operator("void gemm<128>", "base_gemm", 7e6, 0.35, 12, 7e6 / 12, "kernel: products"),
            Operator(EVIL, "dequant", 3e6, 0.15, 24, None, EVIL),
        ),
        idle_by_cause_ns={"launch": 2.5e6 * scale, "sync": 1.5e6 * scale},
        steps_by="ProfilerStep#N",
        rank=3,
        rules=(Placed("kernel: products", 0.6), Placed("range: op:dequant", 0.4)),
        layers=tuple(Layer(f"encoder.layer.{i}", (1 + i) * 1e5, 2e5, 0.02) for i in range(12)),
        communication=Communication(2.1e6, 1.7e6, 0.4e6),
        totals=Totals(70e6, 62e6, 8e6, 55e6, 2e6, 3e6),
        work=(
            Work("base_gemm", 7e6, 0.9, 2.1e12, 3.2e9, "bf16", 0.42, 0.31, "compute"),
            Work("dequant", 3e6, 1.0, 0.0, 5.1e9, "bf16", 0.0, 0.66, "memory"),
            Work("attention", 1e6, 0.0, 0.0, 0.0, "bf16"),
        ),
        ceilings=Ceilings("measured on 2026-11-02", {"bf16": 6.9e14}, 2.9e12),
        memory=MemoryPeak(
            source="memory snapshot",
            device="NVIDIA H100 80GB HBM3",
            peak_bytes=912 * MIB,
            parts=(
                MemoryPart("base_weights", 332 * MIB, 148),
                MemoryPart("activations", 480 * MIB, 410),
                MemoryPart("other", 100 * MIB, 33),
            ),
            phase="backward",
            layer="encoder.layer.5",
            allocated_bytes=910 * MIB,
            reserved_bytes=1024 * MIB,
            process_bytes=1690 * MIB,
            notes=("Blocks from before the recording are told apart by size.",),
        ),
        notes=("A note of the reader.",),
    )


def loaded(*breakdowns: Breakdown, **changes: object) -> Loaded:
    return replace(Loaded(breakdowns, None, (), 0), **changes)  # type: ignore[arg-type]


def compared(speedup: float | None = 1.6, timed: float | None = 1.5, **changes: object) -> Loaded:
    """A run without dequantisation against one with, and what makes the difference."""
    base = made("qlora")
    rows = tuple(row for row in base.rows if row.category != "dequant")
    rows += (Row("forward", "attention", 0.5e6, 0.03, 2, 0.4e6, 0.6e6),)
    step = Spread(17.4e6, 17e6, 18e6)
    other = replace(base, name="lora", rows=rows, step_ns=step, idle_ns=3.9e6)
    bars = (Bar("dequant", -3e6), Bar("attention", 0.5e6), Bar("idle", -0.1e6))
    comparison = Comparison(0, 1, -2.6e6, bars, speedup, timed)
    return loaded(base, other, **{"comparable": True, "comparisons": (comparison,), **changes})
