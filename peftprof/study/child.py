"""One task of a study in a process of its own: a run that dies takes nothing with it.

    python -m peftprof.study.child      reads one request, a line of JSON, from stdin

Requests: {"do": "settle", "configs", "at_most"} answers {"configs", "labels"}: every setting `auto`
settled on this machine, runs of whole epochs cut to `at_most` steps unless that is None,
everything that can be wrong with the input found; {"do": "run", "config",
"folder", "forgetting"} makes a run, or goes on with it; {"do": "audit", "ranks"}. Answers are lines
of JSON on stdout: progress, then {"done"} or {"error", "kind"}. stdin stays open: when it ends, its
writer is gone, and so is this process, so that no run goes on for a study that has ended.
"""

import dataclasses
import json
import math
import os
import shutil
import sys
import threading
import time
from pathlib import Path
from typing import Any

from peftprof.errors import BusyError, PeftprofError

WAITS = 40  # of half a second


def main() -> int:
    """Answer the request on stdin. Exit 0; 2 with the error's line in the answer."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_writer, daemon=True).start()
    try:
        tasks: dict[str, Any] = {"settle": settle, "run": run, "audit": audit}
        answer = tasks[request.pop("do")](**request)
    except PeftprofError as error:
        say({"error": str(error), "kind": type(error).__name__})
        return 2
    say({"done": answer})
    return 0


def _end_with_the_writer() -> None:
    sys.stdin.read()
    os._exit(1)


def say(value: dict[str, Any]) -> None:
    """One line of an answer."""
    print(json.dumps(value), flush=True)


def settle(configs: list[dict[str, Any]], at_most: int | None = None) -> dict[str, Any]:
    """Each configuration resolved, and the classes of the validation examples.

    Raises the errors of a run for what is wrong with any of them, before one has started.
    """
    from peftprof.config import RunConfig
    from peftprof.run import environment, runner

    settled = [runner.resolve(RunConfig.from_json(config)) for config in configs]
    labels: list[int] = []
    seen: dict[str, Any] = {}
    for place, config in enumerate(settled):
        data = {
            key: value
            for key, value in config.to_json().items()
            if key
            in ("model", "dataset", "max_length", "batch_size", "subset", "evaluate_on", "padding")
        }
        if (key := json.dumps(data)) not in seen:
            seen[key] = runner.prepare(config)
            if config.evaluate_on == "validation":
                labels = list(seen[key].validation.labels)
        steps = math.ceil(config.epochs * seen[key].train.per_epoch)
        if at_most is not None and config.max_steps is None and at_most < steps:
            settled[place] = dataclasses.replace(config, max_steps=at_most)
    # A rank above a layer's width, or a layer that is not there, shows when it is attached.
    largest: dict[Any, RunConfig] = {}
    for config in sorted(settled, key=lambda config: config.rank):
        if config.method != "full":
            largest[config.model, config.target_modules] = config
    for config in largest.values():
        runner.prepare(config).build()
    return {
        "configs": [config.to_json() for config in settled],
        "labels": labels,
        "environment": environment.describe(),
    }


def run(config: dict[str, Any], folder: str, forgetting: str | None) -> None:
    """The run of `config` in `folder`, from wherever it is; then, if asked for, its forgetting."""
    from peftprof.config import RunConfig
    from peftprof.run import runner
    from peftprof.run.folder import RunFolder
    from peftprof.study import forgetting as general

    path = Path(folder)
    if path.exists():
        _wait_for(RunFolder(path))
        if not (path / "run.json").exists():
            shutil.rmtree(path)  # killed before it had begun
    if not path.exists():
        runner.train(RunConfig.from_json(config), path, [], Told())
    elif RunFolder.open(path).read_record().state != "complete":
        runner.resume(path, Told())
    if forgetting is not None:
        general.record(RunFolder.open(path), Path(forgetting))


def _wait_for(folder: Any) -> None:
    """A process whose study was killed takes a moment to notice, and holds the folder until then.

    Raises BusyError when it does not let go.
    """
    for left in reversed(range(WAITS)):
        try:
            with folder.held(new=False):
                return
        except BusyError:
            if not left:
                raise
        time.sleep(0.5)


def audit(ranks: list[int]) -> list[dict[str, Any]]:
    """Trainable parameters of the paper's model, counted."""
    from peftprof.records import encode
    from peftprof.study.audit import audit as count

    return [encode(one) for one in count(ranks)]


class Told:
    """A watcher that tells the study."""

    def begin(self, what: str, total: int, done: int) -> None:
        """A pass starts."""
        say({"begin": what, "total": total, "step": done})

    def steps(self, done: int, loss: float, samples_per_s: float, memory_bytes: int | None) -> None:
        """Steps are behind."""
        say({"step": done, "loss": loss, "samples_per_s": samples_per_s})

    def say(self, text: str) -> None:
        """What happened is in the run's own files."""


if __name__ == "__main__":
    sys.exit(main())
