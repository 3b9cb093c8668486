"""The cells of `bench.train_vs_stock` as one SVG: throughput as bars, losses as curves."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from bench.picture import LETTERS, STYLE, escape
from bench.train_vs_stock_figures import OURS, STOCK, Ratio

COLOURS = {STOCK: "#E69F00", OURS: "#0072B2"}  # Okabe and Ito's
COLUMNS = 2
WIDTH = 560
NAMES = 50  # of it for the names of the sides
VALUES = 200  # and for what is written behind a bar
LINE = 20
BAR = 12
CURVE = 110  # height of the curves
GAP = 30
EXPLAINED = (
    "bars: samples/s, median of the pairs, higher is faster, axis from zero; in brackets the "
    "lowest and the highest ratio of a pair. Curves: loss by step, ours drawn thin over stock"
)


def draw(lines: Sequence[Mapping[str, Any]], machine: str) -> str:
    """The lines of a results file; `machine` says where and when they were measured."""
    cells = [line for line in lines if line["kind"] == "cell"]
    below = [*textwrap.wrap(machine, LETTERS), EXPLAINED]
    top = 44 + 16 * len(below)
    height_of_one = 4 * LINE + CURVE + GAP + 24
    parts = []
    for number, cell in enumerate(cells):
        x = 16 + number % COLUMNS * (WIDTH + GAP)
        y = top + number // COLUMNS * height_of_one
        parts += [f'<g transform="translate({x},{y})">', *_panel(cell), "</g>"]
    width = 32 + COLUMNS * WIDTH + (COLUMNS - 1) * GAP
    height = top + -(-len(cells) // COLUMNS) * height_of_one
    question = lines[0]["question"]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(question)}</title><style>{STYLE}</style>",
            f'<rect width="{width}" height="{height}" fill="#fff"/>',
            f'<text class="q" x="16" y="28">{escape(question)}</text>',
            *(
                f'<text class="d" x="16" y="{46 + 16 * i}">{escape(line)}</text>'
                for i, line in enumerate(below)
            ),
            *parts,
            "</svg>\n",
        ]
    )


def _panel(cell: Mapping[str, Any]) -> list[str]:
    name = f"{cell['method']}, {cell['precision']}"
    ratio = Ratio(**cell["ours_over_stock"]["samples_per_s"])
    parts = [f'<text class="t" x="0" y="14">{escape(name)}</text>']
    parts.append(f'<line class="a" x1="{NAMES}" x2="{NAMES}" y1="{LINE}" y2="{3 * LINE}"/>')
    fastest = max(cell[side]["samples_per_s"] for side in (STOCK, OURS))
    for number, side in enumerate((STOCK, OURS), start=1):
        value = cell[side]["samples_per_s"]
        length = (WIDTH - NAMES - VALUES) * value / fastest
        told = f"{value:.1f}" + (f"  ({ratio})" if side == OURS else "")
        y = LINE * number
        parts += [
            f'<text x="{NAMES - 8}" y="{y + 14}" text-anchor="end">{side}</text>',
            f'<rect x="{NAMES}" y="{y + (LINE - BAR) / 2}" width="{length:.2f}" height="{BAR}" '
            f'fill="{COLOURS[side]}"/>',
            f'<text x="{NAMES + length + 6:.2f}" y="{y + 14}">{escape(told)}</text>',
        ]
    stock, ours = cell[STOCK], cell[OURS]
    figures = (
        f"stock, ours: p50 {stock['step_p50_ms']:.1f}, {ours['step_p50_ms']:.1f} ms; "
        f"peak {stock['peak_bytes'] / 1e6:,.0f}, {ours['peak_bytes'] / 1e6:,.0f} MB; "
        f"MFU {100 * stock['mfu']:.1f}, {100 * ours['mfu']:.1f} %"
    )
    parts.append(f'<text class="d" x="{NAMES}" y="{3 * LINE + 14}">{escape(figures)}</text>')
    return [*parts, *_curves(cell, 4 * LINE + 8)]


def _curves(cell: Mapping[str, Any], top: int) -> list[str]:
    off = cell["loss_dropout_off"]
    losses = off or cell["loss_dropout_on"]
    values = [*losses[STOCK], *losses[OURS]]
    low, high = min(values), max(values)
    room = max(high - low, 1e-9)
    across = (WIDTH - NAMES) / max(1, len(losses[STOCK]) - 1)
    parts = [
        f'<line class="a" x1="{NAMES}" x2="{NAMES}" y1="{top}" y2="{top + CURVE}"/>',
        f'<text class="d" x="{NAMES - 6}" y="{top + 10}" text-anchor="end">{high:.3g}</text>',
        f'<text class="d" x="{NAMES - 6}" y="{top + CURVE}" text-anchor="end">{low:.3g}</text>',
    ]
    for side, stroke in ((STOCK, 5), (OURS, 1.5)):
        points = " ".join(
            f"{NAMES + across * step:.1f},{top + CURVE * (high - loss) / room:.1f}"
            for step, loss in enumerate(losses[side])
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[side]}" '
            f'stroke-width="{stroke}" stroke-linejoin="round"/>'
        )
    how = "dropout off" if off else "dropout on, so other random numbers"
    told = f"loss, {how}; differs by at most {losses['relative']:.1e}, at step {losses['step']}"
    parts.append(f'<text class="d" x="{NAMES}" y="{top + CURVE + 16}">{escape(told)}</text>')
    return parts
