"""The table at the end of a run."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftprof.records import Energy, Memory, RunRecord
from peftprof.report.units import count, mib


def render(record: RunRecord, folder: Path) -> RenderableType:
    """What came out of the run at `folder`, and the command that reads its trace."""
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _rows(record):
        table.add_row(name, Text(value))
    method, config = record.config["method"], record.config
    title = Text(f"{method} on {config['model']} / {config['dataset']}", style="bold")
    lines: list[RenderableType] = [Text(), title, table, Text()]
    lines.append(Text(f"run folder  {folder}", overflow="fold"))
    if record.profiled and record.profiled.trace:
        lines.append(Text(f"read it     python -m peftprof breakdown {folder}", overflow="fold"))
    return Group(*lines)


def _rows(record: RunRecord) -> list[tuple[str, str]]:
    config, rows = record.config, []
    if record.accuracy:
        a = record.accuracy
        rows.append(
            (
                "accuracy",
                f"{100 * a.accuracy:.2f} %  (95 % interval {100 * a.low:.2f} to "
                f"{100 * a.high:.2f}, {a.correct} of {a.examples})",
            )
        )
    if record.timed:
        t = record.timed
        rows += [
            ("samples/s", f"{t.samples_per_s:.1f}"),
            (
                "tokens/s",
                f"{count(t.real_tokens_per_s)} real  ({count(t.padded_tokens_per_s)} with padding)",
            ),
            (
                "step p50 / p95 / p99",
                f"{t.step_p50_ms:.1f} / {t.step_p95_ms:.1f} / {t.step_p99_ms:.1f} ms",
            ),
            ("timed", f"{t.steps - t.warmup_steps} of {t.steps} steps; the rest is warm-up"),
        ]
    else:
        rows.append(("samples/s", "not measured: every step was warm-up"))
    if record.memory:
        rows += _memory(record.memory)
    if record.trainable:
        p = record.trainable
        rows.append(
            (
                "trainable",
                f"{count(p.live)} live of {count(p.nominal)} nominal; "
                f"{100 * p.live / p.total:.2f} % of {count(p.total)}",
            )
        )
        if p.packed_total != p.total:
            rows.append(("parameters as stored", f"{count(p.packed_total)} (4-bit weights packed)"))
    if record.energy:
        rows.append(("energy", _energy(record.energy)))
    if record.profiled:
        rows.append(("profiled", _profiled(record)))
    if record.execution and record.execution.processes > 1:
        e = record.execution
        rows.append(
            (
                "devices",
                f"{e.processes}, joined by {e.backend}: samples and energy of all, memory of the "
                "largest process, times of the first",
            )
        )
    kernels = "" if config["method"] == "full" else f", kernels {config['kernels']}"
    triton = record.environment.get("kernels", {}).get("triton", {})
    if config["kernels"] == "triton" and triton.get("interpreted"):
        kernels += " (interpreted: right numbers, times without meaning)"
    checkpointed = ", activations checkpointed" if config.get("checkpointing") else ""
    padding = {"packed": ", no padding", "split": ", split by length"}.get(
        str(config.get("padding")), ""
    )
    where = f"{config['precision']} on {config['device']}"
    rows.append(("how", f"{where}{kernels}{padding}{checkpointed}, seed {config['seed']}"))
    return rows


def _memory(memory: Memory) -> list[tuple[str, str]]:
    sizes = {
        "allocated": memory.allocated_bytes,
        "reserved": memory.reserved_bytes,
        "NVML": memory.nvml_bytes,
        "host RSS": memory.rss_bytes,
    }
    known = ", ".join(f"{name} {mib(size)}" for name, size in sizes.items() if size is not None)
    missing = [name for name, size in sizes.items() if size is None]
    rows = [("peak memory", known or "not measured")]
    reasons = dict(memory.absent)
    reset = reasons.pop("rss_reset", None)
    if missing:
        rows.append(
            ("", f"{', '.join(missing)} absent: {'; '.join(sorted(set(reasons.values())))}")
        )
    if memory.loading_bytes and memory.loading_bytes > (memory.rss_bytes or 0):
        rows.append(("", f"host RSS was {mib(memory.loading_bytes)} while the model was loaded"))
    if reset:
        rows.append(("", reset))
    return rows


def _energy(energy: Energy) -> str:
    if energy.joules:
        return ", ".join(f"{name} {joules:.1f} J" for name, joules in energy.joules.items())
    return "not measurable here: " + "; ".join(dict.fromkeys(energy.absent.values()))


def _profiled(record: RunRecord) -> str:
    p = record.profiled
    assert p is not None
    text = f"{p.active_steps} steps by {p.profiler}, {p.overhead:.2f}x the same steps unprofiled"
    if p.same_losses is not None:
        differ = f", losses differ by up to {p.loss_difference:.1e}"
        text += ", same losses" if p.same_losses else differ
    return text
