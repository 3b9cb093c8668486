import dataclasses
import math

import pytest
import torch

from peftprof.errors import FolderError, TrainingError
from peftprof.run import adapters, capture, loop, runner
from peftprof.run.folder import RunFolder
from tests import tolerances
from tests.tolerances import relative_error


class Killed(Exception):
    pass


def losses(folder):
    return [(s.step, s.loss) for s in folder.read_steps()]


@pytest.fixture(scope="module")
def wholes(tmp_path_factory):
    return tmp_path_factory.mktemp("wholes")


@pytest.fixture
def whole_run(wholes, small_run, quiet):
    """`whole_run(method)`: a run that nothing interrupts, made once."""

    def make(method):
        path = wholes / method
        if path.exists():
            return RunFolder.open(path)
        config = small_run(method, checkpoint_every=4, profiler="none")
        return runner.train(config, path, [], quiet)

    return make


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
@pytest.mark.parametrize("kill_at", [3, 5, 9, 13])
def test_a_killed_run_resumes_to_the_same_bits(
    method, kill_at, small_run, whole_run, tmp_path, quiet, monkeypatch
):
    """Dropout, data order, optimiser and schedule go on as if nothing had happened."""
    config = small_run(method, checkpoint_every=4, profiler="none")
    whole = whole_run(method)
    real_step = loop.Trainee.step

    def dying(self, number, **how):
        if number == kill_at:
            raise Killed
        return real_step(self, number, **how)

    monkeypatch.setattr(loop.Trainee, "step", dying)
    with pytest.raises(Killed):
        runner.train(config, tmp_path / "killed", [], quiet)
    monkeypatch.setattr(loop.Trainee, "step", real_step)
    assert RunFolder(tmp_path / "killed").read_record().state == "running"
    resumed = runner.resume(tmp_path / "killed", quiet)
    assert losses(resumed) == losses(whole)
    a, b = whole.read_record(), resumed.read_record()
    assert (a.accuracy, a.trainable, a.base_sha256) == (b.accuracy, b.trainable, b.base_sha256)
    trained = "model/model.safetensors" if method == "full" else "adapter/adapter_model.safetensors"
    assert (whole.path / trained).read_bytes() == (resumed.path / trained).read_bytes()
    assert not resumed.checkpoint.exists()
    with pytest.raises(FolderError, match="is complete"):
        runner.resume(resumed.path, quiet)


def test_resume_refuses_what_is_not_the_runs_own(small_run, tmp_path, quiet, monkeypatch):
    config = small_run("lora", checkpoint_every=2, profiler="none")
    monkeypatch.setattr(runner, "_save_trained", _die)
    with pytest.raises(Killed):
        runner.train(config, tmp_path / "run", [], quiet)
    folder = RunFolder(tmp_path / "run")
    record = folder.read_record()
    folder.write_record(dataclasses.replace(record, base_sha256="0" * 64))
    with pytest.raises(FolderError, match="frozen weights are not those"):
        runner.resume(folder.path, quiet)
    changed = dataclasses.replace(record.data, fingerprint="0" * 64)
    folder.write_record(dataclasses.replace(record, data=changed))
    with pytest.raises(FolderError, match="is not what the run started with"):
        runner.resume(folder.path, quiet)
    folder.write_record(record)
    whole = folder.checkpoint.read_bytes()
    folder.checkpoint.write_bytes(whole[:1000])
    with pytest.raises(FolderError, match="damaged"):
        runner.resume(folder.path, quiet)


