"""One range, two listeners: torch.profiler.record_function and NVTX, by the same name.

    with annotate.enabled(), annotate.hooks({layer: "layer:bert.encoder.layer.0"}):
        with annotate.step(3), annotate.phase("forward"):
            ...

Names are `step:{n}`, `phase:{name}`, `layer:{module path}` and `op:{name}`; what stands
before the colon is the NVTX category, and the NVTX domain is `peftprof`. Off is the normal
state: an annotation then costs one branch and nothing is imported. Nothing is annotated
while torch.compile traces, because a range opened there would be in the graph or break it.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DOMAIN = "peftprof"
# What a timeline paints each category in: dark outside, light inside.
CATEGORIES = {"step": 0x33415C, "phase": 0x2A6F97, "layer": 0x61A5C2, "op": 0xE09F3E}

_OFF: AbstractContextManager[None] = nullcontext()
_on = False
# Set by `enable`, so that importing this module does not import torch.
_record_function: Any = None
_is_compiling: Any = None


class _Open(threading.local):
    """The ranges open on this thread, outermost first."""

    def __init__(self) -> None:
        self.ranges: list[_Range] = []


_open = _Open()


class _Range:
    """An annotation of one call; opened and closed on the same thread."""

    __slots__ = ("_attributes", "_name", "_record")

    def __init__(self, name: str) -> None:
        self._name = name
        self._attributes = _attributes(name)
        self._record: Any = None

    def __enter__(self) -> None:
        self._record = _record_function(self._name)
        self._record.__enter__()
        if self._attributes is not None:
            _domain().push_range(self._attributes)
        _open.ranges.append(self)

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        # What is still open inside goes first: torch does not call a module's hooks when
        # its forward is left by KeyboardInterrupt, and NVTX pops whatever is innermost.
        if self not in _open.ranges:
            return
        while True:
            innermost = _open.ranges.pop()
            innermost._close()
            if innermost is self:
                return

    def _close(self) -> None:
        if self._attributes is not None:
            _domain().pop_range()
        self._record.__exit__(None, None, None)


def range(name: str) -> AbstractContextManager[None]:
    """A range of this full name, such as `op:dequant`, on the calling thread.

    Raises ValueError, when enabled, for a name whose prefix is no category.
    """
    return _Range(name) if _on and not _is_compiling() else _OFF


def step(n: int) -> AbstractContextManager[None]:
    """The range `step:{n}` of one optimiser step."""
    return _Range(f"step:{n}") if _on and not _is_compiling() else _OFF


def phase(name: str) -> AbstractContextManager[None]:
    """The range `phase:{name}`: data, forward, backward, optimizer or eval."""
    return _Range(f"phase:{name}") if _on and not _is_compiling() else _OFF


def layer(path: str) -> AbstractContextManager[None]:
    """The range `layer:{path}` of a transformer layer or the head, by its module path."""
    return _Range(f"layer:{path}") if _on and not _is_compiling() else _OFF


def op(name: str) -> AbstractContextManager[None]:
    """The range `op:{name}`, such as dequant, base_gemm, lora_A, attention, loss."""
    return _Range(f"op:{name}") if _on and not _is_compiling() else _OFF


def enable() -> None:
    """Let ranges be opened from here on, on every thread."""
    import torch

    global _on, _record_function, _is_compiling
    _record_function = torch.profiler.record_function
    _is_compiling = torch.compiler.is_compiling
    _on = True


def disable() -> None:
    """Open no further ranges; those that are open still close."""
    global _on
    _on = False


@contextmanager
def enabled() -> Iterator[None]:
    """Ranges inside, and the former state after."""
    former = _on
    enable()
    try:
        yield
    finally:
        if not former:
            disable()


@contextmanager
def hooks(ranges: Mapping["torch.nn.Module", str]) -> Iterator[None]:
    """Ranges round the forward of modules, by their full names; hooks are removed at exit.

    Where annotation is off at entry no hook is placed, so an unprofiled model runs as it is.
    """
    handles: list[Any] = []
    try:
        if _on:
            for module, name in ranges.items():
                handles += _hook(module, name)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(module: "torch.nn.Module", name: str) -> list[Any]:
    _attributes(name)  # a wrong name fails here, not in a forward

    class Calls(threading.local):
        def __init__(self) -> None:
            self.open: list[_Range] = []

    calls = Calls()  # by thread: activation checkpointing runs forward on the autograd thread

    def enter(module: "torch.nn.Module", args: Any) -> None:
        if _on and not _is_compiling():
            opened = _Range(name)
            opened.__enter__()
            calls.open.append(opened)

    def leave(module: "torch.nn.Module", args: Any, output: Any) -> None:
        # Empty when traced, or when a global hook raised before `enter` was called.
        if not _is_compiling() and calls.open:
            calls.open.pop().__exit__()

    # First in and, through always_call, out even if forward or another hook raises.
    return [
        module.register_forward_pre_hook(enter, prepend=True),
        module.register_forward_hook(leave, always_call=True),
    ]


@cache
def _domain() -> Any:
    """The NVTX domain; None where the package nvtx does not exist, which is macOS."""
    try:
        import nvtx
    except ModuleNotFoundError:
        return None
    return nvtx.get_domain(DOMAIN)


@cache
def _attributes(name: str) -> Any:
    """The registered message, category and colour of `name`; None when nobody listens."""
    category, colon, _ = name.partition(":")
    if not colon or category not in CATEGORIES:
        raise ValueError(f"range {name!r} must begin with {': or '.join(CATEGORIES)}:")
    if _domain() is None:
        return None
    # nvtx hands out a domain that does nothing when no tool is attached, and None from here.
    return _domain().get_event_attributes(
        message=name, category=category, color=CATEGORIES[category]
    )
