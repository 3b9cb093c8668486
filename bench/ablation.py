"""What is each saving in a training step worth? Each switched off alone, against all on.

    python -m bench.ablation [--methods lora,qlora] [--precision bf16] [--steps 40]

Two processes, one with all savings on and one with one of them off, train the same steps in
turn, step by step, one waiting while the other computes; which goes first changes every time.
So what disturbs the machine for longer than a step disturbs both. The figure is the median
over steps of a step's time over the same step's with all on, and the quartiles; the first
five steps do not count. The first line is all on against all on: a figure inside its quartiles
is no difference. docs/speed.md has what each was predicted to be worth. `NF4 weights`, off, is
LoRA: QLoRA's throughput over LoRA's.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.table import Table

from bench.command import make_console
from peftprof.config import METHODS, RunConfig, make_config
from peftprof.run import adapters, environment, frugal, loop, narrow, packing, runner

ALL = "all on"


def _pad(config: dict[str, Any]) -> None:
    config["padding"] = "pad"


def _one_group(_: dict[str, Any]) -> None:
    from peftprof.run import batches
    from peftprof_kernels.packed_attention import grouped

    vars(batches)["grouped"] = lambda lengths, cost=0: grouped(lengths, 10**12)


def _stock_dropout(_: dict[str, Any]) -> None:
    vars(frugal)["dropout"] = torch.nn.functional.dropout


def _torch_bits(_: dict[str, Any]) -> None:
    def draw(_: Any, n: int) -> Any:
        words = torch.empty((n + 7) // 8, dtype=torch.int64)
        return words.random_(-(2**63), None).view(torch.int8)[:n].numpy()

    vars(sys.modules["peftprof_kernels.dropout"])["random_bytes"] = draw


def _whole_last_layer(_: dict[str, Any]) -> None:
    def first_tokens(stack: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if (segments := kwargs.get("segments")) is not None:
            output["last_hidden_state"] = output.last_hidden_state[0, segments.first][:, None]
        return output

    vars(packing)["_first_tokens"] = first_tokens
    vars(narrow)["prepare"] = lambda *_: None


def _any_length(_: dict[str, Any]) -> None:
    vars(packing)["BUCKET"] = 1


def _round_each_step(_: dict[str, Any]) -> None:
    vars(frugal)["_round_frozen"] = lambda *_: None


def _apart(_: dict[str, Any]) -> None:
    vars(adapters)["SHARE_INPUT"] = ()


def _own_dequantise(_: dict[str, Any]) -> None:
    vars(adapters)["_use_native_dequantise"] = lambda *_: None


def _dense_weights(config: dict[str, Any]) -> None:
    config["method"] = "lora"


def _clip_apart(_: dict[str, Any]) -> None:
    def update(self: Any, number: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(number)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        self.optimizer.step()

    loop.Trainee._update = update  # type: ignore[method-assign]


# What is switched off, where it applies (methods, precisions), and how.
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[dict[str, Any]], None]]] = {
    "padded batches": (METHODS, ("fp32", "bf16"), _pad),
    "attention padded to one length": (METHODS, ("fp32", "bf16"), _one_group),
    "torch's dropout": (METHODS, ("fp32", "bf16"), _stock_dropout),
    "random bits from torch": (METHODS, ("fp32", "bf16"), _torch_bits),
    "last layer for all tokens": (METHODS, ("fp32", "bf16"), _whole_last_layer),
    "any number of tokens": (METHODS, ("bf16",), _any_length),
    "frozen weights rounded in each step": (("lora",), ("bf16",), _round_each_step),
    "each adapter by itself": (("lora", "qlora"), ("fp32", "bf16"), _apart),
    "dequantised by library operations": (("qlora",), ("fp32", "bf16"), _own_dequantise),
    "NF4 weights": (("qlora",), ("fp32", "bf16"), _dense_weights),
    "clipping as a pass of its own": (METHODS, ("fp32", "bf16"), _clip_apart),
}


def serve(config: RunConfig) -> None:
    """Take a step for each line of stdin, and print how many seconds it took."""
    trainee, _ = runner.prepare(config).build()
    for number, _ in enumerate(sys.stdin):
        started = time.perf_counter()
        trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
        print(time.perf_counter() - started, flush=True)


class Worker:
    """A process that trains with one saving off, a step whenever it is asked."""

    def __init__(self, variant: str, settings: dict[str, Any]) -> None:
        self.variant = variant
        command = [sys.executable, "-W", "ignore", "-m", "bench.ablation", "--child"]
        self.process = subprocess.Popen(
            [*command, json.dumps([variant, settings])],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> float:
        """Seconds of the next step. Raises RuntimeError when the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # told below, and the reason by the process
            print(file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the run of {self.variant!r} ended")
        return float(answer)

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.communicate()  # end of its input


def applicable(settings: dict[str, Any], wanted: list[str] | None) -> list[str]:
    """The variants that change something for this method and precision, of those wanted."""
    method, precision = settings["method"], settings["precision"]
    names = [n for n, (m, p, _) in VARIANTS.items() if method in m and precision in p]
    return [n for n in names if not wanted or n in wanted]


def measure(variant: str, settings: dict[str, Any]) -> list[float]:
    """Of each step after the warm-up: its time with the variant over that with all on."""
    ratios = []
    with Worker(ALL, settings) as on, Worker(variant, settings) as off:
        for number in range(settings["max_steps"]):
            turns = (on, off) if number % 2 == 0 else (off, on)
            seconds = {id(worker): worker.step() for worker in turns}
            ratios.append(seconds[id(off)] / seconds[id(on)])
    return ratios[loop.WARMUP_STEPS :]


def main() -> int:
    """Run it as the command line asks."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.ablation", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--methods", default="lora", help=f"of {', '.join(METHODS)}; lora")
    own = environment.default_precision("cpu")
    parser.add_argument("--precision", default=own, choices=("fp32", "bf16"), help=f"here {own}")
    parser.add_argument("--steps", type=int, default=40, help="optimiser steps a variant (40)")
    parser.add_argument("--model", default="minilm", help="as of train (minilm)")
    parser.add_argument("--batch-size", type=int, default=32, help="examples a step (32)")
    parser.add_argument(
        "--variant",
        action="append",
        choices=list(VARIANTS),
        help="only this one; may repeat",
        metavar="NAME",
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        variant, settings = json.loads(given.child)
        if variant != ALL:
            VARIANTS[variant][2](settings)
        config = make_config(settings.pop("method"), **settings)
        serve(runner.resolve(config))
        return 0
    if wrong := set(given.methods.split(",")) - set(METHODS):
        parser.error(f"{min(wrong)!r} is not one of {', '.join(METHODS)}")
    if given.steps < loop.WARMUP_STEPS + 4:
        parser.error(f"--steps wants {loop.WARMUP_STEPS + 4} or more")
    console = make_console()
    for method in given.methods.split(","):
        settings = {
            "method": method,
            "precision": given.precision,
            "model": given.model,
            "batch_size": given.batch_size,
            "max_steps": given.steps,
            "profiler": "none",
            "device": "cpu",
        }
        table = Table("switched off", "step, times all on", "quartiles", box=None)
        for name in [ALL, *applicable(settings, given.variant)]:
            try:
                low, middle, high = statistics.quantiles(measure(name, settings), n=4)
            except (RuntimeError, KeyboardInterrupt) as error:
                print(f"bench.ablation: {error or 'interrupted'}", file=sys.stderr)
                return 2 if isinstance(error, RuntimeError) else 130
            table.add_row(name, f"{middle:.2f}", f"{low:.2f}-{high:.2f}")
            print(f"{method}, {name}: {middle:.3f}", file=sys.stderr)
        console.print(f"\n{method} {given.precision}, {torch.get_num_threads()} threads")
        console.print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