def test_resume_refuses_other_versions_and_lost_steps(small_run, tmp_path, quiet, monkeypatch):
    config = small_run("lora", checkpoint_every=2, profiler="none")
    monkeypatch.setattr(runner, "_save_trained", _die)
    with pytest.raises(Killed):
        runner.train(config, tmp_path / "run", [], quiet)
    folder = RunFolder(tmp_path / "run")
    steps, evaluations = folder.read_steps(), folder.read_evaluations()
    folder.write_steps(steps[:5])
    with pytest.raises(FolderError, match="has lost steps"):
        runner.resume(folder.path, quiet)
    folder.write_steps(steps)
    folder.write_evaluations(evaluations[:-1])
    with pytest.raises(FolderError, match="has lost steps"):
        runner.resume(folder.path, quiet)
    folder.write_evaluations(evaluations)
    record = folder.read_record()
    older = record.environment["packages"] | {"torch": "1.0"}
    old = dataclasses.replace(record, environment=record.environment | {"packages": older})
    folder.write_record(old)
    with pytest.raises(FolderError, match=r"started with torch 1\.0"):
        runner.resume(folder.path, quiet)
    folder.write_record(dataclasses.replace(record, environment={"packages": 3}))
    with pytest.raises(FolderError, match="does not say which packages"):
        runner.resume(folder.path, quiet)
    unsettled = record.config | {"precision": "auto"}
    folder.write_record(dataclasses.replace(record, config=unsettled))
    with pytest.raises(FolderError, match="are not those of a run"):
        runner.resume(folder.path, quiet)


def test_killed_while_profiling_keeps_the_timed_results(small_run, tmp_path, quiet, monkeypatch):
    real = capture.profile
    monkeypatch.setattr(capture, "profile", _die)
    with pytest.raises(Killed):
        runner.train(small_run("lora"), tmp_path / "run", [], quiet)
    before = RunFolder(tmp_path / "run").read_record()
    assert before.state == "running"
    assert before.timed.steps == 14
    monkeypatch.setattr(capture, "profile", real)
    quiet.begun.clear()
    after = runner.resume(tmp_path / "run", quiet).read_record()
    assert [what for what, _, _ in quiet.begun] == ["profiling"]
    assert (after.timed, after.memory, after.energy) == (before.timed, before.memory, before.energy)
    assert after.profiled.same_losses


def test_what_was_measured_before_a_resume_counts(small_run, tmp_path, quiet, monkeypatch):
    """Each timed step costs one joule on a counter that only moves when it is read."""

    class Counted(loop.EnergyMeter):
        def __init__(self, device):
            super().__init__(device, powercap=tmp_path / "none")
            self.uj = 0
            self._add("fake", self._read_next, wrap=0)

        def _read_next(self):
            self.uj += 1_000_000
            return self.uj

    monkeypatch.setattr(loop, "EnergyMeter", Counted)
    config = small_run("lora", checkpoint_every=7, max_steps=21, profiler="none")
    whole = runner.train(config, tmp_path / "whole", [], quiet).read_record()
    real_step = loop.Trainee.step
    monkeypatch.setattr(
        loop.Trainee,
        "step",
        lambda self, n, **how: _die() if n == 16 else real_step(self, n, **how),
    )
    with pytest.raises(Killed):
        runner.train(config, tmp_path / "killed", [], quiet)
    monkeypatch.setattr(loop.Trainee, "step", real_step)
    resumed = runner.resume(tmp_path / "killed", quiet).read_record()
    assert whole.energy.joules["fake"] > 0
    assert resumed.energy.joules["fake"] > 1  # more than the last two steps' alone
    assert resumed.timed.warmup_steps == 10


def _die(*_):
    raise Killed


def test_seeds_reproduce_and_differ(small_run, tmp_path, quiet):
    runs = [
        runner.train(small_run("lora", seed=seed, profiler="none"), tmp_path / name, [], quiet)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = map(losses, runs)
    assert a == b
    assert a != c


def test_the_rate_is_the_stock_schedule(small_run):
    from transformers import get_linear_schedule_with_warmup

    config = small_run("lora", max_steps=25, warmup_ratio=0.1)
    trainee, _ = runner.prepare(config).build()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=config.learning_rate)
    stock = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * 25), 25)
    for number in range(25):
        assert trainee.rate(number) == pytest.approx(stock.get_last_lr()[0], rel=1e-12)
        optimizer.step()
        stock.step()
    assert trainee.rate(10**6) == 0.0


