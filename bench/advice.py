"""How far off are predictions of memory and time? Runs made, each beside its prediction.

    python -m bench.advice [--out FOLDER] [--steps 12] [--models minilm,bert-base-uncased]

Each run is `peftprof train --profiler none` in a process of its own; models that no one gives
away here have the shapes of the real ones and random weights, which take the same memory and
time. Runs come in an order that puts no method first, on a machine that should do nothing else;
runs that are there already are not made again. Predictions are as they would be on a device
where no run was ever compared, and then with what all the other runs teach. The last ways are those
of the first with other batches and lengths. Prints Markdown.
"""

import argparse
import itertools
import subprocess
import sys
from pathlib import Path

from peftprof.advice import CheckedRun
from peftprof.advise import advisor, check, shapes
from peftprof.advise.lessons import Lessons
from peftprof.report.advice import in_all

GIVEN = ("minilm", "smollm2-135m")
MODELS = ("minilm", "distilbert-base-uncased", "bert-base-uncased", "smollm2-135m")
# Method, kernels, rank, batch, tokens at most, precision, further options.
WAYS: tuple[tuple[str, str, int, int, int, str, tuple[str, ...]], ...] = (
    ("lora", "torch", 8, 16, 128, "bf16", ()),
    ("full", "torch", 8, 8, 128, "fp32", ()),
    ("qlora", "torch", 16, 32, 128, "bf16", ()),
    ("lora", "bnb", 8, 24, 64, "fp32", ("--padding", "pad")),
    ("lora", "torch", 64, 48, 128, "bf16", ("--checkpointing",)),
    ("full", "torch", 8, 24, 64, "bf16", ()),
)
# Ways as above with other batches and lengths: no constant is fitted on them, and what the runs
# above teach is for them.
OTHERS: tuple[tuple[str, str, int, int, int, str, tuple[str, ...]], ...] = (
    ("lora", "torch", 8, 40, 128, "bf16", ()),
    ("full", "torch", 8, 20, 48, "fp32", ()),
    ("qlora", "torch", 8, 12, 128, "bf16", ()),
)


def main() -> int:
    """Make what is missing, predict all, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("traces") / "advice")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--models", default=",".join(MODELS))
    options = parser.parse_args()
    made = []
    for way, model in itertools.product((*WAYS, *OTHERS), options.models.split(",")):
        run = options.out / name(model, way)
        if not (run / "run.json").exists():
            train(folder_of(model, options.out), run, way, options.steps)
        made.append(run)
    known = advisor.calibration("auto")
    first = [check.Checker(known, Lessons(known), with_parts=False).check(run) for run in made]
    taught = Lessons(known, tuple(first))
    then = [check.Checker(known, taught, with_parts=False).check(run) for run in made]
    print(table(first, then))
    return 0


def name(model: str, way: tuple[str, str, int, int, int, str, tuple[str, ...]]) -> str:
    """A run's folder, in words."""
    method, kernels, rank, batch, tokens, precision, further = way
    words = [model, method, *([] if method == "full" else [kernels, f"r{rank}"])]
    words += [f"b{batch}", f"t{tokens}", precision, *(w.strip("-") for w in further)]
    return "-".join(words)


def folder_of(model: str, out: Path) -> str:
    """What `train` knows the model by: a name, or a folder of random weights made for it."""
    if model in GIVEN:
        return model
    folder = out / "models" / model
    if not (folder / "config.json").exists():
        import torch
        from transformers import AutoModelForSequenceClassification

        from peftprof.run.source import load_tokenizer, locate

        torch.manual_seed(0)
        settings = shapes.find(model).config
        settings.pad_token_id = 0
        AutoModelForSequenceClassification.from_config(settings).save_pretrained(folder)
        load_tokenizer(locate("minilm")).save_pretrained(folder)
    return str(folder)


def train(
    model: str,
    run: Path,
    way: tuple[str, str, int, int, int, str, tuple[str, ...]],
    steps: int,
) -> None:
    """One run. Raises CalledProcessError where it fails."""
    method, kernels, rank, batch, tokens, precision, further = way
    words = ["--method", method, "--model", model, "--batch-size", batch, "--max-length", tokens]
    words += ["--precision", precision, "--max-steps", steps, "--profiler", "none", "--out", run]
    words += [] if method == "full" else ["--rank", rank, "--kernels", kernels]
    command = [sys.executable, "-m", "peftprof", "train", *map(str, words), *further]
    print(f"{run.name}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def table(first: list[CheckedRun], then: list[CheckedRun]) -> str:
    """Markdown: a row a run, measured, and the errors of both predictions."""
    lines = [
        "| run | peak, MiB | first | taught | step, ms | first | taught |",
        "|---|---|---|---|---|---|---|",
    ]
    for a, b in zip(first, then, strict=True):
        assert a.measured_bytes is not None
        assert a.measured_s is not None
        lines.append(
            f"| {a.name} | {a.measured_bytes / 2**20:.0f} | {percent(a.memory_error)} | "
            f"{percent(b.memory_error)} | {1e3 * a.measured_s:.0f} | {percent(a.time_error)} | "
            f"{percent(b.time_error)} |"
        )
    fitted = len(first) * len(WAYS) // (len(WAYS) + len(OTHERS))
    for what, runs in (
        ("first, the ways that constants were fitted on", first[:fitted]),
        ("first, the others", first[fitted:]),
        ("taught, the others", then[fitted:]),
    ):
        memory = [e for run in runs if (e := run.memory_error) is not None]
        time = [e for run in runs if (e := run.time_error) is not None]
        lines += ["", f"{what}: memory {in_all(memory)}; time {in_all(time)}"]
    return "\n".join(lines)


def percent(error: float | None) -> str:
    """An error, signed."""
    return "" if error is None else f"{100 * error:+.1f} %"


if __name__ == "__main__":
    raise SystemExit(main())
