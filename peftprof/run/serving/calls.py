"""One call of a served model: its choice, on the host, as a server would send it on.

A call lasts until the chosen classes or tokens are there, so on a GPU it waits for it. A
classifier has one phase, `forward`. A language model has `prefill`, the prompt and the first
token, and `decode`, each further token from the keys and values that are kept.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from peftprof.run.source import one_line

Clock = Callable[[], int]  # nanoseconds
CLOCK: Clock = time.perf_counter_ns

OUT_OF_MEMORY = (MemoryError, RuntimeError)  # the CPU's allocator has no exception of its own
NO_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def out_of_memory(error: BaseException) -> str:
    """That and how memory ran out; raises `error` itself where it is about something else."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    if not known and not any(words in str(error) for words in NO_MEMORY):
        raise error
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    return f"out of memory: {one_line(error, 120)}"


def classify(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The class of each of `ids` [batch, length]."""
    choice: torch.Tensor = model(input_ids=ids).logits.argmax(-1).cpu()
    return choice


def prefill(model: Any, ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """The token that follows each of `ids` [batch, length], and what is kept of these."""
    out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    return out.logits[:, -1].argmax(-1).cpu(), out.past_key_values


def decode(model: Any, ids: torch.Tensor, kept: Any) -> torch.Tensor:
    """The token that follows `ids` [batch, 1], which are added to what is kept."""
    out = model(input_ids=ids, use_cache=True, past_key_values=kept, logits_to_keep=1)
    choice: torch.Tensor = out.logits[:, -1].argmax(-1).cpu()
    return choice


@torch.inference_mode()
def greedy(model: Any, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    """The next `tokens` of each of `ids` [batch, length]: [batch, tokens], on the host."""
    choice, kept = prefill(model, ids)
    chosen = [choice]
    for _ in range(tokens - 1):
        chosen.append(decode(model, chosen[-1].to(ids.device).unsqueeze(1), kept))
    return torch.stack(chosen, dim=1)


class Timed:
    """Calls of one phase on one batch; `count` gives their durations in nanoseconds.

    `ids` are [batch, length] and, in decode, what is given as the tokens that were made, so
    that every variant computes on the same: [batch, length + tokens].
    """

    def __init__(
        self, model: Any, phase: str, ids: torch.Tensor, length: int, clock: Clock = CLOCK
    ) -> None:
        self.model, self.phase, self.length, self.clock = model, phase, length, clock
        self.ids = ids if phase == "decode" else ids[:, :length]

    def warm(self) -> int:
        """A call that counts nowhere, and how long it took."""
        return self._count(1, self.ids[:, : self.length + 1], _nothing, _nothing)[0]

    def count(self, calls: int, resume: Callable[[], None], pause: Callable[[], None]) -> list[int]:
        """At least `calls` calls; `resume` and `pause` go round what is timed.

        In decode the prompts are not timed, and every sequence is made to its end.
        """
        return self._count(calls, self.ids, resume, pause)

    @torch.inference_mode()
    def _count(
        self,
        calls: int,
        ids: torch.Tensor,
        resume: Callable[[], None],
        pause: Callable[[], None],
    ) -> list[int]:
        found: list[int] = []
        while len(found) < calls:
            if self.phase == "decode":
                _, kept = prefill(self.model, ids[:, : self.length])
                resume()
                for n in range(self.length, ids.shape[1]):
                    found.append(self._timed(decode, ids[:, n : n + 1], kept))
            else:
                resume()
                call = classify if self.phase == "forward" else prefill
                found += [self._timed(call, ids) for _ in range(calls)]
            pause()
        return found

    def _timed(self, call: Callable[..., object], *arguments: Any) -> int:
        begun = self.clock()
        call(self.model, *arguments)
        return self.clock() - begun


def _nothing() -> None: ...
