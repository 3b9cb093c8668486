"""One run over several processes, each with a device: all that knows torch.distributed.

Data parallel. Every process (a rank) holds the whole model and takes its share of each
batch; the gradients are added up, and then every rank makes the same optimiser step. In a
process that was started alone everything here does nothing.

The gradients are added up in a few flat buckets after backward, not by torch's
DistributedDataParallel. That one averages over ranks, while each example is weighed here by
the size of the whole batch; and it reduces in every backward pass, of which a split batch
has several and a rank without an example none. What it would give is communication beside
the backward pass.
"""

import atexit
import contextlib
import datetime
import hashlib
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from peftprof import annotate
from peftprof.errors import ConfigError, PeftprofError, TrainingError, one_line
from peftprof.run import launch
from peftprof.run.launch import Launch

T = TypeVar("T")

BUCKET = 32 << 20  # bytes of gradients that are added up at once, and that exist twice meanwhile
PATIENCE = datetime.timedelta(hours=1)  # the first rank may fetch, save or export for long
JOINING = datetime.timedelta(minutes=10)
LISTENING = datetime.timedelta(days=1)  # a wait of the store counts milliseconds in 32 bits
HEAD_START_S = 2.0  # in which the first rank says what every rank has met
LEAVING_S = 10.0  # that the others may take to end
# Keys of the store that all ranks share.
SAID, FAILED, ENDED = "peftprof/said", "peftprof/failed", "peftprof/ended"


def size() -> int:
    """How many processes the run goes over; 1 where this one is alone."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process among them, from 0."""
    return dist.get_rank() if size() > 1 else 0


def first() -> bool:
    """Whether this is the process that writes and shows, or the only one."""
    return rank() == 0


def local_first() -> bool:
    """Whether this process is the first on its machine."""
    found = launch.launched()
    return size() == 1 or found is None or found.local_rank == 0


def backend(device: str) -> str | None:
    """What gradients on `device` are added up by; None where there is nothing to add."""
    if size() == 1:
        return None
    return "nccl" if device.startswith("cuda") else "gloo"


def own_device(name: str) -> str:
    """`cuda` as the GPU of this process, by its number on its machine; else `name` itself.

    Raises ConfigError where several processes would share the GPU that `name` is.
    """
    found = launch.launched()
    if size() == 1 or found is None or not name.startswith("cuda"):
        return name
    if name != "cuda":
        raise ConfigError(
            f"--device {name} is one GPU and the run goes over {size()} processes; say --device "
            "cuda, and each gets its own"
        )
    return f"cuda:{found.local_rank}"


def kind(name: str) -> str:
    """What a recorded device is asked for as: several processes each have their own `cuda:N`."""
    return name if size() == 1 else name.partition(":")[0]


def seed(base: int) -> int:
    """What this rank's random numbers start from: `base` on the first, others of it elsewhere."""
    if rank() == 0:
        return base
    digest = hashlib.sha256(f"{base}/rank {rank()}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def share(items: Sequence[T]) -> list[T]:
    """This rank's part of `items`, every so manieth; of sorted ones all ranks get alike."""
    return list(items[rank() :: size()])


def summed(values: torch.Tensor) -> torch.Tensor:
    """`values`, the sum over all ranks of what each gave, in place."""
    if size() > 1:
        with _together():
            dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """What every rank gave, by rank. It travels as a pickle, among the run's own processes."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    with _together():
        dist.all_gather_object(values, value)
    return values


def from_first(value: T) -> T:
    """What the first rank gave."""
    return gathered(value if first() else None)[0]  # type: ignore[return-value]


@contextlib.contextmanager
def first_before_others() -> Iterator[None]:
    """The first rank goes through the block alone, then the others: it fills the caches."""
    if not first():
        gathered(None)
    yield
    if first():
        gathered(None)


def unlike(what: Mapping[str, str | None]) -> str | None:
    """Which rank has something else than the first, such as `rank 1 has other data`; or None."""
    if size() == 1:
        return None
    of_first, *others = gathered(what)
    for number, theirs in enumerate(others, 1):
        for name, value in theirs.items():
            if value != of_first[name]:
                return f"rank {number} has other {name}"
    return None


def add_up_gradients(parameters: Sequence[torch.nn.Parameter], worked: bool) -> None:
    """Make each gradient the sum over all ranks; zeros stand for those that a rank lacks.

    `worked`: whether this rank had an example. One that had gets no gradient where it had
    none itself, so that a missing one is still noticed. Every rank must call this, with the
    same parameters in the same order.
    """
    if size() == 1:
        return
    with annotate.op("all_reduce"):
        for bucket in _buckets(parameters):
            flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1)
                              for p in bucket])  # fmt: skip
            with _together():
                # By operators that a profile shows, with the wait for the other ranks in one.
                group = dist.group.WORLD
                assert group is not None
                torch.ops._c10d_functional.all_reduce_(flat, "sum", group.group_name)
                torch.ops._c10d_functional.wait_tensor(flat)
            for parameter, piece in zip(
                bucket, flat.split([p.numel() for p in bucket]), strict=True
            ):
                if parameter.grad is not None or not worked:
                    parameter.grad = piece.view_as(parameter)


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """The parameters in order, of one dtype each and of BUCKET bytes at most where it can be."""
    bucket: list[torch.nn.Parameter] = []
    held = 0
    for parameter in parameters:
        more = parameter.numel() * parameter.element_size()
        if bucket and (held + more > BUCKET or parameter.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(parameter)
        held += more
    if bucket:
        yield bucket


@contextlib.contextmanager
def _together() -> Iterator[None]:
    """Inside, all ranks talk; a RuntimeError means that one of them is gone."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise TrainingError(
            f"another process of the run does not answer ({_why(error)}); --resume, started the "
            "same way, goes on from the last checkpoint"
        ) from error


