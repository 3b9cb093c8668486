"""Claims C1 to C6: how fast, and why."""

import math

from peftprof.breakdowns import Breakdown
from peftprof.studies import Verdict
from peftprof.study.evidence import (
    FAILS,
    HOLDS,
    UNTESTABLE,
    Claim,
    Results,
    few,
    figure,
    number,
    ratio_above,
    share,
)
from peftprof.study.ladder import LAUNCH, START
from peftprof.study.plan import BATCH

LORA_SPEEDUP = 3.6
QLORA_SPEEDUP = 2.8
QLORA_OVER_LORA = 1091 / 1395  # samples/s, table II over table I
GRADIENT = "gradient work"
NO_PAIR = "No run of each with the same seed is complete."
NO_PROFILE = "No profiled run of it is complete."


def _speedup(results: Results, claim: Claim) -> Verdict:
    """C1: the interval of LoRA's over full fine-tuning's examples a second."""
    found = results.faster("full", "lora")
    if found is None:
        return claim.untestable(NO_PAIR)
    figures = [figure("LoRA / full, examples a second", found.difference, "x", LORA_SPEEDUP)]
    figures += [
        number(f"by {rung.cause}", rung.factor.value, "x")
        for rung in results.ladder
        if rung.cause not in (START, LAUNCH)
    ]
    caveat = " ".join(filter(None, [results.batches("full", "lora"), few(found.difference)]))
    evidence = f"{found.b} against {found.a}, by pairs of seeds; below it what the ladder gives."
    return claim.verdict(ratio_above(found.difference, LORA_SPEEDUP), figures, evidence, caveat)


def _gradient_work(results: Results, claim: Claim) -> Verdict:
    """C2: the share of gradient work in the logarithm of the speed-up by batch and gradients."""
    factors = {r.cause: r.factor for r in results.ladder if r.cause in (BATCH, GRADIENT)}
    if GRADIENT not in factors:
        return claim.untestable("The ladder has no complete rung that changes the method.")
    whole = math.prod(factor.value for factor in factors.values())
    gradient = factors[GRADIENT]
    part = math.log(gradient.value) / math.log(whole) if whole > 1 else 0.0
    figures = [
        figure("speed-up by gradient work", gradient, "x"),
        number("bound by FLOPs at equal batch, 6N / 4N", 1.5, "x"),
        number("share of the speed-up's logarithm", part),
    ]
    if BATCH in factors:
        figures.insert(1, figure("speed-up by batch size", factors[BATCH], "x"))
    breakdown = results.breakdown("lora")
    evidence = "The ladder changes batch size and method one after the other, all else equal."
    if breakdown is not None:
        backward = sum(row.ns for row in breakdown.rows if row.phase == "backward")
        figures.append(
            number("backward's share of a LoRA step", backward / breakdown.step_ns.median)
        )
    return claim.verdict(HOLDS if part > 0.5 else FAILS, figures, evidence, few(gradient))


def _adapter_matmuls(results: Results, claim: Claim) -> Verdict:
    """C3: adapter products as a share of LoRA's backward."""
    breakdown = results.breakdown("lora")
    if breakdown is None:
        return claim.untestable(NO_PROFILE)
    names = ("adapter_gemm", "base_gemm", "attention", "elementwise", "dequant")
    shares = {name: share(breakdown, name, "backward") for name in names}
    figures = [number(f"{name} in LoRA's backward", value) for name, value in shares.items()]
    return claim.verdict(
        HOLDS if shares["adapter_gemm"] > 0.5 else FAILS,
        figures,
        f"The breakdown of {breakdown.name}, backward alone, idle included.",
    )


