"""A study in the terminal: what matters, and where the rest is."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftprof.report.study.sheets import configurations, interval, mark, percent, sheets, size
from peftprof.report.words import clean
from peftprof.studies import Judged

COLOURS = {"holds": "green", "fails": "red"}


def render(judged: Judged, folder: Path) -> RenderableType:
    """Configurations, verdicts, runs without a result; and what was written to `folder`."""
    study = judged.study
    lines: list[RenderableType] = [Text(), Text(clean(study.about or study.recipe), style="bold")]
    if study.quick:
        lines.append(Text(clean(mark(judged)), style="yellow"))
    lines += [Text(), _runs(judged), Text(), _verdicts(judged)]
    lacking = [sheet for sheet in sheets(judged) if sheet.title == "Runs without a result"]
    for sheet in lacking:
        lines += [Text(), Text(sheet.title, style="bold")]
        lines += [
            Text(clean(f"{name}: {state}. {why}"), overflow="fold")
            for name, state, why in sheet.rows
        ]
    lines += [
        Text(),
        Text(f"page        {folder / 'index.html'}", overflow="fold"),
        Text(f"summary     {folder / 'summary.md'}", overflow="fold"),
        Text(f"raw results {folder / 'results.jsonl'} and *.parquet", overflow="fold"),
    ]
    return Group(*lines)


def _runs(judged: Judged) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for number, name in enumerate(("run", "accuracy %", "samples/s", "peak memory")):
        table.add_column(name, justify="left" if not number else "right")
    for name in configurations(judged):
        table.add_row(
            name,
            percent(judged.accuracy.get(name)),
            interval(judged.throughput.get(name), "{:.1f}"),
            size(judged.memory.get(name)),
        )
    return table


def _verdicts(judged: Judged) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    for verdict in judged.verdicts:
        colour = COLOURS.get(verdict.verdict, "dim")
        table.add_row(verdict.claim, Text(verdict.verdict, style=colour), Text(clean(verdict.text)))
    return table
