"""The description of a machine: true, complete, JSON, and readable in 80 columns."""

import copy
import importlib.metadata
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import peftprof
from peftprof.errors import DeviceError
from peftprof.report.environment import render
from peftprof.run import environment


@pytest.fixture(scope="module")
def here():
    return environment.describe()


def shown(description, width: int = 80, **options) -> str:
    out = io.StringIO()
    Console(file=out, width=width, **options).print(render(description))
    return out.getvalue()


def with_gpu(here):
    """The description as it would be with a GPU and every meter."""
    d = copy.deepcopy(here)
    d["cuda"] = {
        "available": True,
        "reason": None,
        "devices": [
            {
                "name": "NVIDIA H100 80GB HBM3",
                "capability": "9.0",
                "memory_bytes": 85 * 10**9,
                "multiprocessors": 132,
            }
        ],
    }
    d["precisions"]["cuda:0"] = {"fp32": "hardware", "bf16": "hardware", "fp16": "hardware"}
    d["defaults"] = {"device": "cuda", "precision": "bf16"}
    d["nvml"] = {"available": True, "reason": None, "driver": "580.1", "gpus": 1}
    d["rapl"] = {"available": True, "reason": None, "counters": ["package-0", "package-1"]}
    d["nsys"] = {"available": True, "reason": None, "version": "2025.3.1"}
    d["git"] = {"available": False, "reason": "installed, not a git checkout"}
    d["memory"]["limit_bytes"] = 2**30
    d["cpu"]["usable_cores"] = d["cpu"]["cores"] + 1
    return d


def test_it_is_json_and_says_what_is_here(here):
    assert json.loads(json.dumps(here)) == here
    assert here["packages"]["torch"] == importlib.metadata.version("torch")
    assert here["torch"]["version"] == torch.__version__
    assert here["cuda"]["available"] == torch.cuda.is_available()
    assert here["cpu"]["usable_cores"] >= 1
    assert here["memory"]["total_bytes"] > 2**20
    assert here["defaults"]["device"] in ("cpu", "cuda")


def test_what_is_missing_has_a_reason(here):
    parts = [*here["kernels"].values(), *(here[k] for k in ("cuda", "mps", "nvml", "rapl", "nsys"))]
    for part in [*parts, here["git"]]:
        assert part["available"] == (part["reason"] is None)
        if part["reason"] is not None:
            assert part["reason"]
            assert "\n" not in part["reason"]


def test_it_names_no_place_and_no_person(here):
    text = json.dumps(here)
    for private in (str(Path.home()), str(Path(peftprof.__file__).parents[1]), os.uname().nodename):
        if len(private) > 3:  # a host called "vm" or a home of / proves nothing
            assert private not in text


def test_triton_is_there_where_it_can_run(here):
    kernels = here["kernels"]
    assert kernels["torch"]["available"]
    assert kernels["triton"]["available"]  # on a GPU, or interpreted as these tests are
    assert kernels["triton"]["interpreted"] != torch.cuda.is_available()


def test_the_triton_kernels_are_refused_without_a_gpu(monkeypatch):
    without = {"available": False, "reason": "needs a GPU, and there is none"}
    monkeypatch.setattr(environment, "_triton", lambda: without | {"interpreted": False})
    with pytest.raises(DeviceError, match="none; use --kernels torch, or set TRITON_INTERPRET=1"):
        environment.check_triton("cpu")
    there = {"available": True, "reason": None, "interpreted": False}
    monkeypatch.setattr(environment, "_triton", lambda: there)
    with pytest.raises(DeviceError, match="needs a GPU and --device is cpu"):
        environment.check_triton("cpu")
    environment.check_triton("cuda:0")


def test_bitsandbytes_is_really_tried(here):
    from bitsandbytes import functional

    right = environment._dequantises(functional, 96, "cpu")
    assert environment._dequantises(functional, 128, "cpu")
    assert here["kernels"]["bnb"]["available"]
    assert right == ("cpu" not in (here["kernels"]["bnb"]["note"] or ""))


def test_the_trial_of_bitsandbytes_notices_wrong_numbers():
    from bitsandbytes import functional

    class Broken:
        quantize_4bit = staticmethod(functional.quantize_4bit)

        @staticmethod
        def dequantize_4bit(packed, state):
            return functional.dequantize_4bit(packed, state).flip(0)

    assert not environment._dequantises(Broken, 128, "cpu")


