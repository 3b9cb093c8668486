"""Every tensor memory that a step allocates and frees, in order, and every operator it calls.

The tracker sits at PyTorch's dispatcher, so it sees real tensors and fake ones (shapes
without data) alike: over fake ones it predicts a step, over real ones it is the exact
reference that the prediction is tested against. What an operator allocates and frees
inside itself is not to be seen there; WORKSPACES says it for those where it is large.
"""

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

FORWARD, HEAD, BACKWARD = "forward", "head", "backward"
_VALUE = torch.ops.aten._local_scalar_dense.default
_DEVICE, _DETACH = torch.ops.prim.device.default, torch.ops.aten.detach.default


def _dense(weight: int, layout: int) -> Callable[[tuple[Any, ...]], int]:
    """The dequantised weight in the dtype of the first operand."""

    def size(args: tuple[Any, ...]) -> int:
        held: int = math.prod(args[layout][:2]) * args[0].element_size()
        return held

    return size


# Operators that dequantise a weight and multiply by it hold it while they do.
WORKSPACES: Final[dict[str, Callable[[tuple[Any, ...]], int]]] = {
    "peftprof::nf4_linear": _dense(1, 2),
    "peftprof::nf4_linear_dx": _dense(1, 2),
}
DEQUANTISE: Final = ("peftprof::nf4_dequantize", "bitsandbytes::dequantize_4bit")


@dataclass
class Block:
    """One storage: bytes, the phase it was allocated in, and what for."""

    bytes: int
    phase: str
    workspace: bool
    born: int  # events before it was there
    died: int | None = None


@dataclass(frozen=True)
class Operator:
    """One call: the operator's name, and dtype and shape of each tensor it reads and writes."""

    name: str
    phase: str
    reads: tuple[tuple[torch.dtype, tuple[int, ...]], ...]
    writes: tuple[tuple[torch.dtype, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Mark:
    """A phase of a layer (None: of the step) begins here, after so many entries.

    HEAD is what comes after the layers' forward.
    """

    phase: str
    layer: int | None
    events: int
    operators: int


@dataclass
class Log:
    """Events in order: a block by its number, +1 allocated and -1 freed; operators; marks."""

    blocks: list[Block] = field(default_factory=list)
    events: list[tuple[int, int]] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)


class Tracker(TorchDispatchMode):
    """Inside, what is allocated on `device_type` and called is written to `log`.

    Memory that exists when the tracker begins is not in it. `phase` is set by whoever runs
    the step.
    """

    def __init__(self, device_type: str = "cpu", operators: bool = True) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.log = Log()
        self.phase = FORWARD
        self._device_type = device_type
        self._wants_operators = operators
        self._known: set[int] = set()
        self._closed = False

    def hold(self, tensors: Any) -> None:
        """Leave the storages of `tensors` out: they were there before."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def mark(self, phase: str, layer: int | None = None) -> None:
        """Note that a layer begins, or a phase."""
        log = self.log
        log.marks.append(Mark(phase, layer, len(log.events), len(log.operators)))
        if layer is None and phase != HEAD:
            self.phase = phase

    def close(self) -> Log:
        """The log up to here; what is freed later, with the model itself, is not of the step."""
        log, self.log = self.log, Log()
        self._closed = True
        return log

    def __torch_dispatch__(  # noqa: D105  (PyTorch calls it)
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is _DEVICE and hasattr(args[0], "fake_device"):  # asked at every turn
            return args[0].fake_device
        if func is _VALUE and hasattr(args[0], "fake_device"):
            # Models ask whether a mask is all ones; a batch with padding costs more.
            return args[0].dtype is not torch.bool
        if func is _DEVICE or func is _DETACH:
            return func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in WORKSPACES:
            self._passing(WORKSPACES[name](args))
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        for tensor in made:
            self._see(tensor, name in DEQUANTISE)
        if self._wants_operators:
            read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
            operator = Operator(name, self.phase, _shapes(read), _shapes(made))
            self.log.operators.append(operator)
        return result

    def _passing(self, size: int) -> None:
        number = self._new(size, workspace=True)
        self._freed(number)

    def _see(self, tensor: torch.Tensor, workspace: bool) -> None:
        device = getattr(tensor, "fake_device", None) or tensor.device
        if device.type != self._device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        number = self._new(storage.nbytes(), workspace)
        weakref.finalize(storage, self._forget, key, number).atexit = False

    def _new(self, size: int, workspace: bool) -> int:
        events = self.log.events
        self.log.blocks.append(Block(size, self.phase, workspace, len(events)))
        events.append((len(self.log.blocks) - 1, 1))
        return len(self.log.blocks) - 1

    def _forget(self, key: int, number: int) -> None:
        self._known.discard(key)
        if not self._closed:
            self._freed(number)

    def _freed(self, number: int) -> None:
        self.log.blocks[number].died = len(self.log.events)
        self.log.events.append((number, -1))


def _shapes(tensors: list[torch.Tensor]) -> tuple[tuple[torch.dtype, tuple[int, ...]], ...]:
    return tuple((t.dtype, tuple(t.shape)) for t in tensors)
