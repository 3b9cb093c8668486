"""Claims C7 to C13: memory, accuracy, forgetting, larger models, energy."""

import itertools

from peftprof.breakdowns import MemoryPeak
from peftprof.studies import CellResult, Figure, Interval, Paired, Verdict
from peftprof.study import estimates, statistics
from peftprof.study.evidence import (
    FAILS,
    HOLDS,
    UNTESTABLE,
    Claim,
    Results,
    above,
    figure,
    number,
)

GB = 1e9
LESS = {"lora": 0.38, "qlora": 0.47}
COMPRESSION = 4.0
LOST = 0.04  # accuracy, shares of 1
LLAMA_7B = 6_738_415_616  # parameters: 32 layers, 4,096 wide, 11,008 in the MLP, 32,000 tokens
LLAMA_7B_LINEAR = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)  # of them in quantised layers
NF4_BYTES = 0.5 + 1 / 64 * (1 + 4 / 256)  # a weight with nested statistics, blocks of 64
LEVEL = 0.05


def _less_memory(results: Results, claim: Claim) -> Verdict:
    """C7: the peaks of the allocator, or of the resident memory, against full fine-tuning's."""
    full = results.memory.get(results.name("full"))
    if full is None:
        return claim.untestable("No complete run of full fine-tuning has a measured peak.")
    figures, verdicts = [], []
    tensors = _tensors(results, "full")
    for method, printed in LESS.items():
        peak = results.memory.get(results.name(method))
        if peak is None:
            return claim.untestable(f"No complete run of {method} has a measured peak.")
        less = Interval(
            1 - peak.value / full.value,
            1 - peak.high / full.low,
            1 - peak.low / full.high,
            min(peak.n, full.n),
        )
        verdicts.append(above(less, printed))
        figures.append(figure(f"{method}: less peak memory than full", less, paper=printed))
        mine = _tensors(results, method)
        if tensors is not None and mine is not None:
            of_tensors = 1 - mine.peak_bytes / tensors.peak_bytes
            figures.append(number(f"{method}: less in tensors (memory step)", of_tensors))
    verdict = FAILS if FAILS in verdicts else max(verdicts, key=(HOLDS, UNTESTABLE).index)
    on_cpu = all(
        run.record is not None and run.record.memory is not None
        and run.record.memory.allocated_bytes is None
        for run in results.runs[results.name("full")]
    )  # fmt: skip
    caveat = (
        "On a CPU the peak is of the whole process, Python and libraries included, which every "
        "method has; the memory step counts tensors alone."
        if on_cpu
        else ""
    )
    caveat = " ".join(filter(None, [caveat, results.batches("full", "lora", "qlora")]))
    return claim.verdict(verdict, figures, "Peaks of the timed passes, over seeds.", caveat)


def _tensors(results: Results, method: str) -> MemoryPeak | None:
    breakdown = results.breakdown(method)
    memory = None if breakdown is None else breakdown.memory
    return memory if memory is not None and memory.peak_bytes else None


def _activations(results: Results, claim: Claim) -> Verdict:
    """C8: activations at full fine-tuning's peak, and what NF4 makes of the stored weights."""
    full, qlora = _tensors(results, "full"), _tensors(results, "qlora")
    if full is None or qlora is None:
        return claim.untestable("No profiled run of full and QLoRA with a memory step is complete.")
    parts = {part.part: part.bytes for part in full.parts}
    states = sum(
        parts.get(name, 0) for name in ("base_weights", "adapters", "gradients", "optimizer_state")
    )
    part = parts.get("activations", 0) / full.peak_bytes
    dense = sum(parts.get(name, 0) for name in ("base_weights", "adapters"))
    stored = sum(p.bytes for p in qlora.parts if p.part in ("base_weights", "quantisation_state"))
    ratio = dense / stored if stored else 0.0
    figures = [
        number("activations at full fine-tuning's peak", part),
        number("weights, gradients and optimiser", states / full.peak_bytes),
        number("weights of full / base weights of QLoRA as stored", ratio, "x", COMPRESSION),
    ]
    evidence = (
        "The memory step of each. NF4 takes linear layers only: embeddings stay as they are, so "
        "the stored ratio is that of the whole model and not of a quantised layer."
    )
    holds = part > 0.5 and ratio >= COMPRESSION
    return claim.verdict(HOLDS if holds else FAILS, figures, evidence)


