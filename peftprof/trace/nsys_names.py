"""What the texts of an nsys export mean: NVTX ranges, API calls, copies."""

import re
from dataclasses import dataclass
from functools import lru_cache

from peftprof.trace.events import NONE, Kind
from peftprof.trace.rules import ENGINE

# What CUPTI writes for the direction of a copy, and what Kineto calls it.
COPIES = {
    1: "HtoD",
    2: "DtoH",
    3: "HtoA",
    4: "AtoH",
    5: "AtoA",
    6: "AtoD",
    7: "DtoA",
    8: "DtoD",
    9: "HtoH",
    10: "PtoP",
    11: "HtoD",  # 11 to 13 are pages of unified memory
    12: "DtoH",
    13: "DtoD",
}
COPY_NAME = re.compile(r"CUDA_MEMCPY_KIND_(?:UVM_)?([A-Z])TO([A-Z])")
# cudaLaunchKernel_v7000, cudaMemcpyAsync_ptsz_v7000: the version of the API that was linked.
VERSION = re.compile(r"(_v\d+|_ptsz|_ptds)+$")
LONGEST_VERSION = 32

OURS = re.compile(r"(step|phase|layer|op):.")
BACKWARD = re.compile(r"[\w:<>]*Backwards?\d*")
# torch.autograd.profiler.emit_nvtx, and nsys's --pytorch=autograd-nvtx which calls it, put
# these after an operator's name, in this order, each where it is known. A text that was cut
# off has lost the last brackets of its shapes.
FIELD = re.compile(r", (?:seq|op_id|sizes|input_op_ids) = ")
FIELDS = re.compile(
    r"(?:, seq = (?P<sequence>\d{1,18})\b)?(?P<id>, op_id = \d+)?"
    r"(?:, sizes = (?P<shapes>\[[][\d, -]*\]))?",
    re.ASCII,
)


@dataclass(frozen=True)
class Meaning:
    """An NVTX range. `sequence` is NONE, `shapes` (as Operands.dims) empty, where not told."""

    kind: Kind
    name: str
    sequence: int = NONE
    backward: bool = False
    shapes: str = ""


def meaning(text: str) -> Meaning:
    """What an NVTX range of this text is: a range, or an operator as PyTorch names it."""
    fields = FIELD.search(text, 1)
    name = text[: fields.start()] if fields else text
    told = FIELDS.match(text, len(name))
    sequence, identity, shapes = told.groups() if told else (None, None, None)
    ours, backward, spaced = _of_name(name)
    # Among ranges of record_function, which emit_nvtx writes too, none has a sequence number.
    operator = backward or bool(sequence) or (spaced and (fields or name.startswith("aten::")))
    if ours or not operator:
        # A range may be called anything; only what emit_nvtx appends is taken off.
        return Meaning(Kind.RANGE, name if ours or identity else text)
    if shapes is None or shapes.count("[") != shapes.count("]"):
        shapes = ""
    return Meaning(Kind.OPERATOR, name, int(sequence) if sequence else NONE, backward, shapes)


@lru_cache(maxsize=1 << 12)
def _of_name(name: str) -> tuple[bool, bool, bool]:
    """Whether a range is one of ours, a backward operator, named within a namespace."""
    backward = name.startswith(ENGINE) or BACKWARD.fullmatch(name) is not None
    return OURS.match(name) is not None, backward, "::" in name


def call(name: str) -> str:
    """The name of an API call without its version."""
    return name[:-LONGEST_VERSION] + VERSION.sub("", name[-LONGEST_VERSION:])


def copy(kind: int, enum_name: str | None) -> str:
    """A copy's name, as in a Kineto trace; `enum_name` is the export's own word for `kind`."""
    found = COPY_NAME.fullmatch(enum_name or "")
    direction = f"{found[1]}to{found[2]}" if found else COPIES.get(kind, "")
    return f"Memcpy {direction}".strip()
