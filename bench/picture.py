"""Results as bars, in SVG written here: a panel a case, every axis from zero.

A bar is the median, the line across its end the range from the 20 % to the 80 % quantile.
Who is wrong is named with the reason, and above the panels who is absent. Nothing in a
picture is fetched from anywhere, and every text in it is escaped.
"""

import html
import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

# Okabe and Ito's colours, told apart by colour-blind readers too; grey for what is no rival.
COLOURS = {
    "ours-torch": "#56B4E9",
    "ours-triton": "#0072B2",
    "ours-fused": "#009E73",
    "ours-two-step": "#CC79A7",
    "bitsandbytes": "#E69F00",
    "bitsandbytes gemv": "#D55E00",
    "PEFT": "#E69F00",
    "torchao": "#B8A000",
    "Unsloth": "#7B4FA3",
}
OTHER = "#8A8F98"

COLUMNS = 2
PANEL = 560  # width of a panel, in pixels
NAMES = 130  # of it for the names
VALUES = 105  # and for the values
LINE = 20
BAR = 12
GAP = 26
LETTERS = 180  # of a line that fit across
EXPLAINED = (
    "ms, lower is faster: median, and 20 % to 80 % of the samples; every panel has its own axis, "
    "from zero; in brackets the speed against the panel's first, where a difference was measured"
)
REASON = 62  # characters of a reason that fit

STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#1f2328}.t{font-weight:600}"
    ".q{font-size:15px;font-weight:600}.d{fill:#656d76}.a{stroke:#d0d7de}"
    ".w{stroke:#1f2328;stroke-width:1.5}"
)


def draw(rows: Sequence[Mapping[str, Any]], question: str, machine: str) -> str:
    """The rows of a results file as one SVG; cases keep their order.

    `machine` is the line that says where and when this was measured.
    """
    panels: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        panel = panels.setdefault(title(row["case"]), [])
        panel += [row] if row["status"] != "absent" else []
    absent = {f"{r['provider']} ({r['why']})": None for r in rows if r["status"] == "absent"}
    below = textwrap.wrap(f"absent: {', '.join(absent)}", LETTERS) if absent else []
    below = [machine, EXPLAINED, *below]
    top = 34 + 16 * len(below)
    parts, bottoms = [], [top + 10.0] * COLUMNS
    for name, panel in panels.items():
        column = bottoms.index(min(bottoms))
        x = 16 + column * (PANEL + GAP)
        parts.append(f'<g transform="translate({x},{bottoms[column]:.0f})">')
        parts += [*_panel(name, panel), "</g>"]
        bottoms[column] += LINE * (len(panel) + 1) + GAP
    width = 32 + COLUMNS * PANEL + (COLUMNS - 1) * GAP
    height = max(bottoms)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height:.0f}" '
            f'width="{width}" height="{height:.0f}" role="img">',
            f"<title>{escape(question)}</title><style>{STYLE}</style>",
            f'<rect width="{width}" height="{height:.0f}" fill="#fff"/>',
            f'<text class="q" x="16" y="28">{escape(question)}</text>',
            *(
                f'<text class="d" x="16" y="{46 + 16 * i}">{escape(line)}</text>'
                for i, line in enumerate(below)
            ),
            *parts,
            "</svg>\n",
        ]
    )


def title(case: Mapping[str, Any]) -> str:
    """A case in one line."""
    items = [(k, v) for k, v in case.items() if k not in ("layer", "N", "K")]
    rest = [str(v) if isinstance(v, str) else f"{k} {v}" for k, v in items]
    return ", ".join([f"{case.get('layer')} [{case.get('N')}, {case.get('K')}]", *rest])


def _panel(name: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    longest = max((row["ms"]["p80"] for row in rows if row["ms"]), default=0.0)
    room = PANEL - NAMES - VALUES
    end = LINE * (len(rows) + 1)
    parts = [f'<text class="t" x="0" y="14">{escape(name)}</text>']
    parts.append(f'<line class="a" x1="{NAMES}" x2="{NAMES}" y1="{LINE}" y2="{end}"/>')
    for i, row in enumerate(rows):
        top = LINE * (i + 1)
        parts.append(
            f'<text x="{NAMES - 8}" y="{top + 14}" text-anchor="end">'
            f"{escape(row['provider'])}</text>"
        )
        if row["ms"] and longest > 0:
            parts += _bar(row, top, room / longest)
        else:
            reason = f"{row['status']}: {row['why']}" if row["why"] else row["status"]
            parts.append(
                f'<text class="d" x="{NAMES + 6}" y="{top + 14}">'
                f"{escape(reason[:REASON])}{'…' if len(reason) > REASON else ''}</text>"
            )
    return parts


def _bar(row: Mapping[str, Any], top: int, scale: float) -> list[str]:
    p20, p50, p80 = (row["ms"][name] * scale for name in ("p20", "p50", "p80"))
    colour = COLOURS.get(row["provider"], OTHER)
    middle = top + LINE / 2
    ratio = row["ratio"]
    told = "" if ratio is None or ratio["verdict"] not in ("faster", "slower") else ratio
    factor = f" ({ratio['median']:.2f}x)" if told else ""
    return [
        f'<rect x="{NAMES}" y="{middle - BAR / 2}" width="{p50:.2f}" height="{BAR}" '
        f'fill="{colour}"/>',
        f'<line class="w" x1="{NAMES + p20:.2f}" x2="{NAMES + p80:.2f}" '
        f'y1="{middle}" y2="{middle}"/>',
        f'<text x="{NAMES + max(p50, p80) + 6:.2f}" y="{top + 14}">'
        f"{row['ms']['p50']:.4g}{factor}</text>",
    ]


def escape(text: object) -> str:
    """`text` for XML: entities for what would be markup, nothing that XML cannot hold."""
    shown = "".join(c if not unicodedata.category(c).startswith("C") else " " for c in str(text))
    return html.escape(shown)