def _why(error: Exception) -> str:
    """What torch says, without the file of its source that gloo and nccl put before it."""
    return one_line(re.sub(r"^\[[^\]]*\]\s*", "", str(error)))[:120]


# --- Begin and end


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Inside, the processes that were started together are one run; nothing where this is alone.

    Whatever ends one of them ends all, and one of them says why: the first rank what every
    rank has met, any other what it alone has, with its number. Raises ConfigError where
    they cannot be joined.
    """
    found = launch.launched()
    if found is None or size() > 1:
        yield
        return
    others = _Others(found, _join(found))
    try:
        yield
        gathered(None)  # nobody leaves, with the store perhaps, before the last has finished
    except BaseException as error:
        others.give_up()
        if isinstance(error, PeftprofError) and found.rank:
            raise type(error)(f"rank {found.rank}: {error}") from error
        raise
    others.part()
    dist.destroy_process_group()


def _join(found: Launch) -> Any:
    """The processes joined; the store that they share."""
    from torch.distributed.rendezvous import rendezvous

    # What lies on the host, such as random states, is exchanged by gloo whatever the device.
    gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        store, _, _ = next(iter(rendezvous("env://", timeout=JOINING)))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if gpus else "gloo",
            store=store,
            rank=found.rank,
            world_size=found.size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(
            f"the {found.size} processes of the run cannot be joined "
            f"({_why(error)}); start them with torchrun"
        ) from error
    return store


class _Others:
    """The other ranks: they hear when this one fails, and this one when another does.

    A rank that has failed would leave the others in a collective for as long as PATIENCE.
    So each listens, on a thread that waits in the store and costs nothing, and ends.
    """

    def __init__(self, found: Launch, store: Any) -> None:
        self._found = found
        # A connection serves one call at a time, and the listener's never ends.
        self._store, self._heard = store.clone(), store.clone()
        self.left = threading.Event()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone, and so is who started us
            while not self._called():
                pass
            if not self.left.is_set():
                self._heard.add(ENDED, 1)
        if self.left.is_set():
            return
        if sys.stdout.isatty():  # a bar hides the cursor
            sys.stdout.write("\x1b[?25h")
        sys.stdout.flush()
        os._exit(2)  # the main thread may be in a collective that never ends

    def _called(self) -> bool:
        """Wait until a rank has failed; not for ever, which a store does not know."""
        try:
            self._heard.wait([FAILED], LISTENING)
        except dist.DistStoreError:
            return False
        return True

    def part(self) -> None:
        """All have finished: end the listeners. One that still waits when Python ends aborts it."""
        self.left.set()
        gathered(None)  # before any is woken, every rank knows that it was no failure
        self._store.set(FAILED, "1")
        self._listener.join(LEAVING_S)

    def give_up(self) -> None:
        """This rank has failed. Raises SystemExit where another says so; else this one may."""
        if self._found.rank:
            time.sleep(HEAD_START_S)  # if the first fails too, it ends this process meanwhile
        with contextlib.suppress(RuntimeError):
            if self._store.add(SAID, 1) > 1:
                time.sleep(LEAVING_S)
                raise SystemExit(2)
        launch.speak_up()
        # Only when the line is out: the first process that ends makes torchrun end the rest.
        atexit.register(self._tell)

    def _tell(self) -> None:
        """Let the others end, and wait for it, so that each ends by itself."""
        self.left.set()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, when it sees them end
        with contextlib.suppress(RuntimeError):
            self._store.set(FAILED, "1")
            until = time.monotonic() + LEAVING_S
            while self._store.add(ENDED, 0) < self._found.size - 1 and time.monotonic() < until:
                time.sleep(0.02)
