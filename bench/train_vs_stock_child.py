"""One run of `bench.train_vs_stock` in a process of its own.

    python -m bench.train_vs_stock_child REQUEST

REQUEST is JSON: {"what": "stock" or "ours", "config": a RunConfig} or {"what": "ceilings",
"device", "precisions"}. Prints one JSON line; an error is one line on stderr, exit code 2.
"""

import dataclasses
import gc
import hashlib
import json
import math
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch

from peftprof.config import RunConfig
from peftprof.errors import PeftprofError, TrainingError
from peftprof.records import Memory
from peftprof.run import adapters, ceilings, runner
from peftprof.run.meters import PeakMemory
from peftprof.run.model import DTYPES

SIDES = ("stock", "ours")


class Watch:
    """The seconds and the memory of a run's steps, and what the process held before its model.

    A step goes from the end of the one before it to its own end, the device's work done:
    what is between two steps, fetching data say, is in it on both sides.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = PeakMemory(device)
        gc.collect()
        self._memory.start()
        self._held = self._memory.current_bytes()
        self._loading: Memory | None = None
        self._edges: list[float] = []

    def loaded(self) -> None:
        """The model is there; from here on the peak is the training's."""
        self._loading = self._memory.result()
        gc.collect()
        self._memory.start()

    def edge(self) -> None:
        """The first step begins, or a step has ended."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._edges.append(time.perf_counter())

    def result(self) -> dict[str, Any]:
        """Seconds by step, and bytes: of the allocator on CUDA, else resident on the host."""
        training = self._memory.result()
        assert self._loading is not None
        return {
            "seconds": [b - a for a, b in zip(self._edges, self._edges[1:], strict=False)],
            "held_bytes": self._held,
            "loading_peak_bytes": self._figure(self._loading),
            "peak_bytes": self._figure(training),
            "memory": dataclasses.asdict(training),
        }

    def _figure(self, memory: Memory) -> int | None:
        return memory.allocated_bytes if self._device.type == "cuda" else memory.rss_bytes


def stock(config: RunConfig) -> dict[str, Any]:
    """Train with the stock Trainer in our order of examples."""
    import transformers

    from bench import stock_trainer
    from bench.train_vs_stock_flops import ModelFlops

    prepared = runner.prepare(config)
    rows = stock_trainer.Rows(prepared.train)
    steps = config.max_steps or 0
    losses: list[torch.Tensor] = []
    shapes: list[torch.Size] = []

    class Edges(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            watch.edge()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.edge()

    def look(_: Any, args: Any, inputs: dict[str, torch.Tensor], output: Any) -> None:
        losses.append(output.loss.detach())
        shapes.append(inputs["input_ids"].shape)

    watch = Watch(torch.device(config.device))
    net = stock_trainer.load(prepared)
    with tempfile.TemporaryDirectory() as folder:
        kind = stock_trainer.OrderedTrainer
        edges = [Edges()]
        trainer = stock_trainer.make_trainer(kind, prepared, net, rows, folder, callbacks=edges)
        hook = net.register_forward_hook(look, with_kwargs=True)
        before = trainable_sha256(net)
        watch.loaded()
        trainer.train()
        found = watch.result()
        hook.remove()
    drawn = iter(rows.drawn)  # one batch more may have been fetched than was used
    order = [[next(drawn) for _ in range(shape[0])] for shape in shapes]
    lengths = [[prepared.train.lengths[i] for i in step] for step in order]
    net.train()
    example = trainer.data_collator([rows[0]]).to(config.device)
    family = prepared.family
    counted = ModelFlops.of(net, family.layers, example, narrow=family.pools == "first")
    usual = transformers.TrainingArguments().to_dict()
    # The loop's own folder: nothing that the training knows.
    usual |= {"output_dir": trainer.args.output_dir}
    arguments = {k: v for k, v in trainer.args.to_dict().items() if v != usual.get(k)}
    return found | {
        "losses": [float(loss) for loss in losses],
        "samples": [shape[0] for shape in shapes],
        "real_tokens": [sum(step) for step in lengths],
        "padded_tokens": [shape.numel() for shape in shapes],
        "flops": [counted.of_step(step) for step in lengths],
        "initial_sha256": before,
        "order_sha256": order_sha256(order),
        "drops_out": first_dropout(net),
        "settings": {
            "training_arguments": arguments,  # those that are not the default
            "optim": str(getattr(trainer.args.optim, "value", trainer.args.optim)),
            "attention": getattr(net.config, "_attn_implementation", None),
            "collator": "DataCollatorWithPadding, to the longest of the batch",
            "steps": steps,
        },
    }


def ours(config: RunConfig) -> dict[str, Any]:
    """Train with the runner's own steps, as its timed pass takes them."""
    prepared = runner.prepare(config)
    steps = range(config.max_steps or 0)
    losses: list[torch.Tensor] = []
    sizes: list[tuple[int, int, int]] = []
    watch = Watch(torch.device(config.device))
    trainee, _ = prepared.build()
    before = trainable_sha256(trainee.model)
    watch.loaded()
    watch.edge()
    for number in steps:
        loss, batch = trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
        losses.append(loss)
        sizes.append((batch.samples, batch.real_tokens, batch.padded_tokens))
        watch.edge()
    found = watch.result()
    return found | {
        "losses": [float(loss) for loss in losses],
        "samples": [size[0] for size in sizes],
        "real_tokens": [size[1] for size in sizes],
        "padded_tokens": [size[2] for size in sizes],
        "initial_sha256": before,
        "order_sha256": order_sha256([prepared.train.indices(n) for n in steps]),
        "drops_out": first_dropout(trainee.model),
        "settings": {
            "optim": type(trainee.optimizer).__name__,
            "attention": getattr(
                getattr(trainee.model, "config", None), "_attn_implementation", None
            ),
            "steps": len(steps),
        },
    }


