"""Traces written by hand: the Chrome JSON of torch.profiler, times given in nanoseconds."""

import gzip
import json
from pathlib import Path
from typing import Any

CPU, GPU = 100, 0
MAIN, ENGINE = 1, 2


class Trace:
    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.document: dict[str, Any] = {
            "schemaVersion": 1,
            "deviceProperties": [{"id": 0, "name": "Test GPU"}],
        }
        self._correlation = 0

    def add(
        self,
        cat: str,
        name: str,
        start: int,
        end: int,
        tid: int = MAIN,
        pid: int = CPU,
        **args: Any,
    ) -> dict[str, Any]:
        event = {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "args": args}
        event |= {"ts": start / 1000, "dur": (end - start) / 1000}
        self.events.append(event)
        return event

    def range(self, name: str, start: int, end: int, tid: int = MAIN) -> None:
        self.add("user_annotation", name, start, end, tid)

    def op(
        self, name: str, start: int, end: int, tid: int = MAIN, seq: int | None = None, fwd: int = 0
    ) -> None:
        args = {} if seq is None else {"Sequence number": seq, "Fwd thread id": fwd}
        self.add("cpu_op", name, start, end, tid, **args)

    def backward(self, node: str, start: int, end: int, seq: int, tid: int = ENGINE) -> None:
        """A graph node as the engine runs it: its wrapper and itself."""
        self.op(f"autograd::engine::evaluate_function: {node}", start, end, tid, seq, fwd=1)
        self.op(node, start, end, tid, seq, fwd=1)

    def kernel(
        self,
        name: str,
        start: int,
        end: int,
        launched: int | None,
        tid: int = MAIN,
        stream: int = 7,
        cat: str = "kernel",
    ) -> None:
        """A device event, launched at CPU time `launched` on thread `tid` (None: not recorded)."""
        self._correlation += 1
        if launched is not None:
            self.add(
                "cuda_runtime",
                "cudaLaunchKernel",
                launched,
                launched,
                tid,
                correlation=self._correlation,
            )
        self.add(cat, name, start, end, stream, GPU, correlation=self._correlation)

    def arrow(
        self, kind: str, identity: int, source: tuple[int, ...], target: tuple[int, ...]
    ) -> None:
        """From (time, tid, pid) to (time, tid, pid)."""
        for ph, (time, tid, pid) in (("s", source), ("f", target)):
            self.events.append(
                {"ph": ph, "id": identity, "cat": kind, "name": kind, "pid": pid, "tid": tid}
                | {"ts": time / 1000}
            )

    def text(self) -> str:
        return json.dumps({**self.document, "traceEvents": self.events})

    def write(self, folder: Path, name: str = "trace.json") -> Path:
        path = folder / name
        data = self.text().encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path
