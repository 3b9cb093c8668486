"""What this machine is and can do: for bug reports, for run.json, and for choosing a device.

`describe` never fails and starts no CUDA where there is none. What cannot be had is None
beside a reason, never left out. It holds no path, no host name and no user name.
"""

import dataclasses
import importlib.metadata
import logging
import os
import platform
import re
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import peftprof
from peftprof.errors import DeviceError, InputError
from peftprof.run import crossovers
from peftprof.run.meters import Absent, open_nvml, rapl_zones

PACKAGES = (
    "peftprof",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "safetensors",
    "tokenizers",
    "triton",
    "kernels",
    "numpy",
    "nvtx",
    "nvidia-ml-py",
    "orjson",
    "rich",
    "typer",
)


def describe() -> dict[str, Any]:
    """The machine as JSON values; `peftprof.report.environment.render` shows them."""
    devices = ["cpu", *(f"cuda:{i}" for i in range(_cuda_count())), *(["mps"] * _has_mps())]
    default = default_device()
    return {
        "python": {
            "version": platform.python_version(),
            "implementation": platform.python_implementation(),
        },
        "platform": platform.platform(),
        "git": _or_reason(_git),
        "cpu": _cpu(),
        "memory": {"total_bytes": _ram_bytes(), "limit_bytes": _cgroup_bytes()},
        "torch": {
            "version": str(torch.__version__),
            "cuda_build": torch.version.cuda,
            "rocm_build": torch.version.hip,
            "threads": torch.get_num_threads(),
            "interop_threads": torch.get_num_interop_threads(),
            "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
            "gomp_spincount": os.environ.get("GOMP_SPINCOUNT"),
        },
        "cuda": _cuda(),
        "mps": {"available": _has_mps(), "reason": None if _has_mps() else _no_mps()},
        "defaults": {"device": default, "precision": default_precision(default)},
        "precisions": {device: precisions(device) for device in devices},
        "kernels": {"bnb": _bnb(), "torch": _kernel(None, "plain PyTorch"), "triton": _triton()},
        "crossovers": _crossovers(),
        "nvml": _or_reason(_nvml),
        "rapl": _or_reason(lambda: {"counters": [zone.name for zone in rapl_zones()]}),
        "nsys": _or_reason(_nsys),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def default_device() -> str:
    """`cuda` where torch sees a GPU (NVIDIA or ROCm), else `cpu`."""
    return "cuda" if _cuda_count() else "cpu"


def check_device(name: str) -> torch.device:
    """The device `name`, with its index on CUDA. Raises DeviceError when it is not here."""
    found = re.fullmatch(r"(cpu|cuda|mps)(?::(\d+))?", name)
    if found is None or (found[2] and found[1] != "cuda"):
        raise DeviceError(f"unknown device {name!r}; it is cpu, cuda or cuda:N")
    if found[1] == "mps":
        raise DeviceError("steps on the device mps cannot be timed yet; use --device cpu")
    if found[1] != "cuda":
        return torch.device(found[1])
    count = _cuda_count()
    if count == 0:
        raise DeviceError(f"there is no device {name}: {_no_cuda()}; use --device cpu")
    index = torch.cuda.current_device() if found[2] is None else int(found[2])
    if index >= count:
        known = "cuda:0 is the only one" if count == 1 else f"they are cuda:0 to cuda:{count - 1}"
        raise DeviceError(f"there is no device {name}: torch sees {count} GPU, {known}")
    return torch.device("cuda", index)


def precisions(device: str) -> dict[str, str]:
    """How `device` does each precision: `hardware`, `emulated` (slower than fp32) or `no`."""
    kind = device.partition(":")[0]
    if kind == "cpu":
        bf16, fp16 = ("hardware" if _cpu_has_bf16() else "emulated"), "no"
    elif kind == "mps":
        bf16, fp16 = "emulated", "hardware"
    elif torch.version.hip:
        bf16, fp16 = "hardware", "hardware"
    else:
        capability = torch.cuda.get_device_capability(device)
        bf16 = "hardware" if capability >= (8, 0) else "emulated"
        fp16 = "hardware" if capability >= (5, 3) else "emulated"
    return {"fp32": "hardware", "bf16": bf16, "fp16": fp16}


def default_precision(device: str) -> str:
    """`bf16` where the hardware has it, `fp16` on other GPUs that have that, else `fp32`.

    bf16 before fp16, because it needs no loss scaling.
    """
    has = precisions(device)
    if has["bf16"] == "hardware":
        return "bf16"
    return "fp16" if has["fp16"] == "hardware" and device.startswith("cuda") else "fp32"


def check_precision(precision: str, device: str) -> None:
    """Raises DeviceError when a run on `device` cannot use `precision`."""
    known = precisions(device)
    if precision not in known:
        raise DeviceError(f"unknown precision {precision!r}; it is one of {', '.join(known)}")
    if known[precision] == "no":
        raise DeviceError(
            f"--precision {precision} needs a GPU; on {device} use --precision "
            f"{default_precision(device)}"
        )


def _or_reason(look: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return {"available": True, "reason": None} | look()
    except Absent as reason:
        return {"available": False, "reason": str(reason)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _one_line(text: object) -> str:
    return (str(text).strip().splitlines() or [type(text).__name__])[0].rstrip(".")


# --- The host


def _cpu() -> dict[str, Any]:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "usable_cores": len(affinity(0)) if affinity else os.cpu_count(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "avx512_bf16": torch.cpu._is_avx512_bf16_supported(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "bf16": _cpu_has_bf16(),
    }


def cpu_model() -> str:
    """What the processor calls itself; where it does not (ARM), what the board does."""
    cpuinfo = _text("/proc/cpuinfo") or ""
    if found := re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE):
        return found[1].strip()
    board = (_text("/proc/device-tree/model") or "").strip("\0 \n")
    return board or platform.processor() or platform.machine()


def _cpu_has_bf16() -> bool:
    if platform.machine() in ("x86_64", "AMD64"):
        # oneDNN's own answer is yes from AVX512BW on, where it computes in fp32 and rounds.
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def memory_bytes() -> int | None:
    """The memory that can be used here: the machine's, or the container's limit."""
    return _cgroup_bytes() or _ram_bytes()


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # a system without that name for it
        return None


def _cgroup_bytes() -> int | None:
    """The container's memory limit (cgroup 2, then 1); None without one."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = (_text(path) or "").strip()
        if text.isdigit() and int(text) < (_ram_bytes() or 0):  # cgroup 1 says 2**63 for none
            return int(text)
    return None


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text()
    except OSError:  # not Linux, or not shown to this user
        return None


def _output(*command: str) -> str:
    """What a program prints. Raises Absent, with its first line, where it fails."""
    # git would otherwise rewrite its index, under the feet of whoever is working there.
    quiet = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, env=quiet)
    except FileNotFoundError:
        raise Absent(f"{command[0]} is not installed") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Absent(f"{command[0]} does not answer ({type(error).__name__})") from None
    if done.returncode != 0:
        raise Absent(f"{Path(command[0]).name} says: {_one_line(done.stderr or done.stdout)}")
    return done.stdout.strip()


def _git() -> dict[str, Any]:
    package = Path(peftprof.__file__).resolve().parent
    if not (package.parent / ".git").exists():
        # Installed: a repository further up would be somebody else's.
        raise Absent("installed, not a git checkout")
    git = ("git", "-C", str(package.parent))
    return {
        "commit": _output(*git, "rev-parse", "HEAD"),
        "dirty": bool(_output(*git, "status", "--porcelain")),
    }


# --- Accelerators


def _cuda_count() -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `_no_cuda` tells what they say
        return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _no_cuda() -> str:
    if torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU"
    try:
        torch.cuda.init()
    except RuntimeError as error:
        return _one_line(error)
    return "torch sees no GPU"


def _has_mps() -> bool:
    return torch.backends.mps.is_available()


def _no_mps() -> str:
    if platform.system() != "Darwin":
        return "this is not macOS"
    built = torch.backends.mps.is_built()
    return "this Mac's GPU or macOS is too old" if built else "torch is built without MPS"


def _cuda() -> dict[str, Any]:
    count = _cuda_count()
    devices = [torch.cuda.get_device_properties(i) for i in range(count)]
    return {
        "available": count > 0,
        "reason": None if count else _no_cuda(),
        "devices": [
            {
                "name": device.name,
                "capability": f"{device.major}.{device.minor}",
                "memory_bytes": device.total_memory,
                "multiprocessors": device.multi_processor_count,
            }
            for device in devices
        ],
    }


def _nvml() -> dict[str, Any]:
    nvml = open_nvml()
    try:
        return {"driver": nvml.nvmlSystemGetDriverVersion(), "gpus": nvml.nvmlDeviceGetCount()}
    except nvml.NVMLError as error:
        raise Absent(f"NVML does not answer ({error})") from None


def _nsys() -> dict[str, Any]:
    path = shutil.which("nsys")
    if path is None:
        raise Absent("nsys is not on PATH")
    found = re.search(r"\d[\w.-]*", _output(path, "--version"))
    return {"version": found[0] if found else None}


# --- Kernel backends


def _kernel(reason: str | None, note: str | None = None) -> dict[str, Any]:
    return {"available": reason is None, "reason": reason, "note": note}


def check_triton(device: str) -> None:
    """Raises DeviceError when the Triton kernels cannot run on `device`."""
    state = _triton()
    if not state["available"]:
        raise DeviceError(
            f"--kernels triton {state['reason']}; use --kernels torch, or set TRITON_INTERPRET=1 "
            "for a slow check of the numbers"
        )
    if not device.startswith("cuda") and not state["interpreted"]:
        raise DeviceError(
            f"--kernels triton needs a GPU and --device is {device}; use --kernels torch, or set "
            "TRITON_INTERPRET=1 for a slow check of the numbers"
        )


def _triton() -> dict[str, Any]:
    if _version("triton") is None:
        return _kernel("needs the package triton, which is not installed") | {"interpreted": False}
    from peftprof_kernels.numerics import INTERPRETED

    if INTERPRETED.value:
        return _kernel(None, "interpreted: right numbers, no times") | {"interpreted": True}
    reason = None if _cuda_count() else f"needs a GPU, and {_no_cuda()}"
    return _kernel(reason) | {"interpreted": False}


def _crossovers() -> dict[str, Any]:
    """By device: the table that decides between the fused NF4 kernels and a library GEMM."""
    found: dict[str, Any] = {}
    for index in range(_cuda_count()):
        try:
            table = crossovers.stored(torch.device("cuda", index))
        except InputError as error:
            found[f"cuda:{index}"] = {"reason": str(error)}
        else:
            found[f"cuda:{index}"] = table and [dataclasses.asdict(entry) for entry in table]
    return found


def _bnb() -> dict[str, Any]:
    # On some CPUs its import advises a package that peftprof does not use.
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        import bitsandbytes
        from bitsandbytes import cextension
    except ModuleNotFoundError as error:
        return _kernel(f"the package {error.name} is not installed")
    except (ImportError, OSError, RuntimeError) as error:
        return _kernel(f"bitsandbytes cannot be imported: {_one_line(error)}")
    finally:
        logger.setLevel(level)
    if isinstance(cextension.lib, cextension.ErrorHandlerMockBNBNativeLibrary):
        return _kernel(f"its native library is not loaded: {_one_line(cextension.lib.error_msg)}")
    wrong = []
    for device in ("cpu", "cuda") if _cuda_count() else ("cpu",):
        try:
            right = [_dequantises(bitsandbytes.functional, k, device) for k in (128, 96)]
        except RuntimeError as error:
            return _kernel(f"it cannot quantise on {device}: {_one_line(error)}")
        if not right[0]:
            return _kernel(f"it dequantises NF4 wrongly on {device}")
        wrong += [] if right[1] else [device]
    note = "for weights whose columns are no multiple of the blocksize, 64"
    return _kernel(None, f"wrong on {' and '.join(wrong)} {note}" if wrong else None)


def _dequantises(functional: Any, columns: int, device: str) -> bool:
    """Whether bitsandbytes gives the NF4 weight [64, columns] that its packed form means."""
    weight = torch.linspace(-1, 1, 64 * columns, device=device).reshape(64, columns)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    # Two codes a byte, the first in the high half; blocks run on across the rows.
    codes = torch.stack((packed.flatten() >> 4, packed.flatten() & 15), dim=-1).flatten()
    meant = (state.code[codes.long()].view(-1, 64) * state.absmax[:, None]).view_as(weight)
    return torch.allclose(functional.dequantize_4bit(packed, state), meant, atol=1e-6)
