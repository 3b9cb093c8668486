"""What `bench.train_vs_stock` prints of its results."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from bench.train_vs_stock_figures import OURS, STOCK, Ratio

COMMIT = 12  # characters that tell one


def machine(header: Mapping[str, Any]) -> str:
    """Where, when and with what it was measured, in one line."""
    env = header["environment"]
    commit = env["git"].get("commit", "no commit")[:COMMIT] + "+" * env["git"].get("dirty", False)
    gemms = ", ".join(f"{p} {f / 1e12:.3g}" for p, f in header["gemm_flops_per_s"].items())
    config = next(iter(header["configs"].values()))
    packages = [f"{name} {env['packages'][name]}" for name in ("transformers", "peft")]
    packages.append(f"bitsandbytes {env['packages']['bitsandbytes']}")
    return ", ".join(
        [
            f"{Path(config['model']).name} on {Path(config['dataset']).name}",
            f"batch {config['batch_size']}",
            f"{config['max_steps']} steps, {header['rounds']} pairs",
            header["device"],
            f"{env['torch']['threads']} threads",
            header["date"][:10],
            f"torch {env['torch']['version']}",
            *packages,
            f"commit {commit}",
            f"load {header['load']} at the start",
            f"measured GEMM {gemms} TFLOP/s",
        ]
    )


def table(lines: Sequence[Mapping[str, Any]]) -> Table:
    """Two rows a cell: stock, and ours with how it compares."""
    shown = Table(box=None, pad_edge=False, header_style="dim")
    shown.add_column("cell", no_wrap=True)
    shown.add_column("side", no_wrap=True)
    for name in (
        "samples/s",
        "ours / stock",
        "p50 ms",
        "p95 ms",
        "real tok/s",
        "peak MB",
        "above start",
        "MFU %",
        "loss differs",
    ):
        shown.add_column(name, justify="right")
    for cell in (line for line in lines if line["kind"] == "cell"):
        ratio, off = Ratio(**cell["ours_over_stock"]["samples_per_s"]), cell["loss_dropout_off"]
        for side in (STOCK, OURS):
            own, told = cell[side], side == OURS
            shown.add_row(
                "" if told else f"{cell['method']} {cell['precision']}",
                side,
                f"{own['samples_per_s']:.1f}",
                str(ratio) if told else "",
                f"{own['step_p50_ms']:.1f}",
                f"{own['step_p95_ms']:.1f}",
                f"{own['real_tokens_per_s']:,.0f}",
                f"{own['peak_bytes'] / 1e6:,.0f}",
                f"{own['above_bytes'] / 1e6:,.0f}",
                f"{100 * own['mfu']:.1f}",
                f"{off['relative']:.1e} at {off['step']}" if told and off else "",
            )
    return shown


def between(lines: Sequence[Mapping[str, Any]]) -> list[Text]:
    """How to read the table, and a line for each ratio across cells."""
    shown = [
        Text(
            "\nMedians of the pairs; ours / stock: median [lowest, highest] pair, no difference "
            "where that spans 1.\nPeaks are the largest. Losses: largest relative difference with "
            "dropout off, and its step.",
            "dim",
        )
    ]
    found = [line for line in lines if line["kind"] == "across"]
    if found:
        shown.append(Text("Between cells, samples/s, paired within a round:", "dim"))
    for line in found:
        ratio = Ratio(line["median"], line["low"], line["high"])
        shown.append(Text(f"  {line['of']} / {line['over']}: {ratio}"))
    return shown