def test_the_optimiser_is_the_stock_trainers(small_run, tmp_path):
    """Same steps as transformers.Trainer on the same batches: the losses agree."""
    from transformers import Trainer, TrainingArguments

    config = small_run("full", dropout=0.0, max_steps=6)
    prepared = runner.prepare(config)

    def no_dropout(model):
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        return model

    ours, _ = prepared.build()
    no_dropout(ours.model)
    mine = []
    for number in range(6):
        mine.append(float(ours.step(number)[0]))
        ours.optimizer.zero_grad()
    # Stock can be given padded batches only; the losses are the same all the same.
    padded = runner.prepare(dataclasses.replace(config, padding="pad"))
    batches = [padded.train.at(n).parts[0] for n in range(6)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, n):
            return batches[n].inputs | {"labels": batches[n].labels}

    seen = []

    class Stock(Trainer):
        def compute_loss(self, model, inputs, **kwargs):
            loss = super().compute_loss(model, inputs, **kwargs)
            seen.append(float(loss.detach() if torch.is_tensor(loss) else loss[0]))
            return loss

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    fresh, _ = padded.build()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=1,
        max_steps=6,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=math.ceil(6 * config.warmup_ratio),
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        dataloader_pin_memory=False,
    )
    Stock(
        model=no_dropout(fresh.model),
        args=arguments,
        train_dataset=Rows(),
        data_collator=lambda rows: rows[0],
    ).train()
    assert len(seen) == 6
    assert mine == pytest.approx(seen, rel=1e-4)


def plainly_updated(trainee, number):
    """The update of a step as torch has it: clipping as a pass of its own, AdamW not fused."""
    for group in trainee.optimizer.param_groups:
        group["lr"] = trainee.rate(number)
    parameters = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, trainee.config.max_grad_norm)
    trainee.optimizer.step()
    return float(norm)


def five_steps(config, update=None):
    """Losses, parameters and gradient norms; `update` in the place of the trainee's own."""
    trainee, _ = runner.prepare(config).build()
    norms = []
    if update:
        groups = [dict(group, fused=False) for group in trainee.optimizer.param_groups]
        trainee.optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, foreach=False)
        trainee._update = lambda number: norms.append(update(trainee, number))
    losses = []
    for number in range(5):
        losses.append(float(trainee.step(number)[0]))
        trainee.optimizer.zero_grad()
    assert bool(trainee.optimizer.defaults["fused"]) == (update is None)
    named = {n: p.detach() for n, p in adapters.trainable(trainee.model)}
    return losses, named, norms


# Without biases of keys, whose gradients are rounding: AdamW would make them steps of any sign.
@pytest.mark.parametrize(("method", "family"), [("lora", "bert"), ("full", "llama")])
@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_folded_clipping_is_clip_grad_norm(method, family, limit, small_run):
    settings = {"max_grad_norm": limit, "warmup_ratio": 0.0, "weight_decay": 0.1}
    config = small_run(method, family, **settings)
    losses, named, _ = five_steps(config)
    plain_losses, plain, norms = five_steps(config, plainly_updated)
    assert all((norm > limit) == (limit < 1) for norm in norms)  # it bites, or never does
    assert losses == pytest.approx(plain_losses, rel=tolerances.FP32_REORDERED)
    for name, parameter in named.items():
        assert relative_error(parameter, plain[name]) < 10 * tolerances.FP32_REORDERED, name


def test_clipping_that_is_left_out_would_be_noticed(small_run):
    config = small_run("lora", max_grad_norm=0.05, warmup_ratio=0.0)
    losses, _, _ = five_steps(config)
    free, _, _ = five_steps(dataclasses.replace(config, max_grad_norm=1e3))
    assert losses != pytest.approx(free, rel=10 * tolerances.FP32_REORDERED)


