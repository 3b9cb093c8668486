"""A run from its configuration to its folder: two passes, timed and then profiled."""

import contextlib
import dataclasses
import datetime
import gc
import os
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.errors import ConfigError, DeviceError, FolderError, InputError, TrainingError
from peftprof.records import ModelInfo, RunRecord, Timed
from peftprof.run import (
    adapters,
    agreement,
    capture,
    ceilings,
    data,
    distributed,
    environment,
    frugal,
    graphs,
    memory_trace,
    packing,
)
from peftprof.run import model as models
from peftprof.run.batches import Batches
from peftprof.run.folder import RunFolder, Step
from peftprof.run.loop import EVALUATED, TimedLoop, Trainee, make_trainee
from peftprof.run.meters import percentiles
from peftprof.run.source import Source, load_tokenizer, locate, one_line, quiet_libraries
from peftprof.run.tables import Examples
from peftprof.watcher import Watcher

NO_MEMORY = "can't allocate memory"


def resolve(config: RunConfig) -> RunConfig:
    """`config` with every `auto` settled on this machine.

    Raises DeviceError for a device, precision or kernel backend that is not here, ConfigError
    for what several processes cannot share.
    """
    if config.batch_size < distributed.size():
        raise ConfigError(
            f"--batch-size {config.batch_size} is less than the {distributed.size()} processes of "
            "the run; make it larger, or start fewer"
        )
    device = environment.default_device() if config.device == "auto" else config.device
    device = str(environment.check_device(distributed.own_device(device)))
    if distributed.size() > 1 and device.startswith("cuda"):
        torch.cuda.set_device(device)  # what nccl talks from
    precision = config.precision
    if precision == "auto":
        precision = environment.default_precision(device)
    environment.check_precision(precision, device)
    if config.kernels == "triton":
        environment.check_triton(device)
    kernels = config.kernels
    if kernels == "auto":
        # On a GPU bitsandbytes dequantises in fused kernels; on a CPU ours is right for
        # every shape, and one op for the adapter saves its copies.
        kernels = "bnb" if device.startswith("cuda") and config.method != "full" else "torch"
    profiler = config.profiler
    heard = {"NSYS_PROFILING_SESSION_ID", "NVTX_INJECTION64_PATH"} & os.environ.keys()
    if profiler == "auto":
        profiler = "nsys" if "NSYS_PROFILING_SESSION_ID" in os.environ else "torch"
    if profiler == "nsys" and not heard:
        raise DeviceError(
            "--profiler nsys records nothing by itself; run the command under `nsys profile` "
            "(docs/nvtx.md), or use --profiler torch"
        )
    alpha = config.scaling * config.rank
    return dataclasses.replace(
        config, device=device, precision=precision, kernels=kernels, profiler=profiler, alpha=alpha
    )


@dataclass(frozen=True)
class Prepared:
    """A run's inputs on this machine: model files, data, tokenised batches."""

    config: RunConfig
    source: Source
    family: models.Family
    tokenizer: Any
    loaded: data.Data
    train: Batches
    validation: Batches

    def build(self) -> tuple[Trainee, ModelInfo]:
        """A trainee at step 0: the same every time it is called."""
        config = self.config
        model = models.load_model(
            self.source,
            config,
            self.family,
            self.loaded.info.labels,
            self.tokenizer.pad_token_id,
        )
        info = models.describe(self.source, model)
        adapted = adapters.attach(model, config, self.family)
        if config.padding == "packed":
            packing.prepare(adapted, self.family)
        frugal.prepare(adapted, config)
        if config.checkpointing:
            frugal.checkpoint_activations(adapted, self.family)
        return make_trainee(config, adapted, self.train, self.validation), info


