"""Compiles kernels for a GPU that is not there, and reads what came out.

Triton needs no device to compile, and its wheel brings NVIDIA's disassembler. So registers,
shared memory, spills and the machine code (SASS) of every variant of every kernel are known
on any machine; only its time is not.

A loop's body is counted once: instructions per output element compare two versions of one
kernel, or two kernels without loops, and nothing else.
"""

import importlib
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftprof_kernels.numerics import INTERPRETED
from peftprof_kernels.variant import Variant

# The files with kernels, each with a function ``variants()``. Imported when asked for: a
# kernel file knows its variants, and this one has to know no kernel.
MODULES: Final = (
    "peftprof_kernels.nf4_dequantize",
    "peftprof_kernels.nf4_linear_kernels",
    "peftprof_kernels.lora_variants",
)

# Bytes of shared memory that one program may use. CUDA C++ Programming Guide, "Technical
# Specifications per Compute Capability", "Maximum amount of shared memory per thread block".
SHARED_LIMITS: Final = {
    75: 64 << 10,
    80: 163 << 10,
    86: 99 << 10,
    89: 99 << 10,
    90: 227 << 10,
    100: 227 << 10,
    120: 99 << 10,
}

# From sm_90 on ptxas counts the 1 KiB that CUDA keeps for itself in every program; the
# limits above leave it out.
_RESERVED_SHARED: Final = 1 << 10
_WARP: Final = 32
_INSTRUCTION_BYTES: Final = 16
# Triton multiplies on tensor cores from here on; below, tl.dot becomes scalar code
# (triton-lang/triton#5066).
_TENSOR_CORES_FROM: Final = 80


class CompileError(RuntimeError):
    """A variant does not compile for a target; says which, and Triton's own reason."""


@dataclass(frozen=True)
class Listing:
    """The machine code of one variant on one target, counted.

    kernel, variant  names, as ``Variant`` has them
    capability       the target: 90 for sm_90
    registers        for each thread
    stack_bytes      for each thread: spills and indexed arrays
    shared_bytes     for each program, without what CUDA keeps for itself
    instructions     in the kernel, each counted once however often a loop runs it
    per_output       instructions of all of a program's threads for one output element
    local            loads and stores of local memory: spills
    tensor_core      matrix multiplications on tensor cores
    atomics          atomics on global memory
    memory           global accesses by bits a thread, "LDG.128": 2, and TMA, "UTMALDG": 1
    """

    kernel: str
    variant: str
    capability: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    instructions: int
    per_output: float
    local: int
    tensor_core: int
    atomics: int
    memory: Mapping[str, int]

    @property
    def name(self) -> str:
        """Kernel, variant and target: "nf4_dequant/nested-bf16/sm_90"."""
        return f"{self.kernel}/{self.variant}/sm_{self.capability}"

    def widths(self, *opcodes: str) -> set[int]:
        """Bits that one thread moves in an access by any of these: ``widths("STG")``."""
        split = (access.split(".") for access in self.memory)
        return {int(width[0]) for opcode, *width in split if opcode in opcodes and width}


def all_variants() -> list[Variant]:
    """Every variant of every kernel file, in the files' order. Raises on a name used twice."""
    found = [v for module in MODULES for v in importlib.import_module(module).variants()]
    twice = [key for key, count in Counter(v.key for v in found).items() if count > 1]
    if twice:
        raise ValueError(f"variants with one name: {', '.join(twice)}")
    return found


def listings(variants: Sequence[Variant], capability: int) -> list[Listing | CompileError]:
    """What each variant becomes on one target, in order; what does not compile, as its error.

    Raises RuntimeError under Triton's interpreter, and FileNotFoundError where Triton has no
    NVIDIA tools.
    """
    compiled: list[Any] = [_attempt(variant, capability) for variant in variants]
    cubins = [c.asm["cubin"] for c in compiled if not isinstance(c, CompileError)]
    # Together: the disassembler needs 0.25 to 0.45 s to start, as long as a compilation, and
    # a few milliseconds for a kernel.
    codes = iter(disassemble([machine_code(cubin) for cubin in cubins], capability))
    return [
        c if isinstance(c, CompileError) else _listing(variant, capability, c, next(codes))
        for variant, c in zip(variants, compiled, strict=True)
    ]


def faults(variant: Variant, listing: Listing) -> list[str]:
    """What no kernel here may have, whatever it had before; empty when all is well."""
    found = []
    if listing.local or listing.stack_bytes:
        found.append(f"{listing.local} spill instructions, {listing.stack_bytes} stack bytes")
    limit = SHARED_LIMITS[listing.capability]
    if listing.shared_bytes > limit:
        found.append(f"{listing.shared_bytes} bytes of shared memory, the limit is {limit}")
    if listing.atomics:
        found.append(f"{listing.atomics} global atomics: results would not repeat")
    demanded = variant.kind == "gemm" and variant.tensor_cores
    if demanded and listing.capability >= _TENSOR_CORES_FROM and not listing.tensor_core:
        found.append("no tensor-core instructions")
    if variant.kind == "stream" and variant.wide:
        stores = listing.widths("STG")
        if not stores or min(stores) < 128:
            found.append(f"global stores of {sorted(stores)} bits, not of 128 only")
    return found


