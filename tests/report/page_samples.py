"""Runs made up for tests of the page: every part of one, with any words in all its names."""

import random
from dataclasses import replace

from peftprof.breakdowns import (
    CATEGORIES,
    IDLE_CAUSES,
    MEMORY_PARTS,
    PHASES,
    Bar,
    Breakdown,
    Ceilings,
    Communication,
    Comparison,
    Lane,
    Layer,
    MemoryPart,
    MemoryPeak,
    Operator,
    Placed,
    Row,
    Span,
    Spread,
    Timeline,
    Totals,
    Work,
)
from peftprof.trace import Loaded

# Phase, category and share of the step; what is left is idle and unattributed.
SHARES = (
    ("data", "memcpy", 0.01),
    ("forward", "dequant", 0.09),
    ("forward", "base_gemm", 0.13),
    ("forward", "adapter_gemm", 0.04),
    ("forward", "attention", 0.05),
    ("forward", "elementwise", 0.04),
    ("forward", "embedding", 0.002),
    ("forward", "head_loss", 0.02),
    ("backward", "dequant", 0.09),
    ("backward", "base_gemm", 0.15),
    ("backward", "adapter_gemm", 0.09),
    ("backward", "attention", 0.08),
    ("backward", "elementwise", 0.05),
    ("backward", "communication", 0.015),
    ("optimizer", "optimizer", 0.03),
    ("optimizer", "elementwise", 0.003),
)
KERNELS = (
    "void kDequantizeBlockwise<__nv_bfloat16, 512, 64, 8, 2>(float*, unsigned char*, float*)",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1",
    "flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel",
    "_lora_linear_kernel",
    "at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16>>",
)
BANDWIDTH = 2.7e12
PEAKS = {"bf16": 6.6e14, "fp32": 4.9e13}
# Category: FLOP a byte, share of what the roof allows there, dtype.
REACHED = {
    "dequant": (2.0, 0.7, "bf16"),
    "base_gemm": (450.0, 0.62, "bf16"),
    "adapter_gemm": (14.0, 0.35, "bf16"),
    "attention": (95.0, 0.3, "bf16"),
    "elementwise": (0.3, 0.66, "bf16"),
    "head_loss": (60.0, 0.1, "fp32"),
    "optimizer": (0.9, 0.5, "fp32"),
    "memcpy": (0.0, 0.8, "bf16"),
}


def run(
    name: str = "qlora-qwen3-8b-20260102-030405",
    step_ns: float = 184.3e6,
    seed: int = 0,
    words: str = "",
    parts: bool = True,
) -> Breakdown:
    """A run on a GPU whose lines add up to `step_ns`; `words` goes into every name it has.

    Without `parts` it has what every trace gives, and none of the optional.
    """
    draw = random.Random(seed)
    times = [step_ns * share * draw.uniform(0.6, 1.4) for _, _, share in SHARES]
    unattributed = 0.012 * step_ns
    idle = step_ns - sum(times) - unattributed
    placed = Placed(f"op: range{words}", 0.9), Placed(f"kernel name{words}", 0.1)
    rows = tuple(
        Row(phase, category, ns, ns / step_ns, draw.randrange(1, 900), 0.97 * ns, 1.04 * ns, placed)
        for (phase, category, _), ns in zip(SHARES, times, strict=True)
    )
    plain = Breakdown(
        name=name + words,
        source="kineto",
        device="NVIDIA H100 80GB HBM3" + words,
        steps=3,
        step_ns=Spread(step_ns, 0.985 * step_ns, 1.03 * step_ns),
        rows=rows,
        unattributed_ns=unattributed,
        idle_ns=idle,
        idle_by_phase_ns={"forward": 0.6 * idle, "optimizer": 0.3 * idle, "other": 0.1 * idle},
        overlap_ns=0.01 * step_ns,
        operators=_operators(rows, words),
        unattributed_operators=(
            Operator(f"mystery::op{words}", "unattributed", unattributed, 0.012, 7, 261e3, ""),
        ),
        steps_by="step:N" + words,
    )
    return _with_parts(plain, words) if parts else plain


def _operators(rows: tuple[Row, ...], words: str) -> tuple[Operator, ...]:
    """Twice as many as the page lists, not all with a mean."""
    longest = sorted(rows, key=lambda row: -row.ns)
    return tuple(
        Operator(
            KERNELS[i % len(KERNELS)] + words,
            row.category,
            row.ns,
            row.share,
            row.count,
            row.ns / row.count if i % 5 else None,
            f"kernel name{words}" if i % 2 else f"op: range{words}",
        )
        for i, row in enumerate([*longest, *longest])
    )


