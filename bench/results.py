"""The files that benchmarks leave: JSON lines, a header first, and the line that sums it up.

Lines are written as they are measured, so that a run which breaks off is kept up to there.
"""

import datetime
import json
import os
from pathlib import Path
from typing import Any, TextIO

from bench.harness import Row
from bench.options import Setup, device_name
from bench.work import Ceilings
from peftprof.run import environment


def header(name: str, question: str, setup: Setup, ceilings: Ceilings | None) -> dict[str, Any]:
    """The first line: where, when and with what the others were measured."""
    return {
        "kind": "header",
        "benchmark": name,
        "question": question,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(setup.device),
        "dtype": str(setup.dtype).removeprefix("torch."),
        "l2": setup.l2 if setup.device.type == "cuda" else None,
        "quick": setup.quick,
        "effort": setup.effort._asdict(),
        "ceilings": ceilings and ceilings.to_json(),
        # Of the minute before: of other processes, where this one has only begun.
        "load": round(os.getloadavg()[0], 2),
        "environment": environment.describe(),
    }


def write(file: TextIO, line: dict[str, Any]) -> None:
    """One line, on disk when this returns."""
    file.write(json.dumps(line) + "\n")
    file.flush()


def write_rows(file: TextIO, rows: list[Row]) -> None:
    """A line for each row."""
    for row in rows:
        write(file, {"kind": "row", **row.to_json()})


def lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results file; one that broke off is dropped."""
    found: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return found


def machine(first: dict[str, Any]) -> str:
    """Where and when a results file was measured, and with what, in one line."""
    env = first["environment"]
    commit = env["git"].get("commit", "no commit")[:12] + "+" * env["git"].get("dirty", False)
    parts = [first["device"], first["dtype"], first["date"][:10]]
    parts += [f"torch {env['torch']['version']}", f"triton {env['packages']['triton']}"]
    parts += [f"{env['torch']['threads']} threads", f"commit {commit}"]
    parts += [f"L2 {first['l2']}"] if first["l2"] else []
    parts += [f"load {first['load']} at the start"]
    if first["ceilings"]:
        copy, gemm = (first["ceilings"][k] for k in ("copy_bytes_per_s", "gemm_flops_per_s"))
        parts.append(f"measured copy {copy / 1e9:.4g} GB/s, GEMM {gemm / 1e12:.3g} TFLOP/s")
    return ", ".join(parts)
