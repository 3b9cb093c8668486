"""What a fine-tuned model costs to serve: from what is asked to the folder with the figures.

In this order: settle and find everything, build the variants and compare what they compute,
time them in turn, profile each, and measure the memory of each in a process of its own.
"""

import contextlib
import dataclasses
import datetime
import gc
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from peftprof.errors import InferenceError
from peftprof.inferences import Cell, Footprint, InferenceRecord, Inputs, Progress, Trace
from peftprof.records import ModelInfo
from peftprof.run import environment
from peftprof.run import model as models
from peftprof.run.serving import checks, memory, timing, traces
from peftprof.run.serving.calls import OUT_OF_MEMORY, out_of_memory
from peftprof.run.serving.folder import InferenceFolder
from peftprof.run.serving.served import Plan
from peftprof.run.serving.settle import Asked, Settled, settle, tokens_of, with_adapter
from peftprof.run.serving.tokens import Tokens
from peftprof.run.source import quiet_libraries


def infer(asked: Asked, command: Sequence[str], progress: Progress) -> tuple[InferenceRecord, Path]:
    """Measure; the record, and the folder that it is in.

    Raises the errors of `peftprof.errors`; then no folder is left.
    """
    quiet_libraries()
    settled = settle(asked)
    now = datetime.datetime.now().astimezone()
    folder = InferenceFolder.check_free(asked.out or _own_name(settled, now))
    with _said():
        settled = with_adapter(settled)
        tokens = tokens_of(settled)
        progress.begin("comparing", 1)
        compared = checks.build_and_compare(
            settled.served, settled.variants, tokens, min(asked.lengths)
        )
        progress.done("")
    with folder.made():
        plan = settled.served.plan
        if plan.adapter is None and settled.served.adapter is not None:
            saved = folder.save_adapter(settled.served.adapter)
            plan = dataclasses.replace(plan, adapter=str(saved.resolve()))
        model = _describe(settled, compared.models)
        turns, cells, no_energy = _timed(settled, compared.models, tokens, progress)
        folder.write_turns(turns)
        profiled = _profiled(settled, compared.models, tokens, cells, folder, progress)
        compared.models.clear()
        gc.collect()
        cells, footprints = _with_memory(settled, plan, cells, progress)
        record = InferenceRecord(
            version=1,
            name=folder.path.resolve().name,
            created=now.isoformat(timespec="seconds"),
            command=tuple(command),
            run=None if settled.record is None else settled.record.name,
            task=plan.task,
            config=plan.config.to_json(),
            settings=_settings(settled),
            environment=environment.describe(),
            model=model,
            dense=_dense(settled),
            adapter=_adapter(settled),
            inputs=Inputs(tokens.source, tokens.fingerprint),
            checks=compared.checks,
            cells=tuple(cells),
            memory=memory.MEANS["cuda" if plan.config.device.startswith("cuda") else "cpu"],
            footprints=tuple(footprints),
            energy_absent=no_energy,
            traces=tuple(profiled),
        )
        folder.write_record(record)
    return record, folder.path


def _own_name(settled: Settled, now: datetime.datetime) -> Path:
    run = settled.record
    name = run.name if run is not None else Path(settled.config.model).name
    return Path("traces") / f"infer-{name}-{now:%Y%m%d-%H%M%S}"


# --- Measuring


def _timed(
    settled: Settled, variants: dict[str, Any], tokens: Tokens, progress: Progress
) -> tuple[list[timing.Turn], list[Cell], dict[str, str]]:
    asked = settled.asked
    every = list(itertools.product(settled.phases, asked.shapes))
    turns: list[timing.Turn] = []
    cells: list[Cell] = []
    no_energy: dict[str, str] = {}
    progress.begin("timing", len(every))
    for phase, (batch, length) in every:
        try:
            ids = tokens.at(batch, length, settled.more(phase)).to(settled.config.device)
            found = timing.measure(variants, phase, ids, length, asked.requests)
        except OUT_OF_MEMORY as error:
            failed = dict.fromkeys(variants, out_of_memory(error))
            found = timing.Measured((), {}, failed, no_energy)
        turns += found.turns
        no_energy = found.energy_absent or no_energy
        made = {c.variant: c for c in timing.cells(found.turns, settled.variants, found.joules)}
        for variant in settled.variants:
            none = Cell(variant, phase, batch, length, absent=found.failed.get(variant))
            cells.append(made.get(variant, none))
        progress.done(f"{phase} {batch} x {length}")
    return turns, cells, no_energy