def _with_parts(plain: Breakdown, words: str) -> Breakdown:
    step, idle = plain.step_ns.median, plain.idle_ns
    block = Layer("", 0.008 * step, 0.0145 * step, 0.0225)
    return replace(
        plain,
        idle_by_cause_ns=dict(
            zip(IDLE_CAUSES, (0.55 * idle, 0.02 * idle, 0.33 * idle, 0.1 * idle), strict=True)
        ),
        rank=3,
        rules=(
            Placed(f"op: range{words}", 0.71),
            Placed(f"kernel name{words}", 0.2),
            Placed(f"forward's op: range{words}", 0.09),
        ),
        layers=(
            *(replace(block, path=f"model.layers.{i}{words}") for i in range(12)),
            Layer("head.score" + words, 0.02 * step, 0.03 * step, 0.05),
        ),
        communication=Communication(0.04 * step, 0.025 * step, 0.015 * step),
        totals=Totals(3.1 * step, 2.6 * step, 0.5 * step, 2.5 * step, 0.12 * step, 0.06 * step),
        ceilings=Ceilings(f"measured here, 2026-01-02{words}", PEAKS, BANDWIDTH),
        work=tuple(_work(plain, category) for category in REACHED),
        memory=_memory(words),
        notes=(f"12 kernels have no launch in the trace.{words}",),
    )


def _work(plain: Breakdown, category: str) -> Work:
    intensity, reach, dtype = REACHED[category]
    ns = sum(row.ns for row in plain.rows if row.category == category)
    known_s = 0.9 * ns / 1e9
    rate = reach * min(PEAKS[dtype], intensity * BANDWIDTH)
    traffic = rate / intensity if intensity else reach * BANDWIDTH
    shares = rate / PEAKS[dtype], traffic / BANDWIDTH
    bound = "compute" if shares[0] > 0.5 else "memory" if shares[1] > 0.5 else "overhead"
    return Work(category, ns, 0.9, rate * known_s, traffic * known_s, dtype, *shares, bound)


def _memory(words: str) -> MemoryPeak:
    peak = 17 * 2**30
    sizes = [int(share * peak) for share in (0.43, 0.02, 0.01, 0.02, 0.04, 0.4, 0.05)]
    sizes.append(peak - sum(sizes))
    return MemoryPeak(
        source=f"profile_memory{words}",
        device="cuda:0" + words,
        peak_bytes=peak,
        parts=tuple(
            MemoryPart(part, size, 10 + i)
            for i, (part, size) in enumerate(zip(MEMORY_PARTS, sizes, strict=True))
        ),
        phase="backward",
        layer=f"model.layers.11{words}",
        allocated_bytes=peak - 2**20,
        reserved_bytes=peak + 2**30,
        process_bytes=peak + 2 * 2**30,
        notes=(f"2 blocks were there before the profiler listened.{words}",),
    )


def timeline(spans: int = 2000, step_ns: int = 184_300_000, words: str = "") -> Timeline:
    """A step of two CPU threads and two streams with `spans` spans in all."""
    draw = random.Random(spans)
    lanes = []
    for title in ("thread 1", "thread 2 (autograd)", "stream 7", "stream 20"):
        cuts = sorted(draw.sample(range(step_ns), 2 * (spans // 4)))
        made = []
        for start, end in zip(cuts[::2], cuts[1::2], strict=True):
            phase = "other" if title == "stream 20" else PHASES[1 + 3 * start // step_ns]
            category = draw.choice((*CATEGORIES, "unattributed"))
            made.append(Span(start, end, category, phase, f"kernel_{draw.randrange(300)}{words}"))
        lanes.append(Lane(title + words, tuple(made)))
    return Timeline(7, step_ns, tuple(lanes), 41)


def loaded(*runs: Breakdown, spans: int = 0, words: str = "", **changes: object) -> Loaded:
    """Runs, each compared with the first, with a timeline of `spans` each where asked for."""
    made = Loaded(
        runs,
        None,
        (),
        0,
        comparisons=tuple(compared(runs, i) for i in range(1, len(runs))),
        timelines=tuple(timeline(spans, int(r.step_ns.median), words) for r in runs if spans),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def compared(runs: tuple[Breakdown, ...], other: int) -> Comparison:
    """Run `other` against the first; its bars add up to the difference."""
    times: list[dict[str, float]] = []
    for one in (runs[0], runs[other]):
        found = {"idle": one.idle_ns, "unattributed": one.unattributed_ns}
        for row in one.rows:
            found[row.category] = found.get(row.category, 0.0) + row.ns
        times.append(found)
    before, after = times
    keys = sorted(before.keys() | after.keys())
    bars = tuple(Bar(key, after.get(key, 0.0) - before.get(key, 0.0)) for key in keys)
    steps = runs[0].step_ns.median, runs[other].step_ns.median
    return Comparison(0, other, steps[1] - steps[0], bars, steps[0] / steps[1], 1.02)
