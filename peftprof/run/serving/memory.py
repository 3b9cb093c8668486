"""What a variant takes, alone in a process of its own.

    python -m peftprof.run.serving.memory      reads one request, a line of JSON, from stdin

The request: {"plan", "variant", "decode", "cells": [[phase, batch, length], ...]}. Answers are
lines of JSON: {"weight_bytes", "loaded_bytes"}, then for each cell {"peak_bytes", "absent"}, or
{"error"}. stdin stays open: when it ends its writer is gone, and so is this process.

On CUDA the peak is the allocator's. A CPU knows resident memory only, of a process with all its
libraries; the peak is counted from just before the calls.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftprof.errors import InferenceError, PeftprofError
from peftprof.inferences import Footprint

Key = tuple[str, int, int]  # phase, batch, length

MEANS = {
    "cuda": "the allocator's peak, a process for each variant",
    "cpu": "resident memory, libraries included, a process for each variant",
}


@dataclass(frozen=True)
class Peaks:
    """What a variant took: by cell the peak, or why there is none."""

    footprint: Footprint | None
    bytes: dict[Key, int]
    absent: dict[Key, str]


def measure(plan: dict[str, Any], variant: str, decode: int, cells: Sequence[Key]) -> Peaks:
    """Start a process that builds `variant` and calls it once for each of `cells`.

    Where it cannot build, or is killed, the cells that it has not answered have no figure.
    """
    request = {
        "plan": plan,
        "variant": variant,
        "decode": decode,
        "cells": [list(c) for c in cells],
    }
    process = subprocess.Popen(
        [sys.executable, "-m", __name__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
    )
    answers = []
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            answers.append(json.loads(line))
            if len(answers) == len(cells) + 1 or "error" in answers[-1]:
                break
    except BrokenPipeError:  # how it ended is told below
        pass
    finally:
        process.communicate()
    return _peaks(answers, variant, cells, process.returncode)


def _peaks(answers: list[dict[str, Any]], variant: str, cells: Sequence[Key], code: int) -> Peaks:
    why = _how(code)
    if answers and "error" in answers[-1]:
        why = answers.pop()["error"]
    found = Peaks(Footprint(variant, **answers[0]) if answers else None, {}, {})
    for number, cell in enumerate(cells, start=1):
        answer: dict[str, Any] = {"absent": why}
        if number < len(answers):
            answer = answers[number]
        if answer.get("peak_bytes") is not None:
            found.bytes[cell] = answer["peak_bytes"]
        else:
            found.absent[cell] = answer["absent"]
    return found


def _how(code: int) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed; the machine may have run out of memory"
    return f"its process ended with exit code {code}"


def main() -> int:
    """Answer the request on stdin. Exit 0; 2 with the error's line in the answer."""
    request = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_writer, daemon=True).start()
    try:
        _answer(**request)
    except PeftprofError as error:
        _say({"error": str(error)})
        return 2
    return 0


def _end_with_the_writer() -> None:
    sys.stdin.read()
    os._exit(1)


def _say(value: dict[str, Any]) -> None:
    print(json.dumps(value), flush=True)


def _answer(plan: dict[str, Any], variant: str, decode: int, cells: list[list[Any]]) -> None:
    import gc

    import torch

    from peftprof.run.meters import PeakMemory, give_back
    from peftprof.run.serving.calls import OUT_OF_MEMORY, out_of_memory
    from peftprof.run.serving.served import Plan, Served
    from peftprof.run.serving.tokens import Tokens

    served = Served.of(Plan.from_json(plan))
    try:
        model = served.build(variant)
    except OUT_OF_MEMORY as error:
        raise InferenceError(out_of_memory(error)) from error
    gc.collect()
    give_back()
    meter = PeakMemory(torch.device(served.config.device))
    loaded = meter.current_bytes()
    _say({"weight_bytes": weight_bytes(model), "loaded_bytes": loaded})
    tokens = Tokens.drawn(served.tokenizer, served.config.seed, decode > 0)
    for phase, batch, length in cells:
        _say(_cell(model, meter, tokens, served.config.device, (phase, batch, length), decode))


def _cell(
    model: Any, meter: Any, tokens: Any, device: str, cell: Key, decode: int
) -> dict[str, Any]:
    from peftprof.run.meters import give_back
    from peftprof.run.serving.calls import OUT_OF_MEMORY, Timed, out_of_memory

    phase, batch, length = cell
    give_back()
    meter.start()
    try:
        ids = tokens.at(batch, length, decode if phase == "decode" else 0).to(device)
        Timed(model, phase, ids, length).warm()
    except OUT_OF_MEMORY as error:
        return {"peak_bytes": None, "absent": out_of_memory(error)}
    taken = meter.result()
    if device.startswith("cuda"):
        return {"peak_bytes": taken.allocated_bytes, "absent": None}
    # A peak that cannot be counted from here is that of building the model.
    absent = taken.absent.get("rss_reset")
    return {"peak_bytes": None if absent else taken.rss_bytes, "absent": absent}


def weight_bytes(model: Any) -> int:
    """Bytes of a model's tensors: weights as stored, quantisation state, buffers; once each."""
    from peftprof.run import adapters

    found = [*model.parameters(), *model.buffers(), *adapters.quantisation_state(model)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
    return sum(storages.values())


if __name__ == "__main__":
    sys.exit(main())
