"""Small healthy traces of every kind, which damage.py damages."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import synthetic_trace
from peftprof.breakdowns import Ceilings
from peftprof.records import Held, Memory, MemoryStep, encode
from peftprof.report import perfetto
from peftprof.trace import kineto
from peftprof.trace.attribute import attribute
from tests.trace import nsys_files
from tests.trace.build import CPU, ENGINE, GPU, MAIN, Trace
from tests.trace.nsys_files import NEW, OLD, STEP, Nsys
from tests.trace.test_sources import record

SHARED = Path(__file__).parents[3] / "shared" / "traces"

Document = dict[str, Any]


@dataclass(frozen=True)
class Seeds:
    """What is damaged: traces as documents, exports as bytes of a database, a run's record."""

    traces: dict[str, Document]
    exports: dict[str, bytes]
    record: Document


def healthy() -> Seeds:
    """Small traces of every kind, and whatever real ones there are."""
    traces = {"cpu": _cpu(), "gpu": _gpu(), "old": _old(), "foreign": _foreign()}
    exports = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        tracks = folder / "tracks.json"
        gpu = folder / "gpu.json"
        gpu.write_text(json.dumps(traces["gpu"]))
        perfetto.write([("run", attribute(kineto.read(gpu)))], tracks)
        traces["tracks"] = json.loads(tracks.read_text())
        for kind, schema in (("new", NEW), ("old", OLD)):
            export = Nsys(schema, registered=kind == "old")
            nsys_files.train(export)
            exports[kind] = export.write(folder, f"{kind}.sqlite").read_bytes()
    for path in sorted(SHARED.glob("*.json.gz")):
        traces[path.name.removesuffix(".json.gz")] = _cut_out(
            json.loads(gzip.decompress(path.read_bytes()))
        )
    for path in sorted(SHARED.glob("*.sqlite")):
        exports[path.stem] = path.read_bytes()
    return Seeds(traces, exports, _record())


def _cpu() -> Document:
    """Annotated steps on a CPU, with operands, modules, and the memory of every operator."""
    trace = Trace()
    for n in range(3):
        t = n * STEP
        trace.range(f"step:{n}", t, t + 90_000)
        for phase, start, end in (("data", 0, 5), ("forward", 6, 40), ("backward", 41, 70)):
            trace.range(f"phase:{phase}", t + start * 1000, t + end * 1000)
        trace.range("layer:model.layers.0", t + 7_000, t + 35_000)
        trace.add("python_function", "nn.Module: Linear_0", t + 8_000, t + 20_000)
        product = {"Input Dims": [[8, 64], [64, 64]], "Input type": ["float", "float"]}
        trace.add("cpu_op", "aten::mm", t + 9_000, t + 15_000, **product, **{"Sequence number": n})
        trace.op("aten::gelu", t + 16_000, t + 20_000, seq=100 + n)
        trace.op("mystery::op", t + 21_000, t + 22_000)
        trace.backward("MmBackward0", t + 45_000, t + 55_000, n)
        for at, size in ((10, 4096), (17, 2048), (46, 4096), (60, -4096), (65, -2048)):
            _allocate(trace, t + at * 1000, size, device=0)
    return trace.document | {"traceEvents": trace.events}


def _gpu() -> Document:
    trace = Trace()
    nsys_files.train(trace, steps=2)
    nsys_files.operators(trace, steps=2)
    for n in range(2):
        t = n * STEP
        trace.arrow("ac2g", n, (t + 15_000, MAIN, CPU), (t + 16_000, 7, GPU))
        trace.arrow("fwdbwd", n, (t + 14_500, MAIN, CPU), (t + 49_000, ENGINE, CPU))
        for at, size in ((12, 1 << 20), (46, 1 << 19), (50, -(1 << 20))):
            _allocate(trace, t + at * 1000, size, device=1)
    about = {"distributedInfo": {"backend": "nccl", "rank": 3, "world_size": 4}}
    return trace.document | about | {"traceEvents": trace.events, "traceName": "t.json"}


def _allocate(trace: Trace, time: int, size: int, device: int) -> None:
    args = {"Total Allocated": 1 << 24, "Total Reserved": 1 << 25, "Bytes": size, "Addr": 4096}
    args |= {"Device Id": 0, "Device Type": device}
    event = {"ph": "i", "cat": "cpu_instant_event", "s": "t", "name": "[memory]", "args": args}
    trace.events.append(event | {"pid": CPU, "tid": MAIN, "ts": time / 1000})


def _old() -> Document:
    """As torch 1.8 wrote it: other categories, ids as text, whole microseconds."""
    entries = [
        {"ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur}
        | {"args": {"correlation": "7", "External id": "3"}}
        for cat, name, pid, tid, ts, dur in (
            ("Operator", "ProfilerStep#3", 1, "1", 0, 90),
            ("Operator", "aten::mm", 1, "1", 10, 30),
            ("Runtime", "cudaLaunchKernel", 1, "1", 15, 5),
            ("Kernel", "volta_sgemm_128x64_nn", 0, "stream 7", 25, 40),
            ("Memcpy", "Memcpy HtoD (Pageable -> Device)", 0, "stream 7", 70, 10),
        )
    ]
    return {"traceEvents": entries}


def _foreign() -> Document:
    """Half a step of the benchmark's trace."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        synthetic_trace.write(path, 1)
        return _cut_out(json.loads(path.read_text()))


def _cut_out(document: Document, count: int = 90) -> Document:
    """Some entries of each kind that follow each other, and a range that may be a step."""
    entries = [e for e in document["traceEvents"] if e.get("ph") in ("X", "s", "f", "M")]
    steps = [e for e in entries if str(e.get("name")).startswith("ProfilerStep")][:1]
    middle = len(entries) // 3
    device = [e for e in entries if str(e.get("cat")).lower() in ("kernel", "gpu_memcpy")][:20]
    return {**document, "traceEvents": steps + entries[middle : middle + count] + device}


def _record() -> Document:
    return encode(
        record(
            memory=Memory(1 << 20, 2 << 20, None, 4 << 20),
            memory_step=MemoryStep("memory.json.gz", 2, "cpu", (Held("adapters", {"1000": 64}),)),
            ceilings=Ceilings("a test", {"fp32": 1e12}, 1e11),
        )
    )
