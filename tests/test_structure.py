"""The house's rules that a machine can hold: floors, sizes, names."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*(ROOT / "peftprof").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# A module may import its own room and what stands behind it here, nothing else of ours.
LOW = {
    "peftprof",
    "peftprof.errors",
    "peftprof.records",
    "peftprof.breakdowns",
    "peftprof.config",
    "peftprof.watcher",
    "peftprof.studies",
    "peftprof.inferences",
    "peftprof.advice",
    "peftprof.cache",
    "peftprof.calibrations",
    "peftprof.devices",
}
FLOORS = {
    "peftprof_kernels": set(),
    "peftprof.errors": set(),
    "peftprof.breakdowns": set(),
    "peftprof.records": {"peftprof.errors", "peftprof.breakdowns"},
    "peftprof.watcher": set(),
    "peftprof.studies": {"peftprof.breakdowns", "peftprof.records"},
    "peftprof.inferences": {"peftprof.errors", "peftprof.records"},
    "peftprof.advice": {"peftprof.breakdowns"},
    "peftprof.config": {"peftprof.errors"},
    "peftprof.cache": set(),
    "peftprof.calibrations": {"peftprof.breakdowns"},
    "peftprof.devices": LOW,
    "peftprof.annotate": set(),
    "peftprof.trace": LOW,
    "peftprof.report": LOW | {"peftprof.trace"},
    "peftprof.run": LOW | {"peftprof.annotate", "peftprof_kernels"},
    "peftprof.study": LOW | {"peftprof.run", "peftprof.trace"},
    "peftprof.advise": LOW | {"peftprof.run", "peftprof.trace", "peftprof_kernels"},
    "peftprof.cli_advise": LOW | {"peftprof.advise", "peftprof.report"},
    "peftprof.cli_calibrate": LOW | {"peftprof.run", "peftprof.report"},
    "peftprof.cli_infer": LOW | {"peftprof.run", "peftprof.report"},
    "peftprof.cli": LOW
    | {"peftprof.run", "peftprof.report", "peftprof.trace", "peftprof.study"}
    | {"peftprof.cli_advise", "peftprof.cli_calibrate", "peftprof.cli_infer"},
    "peftprof.__main__": {"peftprof.cli", "peftprof.cli_advise"},
    "peftprof": set(),
}


def room(module: str) -> str:
    parts = module.split(".")
    return parts[0] if parts[0] == "peftprof_kernels" else ".".join(parts[:2])


def module_name(path: Path) -> str:
    base = ROOT / "kernels" if path.is_relative_to(ROOT / "kernels") else ROOT
    return ".".join(path.relative_to(base).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found.add(node.module)
            if node.module == "peftprof":
                found |= {f"peftprof.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_go_down_only(path):
    own = room(module_name(path))
    allowed = FLOORS[own] | {own, "peftprof"}
    for name in imports(path):
        top = name.split(".")[0]
        assert top not in {"tests", "bench", "kernels"}, name
        if top in {"peftprof", "peftprof_kernels"} and not name.startswith("peftprof.__"):
            assert room(name) in allowed, f"{module_name(path)} imports {name}"


def test_kernels_import_torch_triton_and_numpy_only():
    allowed = set(sys.stdlib_module_names) | {"torch", "triton", "numpy", "peftprof_kernels"}
    for path in (ROOT / "kernels").rglob("*.py"):
        assert {name.split(".")[0] for name in imports(path)} <= allowed, path


def test_reading_and_showing_import_no_torch():
    for path in SOURCES:
        if room(module_name(path)) in {"peftprof.trace", "peftprof.report"}:
            assert not {n for n in imports(path) if n.split(".")[0] == "torch"}, path


def test_no_file_is_two_rooms():
    for path in [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]:
        assert len(path.read_text().splitlines()) <= 420, path


def test_kernels_is_a_folder_and_no_package():
    """A kernels/__init__.py would shadow the public package that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_ci_runs_the_readmes_test_line():
    line = next(
        line for line in (ROOT / ".ci" / "run").read_text().splitlines() if "pytest" in line
    )
    assert line in (ROOT / "README.md").read_text().splitlines()
