"""The suite's result as one HTML page: tables and SVG inline, nothing fetched, all text escaped."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.picture import draw, escape, title
from bench.results import machine

STYLE = """
body{font:14px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1200px;padding:0 1rem;
color:#1f2328}
h1{font-size:1.5rem}h2{font-size:1.15rem;margin-top:2.2rem}
table{border-collapse:collapse;margin:.6rem 0}
th,td{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #d0d7de;
vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.failed{color:#b42318;font-weight:600}.cut,.skipped{color:#9a6700;font-weight:600}
.note{color:#656d76}td:first-child{white-space:nowrap}svg{max-width:100%;height:auto}
pre{background:#f6f8fa;padding:.8rem;overflow-x:auto;font-size:12px}
summary{cursor:pointer}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"

MEMORY = ("saved_bytes", "peak_bytes")

Json = Mapping[str, Any]


def render(result: Json) -> str:
    """The page of a suite.json."""
    failed = result["failed"]
    said = f"{len(failed)} failed: {', '.join(failed)}" if failed else "no part failed"
    body = [
        f"<h1>GPU suite: {escape(said)}</h1>",
        *_machine(result),
        "<h2>Parts</h2>",
        *_parts(result["parts"]),
    ]
    for name, benchmark in result["benchmarks"].items():
        body += _benchmark(name, benchmark)
    body += _training(result["training"])
    body += _breakdowns(result["breakdowns"])
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>GPU suite</title><style>{STYLE}</style></head><body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def _machine(result: Json) -> Iterable[str]:
    env = result["environment"]
    gpus = [device["name"] for device in env["cuda"]["devices"]]
    git = env["git"]
    facts = {
        "date": result["date"],
        "took": f"{result['seconds']:.0f} s",
        "GPU": ", ".join(gpus) or f"none: {env['cuda']['reason']}",
        "CPU": f"{env['cpu']['model']}, {env['cpu']['usable_cores']} cores",
        "commit": f"{git.get('commit') or git['reason']}{' + changes' * bool(git.get('dirty'))}",
        "driver": env["nvml"].get("driver") or env["nvml"]["reason"],
        "versions": ", ".join(f"{k} {v}" for k, v in env["packages"].items() if v),
    }
    if result["rehearsal"]:
        yield '<p class="failed">A rehearsal on a CPU, with tiny sizes: no measurement.</p>'
    yield table([], [[name, value] for name, value in facts.items()])


def _parts(parts: Sequence[Json]) -> Iterable[str]:
    rows = [[p["name"], p["status"], p["seconds"], p["why"]] for p in parts]
    yield table(["part", "status", "s", ""], rows, numbers={2}, marks=1)
    for part in parts:
        output = "\n".join(filter(None, (part["output"], part["errors"])))
        if part["status"] in ("failed", "cut short") and output:
            yield f"<details><summary>{escape(part['name'])}: the end of what it printed</summary>"
            yield f"<pre>{lines(output)}</pre></details>"


def _benchmark(name: str, benchmark: Json) -> Iterable[str]:
    header, rows, end = benchmark["header"], benchmark["rows"], benchmark["end"]
    yield f"<h2>{escape(name)}</h2>"
    if header is None:
        yield '<p class="note">It broke off before it had measured anything.</p>'
        return
    yield f'<p class="note">{escape(machine(header))}</p>'
    if end is None or end["cut_short"]:
        yield '<p class="cut">Cut short: what follows is what was measured until then.</p>'
    if benchmark["crossovers"]:
        yield "<p>The largest M at which the fused kernel wins:</p>"
        columns = ["layer", "N", "K", "forward_max_m", "dx_max_m"]
        found = [[entry[column] for column in columns] for entry in benchmark["crossovers"]]
        heads = ["layer", "N", "K", "forward", "dX"]
        yield table(heads, found, numbers={1, 2, 3, 4})
    if rows:
        yield f"<details open><summary>{escape(header['question'])}</summary>"
        yield draw(rows, header["question"], machine(header))
        yield "</details>"
    kept = [row for row in rows if "saved_bytes" in row["notes"]]
    if kept:
        yield "<p>What a forward keeps for backward beside parameters, and the peak of both:</p>"
        sizes = [[row["notes"].get(name) for name in MEMORY] for row in kept]
        cells = [
            [title(row["case"]), row["provider"], *(number(s and s / 2**20, 2) for s in size)]
            for row, size in zip(kept, sizes, strict=True)
        ]
        yield table(["case", "provider", "saved MiB", "peak MiB"], cells, numbers={2, 3})


def _training(training: Json) -> Iterable[str]:
    if not training:
        return
    yield "<h2>QLoRA runs</h2>"
    rows = []
    for kernels, record in training.items():
        timed, memory = record.get("timed") or {}, record.get("memory") or {}
        allocated = memory.get("allocated_bytes")
        rows.append(
            [
                kernels,
                number(timed.get("samples_per_s"), 1),
                number(timed.get("step_p50_ms"), 2),
                number(timed.get("step_p95_ms"), 2),
                number(allocated and allocated / 2**20, 0),
                number(timed.get("last_loss"), 4),
            ]
        )
    heads = ["kernels", "samples/s", "step p50 ms", "p95 ms", "peak MiB", "last loss"]
    yield table(heads, rows, numbers={1, 2, 3, 4, 5})


def _breakdowns(breakdowns: Json) -> Iterable[str]:
    runs = {name: told["runs"][0] for name, told in breakdowns.items() if told.get("runs")}
    if not runs:
        return
    yield "<h2>Where a profiled step's time goes, ms</h2>"
    keys: dict[tuple[str, str], None] = {}
    times: dict[str, dict[tuple[str, str], float]] = {}
    for name, run in runs.items():
        times[name] = {(row["phase"], row["category"]): row["ns"] for row in run["rows"]}
        times[name]["idle", ""] = run["idle_ns"]
        keys |= dict.fromkeys(times[name])
    rows = [
        [*key, *(number(times[run].get(key, 0) / 1e6, 3) for run in runs)]
        for key in sorted(keys, key=lambda key: key == ("idle", ""))
    ]
    rows.append(["step", "", *(number(run["step_ns"]["median"] / 1e6, 3) for run in runs.values())])
    yield table(["phase", "category", *runs], rows, numbers=set(range(2, 2 + len(runs))))


def number(value: float | None, digits: int) -> str:
    """A number, or a dash where there is none."""
    return "-" if value is None else f"{value:,.{digits}f}"


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[object]],
    numbers: set[int] | None = None,
    marks: int | None = None,
) -> str:
    """A table; columns in `numbers` to the right, the column `marks` coloured by its word."""

    def cell(tag: str, column: int, value: object) -> str:
        kind = "n" if column in (numbers or set()) else ""
        if column == marks and value in ("failed", "cut short", "skipped"):
            kind = str(value).split()[0]
        return f"<{tag}{f' class={kind!r}' if kind else ''}>{escape(value)}</{tag}>"

    body = [[cell("td", i, value) for i, value in enumerate(row)] for row in rows]
    body = [[cell("th", i, head) for i, head in enumerate(heads)], *body] if heads else body
    lined = [f"<tr>{''.join(row)}</tr>" for row in body]
    return f"<table>{''.join(lined)}</table>"


def lines(text: str) -> str:
    """Escaped text that keeps its line breaks."""
    return "\n".join(escape(line) for line in text.splitlines())