@pytest.mark.parametrize("name", ["", "gpu", "cpu:1", "cuda:", "cuda:-1", "cuda:x", "xpu", "CPU"])
def test_unknown_devices(name):
    with pytest.raises(DeviceError, match="unknown device") as error:
        environment.check_device(name)
    assert "\n" not in str(error.value)


def test_devices_that_are_not_here(monkeypatch):
    assert environment.check_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(environment, "_cuda_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert environment.check_device("cuda") == torch.device("cuda", 0)
    assert environment.default_device() == "cuda"
    with pytest.raises(DeviceError, match="cuda:3: torch sees 1 GPU, cuda:0 is the only one"):
        environment.check_device("cuda:3")
    monkeypatch.setattr(environment, "_cuda_count", lambda: 0)
    monkeypatch.setattr(environment, "_has_mps", lambda: False)
    assert environment.default_device() == "cpu"
    for name in ("cuda", "cuda:3"):
        with pytest.raises(DeviceError, match=f"there is no device {name}: .+ --device cpu"):
            environment.check_device(name)


@pytest.mark.parametrize(
    ("capability", "precision"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16")]
)
def test_default_precision_of_gpus(monkeypatch, capability, precision):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert environment.default_precision("cuda:0") == precision
    for each in ("fp32", "bf16", "fp16"):
        environment.check_precision(each, "cuda:0")


@pytest.mark.parametrize("bf16", [True, False])
def test_default_precision_of_cpus(monkeypatch, bf16):
    monkeypatch.setattr(environment, "_cpu_has_bf16", lambda: bf16)
    assert environment.default_precision("cpu") == ("bf16" if bf16 else "fp32")
    environment.check_precision("bf16", "cpu")
    with pytest.raises(DeviceError, match=r"fp16 needs a GPU; on cpu use --precision (bf16|fp32)"):
        environment.check_precision("fp16", "cpu")
    with pytest.raises(DeviceError, match="unknown precision 'int8'"):
        environment.check_precision("int8", "cpu")


def make_program(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")
    (folder / name).chmod(0o755)


def test_nsys_is_asked_for_its_version(monkeypatch, tmp_path):
    make_program(tmp_path, "nsys", "echo NVIDIA Nsight Systems version 2025.3.1.90-253135822126v0")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    found = environment._or_reason(environment._nsys)
    assert found["version"] == "2025.3.1.90-253135822126v0"
    make_program(tmp_path, "nsys", "echo cannot start >&2; exit 3")
    found = environment._or_reason(environment._nsys)
    assert found == {"available": False, "reason": "nsys says: cannot start"}


def test_without_git_and_outside_a_checkout(monkeypatch, tmp_path):
    package = tmp_path / "peftprof"
    package.mkdir()
    monkeypatch.setattr(environment.peftprof, "__file__", str(package / "__init__.py"))
    assert environment._or_reason(environment._git)["reason"] == "installed, not a git checkout"
    (tmp_path / ".git").mkdir()
    assert "git says: " in environment._or_reason(environment._git)["reason"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment._or_reason(environment._git)["reason"] == "git is not installed"


def test_the_commit_of_a_checkout(monkeypatch, tmp_path):
    (tmp_path / "peftprof").mkdir()
    monkeypatch.setattr(environment.peftprof, "__file__", str(tmp_path / "peftprof" / "x.py"))
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    try:
        subprocess.run([*git, "init", "-q"], check=True)
    except FileNotFoundError:
        pytest.skip("git is not installed")
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    found = environment._or_reason(environment._git)
    assert re.fullmatch("[0-9a-f]{40}", found["commit"])
    assert found["dirty"] is False
    (tmp_path / "new.py").touch()
    assert environment._or_reason(environment._git)["dirty"] is True


@pytest.mark.parametrize("gpu", [False, True])
def test_the_page_fits_and_is_plain_where_nobody_watches(here, gpu):
    text = shown(with_gpu(here) if gpu else here)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80
    assert "\x1b" not in text
    assert "\x1b" in shown(here, force_terminal=True)
    for word in ("machine", "devices", "kernels", "meters", "packages", "bnb", "triton", "nsys"):
        assert word in text
    if gpu:
        assert "NVIDIA H100 80GB HBM3, 79.2 GiB, capability 9.0" in " ".join(text.split())


def test_the_page_gives_every_reason(here):
    text = " ".join(shown(here).split())
    for part in (here["nvml"], here["rapl"], here["nsys"], *here["kernels"].values()):
        if part["reason"]:
            assert part["reason"] in text


def test_the_page_needs_no_torch():
    code = "import sys, peftprof.report.environment; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
