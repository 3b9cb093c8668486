"""What can a 4 GB board fine-tune? By prediction, and what the same runs take on this machine.

    python -m bench.boards [--device "raspberry pi 4"] [--memory 3.7GiB] [--steps 6]
                           [--models distilbert-base-uncased,...] [--out FOLDER] [--measure]

For each model and method the largest batch that fits, without checkpointing if it does. With
`--measure` that run is made here, where time and libraries are others', but the same tensors
are held: its own prediction for this machine stands beside what it took. Prints Markdown.
"""

import argparse
import dataclasses
from pathlib import Path

from bench.advice import folder_of, percent, train
from peftprof.advice import Prediction
from peftprof.advise import advisor, check
from peftprof.advise.advisor import Wanted
from peftprof.advise.lessons import Lessons
from peftprof.cli_advise import memory_of
from peftprof.config import METHODS

MODELS = ("minilm", "distilbert-base-uncased", "bert-base-uncased", "smollm2-135m", "qwen2.5-0.5b")
TOKENS = 128
MIB = 2**20


def main() -> int:
    """Predict, run what is asked for, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="raspberry pi 4")
    parser.add_argument("--memory", default=None)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("traces") / "boards")
    parser.add_argument("--measure", action="store_true")
    options = parser.parse_args()
    head = "| model | method | batch | ckpt | peak, MiB | loading | a step | examples/s |"
    if options.measure:
        head += " here: peak | predicted | loading | predicted |"
    print(head)
    print("|" + "---|" * (head.count("|") - 1))
    for model in options.models.split(","):
        for method in METHODS:
            best = chosen(model, method, options.device, options.memory)
            print(row(model, method, best, options), flush=True)
    return 0


def chosen(model: str, method: str, device: str, memory: str | None) -> Prediction | None:
    """The largest batch that fits, without checkpointing if it does; None where nothing fits."""
    subject = advisor.subject(model, device, TOKENS, "auto", ())
    wanted = Wanted((method,), (8,), (1, 2, 4, 8, 16), ("fp32",), (), ("torch",))
    limit = subject.device.memory_bytes if memory is None else memory_of(memory)
    advice = advisor.advise(dataclasses.replace(subject, lessons=None), limit, wanted)
    return max(
        advice.predictions[: advice.fitting],
        key=lambda p: (p.choice.batch_size, not p.choice.checkpointing),
        default=None,
    )


def row(model: str, method: str, best: Prediction | None, options: argparse.Namespace) -> str:
    """A line of the table, its run made first if it is asked for."""
    if best is None:
        return f"| {model} | {method} | nothing fits |" + " |" * (9 if options.measure else 5)
    c = best.choice
    assert best.step_s is not None
    cells = [model, method, str(c.batch_size), "yes" if c.checkpointing else ""]
    cells += [f"{best.peak_bytes / MIB:.0f}", f"{best.loading_bytes / MIB:.0f}"]
    cells += [f"{best.step_s:.0f} s", f"{c.batch_size / best.step_s:.2f}"]
    if options.measure:
        run = options.out / f"{model}-{method}"
        if not (run / "run.json").exists():
            further = ("--checkpointing",) if c.checkpointing else ()
            way = (method, "torch", 8, c.batch_size, TOKENS, "fp32", further)
            train(folder_of(model, options.out), run, way, options.steps)
        known = advisor.calibration("cpu")
        one = check.Checker(known, Lessons(known), with_parts=False).check(run)
        assert one.measured_bytes is not None
        assert one.loading_bytes is not None
        assert one.predicted_loading_bytes is not None
        off = one.predicted_loading_bytes / one.loading_bytes - 1
        cells += [f"{one.measured_bytes / MIB:.0f}", percent(one.memory_error)]
        cells += [f"{one.loading_bytes / MIB:.0f}", percent(off)]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    raise SystemExit(main())
