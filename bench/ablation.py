"""What is each saving in a training step worth? Each switched off alone, against all on.

    python -m bench.ablation [--methods lora,qlora] [--precision bf16] [--rounds 3]

Every run is a process of its own; a round runs every variant once, every second round
backwards, with all savings on at both ends. The figure of a variant is its median step over
that of all on, in the same round; where it does not exceed how far the two runs with all on
lay apart, it is no difference. Steps after the first five count. docs/speed.md has what
each was predicted to be worth.
"""

import argparse
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
from peftprof.run import adapters, frugal, loop, narrow, packing, runner

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
    "clipping as a pass of its own": (METHODS, ("fp32", "bf16"), _clip_apart),
}


def run(config: RunConfig) -> dict[str, float]:
    """The median step of a run, in milliseconds, after the warm-up."""
    trainee, _ = runner.prepare(config).build()
    durations = []
    for number in range(config.max_steps or 1):
        started = time.perf_counter_ns()
        trainee.step(number)
        trainee.optimizer.zero_grad(set_to_none=True)
        durations.append((time.perf_counter_ns() - started) / 1e6)
    counted = durations[loop.WARMUP_STEPS :]
    return {"p50_ms": statistics.median(counted), "mean_ms": statistics.mean(counted)}


def _child(variant: str, settings: dict[str, Any]) -> dict[str, float]:
    command = [sys.executable, "-W", "ignore", "-m", "bench.ablation", "--child"]
    done = subprocess.run(
        [*command, json.dumps([variant, settings])], capture_output=True, text=True, check=True
    )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def measure(settings: dict[str, Any], rounds: int) -> dict[str, list[float]]:
    """For each variant its mean step over that of all on, by round; ALL is the self-pair."""
    method, precision = settings["method"], settings["precision"]
    names = [n for n, (m, p, _) in VARIANTS.items() if method in m and precision in p]
    ratios: dict[str, list[float]] = {name: [] for name in (ALL, *names)}
    for number in range(rounds):
        first = _child(ALL, settings)
        between = {n: _child(n, settings) for n in (names if number % 2 == 0 else names[::-1])}
        last = _child(ALL, settings)
        base = (first["mean_ms"] + last["mean_ms"]) / 2
        ratios[ALL].append(max(first["mean_ms"], last["mean_ms"]) / base)
        for name, result in between.items():
            ratios[name].append(result["mean_ms"] / base)
        print(f"round {number + 1}: all on {base:.1f} ms", file=sys.stderr)
    return ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default="lora")
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        variant, settings = json.loads(given.child)
        if variant != ALL:
            VARIANTS[variant][2](settings)
        config = make_config(settings.pop("method"), **settings)
        print(json.dumps(run(runner.resolve(config))))
        return
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
        table = Table("switched off", "step, times all on", "min-max", box=None)
        for name, ratios in measure(settings, given.rounds).items():
            middle = f"{statistics.median(ratios):.2f}"
            table.add_row(name, middle, f"{min(ratios):.2f}-{max(ratios):.2f}")
        console.print(f"\n{method} {given.precision}, {torch.get_num_threads()} threads")
        console.print(table)


if __name__ == "__main__":
    main()