def trainable_sha256(model: torch.nn.Module) -> str:
    """SHA-256 over all that is trained, names included."""
    digest = hashlib.sha256()
    for name, parameter in sorted(adapters.trainable(model), key=lambda item: item[0]):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        raw = parameter.detach().contiguous().cpu().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy())  # no copy of it, which would stand in the peak
    return digest.hexdigest()


def order_sha256(order: list[list[int]]) -> str:
    """SHA-256 over the examples of each step."""
    return hashlib.sha256(json.dumps([list(map(int, step)) for step in order]).encode()).hexdigest()


def first_dropout(model: torch.nn.Module) -> str | None:
    """A module that drops something out, and how much; None where none does."""
    for name, module in model.named_modules():
        rate = module.p if isinstance(module, torch.nn.Dropout) else 0.0
        own = (v for k, v in vars(module).items() if "dropout" in k and isinstance(v, float))
        if (most := max(rate, *own, 0.0)) > 0:
            return f"{name} {most}"
    return None


def measured(device: torch.device, precisions: list[str]) -> dict[str, Any]:
    """The device's fastest products and copy."""
    return dataclasses.asdict(ceilings.measure(device, [DTYPES[p] for p in precisions]))


def check(found: dict[str, Any]) -> None:
    """Raises TrainingError for a loss that is no number: its time would mean nothing."""
    for step, loss in enumerate(found["losses"]):
        if not math.isfinite(loss):
            raise TrainingError(f"the loss of step {step} is {loss}")


def main(argument: str) -> int:
    """Do what is asked, and print it."""
    warnings.simplefilter("ignore")
    request = json.loads(argument)
    try:
        if request["what"] == "ceilings":
            found = measured(torch.device(request["device"]), request["precisions"])
        else:
            train: Callable[[RunConfig], dict[str, Any]] = {"stock": stock, "ours": ours}[
                request["what"]
            ]
            found = train(RunConfig.from_json(request["config"]))
            found["threads"] = torch.get_num_threads()
            check(found)
    except PeftprofError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
