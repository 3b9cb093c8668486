"""Numbers for whatever a trace repeats: values, names, threads. A stranger's trace is bounded."""

from pathlib import Path
from typing import Any

from peftprof.errors import TraceError
from peftprof.trace.events import NONE

MAX_NAME = 4096  # characters; a mangled template may have hundreds, a name that is data more
# Characters of all names together, bytes of all operands. Traces of training have under a
# hundredth. To match a name takes about a microsecond for each of its characters, and NAME more.
MAX_NAMES = 8 << 20
NAME = 32
MAX_OPERANDS = 64 << 20
REST = "further names"  # what all names go by that come after these
MAX_THREADS = 1 << 14
MAX_THREAD = 80  # characters that are kept of a thread's name


class Numbers(dict[Any, int]):
    """Numbers for values in the order in which they are first asked for."""

    def __missing__(self, value: Any) -> int:
        """The next number, for a value that has none yet."""
        number = self[value] = len(self)
        return number


class Names(Numbers):
    """The same for names, cut to a length that can be matched and shown, and not without end."""

    room = MAX_NAMES

    def __missing__(self, name: str) -> int:
        """The next number; that of the cut name; or that of REST."""
        if len(name) > MAX_NAME:
            return self[name[:MAX_NAME]]
        if self.room <= 0 and name != REST:
            return self[REST]
        self.room -= len(name) + NAME
        return super().__missing__(name)


class Signatures(Numbers):
    """The same for operands, as tuples of JSON texts; NONE for those that there is no room for."""

    room = MAX_OPERANDS

    def __missing__(self, operands: tuple[bytes, ...]) -> int:
        """The next number, or NONE."""
        size = sum(map(len, operands))
        if size > self.room:
            return NONE
        self.room -= size
        return super().__missing__(operands)


class Places(Numbers):
    """The same for the threads and streams of the trace at `path`, each a process and a thread."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path

    def __missing__(self, place: tuple[int | str, int | str]) -> int:
        """The next number. Raises TraceError where there are too many."""
        kept = tuple(v[:MAX_THREAD] if isinstance(v, str) else v for v in place)
        if kept != place:
            return self[kept]
        if len(self) == MAX_THREADS:
            raise TraceError(
                f"{self._path} has more than {MAX_THREADS:,} threads and streams; that is no trace"
            )
        return super().__missing__(place)