def prepare(config: RunConfig) -> Prepared:
    """Find and tokenise everything `config` names; see the errors of `model` and `data`."""
    quiet_libraries()
    source = locate(config.model)
    family = models.family_of(source, config)
    config = dataclasses.replace(config, padding=_padding(source, config, family))
    if config.cuda_graphs == "on" and (why := graphs.possible(config)):
        raise ConfigError(f"--cuda-graphs on cannot be: {why}; leave the option out")
    tokenizer = load_tokenizer(source)
    first = packing.first_position(source.family, tokenizer.pad_token_id)
    if source.positions is not None and config.max_length > source.positions - first:
        raise InputError(
            f"--max-length {config.max_length} is more than the {source.positions - first} "
            f"positions of {config.model!r}"
        )
    loaded = data.load(config)

    def batches(examples: Examples) -> Batches:
        return Batches(
            examples,
            tokenizer,
            source.inputs,
            config.max_length,
            config.batch_size,
            config.seed,
            config.padding,
            first,
            packing.multiple(config),
        )

    return Prepared(
        config,
        source,
        family,
        tokenizer,
        loaded,
        batches(loaded.train),
        batches(loaded.validation),
    )


def _padding(source: Source, config: RunConfig, family: models.Family) -> str:
    """How batches of this model are made where the configuration leaves it open."""
    packs = packing.packable(source.config, family) >= config.max_length
    if config.padding == "packed" and not packs:
        raise ConfigError(
            f"--padding packed is not known for {config.model!r} ({source.family}); use "
            "--padding split, which pads to lengths that are close"
        )
    if config.padding != "auto":
        return config.padding
    return "packed" if packs else "split"


def train(config: RunConfig, out: Path | None, command: list[str], watcher: Watcher) -> RunFolder:
    """A new run in `out` (None: a name of its own below traces/).

    Processes that were started together become one run; the first of them writes. Raises the
    errors of `peftprof.errors`; nothing is left behind when the input is bad.
    """
    with distributed.joined():
        return _train(resolve(config), out, command, watcher)


def _train(config: RunConfig, out: Path | None, command: list[str], watcher: Watcher) -> RunFolder:
    now = datetime.datetime.now().astimezone()
    if out is None:
        model = Path(config.model).name
        out = Path("traces") / f"{config.method}-{model}-{now:%Y%m%d-%H%M%S}"
    folder = RunFolder.check_free(out) if distributed.first() else RunFolder(out, writes=False)
    with distributed.first_before_others():
        prepared = prepare(config)
    record = RunRecord(
        version=1,
        name=folder.path.resolve().name,
        state="running",
        created=now.isoformat(timespec="seconds"),
        command=tuple(command),
        config=prepared.config.to_json(),
        environment=environment.describe(),
    )
    return _finish(folder, record, prepared, watcher, folder.held(new=True))


def resume(path: Path, watcher: Watcher) -> RunFolder:
    """Go on with the run at `path` from its last checkpoint, to the same result.

    Raises FolderError when there is no such run, it is complete, or its inputs changed, or
    when it was started over another number of processes.
    """
    with distributed.joined():
        folder = dataclasses.replace(RunFolder.open(path), writes=distributed.first())
        with folder.held(new=False):
            record = folder.read_record()
            if record.state == "complete":
                raise FolderError(f"{path} is complete; there is nothing to resume")
            agreement.check_processes(record)
            # A run of before there was a choice was padded.
            config = RunConfig.from_json({"padding": "pad"} | record.config)
            settled = resolve(dataclasses.replace(config, device=distributed.kind(config.device)))
            if distributed.size() > 1:
                config = dataclasses.replace(config, device=settled.device)
            if settled != config:
                raise FolderError(f"the settings of {path} are not those of a run; start a new one")
            agreement.check_versions(record)
            with distributed.first_before_others():
                prepared = prepare(config)
            return _finish(folder, record, prepared, watcher, contextlib.nullcontext())


def _finish(
    folder: RunFolder,
    record: RunRecord,
    prepared: Prepared,
    watcher: Watcher,
    hold: contextlib.AbstractContextManager[None],
) -> RunFolder:
    """The timed pass from wherever it is, what was trained, the profiled pass."""
    with contextlib.ExitStack() as held:
        try:
            # Functions of their own, so that the first model is gone before the second is built.
            if record.accuracy is None:
                record = _timed_pass(folder, record, prepared, watcher, held, hold)
                folder.write_record(record)
                gc.collect()
            if prepared.config.profiler != "none":
                record = _profiled_pass(folder, record, prepared, watcher)
                gc.collect()
                if distributed.first():
                    measured = ceilings.measure(torch.device(prepared.config.device))
                    record = dataclasses.replace(record, ceilings=measured)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            # The allocator of the CPU has no exception of its own.
            if not isinstance(error, torch.OutOfMemoryError) and NO_MEMORY not in str(error):
                raise
            raise TrainingError(
                f"out of memory ({one_line(error)}); lower --batch-size or --max-length, or use "
                "--method qlora"
            ) from error
        folder.write_record(dataclasses.replace(record, state="complete"))
        if folder.writes:
            folder.checkpoint.unlink(missing_ok=True)
    return folder