def _ranks(results: Results, claim: Claim) -> Verdict:
    """C9: no pair of ranks differs, and rank 8 beats every other (Holm's correction)."""
    figures: list[Figure] = []
    told_apart: list[Paired] = []
    best, pairs = True, 0
    for method in ("lora", "qlora"):
        names = [name for name in results.runs if name.startswith(f"{method}-r")]
        found = [
            pair
            for a, b in itertools.combinations(names, 2)
            if (pair := estimates.compare_accuracy(results.study, a, b)) is not None
        ]
        pairs += len(found)
        apart = _holm(found)
        told_apart += apart
        reference = results.name(method)
        others = [pair for pair in found if reference in (pair.a, pair.b)]
        best &= bool(others) and all(
            pair in apart and (pair.difference.value > 0) == (pair.b == reference)
            for pair in others
        )
        known = [results.accuracy[name].value for name in names if name in results.accuracy]
        if known:
            figures.append(number(f"{method}: best rank - worst rank", max(known) - min(known)))
    if not pairs:
        return claim.untestable("No two ranks have a complete run with the same seed.")
    figures.append(number("pairs of ranks that differ, of all", len(told_apart) / pairs))
    examples = len(results.study.labels)
    evidence = (
        f"{len(told_apart)} of {pairs} pairs of ranks differ (paired test, Holm's correction, "
        f"5 %). One of the {examples} examples is {100 / examples:.2f} points. "
        + (
            "Accuracy depends on rank here."
            if told_apart
            else "Differences between ranks are noise, so none of them is the optimum."
        )
    )
    return claim.verdict(HOLDS if not told_apart and best else FAILS, figures, evidence)


def _holm(found: list[Paired]) -> list[Paired]:
    """The comparisons that stay significant among all of them (Holm 1979)."""
    kept: list[Paired] = []
    ordered = sorted((pair for pair in found if pair.p is not None), key=lambda pair: pair.p or 0)
    for place, pair in enumerate(ordered):
        if (pair.p or 0) > LEVEL / (len(ordered) - place):
            break
        kept.append(pair)
    return kept


def _lost_accuracy(results: Results, claim: Claim) -> Verdict:
    """C10: the interval of full - adapter is above 0 and has 4 points in it."""
    figures, verdicts = [], []
    for method in ("lora", "qlora"):
        pair = estimates.compare_accuracy(results.study, results.name(method), results.name("full"))
        if pair is None:
            return claim.untestable(f"No run of full and {method} with the same seed is complete.")
        figures.append(figure(f"full - {method}, accuracy", pair.difference, "", LOST))
        low, high = pair.difference.low, pair.difference.high
        if 0 < low <= LOST <= high:
            verdicts.append(HOLDS)
        else:
            verdicts.append(FAILS if high < LOST or low > LOST else UNTESTABLE)
    rates = {
        method: run.record.config["learning_rate"]
        for method in ("full", "lora", "qlora")
        for run in results.runs.get(results.name(method), [])[:1]
        if run.record is not None
    }
    told = ", ".join(f"{method} {rate:g}" for method, rate in rates.items())
    searched = "searched for each method" if results.study.rates else "as the recipe gives them"
    verdict = verdicts[0] if len(set(verdicts)) == 1 else UNTESTABLE
    if FAILS in verdicts:
        verdict = FAILS
    return claim.verdict(
        verdict,
        figures,
        f"Paired by example, over seeds. Rates {searched}: {told}.",
        results.batches("full", "lora", "qlora"),
    )


