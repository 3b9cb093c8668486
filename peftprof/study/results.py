"""From a study's folder to `Study`, and to the raw results that anyone can compute with.

results.jsonl         one line a cell: the cell, its state, its record's figures, forgetting,
                      and the breakdown of profiled ones without operators and layers
runs.parquet          the same figures as columns, one row a cell
steps.parquet         cell, step, ns, samples, real_tokens, padded_tokens, loss, warmup
predictions.parquet   cell, example, label, predicted, of every complete cell of the matrix
"""

import dataclasses
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from peftprof.breakdowns import Breakdown
from peftprof.errors import PeftprofError
from peftprof.records import RunRecord, decode, encode
from peftprof.run.folder import RunFolder, Step
from peftprof.studies import Cell, CellResult, Forgetting, Judged, Study
from peftprof.study.folder import StudyFolder
from peftprof.study.matrix import chosen
from peftprof.trace import load


def read(folder: StudyFolder) -> Study:
    """Everything the study's runs gave, as far as it is there.

    Raises FolderError where the folder or a complete run in it is damaged.
    """
    stored = folder.stored()
    rates = chosen(folder, stored)
    return Study(
        recipe=stored.recipe,
        about=stored.about,
        quick=stored.quick,
        created=stored.created,
        settings=stored.settings,
        environment=stored.environment,
        labels=stored.labels,
        results=tuple(_result(folder, cell) for cell in stored.cells),
        rates={method: rate for method, rate in rates.items() if rate is not None},
        audit=stored.audit,
        left_out=stored.left_out,
    )


def _result(folder: StudyFolder, cell: Cell) -> CellResult:
    why = folder.failure(cell.name)
    if why is not None:
        return CellResult(cell, "failed", why)
    path = folder.run(cell.name)
    run = RunFolder(path)
    if not (path / "run.json").is_file() or (record := run.read_record()).state != "complete":
        return CellResult(cell, "missing", "it has not been run to its end")
    steps = [step for step in run.read_steps() if not step.warmup]
    evaluations = run.read_evaluations()
    breakdown, note = _breakdown(path, record)
    forgetting, absent = general(path)
    return CellResult(
        cell=cell,
        state="complete",
        why=note,
        record=record,
        breakdown=breakdown,
        step_ns=tuple(step.ns for step in steps),
        step_samples=tuple(step.samples for step in steps),
        step_tokens=tuple(step.real_tokens for step in steps),
        predicted=evaluations[-1].predicted if evaluations else (),
        forgetting=forgetting,
        no_forgetting=absent,
    )


def _breakdown(path: Path, record: RunRecord) -> tuple[Breakdown | None, str]:
    if record.profiled is None or record.profiled.trace is None:
        return None, ""
    try:
        return load([path]).breakdowns[0], ""
    except PeftprofError as error:
        return None, f"no breakdown: {error}"


def general(path: Path) -> tuple[Forgetting | None, str]:
    """What a run forgot, or why that is not known; neither where nobody asked."""
    try:
        value = json.loads((path / "forgetting.json").read_text(encoding="utf-8"))
        return (None, value["absent"]) if "absent" in value else (decode(Forgetting, value), "")
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError, KeyError, TypeError) as error:
        return None, f"forgetting.json is damaged: {error}"


def export(folder: StudyFolder, study: Study) -> None:
    """Write the raw results. Raises FolderError when they cannot be written."""
    rows = [_row(result) for result in study.results]
    folder.write("results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    folder.write("runs.parquet", _parquet([_flat(row) for row in rows]))
    folder.write("steps.parquet", _parquet(_steps(folder, study.results)))
    folder.write("predictions.parquet", _parquet(_predictions(study)))


def _row(result: CellResult) -> dict[str, Any]:
    record = None if result.record is None else encode(result.record)
    if record is not None:
        del record["environment"]
    breakdown = None if result.breakdown is None else encode(result.breakdown)
    if breakdown is not None:
        for long in ("operators", "unattributed_operators", "layers"):
            del breakdown[long]
    return {
        "cell": encode(result.cell),
        "state": result.state,
        "why": result.why,
        "record": record,
        "breakdown": breakdown,
        "forgetting": None if result.forgetting is None else encode(result.forgetting),
        "no_forgetting": result.no_forgetting,
    }


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """The figures of a row as columns; a column is there in every row or in none."""
    cell, record = row["cell"], row["record"] or {}
    config = record.get("config") or cell["config"]
    flat = {key: cell[key] for key in ("name", "part", "method", "rank", "seed", "rung", "cause")}
    flat |= {"state": row["state"], "why": row["why"]}
    for key in (
        "learning_rate", "batch_size", "max_length", "max_steps", "epochs", "precision", "padding",
        "kernels", "device", "model", "dataset", "subset",
    ):  # fmt: skip
        flat[key] = config.get(key)
    figures = {
        "timed": ("steps", "seconds", "samples_per_s", "real_tokens_per_s", "padded_tokens_per_s",
                  "step_p50_ms", "step_p95_ms", "first_loss", "last_loss"),
        "accuracy": ("correct", "examples", "accuracy", "low", "high", "loss"),
        "memory": ("allocated_bytes", "reserved_bytes", "nvml_bytes", "rss_bytes"),
        "trainable": ("live", "nominal", "total", "packed_total"),
    }  # fmt: skip
    for part, keys in figures.items():
        values = record.get(part) or {}
        flat |= {key if part == key else f"{part}_{key}": values.get(key) for key in keys}
    energy = (record.get("energy") or {}).get("joules") or {}
    flat["joules"] = sum(energy.values()) if energy else None
    forgetting = row["forgetting"] or {}
    return flat | {f"general_{k}": forgetting.get(k) for k in ("before", "after", "tokens")}


def _steps(folder: StudyFolder, results: Iterable[CellResult]) -> list[dict[str, Any]]:
    names = [field.name for field in dataclasses.fields(Step)]
    return [
        {"cell": result.cell.name} | {name: getattr(step, name) for name in names}
        for result in results
        if result.state == "complete"
        for step in RunFolder(folder.run(result.cell.name)).read_steps()
    ]


def _predictions(study: Study) -> list[dict[str, Any]]:
    return [
        {"cell": result.cell.name, "example": i, "label": label, "predicted": predicted}
        for result in study.results
        if result.cell.part == "matrix" and result.state == "complete"
        for i, (label, predicted) in enumerate(zip(study.labels, result.predicted, strict=True))
    ]


def _parquet(rows: Sequence[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), buffer)
    return buffer.getvalue()


def export_verdicts(folder: StudyFolder, judged: Judged) -> None:
    """Write verdicts.json: verdicts, intervals, comparisons, ladder."""
    value = encode(judged)
    del value["study"]
    folder.write("verdicts.json", json.dumps(value, indent=1) + "\n")