def _bound(results: Results, claim: Claim) -> Verdict:
    """C4: which ceiling most of the step's time is at, full against LoRA."""
    figures, most = [], {}
    for method in ("full", "lora"):
        breakdown = results.breakdown(method)
        if breakdown is None or not any(work.bound for work in breakdown.work):
            return claim.untestable(
                f"No profiled run of {method} with measured ceilings is complete."
            )
        at = _by_bound(breakdown)
        figures += [
            number(f"{method}: {bound}-bound share of the step", at[bound])
            for bound in ("memory", "compute", "overhead")
        ]
        most[method] = max(at, key=lambda bound: at[bound])
    holds = most == {"full": "memory", "lora": "compute"}
    evidence = (
        f"Time by the ceiling its category is at (roofline): most of full fine-tuning's is "
        f"{most['full']}-bound, most of LoRA's {most['lora']}-bound."
    )
    return claim.verdict(HOLDS if holds else FAILS, figures, evidence)


def _by_bound(breakdown: Breakdown) -> dict[str, float]:
    return {
        bound: sum(work.ns for work in breakdown.work if work.bound == bound)
        / breakdown.step_ns.median
        for bound in ("memory", "compute", "overhead")
    }


def _dequantise(results: Results, claim: Claim) -> Verdict:
    """C5: QLoRA is slower than LoRA, and dequantising is at least half of the difference."""
    found = results.faster("lora", "qlora")
    if found is None:
        return claim.untestable(NO_PAIR)
    figures = [figure("QLoRA / LoRA, examples a second", found.difference, "x", QLORA_OVER_LORA)]
    breakdown, lora = results.breakdown("qlora"), results.breakdown("lora")
    part = None
    if breakdown is not None and lora is not None:
        dequant = share(breakdown, "dequant") * breakdown.step_ns.median
        slower = breakdown.step_ns.median - lora.step_ns.median
        figures.append(number("dequantising in a QLoRA step", share(breakdown, "dequant")))
        figures.append(number("dequantising", dequant / 1e6, "ms"))
        figures.append(number("QLoRA's step - LoRA's, profiled", slower / 1e6, "ms"))
        part = dequant / slower if slower > 0 else None
    slower_at_all = found.difference.n > 1 and found.difference.high < 1
    caveat = " ".join(filter(None, [results.batches("lora", "qlora"), few(found.difference)]))
    evidence = f"{found.b} against {found.a}, by pairs of seeds, and the breakdown of each."
    if found.difference.n > 1 and found.difference.low >= 1:
        return claim.verdict(FAILS, figures, evidence + " QLoRA is not slower here.", caveat)
    if not slower_at_all:
        return claim.verdict(
            UNTESTABLE, figures, evidence + " The runs do not tell the two apart.", caveat
        )
    if part is None:
        told = evidence + " QLoRA is slower, but no profile says by what."
        return claim.verdict(UNTESTABLE, figures, told, caveat)
    return claim.verdict(HOLDS if part >= 0.5 else FAILS, figures, evidence, caveat)


def _qlora_speedup(results: Results, claim: Claim) -> Verdict:
    """C6: the interval of QLoRA's over full fine-tuning's examples a second."""
    found = results.faster("full", "qlora")
    if found is None:
        return claim.untestable(NO_PAIR)
    figures = [figure("QLoRA / full, examples a second", found.difference, "x", QLORA_SPEEDUP)]
    caveat = " ".join(filter(None, [results.batches("full", "qlora"), few(found.difference)]))
    evidence = f"{found.b} against {found.a}, by pairs of seeds."
    return claim.verdict(ratio_above(found.difference, QLORA_SPEEDUP), figures, evidence, caveat)


CLAIMS = (
    Claim("C1", "LoRA trains 3.6 times as fast as full fine-tuning", _speedup),
    Claim("C2", "The cause is the sparsity of gradient computation", _gradient_work),
    Claim("C3", "LoRA's backward is dominated by the products of A and B", _adapter_matmuls),
    Claim("C4", "LoRA moves the work from memory-bound to compute-bound", _bound),
    Claim("C5", "QLoRA is slower than LoRA because of dequantisation", _dequantise),
    Claim("C6", "QLoRA is still 2.8 times as fast as full fine-tuning", _qlora_speedup),
)
