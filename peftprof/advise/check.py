"""Predictions beside what runs have measured, and what the runs teach of this device."""

import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from peftprof.advice import TENSORS, CheckedRun, Choice, Prediction
from peftprof.advise import kept, shapes
from peftprof.advise.lessons import Lessons, model_of
from peftprof.advise.predict import Predictor, Size, Subject
from peftprof.advise.shapes import Shape
from peftprof.calibrations import Calibration
from peftprof.config import RunConfig
from peftprof.errors import FolderError, TraceError
from peftprof.records import Computed, RunRecord, read_record
from peftprof.run.folder import RunFolder, Step

ENOUGH_STEPS = 3  # beside those of the warm-up


@dataclass
class Checker:
    """Predicts runs after the fact, with the batches that they really had."""

    device: Calibration
    lessons: Lessons
    with_parts: bool = True
    _shapes: dict[tuple[str, int], Shape] = field(default_factory=dict)
    _predictors: dict[tuple[object, ...], Predictor] = field(default_factory=dict)

    def check(self, folder: Path) -> CheckedRun:
        """The prediction for the complete run in `folder` beside what it measured.

        Raises FolderError where there is no such run, InputError or ConfigError where its
        model cannot be had any more.
        """
        record = read_record(folder)
        if record.state != "complete" or record.memory is None:
            raise FolderError(f"{folder} is not complete; --resume it first")
        config = RunConfig.from_json({"padding": "pad"} | record.config)
        steps = RunFolder(folder).read_steps()
        if not steps:
            raise FolderError(f"{folder} has no steps; there is nothing to check against")
        choice = choice_of(config)
        largest = max(steps, key=lambda step: step.padded_tokens)
        memory = self._predict(record, config, choice, [largest], record.evaluated)
        usual = [step for step in steps if not step.warmup] or steps
        time = self._predict(record, config, choice, usual)
        same = self._is_device(record)
        cuda = self.device.kind == "cuda"
        beside = memory.terms["process"] if cuda else 0
        return CheckedRun(
            name=record.name,
            created=record.created,
            model=_model(record),
            choice=choice,
            predicted_bytes=memory.peak_bytes - beside,
            measured_bytes=_measured(record),
            predicted_process_bytes=memory.terms["process"] - beside,
            predicted_s=time.step_s if same else None,
            operators_s=time.step_s / time.factor if same and time.step_s and time.factor else None,
            measured_s=_step(record),
            parts=self._parts(folder, record, config, choice, steps) if self.with_parts else {},
            predicted_tensor_bytes=memory.tensor_bytes,
            predicted_loading_bytes=memory.loading_bytes or None,
            allocated_bytes=record.memory.allocated_bytes,
            loading_bytes=record.memory.loading_bytes,
        )

    def _is_device(self, record: RunRecord) -> bool:
        then = record.environment
        name = then.get("cpu", {}).get("model") if self.device.kind == "cpu" else None
        if self.device.kind == "cuda":
            name = next((gpu.get("name") for gpu in then.get("gpus", [])), None)
        return bool(name) and str(name) in self.device.device

    def _predict(
        self,
        record: RunRecord,
        config: RunConfig,
        choice: Choice,
        steps: Sequence[Step],
        evaluated: Computed | None = None,
    ) -> Prediction:
        """For the mean of `steps`: so many sequences, of so many tokens as were computed."""
        samples = statistics.mean(step.samples for step in steps)
        tokens = statistics.mean(step.padded_tokens for step in steps)
        predictor = self._predictor(record, config)
        others = self.lessons.of(_model(record)).without(f"{record.created} {record.name}")
        predictor.subject = replace(predictor.subject, lessons=others)
        most = None  # of runs that are older than what is recorded of evaluations
        if evaluated is not None and evaluated.examples:
            most = Size(evaluated.examples, evaluated.tokens / evaluated.examples)
        return predictor.predict(choice, Size(samples, tokens / samples), most)

    def _predictor(self, record: RunRecord, config: RunConfig) -> Predictor:
        shape = self._shape(record, config)
        of_run = (config.padding, config.device, config.target_modules, config.dropout)
        key = (config.model, shape.labels, *of_run)
        if key not in self._predictors:
            targets = config.target_modules or record.target_modules
            subject = Subject(
                shape,
                kept.facts_of(shape, targets or shape.family.targets),
                self.device,
                config.max_length,
                config.padding,
                config.dropout,
                targets,
                self.lessons,
            )
            self._predictors[key] = Predictor(subject)
        return self._predictors[key]

    def _shape(self, record: RunRecord, config: RunConfig) -> Shape:
        labels = len(record.data.labels) if record.data else 2
        key = (config.model, labels)
        if key not in self._shapes:
            self._shapes[key] = shapes.find(config.model, labels)
        return self._shapes[key]

    def _parts(
        self,
        folder: Path,
        record: RunRecord,
        config: RunConfig,
        choice: Choice,
        steps: Sequence[Step],
    ) -> dict[str, tuple[int, int]]:
        """Each part of the memory attribution, predicted and measured, in the memory step."""
        from peftprof.trace import loading

        if record.memory_step is None:
            return {}
        try:
            (run,) = loading.load([folder]).breakdowns
        except (TraceError, FolderError, ValueError):
            return {}
        if run.memory is None:
            return {}
        step = next(s for s in steps if s.step == record.memory_step.step)
        predicted = self._predict(record, config, choice, [step])
        measured = {part.part: part.bytes for part in run.memory.parts}
        return {part: (predicted.terms[part], measured.get(part, 0)) for part in TENSORS}


def choice_of(config: RunConfig) -> Choice:
    """The settings of a run that a prediction is made for."""
    full = config.method == "full"
    return Choice(
        config.method,
        config.rank,
        config.batch_size,
        config.precision,
        config.checkpointing,
        "torch" if full else config.kernels,
    )


def _model(record: RunRecord) -> str:
    model = record.model
    return model_of(model.family, model.parameters) if model else ""


def _step(record: RunRecord) -> float | None:
    """The median step; None of fewer than ENOUGH_STEPS, which may all be disturbed ones."""
    timed = record.timed
    if timed is None or timed.steps - timed.warmup_steps < ENOUGH_STEPS:
        return None
    return timed.step_p50_ms / 1e3


def _measured(record: RunRecord) -> int | None:
    """The allocator's own peak on a GPU, which no other process is in; else the process's."""
    assert record.memory is not None
    return record.memory.reserved_bytes or record.memory.rss_bytes


def runs_below(paths: Iterable[Path]) -> list[Path]:
    """The complete runs at `paths`: run folders, and folders that hold some, studies too.

    Raises FolderError where there is none.
    """
    found: list[Path] = []
    other: list[Path] = []
    for path in paths:
        if not path.exists():
            raise FolderError(f"there is no {path}; name a run folder or a folder of runs")
        for file in sorted(
            [
                *path.glob("run.json"),
                *path.glob("*/run.json"),
                *path.glob("*/*/run.json"),
                *path.glob("*/*/*/run.json"),
            ]
        ):
            (found if _complete(file) else other).append(file.parent)
    if not found and other:
        raise FolderError(
            f"{other[0]} is damaged or not complete, and there is no other run to check against; "
            "--resume it, or make one with `python -m peftprof train`"
        )
    if not found:
        raise FolderError(
            "there is no run to check against; make one with `python -m peftprof train`"
        )
    return found


def _complete(file: Path) -> bool:
    try:
        return bool(json.loads(file.read_text(encoding="utf-8")).get("state") == "complete")
    except (OSError, ValueError, AttributeError):
        return False
