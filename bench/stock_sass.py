"""bitsandbytes' dequantise kernels, as machine code in its wheel.

Read with the disassembler in Triton's wheel; no GPU, and bitsandbytes is not imported.
"""

import importlib.util
import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peftprof_kernels import codegen


@dataclass(frozen=True)
class Stock:
    """bitsandbytes' dequantise kernels in its wheel: NF4 to bf16, and the absmax of a nested one.

    Instructions of a thread, and the elements that it makes with them; ``memory`` counts the
    first kernel's global accesses by bits.
    """

    library: str
    version: str
    capability: int
    weight_instructions: int
    weight_elements: int
    absmax_instructions: int
    absmax_elements: int
    memory: dict[str, int]

    @property
    def plain(self) -> float:
        """Instructions a weight where the scales are fp32."""
        return self.weight_instructions / self.weight_elements

    def nested(self, blocksize: int) -> float:
        """Instructions a weight with the absmax of each block; adding the offset is left out."""
        return self.plain + self.absmax_instructions / self.absmax_elements / blocksize


class NoStockError(RuntimeError):
    """Why bitsandbytes' machine code cannot be read here, in one line."""


def stock_dequantise(capability: int = 90) -> Stock:
    """bitsandbytes' kernels for this target, or the nearest that its newest library has.

    Raises NoStockError where there is no CUDA library, no machine code in it, or no tool.
    """
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is None or spec.origin is None:
        raise NoStockError("bitsandbytes is not installed")
    found = {
        int(re.sub(r"\D", "", path.stem)): path
        for path in Path(spec.origin).parent.glob("libbitsandbytes_cuda*.so")
    }
    if not found:
        raise NoStockError("bitsandbytes has no CUDA library here")
    library = found[max(found)]
    try:
        elves = codegen.run_tool("cuobjdump", "--list-elf", str(library))
        cubins = {int(sm): name for name, sm in re.findall(r"(\S+\.sm_(\d+)\w*\.cubin)", elves)}
        if not cubins:
            raise NoStockError(f"{library.name} holds no machine code")
        nearest = min(cubins, key=lambda sm: (abs(sm - capability), sm))
        with tempfile.TemporaryDirectory() as folder:
            arguments = ("--extract-elf", cubins[nearest], str(library))
            codegen.run_tool("cuobjdump", *arguments, cwd=Path(folder))
            return _read_stock(Path(folder) / cubins[nearest], library.name, nearest)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise NoStockError(f"{library.name} cannot be read: {error}") from None


def _read_stock(cubin: Path, library: str, capability: int) -> Stock:
    usage = codegen.run_tool("cuobjdump", "--dump-resource-usage", str(cubin))
    # kDequantizeBlockwise<T, TILE_SIZE, THREADS, NUM_PER_TH, DATA_TYPE>: a thread reads
    # NUM_PER_TH bytes, each two weights where DATA_TYPE is NF4 (2) and one absmax where it
    # is General8bit (0). Each thread is launched for one tile.
    named = re.findall(
        r"(_Z20kDequantizeBlockwiseI(13__nv_bfloat16|f)Li\d+ELi\d+ELi(\d+)ELi([02])E\w+)", usage
    )
    kernels = {(dtype, data): (name, int(count)) for name, dtype, count, data in named}
    try:
        weight, weight_bytes = kernels["13__nv_bfloat16", "2"]
        absmax, absmax_bytes = kernels["f", "0"]
    except KeyError:
        raise NoStockError(f"{library} has no kDequantizeBlockwise as known here") from None
    code = cubin.read_bytes()
    parts = [codegen.machine_code(code, name) for name in (weight, absmax)]
    weight_code, absmax_code = codegen.disassemble(parts, capability)
    return Stock(
        library=library,
        version=version("bitsandbytes"),
        capability=capability,
        weight_instructions=len(weight_code),
        weight_elements=2 * weight_bytes,
        absmax_instructions=len(absmax_code),
        absmax_elements=absmax_bytes,
        memory=codegen.global_accesses(weight_code),
    )
