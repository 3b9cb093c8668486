"""Stock transformers.Trainer + PEFT + bitsandbytes on a run's own model, data and settings.

    python -m bench.stock_trainer --method lora --max-steps 100

The comparison for `python -m peftprof train` with the same options: same examples, same
tokenizer and cut, same optimiser, schedule, clipping and seed. Stock draws its own batch
order. Prints one JSON line. Samples/s is over the steps after the first five, as a run's
own figure is, evaluation and checkpoints left out.
"""

import argparse
import json
import logging
import platform
import tempfile
import time
from typing import Any

import torch
import transformers
from peft import LoraConfig, TaskType, get_peft_model

from peftprof.config import RunConfig, make_config
from peftprof.errors import DeviceError
from peftprof.run import batches, loop, model, runner
from peftprof.run.statistics import wilson


class _Rows(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, examples: batches.Batches) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples.labels)

    def __getitem__(self, i: int) -> dict[str, Any]:
        row = {name: column[i] for name, column in self.examples.columns.items()}
        return row | {"labels": self.examples.labels[i]}


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
    net = model.load_model(
        prepared.source,
        config,
        prepared.family,
        prepared.loaded.info.labels,
        prepared.tokenizer.pad_token_id,
    )
    if config.method != "full":
        for module in net.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False  # else evaluation ends the training
        net = get_peft_model(
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
    with tempfile.TemporaryDirectory() as folder:
        arguments = transformers.TrainingArguments(
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
        trainer = transformers.Trainer(
            model=net,
            args=arguments,
            train_dataset=_Rows(prepared.train),
            eval_dataset=_Rows(prepared.validation),
            data_collator=transformers.DataCollatorWithPadding(prepared.tokenizer),
            callbacks=[clock],
            compute_metrics=lambda p: {
                "correct": int((p.predictions.argmax(-1) == p.label_ids).sum())
            },
        )
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if arguments.n_gpu > 1:
            raise DeviceError("stock Trainer would use every GPU; set CUDA_VISIBLE_DEVICES to one")
        trained = trainer.train()
        correct = trainer.evaluate()["eval_correct"]
    examples = len(prepared.validation.labels)
    low, high = wilson(correct, examples)
    steps = range(loop.WARMUP_STEPS, trained.global_step)
    samples = sum(len(prepared.train.at(n).labels) for n in steps)
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
