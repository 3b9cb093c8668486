"""Hears the NVTX ranges of a process: builds the recorder, reads and checks its record.

    recorder = build_recorder(tmp_path)
    subprocess.run(command, env=recording(recorder, tmp_path / "record"), check=True)
    check_nesting(read_record(tmp_path / "record"))

The recorder is nvtx_recorder.c, in the place where Nsight Systems would be.
"""

import importlib.metadata
import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

RANKS = {"step": 0, "phase": 1, "layer": 2, "op": 3}


@dataclass(frozen=True)
class Event:
    """One NVTX call: kind is domain, category, string, push or pop."""

    kind: str
    pid: int
    tid: int
    ns: int
    domain: str
    category: str | None
    message: str | None


def build_recorder(folder: Path) -> Path:
    """The recorder, compiled into `folder`; skips the test where that cannot be done."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("hearing NVTX needs a C compiler (cc, gcc or clang); there is none")
    library = folder / "nvtx_recorder.so"
    source = Path(__file__).with_name("nvtx_recorder.c")
    flags = ["-O1", "-Wall", "-Wextra", "-shared", "-fPIC", "-pthread", "-fvisibility=hidden"]
    files = ["-isystem", str(_headers()), "-o", str(library), str(source), "-ldl"]
    made = subprocess.run([compiler, *flags, *files], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    return library


def _headers() -> Path:
    try:
        files = importlib.metadata.files("nvidia-nvtx") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    # CUDA 12's package keeps them in nvidia/nvtx/include, CUDA 13's in nvidia/cu13/include.
    for file in files:
        if file.name == "nvToolsExt.h" and file.parent.name == "nvtx3":
            return Path(str(file.locate())).parent.parent
    pytest.skip("hearing NVTX needs the headers of the package nvidia-nvtx (extra `test`)")


def recording(recorder: Path, record: Path) -> dict[str, str]:
    """The environment in which a process writes its NVTX calls to `record`."""
    return os.environ | {"NVTX_INJECTION64_PATH": str(recorder), "NVTX_RECORD": str(record)}


def read_record(path: Path) -> list[Event]:
    """The events of a record, in the order they were written; none if nothing was recorded."""
    if not path.exists():
        return []
    return [Event(**json.loads(line)) for line in path.read_text().splitlines()]


def check_nesting(events: list[Event], domain: str = "peftprof") -> list[tuple[str, ...]]:
    """Asserts that a domain's ranges balance on each thread and nest step > phase > layer > op.

    A level may be left out, as on the autograd thread, and an op may hold ops. Returns the
    ranges in the order they were opened, each with those that enclose it, outermost first.
    """
    open_ranges: dict[tuple[int, int], list[Event]] = {}
    paths = []
    for event in events:
        if event.domain != domain or event.kind not in ("push", "pop"):
            continue
        stack = open_ranges.setdefault((event.pid, event.tid), [])
        if event.kind == "pop":
            assert stack, f"thread {event.tid} pops a range it has not pushed"
            stack.pop()
            continue
        assert event.category in RANKS, f"{event.message} has category {event.category}"
        assert event.message is not None
        assert event.message.startswith(f"{event.category}:"), event
        if stack:
            outer = stack[-1]
            above, below = RANKS[outer.category or ""], RANKS[event.category]
            assert above < below or above == below == RANKS["op"], (
                f"{event.message} inside {outer.message}"
            )
        stack.append(event)
        paths.append(tuple(e.message or "" for e in stack))
    left = [e.message for stack in open_ranges.values() for e in stack]
    assert not left, f"never popped: {left}"
    return paths
