"""Stock transformers.Trainer + PEFT + bitsandbytes on a run's own model, data and settings.

    python -m bench.stock_trainer --method lora --max-steps 100

The comparison for `python -m peftprof train` with the same options: same examples, same
tokenizer and cut, same optimiser, schedule, clipping and seed. Stock draws its own batch
order (`bench.train_vs_stock` gives it ours). Prints one JSON line. Samples/s is over the
steps after the first five, as a run's own figure is, evaluation and checkpoints left out.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

from peftprof.config import RunConfig, make_config
from peftprof.errors import DeviceError
from peftprof.run import batches, loop, model, runner
from peftprof.run.statistics import wilson


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Examples as the collator takes them without converting: lists of numbers.

    `drawn` are the examples that were asked for, in order.
    """

    def __init__(self, examples: batches.Batches) -> None:
        self.examples = examples
        columns = {k: [row.tolist() for row in rows] for k, rows in examples.columns.items()}
        self._rows = [
            {name: column[i] for name, column in columns.items()} | {"labels": int(label)}
            for i, label in enumerate(examples.labels)
        ]
        self.drawn: list[int] = []

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.drawn.append(i)
        return self._rows[i]


class OurOrder(torch.utils.data.Sampler[int]):
    """The examples of `Batches.at`, epoch after epoch, one epoch each time it is iterated."""

    def __init__(self, examples: batches.Batches) -> None:
        self._examples = examples
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._examples.labels)

    def __iter__(self) -> Iterator[int]:
        first = self._epoch * self._examples.per_epoch
        self._epoch += 1
        for step in range(first, first + self._examples.per_epoch):
            yield from self._examples.indices(step)


class OrderedTrainer(transformers.Trainer):
    """Stock but for one thing: it draws the examples in our order."""

    def _get_train_sampler(self, train_dataset: Any = None) -> OurOrder:
        return OurOrder((self.train_dataset if train_dataset is None else train_dataset).examples)


def load(prepared: runner.Prepared) -> Any:
    """The model with stock PEFT's adapter, from the same random numbers as a run's."""
    config = prepared.config
    net: Any = model.load_model(
        prepared.source,
        config,
        prepared.family,
        prepared.loaded.info.labels,
        prepared.tokenizer.pad_token_id,
    )
    if config.method == "full":
        return net
    for module in net.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # else evaluation ends the training
    return get_peft_model(
        net,
        LoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.rank,
            lora_alpha=config.scaling * config.rank,
            lora_dropout=config.dropout,
            target_modules=list(prepared.family.targets),
            modules_to_save=list(prepared.family.head),
        ),
    )


def arguments(config: RunConfig, folder: str) -> transformers.TrainingArguments:
    """The run's hyperparameters; all else is the Trainer's default, its fused AdamW too."""
    return transformers.TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=2 * config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_ratio,
        max_grad_norm=config.max_grad_norm,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        lr_scheduler_type="linear",
        bf16=config.precision == "bf16",
        fp16=config.precision == "fp16",
        use_cpu=config.device == "cpu",
        seed=config.seed,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
    )


def make_trainer(
    kind: type[transformers.Trainer],
    prepared: runner.Prepared,
    net: Any,
    rows: Rows,
    folder: str,
    **further: Any,
) -> transformers.Trainer:
    """A `kind` of Trainer that pads to the longest of the batch and keeps nothing in `folder`.

    Raises DeviceError where it would compute elsewhere than the run.
    """
    chosen = arguments(prepared.config, folder)
    if chosen.n_gpu > 1 or torch.device(prepared.config.device).index:
        raise DeviceError(
            "stock Trainer uses every GPU, cuda:0 first; set CUDA_VISIBLE_DEVICES to one"
        )
    trainer = kind(
        model=net,
        args=chosen,
        train_dataset=rows,
        data_collator=transformers.DataCollatorWithPadding(prepared.tokenizer),
        **further,
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    return trainer


class _Clock(transformers.TrainerCallback):
    """When the optimiser steps after the warm-up begin and end."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self.ended = 0.0

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == loop.WARMUP_STEPS:
            self.started = self._now()
        if state.global_step == state.max_steps:
            self.ended = self._now()


def run(config: RunConfig) -> dict[str, Any]:
    """Train and evaluate as a user of the stock libraries would."""
    clock = _Clock(torch.device(config.device))
    prepared = runner.prepare(config)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            transformers.Trainer,
            prepared,
            load(prepared),
            Rows(prepared.train),
            folder,
            eval_dataset=Rows(prepared.validation),
            callbacks=[clock],
            compute_metrics=lambda p: {
                "correct": int((p.predictions.argmax(-1) == p.label_ids).sum())
            },
        )
        trained = trainer.train()
        correct = trainer.evaluate()["eval_correct"]
    examples = len(prepared.validation.labels)
    low, high = wilson(correct, examples)
    steps = range(loop.WARMUP_STEPS, trained.global_step)
    samples = sum(len(prepared.train.indices(n)) for n in steps)
    return {
        "what": "stock Trainer + PEFT + bitsandbytes",
        "config": config.to_json(),
        "accuracy": correct / examples,
        "interval": [low, high],
        "samples_per_s": samples / (clock.ended - clock.started),
        "seconds": clock.ended - clock.started,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="qlora")
    parser.add_argument("--model")
    parser.add_argument("--dataset")
    parser.add_argument("--lr", type=float)
    parser.add_argument("--epochs", type=float)
    parser.add_argument("--max-steps", type=int)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--precision")
    parser.add_argument("--device")
    parser.add_argument("--seed", type=int)
    given = vars(parser.parse_args())
    given["learning_rate"] = given.pop("lr")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    print(json.dumps(run(runner.resolve(make_config(given.pop("method"), **given)))))


if __name__ == "__main__":
    main()
