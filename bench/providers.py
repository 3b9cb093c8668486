"""Who else offers the operation, and why not where not."""

from typing import Any

from bench.harness import AbsentError, Prepared, Provider
from bench.options import Setup
from bench.problems import imported, installed


def need_gpu_for_triton(setup: Setup, backend: str = "triton") -> None:
    """Raise AbsentError for the Triton backend on a CPU.

    Under TRITON_INTERPRET=1 it can be verified there, never timed: an interpreter's
    seconds say nothing of a GPU's.
    """
    if backend != "triton" or setup.device.type == "cuda":
        return
    from peftprof_kernels.numerics import INTERPRETED

    if not INTERPRETED.value:
        raise AbsentError("needs a GPU")
    if not setup.verify_only:
        raise AbsentError("needs a GPU; the interpreter's seconds are no timing")


def unsloth_kernels(setup: Setup) -> Any:
    """The module unsloth.kernels. Raises AbsentError without it, or where it was not asked for.

    Written from its source and not yet run beside this project.
    """
    if installed("unsloth") and not setup.unsloth:
        raise AbsentError("installed; --with-unsloth takes it in, and its import patches PEFT")
    return imported("unsloth.kernels")


def _liger() -> Prepared:
    if not installed("liger_kernel"):
        raise AbsentError("not installed")
    raise AbsentError("it has no NF4 and no LoRA linear")


LIGER = Provider("Liger", _liger)
