"""The machine of `peftprof.run.environment.describe` as a page of text, within 80 columns."""

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

COLUMNS_OF_PACKAGES = 2
NAME_WIDTH, ANSWER_WIDTH = 10, 4

Line = tuple[str, str, str]  # a name, a short answer, what there is to say about it


def render(description: Mapping[str, Any]) -> RenderableType:
    """What the machine is, and what it can and cannot do, each with its reason."""
    d = description
    return Group(
        Text(f"peftprof {d['packages']['peftprof'] or '(not installed)'}{_checkout(d)}", "bold"),
        *_section("machine", _machine(d)),
        *_section("devices", _devices(d)),
        *_section("kernels", [_kernel(name, k) for name, k in d["kernels"].items()]),
        *_section("meters", _meters(d)),
        Text(),
        Text("packages", "bold"),
        _packages(d["packages"]),
    )


def _section(title: str, lines: list[Line]) -> list[RenderableType]:
    answers = any(answer for _, answer, _ in lines)
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=NAME_WIDTH, no_wrap=True)
    if answers:
        table.add_column(width=ANSWER_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for name, answer, text in lines:
        style = {"yes": "green", "no": "yellow"}.get(answer, "")
        table.add_row(Text(f"  {name}"), *([Text(answer, style)] if answers else []), Text(text))
    return [Text(), Text(title, "bold"), table]


def _checkout(d: Mapping[str, Any]) -> str:
    git = d["git"]
    if not git["available"]:
        return f"  ({git['reason']})"
    return f"  commit {git['commit'][:12]}" + (", with local changes" if git["dirty"] else "")


def _machine(d: Mapping[str, Any]) -> list[Line]:
    cpu, memory, torch = d["cpu"], d["memory"], d["torch"]
    cores = f"{cpu['cores']} cores"
    if cpu["usable_cores"] != cpu["cores"]:
        cores += f", {cpu['usable_cores']} of them usable here"
    vectors = [cpu["vectors"]]
    vectors += ["AVX512-BF16"] * cpu["avx512_bf16"] + ["AMX"] * cpu["amx"]
    ram = _gib(memory["total_bytes"])
    if memory["limit_bytes"] is not None:
        ram += f", {_gib(memory['limit_bytes'])} of it usable here"
    build = "CUDA " + torch["cuda_build"] if torch["cuda_build"] else ""
    build = "ROCm " + torch["rocm_build"] if torch["rocm_build"] else build
    torch_text = f"{torch['version']}, {torch['threads']} threads"
    return [
        ("system", "", d["platform"]),
        ("python", "", f"{d['python']['version']} ({d['python']['implementation']})"),
        ("cpu", "", f"{cpu['model']}, {cores}; {', '.join(vectors)}"),
        ("memory", "", ram),
        ("torch", "", f"{torch_text}, built for {build or 'the CPU only'}"),
    ]


def _devices(d: Mapping[str, Any]) -> list[Line]:
    lines = []
    for device, precisions in d["precisions"].items():
        text = _precisions(precisions)
        if device.startswith("cuda:"):
            gpu = d["cuda"]["devices"][int(device.partition(":")[2])]
            text = (
                f"{gpu['name']}, {_gib(gpu['memory_bytes'])}, capability {gpu['capability']}, "
                f"{gpu['multiprocessors']} multiprocessors; {text}"
            )
        lines.append((device, "yes", text))
    for device in ("cuda", "mps"):
        if not d[device]["available"]:
            lines.append((device, "no", d[device]["reason"]))
    default = d["defaults"]
    return [
        *lines,
        ("default", default["device"], f"{default['precision']}, unless told otherwise"),
    ]


def _precisions(precisions: Mapping[str, str]) -> str:
    said = {"hardware": "{}", "emulated": "{} (emulated, slow)", "no": "no {}"}
    return ", ".join(said[how].format(name) for name, how in precisions.items())


def _kernel(name: str, kernel: Mapping[str, Any]) -> Line:
    if not kernel["available"]:
        return name, "no", kernel["reason"]
    return name, "yes", kernel["note"] or ""


def _meters(d: Mapping[str, Any]) -> list[Line]:
    said = {
        "nvml": ("NVML", "driver {driver}, GPUs: {gpus}"),
        "rapl": ("RAPL", "CPU energy: {counters}"),
        "nsys": ("nsys", "Nsight Systems {version}"),
    }
    lines = []
    for key, (name, text) in said.items():
        meter = d[key]
        if meter["available"]:
            words = {k: ", ".join(v) if isinstance(v, list) else v for k, v in meter.items()}
            lines.append((name, "yes", text.format(**words)))
        else:
            lines.append((name, "no", meter["reason"]))
    return lines


def _packages(packages: Mapping[str, str | None]) -> Table:
    """Names and versions in columns read downwards; one that is absent says so."""
    table = Table.grid(padding=(0, 2, 0, 0))
    items = [(f"  {name}", version or "absent") for name, version in packages.items()]
    rows = -(-len(items) // COLUMNS_OF_PACKAGES)
    for _ in range(COLUMNS_OF_PACKAGES):
        table.add_column(no_wrap=True)
        table.add_column(min_width=14)
    columns = [items[i : i + rows] for i in range(0, len(items), rows)]
    for row in zip_longest(*columns, fillvalue=("", "")):
        cells = [
            cell
            for name, version in row
            for cell in (Text(name), Text(version, "yellow" if version == "absent" else ""))
        ]
        table.add_row(*cells)
    return table


def _gib(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB"