def _profiled(
    settled: Settled,
    variants: dict[str, Any],
    tokens: Tokens,
    cells: list[Cell],
    folder: InferenceFolder,
    progress: Progress,
) -> list[Trace]:
    """A trace of each variant in each phase, at the largest batch and length that all could do."""
    if settled.config.profiler == "none":
        return []
    progress.begin("profiling", len(settled.phases) * len(variants))
    found = []
    for phase in settled.phases:
        failed = {(c.batch, c.length) for c in cells if c.phase == phase and c.absent}
        able = [shape for shape in settled.asked.shapes if shape not in failed]
        if not able:
            continue
        batch, length = max(able, key=lambda shape: shape[0] * shape[1])
        more = traces.STEPS if phase == "decode" else 0
        if settled.served.source.positions is not None:
            length = min(length, settled.served.source.positions - more)
        ids = tokens.at(batch, length, more).to(settled.config.device)
        for variant, model in variants.items():
            try:
                file = traces.record(settled.served, model, variant, phase, ids, folder.whole)
            except OUT_OF_MEMORY as error:
                out_of_memory(error)
            else:
                found.append(Trace(variant, phase, batch, length, file))
            progress.done(f"{phase} {variant}")
    return found


def _with_memory(
    settled: Settled, plan: Plan, cells: list[Cell], progress: Progress
) -> tuple[list[Cell], list[Footprint]]:
    """The cells with their peaks, from one process a variant."""
    progress.begin("memory", len(settled.variants))
    footprints = []
    seen: dict[tuple[str, memory.Key], Cell] = {}
    for variant in settled.variants:
        own = [cell for cell in cells if cell.variant == variant]
        keys = [(cell.phase, cell.batch, cell.length) for cell in own]
        found = memory.measure(plan.to_json(), variant, settled.decode, keys)
        if found.footprint is not None:
            footprints.append(found.footprint)
        for cell, key in zip(own, keys, strict=True):
            peak, why = found.bytes.get(key), found.absent.get(key)
            seen[variant, key] = dataclasses.replace(cell, peak_bytes=peak, peak_absent=why)
        progress.done(variant)
    return [seen[c.variant, (c.phase, c.batch, c.length)] for c in cells], footprints


# --- What is told


def _describe(settled: Settled, variants: dict[str, Any]) -> ModelInfo:
    served = settled.served
    model = next(iter(variants.values()))
    own = (p for name, p in model.named_parameters() if ".lora_" not in name)
    info = models.describe(served.source, model)
    info = dataclasses.replace(info, parameters=sum(map(models.unpacked_size, own)))
    if settled.record is not None and settled.record.config["method"] == "full":
        trained_from = settled.record.config["model"]
        source = f"full fine-tuning run {settled.record.name}"
        return dataclasses.replace(info, name=str(trained_from), source=source)
    return info


def _settings(settled: Settled) -> dict[str, Any]:
    asked = settled.asked
    return {
        "variants": list(settled.variants),
        "batch_sizes": sorted(set(asked.batch_sizes)),
        "lengths": sorted(set(asked.lengths)),
        "decode": settled.decode,
        "requests": asked.requests,
    }


def _dense(settled: Settled) -> str:
    precision = settled.config.precision
    if settled.served.plan.dequantised:
        return f"the run's NF4 weights, dequantised, in {precision}"
    return f"the model's own, in {precision}"


def _adapter(settled: Settled) -> str | None:
    served = settled.served
    if served.adapter is None:
        return None
    rank = served.adapter.settings.r
    whose = "made for this" if settled.record is None else "the run's"
    return f"{whose}, rank {rank} on {', '.join(sorted(served.adapter.settings.target_modules))}"


@contextlib.contextmanager
def _said() -> Iterator[None]:
    """Running out of memory before there is anything to go on with is one line."""
    try:
        yield
    except OUT_OF_MEMORY as error:
        why = out_of_memory(error)
        raise InferenceError(f"{why}; name fewer --variants, or a smaller model") from error