def _profiled_pass(
    folder: RunFolder, record: RunRecord, prepared: Prepared, watcher: Watcher
) -> RunRecord:
    trainee, _ = prepared.build()
    timed = distributed.from_first(folder.read_steps() if folder.writes else [])
    profiled = capture.profile(trainee, prepared.family, folder, timed, watcher)
    memory_step = memory_trace.record(trainee, prepared.family, folder, timed)
    return dataclasses.replace(record, profiled=profiled, memory_step=memory_step)


def _timed_pass(
    folder: RunFolder,
    record: RunRecord,
    prepared: Prepared,
    watcher: Watcher,
    held: contextlib.ExitStack,
    hold: contextlib.AbstractContextManager[None],
) -> RunRecord:
    # Whatever is wrong with the model is said before a folder is made.
    trainee, info = prepared.build()
    full = prepared.config.method == "full"
    before = None if full else adapters.frozen_sha256(trainee.model)
    agreement.check_everywhere(trainee, before, info, prepared.loaded.info)
    held.enter_context(hold)
    agreement.check_inputs(record, info, prepared.loaded.info)
    if record.base_sha256 not in (None, before):
        raise FolderError("the frozen weights are not those the run started with; start a new run")
    record = dataclasses.replace(
        record,
        model=info,
        data=prepared.loaded.info,
        target_modules=() if full else prepared.family.targets,
        head_modules=prepared.family.head,
        execution=frugal.describe(trainee.model, trainee.optimizer, prepared.config),
        base_sha256=before,
    )
    folder.write_record(record)
    loop = TimedLoop(trainee, folder, watcher)
    passed = loop.run()
    if not full and adapters.frozen_sha256(trainee.model) != before:
        raise TrainingError("the frozen base weights changed while training; the result is void")
    agreement.check_trained(trainee)
    _save_trained(folder, trainee, prepared)
    assert record.execution is not None
    execution = dataclasses.replace(record.execution, cuda_graphs=loop.cuda_graphs())
    return dataclasses.replace(
        record,
        execution=execution,
        trainable=passed.trainable,
        timed=summarise(passed.steps),
        accuracy=passed.evaluations[-1].accuracy,
        memory=loop.peaks(),
        energy=loop.joules(),
        evaluated=trainee.validation.largest(EVALUATED * prepared.config.batch_size),
    )


def _save_trained(folder: RunFolder, trainee: Trainee, prepared: Prepared) -> None:
    model: Any = trainee.model
    if prepared.config.method == "full":

        def save(path: Path) -> None:
            model.save_pretrained(path)
            prepared.tokenizer.save_pretrained(path)

        folder.save_folder("model", save)
        return
    for adapter in model.peft_config.values():
        adapter.base_model_name_or_path = prepared.source.reference
    folder.save_folder("adapter", model.save_pretrained)


def summarise(steps: list[Step]) -> Timed | None:
    """The timed pass's figures over its steps after warm-up; None when there is none."""
    counted = [s for s in steps if not s.warmup]
    if not counted:
        return None
    seconds = sum(s.ns for s in counted) / 1e9
    p50, p95, p99 = percentiles([s.ns for s in counted])
    return Timed(
        steps=len(steps),
        warmup_steps=len(steps) - len(counted),
        seconds=seconds,
        samples_per_s=sum(s.samples for s in counted) / seconds,
        real_tokens_per_s=sum(s.real_tokens for s in counted) / seconds,
        padded_tokens_per_s=sum(s.padded_tokens for s in counted) / seconds,
        real_tokens_per_step=statistics.mean(s.real_tokens for s in counted),
        padded_tokens_per_step=statistics.mean(s.padded_tokens for s in counted),
        step_p50_ms=p50 / 1e6,
        step_p95_ms=p95 / 1e6,
        step_p99_ms=p99 / 1e6,
        first_loss=steps[0].loss,
        last_loss=steps[-1].loss,
    )
