"""Named ranges around each piece of an operation, heard only while somebody listens.

A profiler's ranges cost time even when nothing records them, and the backward of an
operation runs on the autograd engine's thread, where a range that the caller opened is
not open. So the operations open their own ranges, at the place and on the thread where
the work happens, and what a range is (``record_function``, NVTX, a test's list) is the
listener's business.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Final

import torch

Listener = Callable[[str], AbstractContextManager[object]]

ATTENTION: Final = "op:attention"
DEQUANT: Final = "op:dequant"
BASE_GEMM: Final = "op:base_gemm"
LORA_A: Final = "op:lora_A"
LORA_B: Final = "op:lora_B"
LORA_DA: Final = "op:lora_dA"
LORA_DB: Final = "op:lora_dB"
LORA_DX: Final = "op:lora_dx"

_SILENT: Final = nullcontext()
_listener: Listener | None = None


def set_listener(listener: Listener | None) -> Listener | None:
    """Have ``listener(name)`` opened around each piece of work; None stops it.

    One listener for the process, not for the thread: autograd runs backward on threads
    of its own. Returns the listener that was set before.
    """
    global _listener
    before = _listener
    _listener = listener
    return before


def span(name: str) -> AbstractContextManager[object]:
    """The range ``name``; with no listener set, a shared context that does nothing."""
    listener = _listener
    # While torch.compile traces, a range would be opened once, at trace time, around
    # work that is not done then.
    if listener is None or torch.compiler.is_compiling():
        return _SILENT
    return listener(name)
