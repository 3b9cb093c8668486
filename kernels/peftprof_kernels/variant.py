"""One configuration of a kernel that its launcher can choose, said without a GPU.

Each kernel file lists its own in a function ``variants()``; ``codegen.py`` compiles them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

# Compute capabilities: Turing, Ampere (A100, then the others), Ada, Hopper, Blackwell (B200,
# then the others).
TARGETS: Final = (75, 80, 86, 89, 90, 100, 120)


@dataclass(frozen=True, eq=False)
class Variant:
    """What Triton specialises a kernel for, and what is demanded of the code it makes.

    name          unique among the kernel's variants, such as "nested-bf16"
    kernel        the function under ``@triton.jit``
    signature     Triton's type of each argument given at run time: "*bf16", "i32", ...
    constexprs    value of each other argument; None for a pointer that is left out, and 1
                  for an int that is 1, as Triton's launcher specialises both
    outputs       output elements that one program makes
    kind          "stream" reads and writes memory, "gemm" multiplies matrices
    options       num_warps, num_stages, enable_fp_fusion, ... as the launcher gives them
    aligned       the ints that are divisible by 16; pointers all are
    wide          a stream's global stores are 128 bits; False where odd sizes forbid it
    tensor_cores  a gemm multiplies on tensor cores; False for IEEE fp32
    targets       the compute capabilities on which a launcher can choose it
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    outputs: int
    kind: Literal["stream", "gemm"]
    options: Mapping[str, Any]
    aligned: tuple[str, ...] = ()
    wide: bool = True
    tensor_cores: bool = True
    targets: tuple[int, ...] = TARGETS

    def __post_init__(self) -> None:
        """Every argument of the kernel is said exactly once."""
        arguments = set(self.kernel.arg_names)
        said = [*self.signature, *self.constexprs]
        if set(said) != arguments or len(said) != len(arguments):
            wrong = sorted(arguments ^ set(said)) or sorted(set(self.signature) & {*said})
            raise ValueError(f"{self.key}: missing, unknown or said twice: {', '.join(wrong)}")
        if unknown := set(self.aligned) - set(self.signature):
            raise ValueError(f"{self.key}: aligned names no argument: {', '.join(unknown)}")

    @property
    def kernel_name(self) -> str:
        """The kernel's name without its underscore and the ending ``_kernel``."""
        name: str = self.kernel.__name__
        return name.strip("_").removesuffix("_kernel")

    @property
    def key(self) -> str:
        """The name among all kernels' variants: "nf4_dequant/nested-bf16"."""
        return f"{self.kernel_name}/{self.name}"