def _forgets_less(results: Results, claim: Claim) -> Verdict:
    """C11: the loss on general text rises less with adapters than with full fine-tuning."""
    groups = {m: results.runs.get(results.name(m), []) for m in ("full", "lora", "qlora")}
    rises = {
        method: {
            r.cell.seed: r.forgetting.after - r.forgetting.before for r in runs if r.forgetting
        }
        for method, runs in groups.items()
    }
    if not rises["full"] or not (rises["lora"] or rises["qlora"]):
        why = next(
            (run.no_forgetting for runs in groups.values() for run in runs if run.no_forgetting),
            "the study did not ask for it, or its runs are not complete",
        )
        return claim.untestable(f"The loss on general text is not known: {why}.")
    figures, verdicts = [], []
    for method, found in rises.items():
        if found:
            mean = sum(found.values()) / len(found)
            figures.append(number(f"{method}: rise of the loss", mean, "nats a token"))
    for method in ("lora", "qlora"):
        shared = sorted(rises["full"].keys() & rises[method].keys())
        if len(shared) < 2:
            verdicts.append(UNTESTABLE)
            continue
        less = statistics.mean([rises["full"][s] - rises[method][s] for s in shared])
        figures.append(figure(f"full's rise - {method}'s", less, "nats a token"))
        if less.low > 0:
            verdicts.append(HOLDS)
        else:
            verdicts.append(FAILS if less.high < 0 else UNTESTABLE)
    measured = next(r.forgetting for runs in groups.values() for r in runs if r.forgetting)
    evidence = (
        f"{measured.measure.capitalize()} loss of {measured.tokens} tokens before and after; the "
        f"head over the vocabulary is {measured.head}. Text: {measured.text}."
    )
    verdict = verdicts[0] if len(set(verdicts)) == 1 else UNTESTABLE
    if FAILS in verdicts:
        verdict = FAILS
    return claim.verdict(verdict, figures, evidence)


def _llama(results: Results, claim: Claim) -> Verdict:
    """C12: bytes by arithmetic; no 7B model is trained here."""
    nf4 = LLAMA_7B_LINEAR * NF4_BYTES + (LLAMA_7B - LLAMA_7B_LINEAR) * 2
    figures = [
        number("weights in fp32", 4 * LLAMA_7B / GB, "GB", 28),
        number("weights, gradients and AdamW in fp32", 16 * LLAMA_7B / GB, "GB", 28),
        number("base weights of QLoRA, the rest in bf16", nf4 / GB, "GB", 15),
    ]
    return claim.untestable(
        "No 7B model is trained in this study. By arithmetic alone: 28 GB are the weights in fp32, "
        "without gradients, optimiser or activations, so they are no figure of fine-tuning; "
        "under 15 GB for QLoRA leaves room for activations.",
        figures,
    )


def _energy(results: Results, claim: Claim) -> Verdict:
    """C13: joules an example of the timed steps, where a counter is there."""
    used = {
        method: [joules for run in results.runs.get(results.name(method), [])
                 if (joules := _joules_an_example(run)) is not None]
        for method in ("full", "lora", "qlora")
    }  # fmt: skip
    if not used["full"] or not used["lora"]:
        record = next(
            (run.record for runs in results.runs.values() for run in runs if run.record), None
        )
        absent = record.energy.absent if record is not None and record.energy is not None else {}
        told = "; ".join(f"{counter}: {why}" for counter, why in absent.items())
        return claim.untestable(f"Energy is not measurable here. {told}".strip())
    figures = [
        number(f"{method}, joules an example", sum(values) / len(values), "J")
        for method, values in used.items()
        if values
    ]
    holds = max(used["lora"]) < min(used["full"])
    apart = holds or min(used["lora"]) > max(used["full"])
    return claim.verdict(
        HOLDS if holds else FAILS if apart else UNTESTABLE,
        figures,
        "Counters of the whole device over the timed steps; every run of one method must be "
        "below every run of the other.",
        results.batches("full", "lora"),
    )


def _joules_an_example(run: CellResult) -> float | None:
    energy = run.record.energy if run.record is not None else None
    if energy is None or not energy.joules or not run.step_samples:
        return None
    return sum(energy.joules.values()) / sum(run.step_samples)


CLAIMS = (
    Claim("C7", "LoRA takes 38 % less peak memory than full, QLoRA 47 %", _less_memory),
    Claim(
        "C8", "Activations dominate a small model's memory; NF4 stores 4 times less", _activations
    ),
    Claim("C9", "Accuracy barely depends on rank, and rank 8 is the optimum", _ranks),
    Claim("C10", "LoRA and QLoRA lose about 4 points against full fine-tuning", _lost_accuracy),
    Claim("C11", "Adapters forget less than full fine-tuning", _forgets_less),
    Claim("C12", "A 7B model takes QLoRA under 15 GB, full fine-tuning 28 GB", _llama),
    Claim("C13", "Fewer trained parameters take less energy", _energy),
)