def disassemble(codes: Sequence[bytes], capability: int) -> list[list[str]]:
    """The opcodes of each piece of machine code, "LDG.E.128", without the padding at its end."""
    if not codes:
        return []
    # The letter names the instructions that only this one architecture has.
    architecture = f"SM{capability}{'a' if capability >= 90 else ''}"
    with tempfile.NamedTemporaryFile(suffix=".bin") as file:
        file.write(b"".join(codes))
        file.flush()
        text = run_tool("nvdisasm", "--binary", architecture, file.name)
    lines = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.M)
    opcodes = iter(lines)
    counts = [len(code) // _INSTRUCTION_BYTES for code in codes]
    if len(lines) != sum(counts):
        raise ValueError(f"nvdisasm printed {len(lines)} instructions of {sum(counts)}")
    return [_without_padding([next(opcodes) for _ in range(count)]) for count in counts]


def machine_code(cubin: bytes, function: str | None = None) -> bytes:
    """The section of an ELF file that holds a function's code; of the only one, if not named."""
    table, *_ = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    # Of each section header: offset of its name, type, flags, address, offset, size.
    headers = [struct.unpack_from("<IIQQQQ", cubin, table + size * i) for i in range(count)]
    for header in headers:
        start = headers[names][4] + header[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name == f".text.{function}" or (function is None and name.startswith(".text.")):
            return cubin[header[4] : header[4] + header[5]]
    raise ValueError(f"no code of {function or 'any function'} in this cubin")


def run_tool(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """What one of the NVIDIA tools in Triton's wheel prints.

    Raises FileNotFoundError without the tool and CalledProcessError when it fails.
    """
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    if not tool.is_file():
        raise FileNotFoundError(f"Triton {triton.__version__} has no {name} at {tool}")
    done = subprocess.run([tool, *arguments], capture_output=True, text=True, check=True, cwd=cwd)
    return done.stdout


def global_accesses(opcodes: Sequence[str]) -> dict[str, int]:
    """Counts of global loads, stores and asynchronous copies by bits a thread."""
    return dict(sorted(Counter(filter(None, map(_access, opcodes))).items()))


def _attempt(variant: Variant, capability: int) -> Any:
    """Triton's compiled kernel, or the CompileError that says why there is none."""
    if INTERPRETED.value:
        raise RuntimeError(
            "TRITON_INTERPRET is set, so kernels are Python functions and nothing compiles: "
            "unset it before triton is imported"
        )
    arguments = variant.kernel.arg_names
    kinds = {name: variant.signature.get(name, "constexpr") for name in arguments}
    aligned = [n for n, kind in kinds.items() if kind.startswith("*") or n in variant.aligned]
    source = ASTSource(
        fn=variant.kernel,
        signature=kinds,
        constexprs=dict(variant.constexprs),
        attrs={(arguments.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", capability, _WARP)
    try:
        return triton.compile(source, target=target, options=dict(variant.options))
    # Triton's front end, its passes and ptxas raise classes of their own, and plain
    # RuntimeError, AssertionError and ValueError; all mean the same here.
    except Exception as error:  # noqa: BLE001
        reason = str(error).strip() or type(error).__name__
        return CompileError(f"{variant.key} does not compile for sm_{capability}: {reason}")


def _listing(variant: Variant, capability: int, compiled: Any, opcodes: list[str]) -> Listing:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = run_tool("cuobjdump", "--dump-resource-usage", file.name)
    used = {name: int(n) for name, n in re.findall(r"(REG|STACK|SHARED):(\d+)", usage)}
    reserved = _RESERVED_SHARED if capability >= 90 else 0
    first = Counter(opcode.split(".")[0] for opcode in opcodes)
    threads = _WARP * compiled.metadata.num_warps
    return Listing(
        kernel=variant.kernel_name,
        variant=variant.name,
        capability=capability,
        registers=used["REG"],
        stack_bytes=used["STACK"],
        shared_bytes=compiled.metadata.shared + max(0, used["SHARED"] - reserved),
        instructions=len(opcodes),
        per_output=len(opcodes) * threads / variant.outputs,
        local=first["LDL"] + first["STL"],
        # HMMA and IMMA; HGMMA on sm_90; UTCHMMA, UTCQMMA and more on sm_100; QMMA on sm_120.
        tensor_core=sum(count for name, count in first.items() if name.endswith("MMA")),
        atomics=sum(first[name] for name in ("ATOM", "ATOMG", "RED", "REDG")),
        memory=global_accesses(opcodes),
    )


def _access(opcode: str) -> str | None:
    """ "LDG.128" of "LDG.E.128.CONSTANT"; None of what touches no global memory."""
    name, *suffixes = opcode.split(".")
    if name in ("UTMALDG", "UTMASTG", "UBLKCP"):
        return name
    if name not in ("LDG", "STG", "LDGSTS"):
        return None
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return f"{name}.{next((widths[s] for s in suffixes if s in widths), 32)}"


def _without_padding(opcodes: list[str]) -> list[str]:
    """ptxas ends a kernel with a branch to itself and fills the line with NOPs."""
    end = len(opcodes)
    while end and opcodes[end - 1] == "NOP":
        end -= 1
    return opcodes[: end - 1] if end and opcodes[end - 1] == "BRA" else opcodes[:end]