def test_gradients_are_left_as_they_are_and_a_zero_one_is_no_trouble(small_run):
    """The optimiser divides in passing; a norm of zero is not divided by."""
    config = small_run("lora", max_grad_norm=1e-3, warmup_ratio=0.0)
    trainee, _ = runner.prepare(config).build()
    before = {n: p.detach().clone() for n, p in adapters.trainable(trainee.model)}
    for _, parameter in adapters.trainable(trainee.model):
        parameter.grad = torch.zeros_like(parameter)
    trainee._update(0)
    for name, parameter in adapters.trainable(trainee.model):
        decayed = before[name]
        if parameter.ndim > 1:
            decayed = decayed * (1 - config.learning_rate * config.weight_decay)
        torch.testing.assert_close(parameter.detach(), decayed)


def test_a_loss_that_is_not_finite_stops_the_run(small_run, tmp_path, quiet):
    config = small_run("full", learning_rate=1e30, profiler="none", warmup_ratio=0.0)
    with pytest.raises(TrainingError, match="lower --lr"):
        runner.train(config, tmp_path / "run", [], quiet)


def test_a_base_weight_that_changes_voids_the_run(small_run, tmp_path, quiet, monkeypatch):
    real = loop.Trainee.predict

    def meddling(self):
        frozen = next(p for p in self.model.parameters() if not p.requires_grad)
        frozen.data.view(-1)[0] += 1
        return real(self)

    monkeypatch.setattr(loop.Trainee, "predict", meddling)
    with pytest.raises(TrainingError, match="base weights changed"):
        runner.train(small_run("lora", profiler="none"), tmp_path / "run", [], quiet)


def test_warmup_and_evaluation_are_outside_the_divisor(small_run, tmp_path, quiet):
    config = small_run("lora", max_steps=14, padding="pad", profiler="none")
    folder = runner.train(config, tmp_path / "run", [], quiet)
    steps, timed = folder.read_steps(), folder.read_record().timed
    assert [s.warmup for s in steps] == [True] * 5 + [False] * 9
    seconds = sum(s.ns for s in steps[5:]) / 1e9
    assert timed.seconds == pytest.approx(seconds)
    assert timed.samples_per_s == pytest.approx(sum(s.samples for s in steps[5:]) / seconds)
    assert timed.real_tokens_per_s < timed.padded_tokens_per_s
    # 96 examples, a tenth held out, batch 8: an epoch is 11 steps
    assert [e.step for e in folder.read_evaluations()] == [11, 14]
    assert len(quiet.said) == 2


def test_a_run_of_warmup_only_has_no_figures(small_run, tmp_path, quiet):
    record = runner.train(small_run("lora", max_steps=3), tmp_path / "run", [], quiet).read_record()
    assert record.timed is None
    assert record.accuracy is not None
    assert record.profiled.overhead > 0
    assert record.profiled.same_losses
    assert record.energy.joules == {}


@pytest.mark.parametrize("padding", ["packed", "split", "pad"])
def test_the_predictions_are_those_the_accuracy_counts(padding, small_run, tmp_path, quiet):
    """One class an example, in the order of the data, however its batches are made."""
    config = small_run("lora", padding=padding, max_steps=8, profiler="none")
    folder = runner.train(config, tmp_path / "run", [], quiet)
    (last,) = folder.read_evaluations()
    prepared = runner.prepare(config)
    labels = prepared.validation.labels
    assert len(last.predicted) == len(labels) == last.accuracy.examples
    right = sum(a == b for a, b in zip(last.predicted, labels, strict=True))
    assert right == last.accuracy.correct
    if padding == "pad":
        trainee, _ = prepared.build()
        one_by_one = [
            int(trainee.model.eval()(**batch.parts[0].inputs).logits.argmax())
            for batch in (prepared.validation.collate([i]) for i in range(len(labels)))
        ]
        assert trainee.predict()[0] == tuple(one_by_one)
