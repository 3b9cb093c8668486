"""What an operator was called with, parsed from a trace: shapes, dtypes, plain values.

The text comes from strangers. What cannot be a call is `OperandsError`, whatever it is.
"""

import math
import re
from dataclasses import dataclass
from typing import TypeVar

import orjson

from peftprof.trace.events import Operands

T = TypeVar("T")

# Bounds on what is read, far above what PyTorch writes: 64 dimensions at most are in a
# tensor, and no tensor has more elements than an int64 counts.
MOST_TEXT = 1 << 18
MOST_DIMS = 64
MOST_ELEMENTS = 2**63 - 1
_INTEGER = re.compile(r"-?\d{1,18}")


class OperandsError(ValueError):
    """The text does not say what an operator was called with."""


@dataclass(frozen=True)
class Dtype:
    """An element type: its short name (`bf16`) and the bytes of an element."""

    name: str
    size: int


FP32, INT32 = Dtype("fp32", 4), Dtype("int32", 4)
UINT8, INT8, INT16, INT64 = (
    Dtype("uint8", 1),
    Dtype("int8", 1),
    Dtype("int16", 2),
    Dtype("int64", 8),
)
FP16, BF16, FP64, FP8 = Dtype("fp16", 2), Dtype("bf16", 2), Dtype("fp64", 8), Dtype("fp8", 1)
COMPLEX32, COMPLEX64, COMPLEX128 = (Dtype(f"complex{8 * n}", n) for n in (4, 8, 16))
BOOL = Dtype("bool", 1)

# As Kineto writes them: names of C++ types.
_BY_TYPE = {
    "float": FP32,
    "double": FP64,
    "c10::Half": FP16,
    "c10::BFloat16": BF16,
    "c10::Float8_e4m3fn": FP8,
    "c10::Float8_e4m3fnuz": FP8,
    "c10::Float8_e5m2": FP8,
    "c10::Float8_e5m2fnuz": FP8,
    "c10::complex<c10::Half>": COMPLEX32,
    "c10::complex<float>": COMPLEX64,
    "c10::complex<double>": COMPLEX128,
    "bool": BOOL,
    "char": INT8,
    "signed char": INT8,
    "unsigned char": UINT8,
    "short": INT16,
    "short int": INT16,
    "unsigned short": INT16,
    "int": INT32,
    "unsigned int": INT32,
    "long": INT64,
    "long int": INT64,
    "long long": INT64,
    "__int64": INT64,
    "unsigned long": INT64,
}
# As a ScalarType among the plain values: its number (torch/headeronly/core/ScalarType.h).
_BY_NUMBER = {
    0: UINT8,
    1: INT8,
    2: INT16,
    3: INT32,
    4: INT64,
    5: FP16,
    6: FP32,
    7: FP64,
    8: COMPLEX32,
    9: COMPLEX64,
    10: COMPLEX128,
    11: BOOL,
    15: BF16,
    23: FP8,
    24: FP8,
    25: FP8,
    26: FP8,
}


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Tensor:
    """A tensor operand; a shape of `()` is one element."""

    shape: Shape
    dtype: Dtype

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Bytes of its elements, each counted once, wherever they lie."""
        return self.numel * self.dtype.size


@dataclass(frozen=True)
class Call:
    """The operands of one call, by position.

    `tensors` is None where an operand is no tensor or was not given; `lists` has the shapes
    of lists of tensors, whose dtypes a trace does not tell; `values` the plain values as text.
    """

    tensors: tuple[Tensor | None, ...]
    lists: dict[int, tuple[Shape, ...]]
    values: tuple[str, ...]

    @property
    def given(self) -> tuple[Tensor, ...]:
        """The tensors that were given, in order. Raises OperandsError beside a list of tensors."""
        if self.lists:
            raise OperandsError("the dtype of a list's tensors is not in a trace")
        return tuple(tensor for tensor in self.tensors if tensor is not None)

    @property
    def read(self) -> int:
        """Bytes of all tensors. Raises OperandsError beside a list of tensors."""
        return sum(tensor.bytes for tensor in self.given)

    def has(self, position: int) -> bool:
        """Whether a tensor was given at `position`."""
        return position < len(self.tensors) and self.tensors[position] is not None

    def tensor(self, position: int, rank: int | None = None) -> Tensor:
        """The tensor at `position`. Raises OperandsError if it is not there or not of `rank`."""
        found = self.tensors[position] if position < len(self.tensors) else None
        if found is None or rank not in (None, len(found.shape)):
            raise OperandsError(f"no such tensor at {position}")
        return found

    def shapes(self, position: int) -> tuple[Shape, ...]:
        """The shapes of the list of tensors at `position`; OperandsError if there is none."""
        if position not in self.lists:
            raise OperandsError(f"no list of tensors at {position}")
        return self.lists[position]

    def integers(self, position: int) -> Shape:
        """The list of integers at `position`, such as `[2, 2]`; OperandsError if it is none."""
        return tuple(_integer(item) for item in self._items(position))

    def integer(self, position: int) -> int:
        """The integer at `position`; OperandsError if it is none."""
        return _integer(self._value(position))

    def flags(self, position: int) -> tuple[bool, ...]:
        """The list of truth values at `position`; OperandsError if it is none."""
        return tuple(_flag(item) for item in self._items(position))

    def flag(self, position: int) -> bool:
        """The truth value at `position`; OperandsError if it is none."""
        return _flag(self._value(position))

    def dtype(self, position: int) -> Dtype:
        """The dtype that is an argument at `position`; OperandsError if it is none."""
        number = _integer(self._value(position))
        if number not in _BY_NUMBER:
            raise OperandsError(f"no dtype has number {number}")
        return _BY_NUMBER[number]

    def _value(self, position: int) -> str:
        if position >= len(self.values):
            raise OperandsError(f"no value at {position}")
        return self.values[position]

    def _items(self, position: int) -> list[str]:
        text = self._value(position)
        if not (text.startswith("[") and text.endswith("]")):
            raise OperandsError(f"no list at {position}")
        items = [item.strip() for item in text[1:-1].split(",") if item.strip()]
        if len(items) > MOST_DIMS:
            raise OperandsError("too many values")
        return items


def parse(operands: Operands) -> Call:
    """The call that a trace's text describes. Raises OperandsError where it describes none."""
    dims, types = _list(operands.dims), _list(operands.types)
    values = _list(operands.concrete) if operands.concrete else []
    if len(dims) != len(types):
        raise OperandsError("not one type for each operand")
    tensors: list[Tensor | None] = []
    lists: dict[int, tuple[Shape, ...]] = {}
    for position, (shape, kind) in enumerate(zip(dims, types, strict=True)):
        if kind == "TensorList":
            lists[position] = tuple(_shape(one) for one in _checked(shape, list))
            tensors.append(None)
        elif isinstance(kind, str) and kind in _BY_TYPE:
            tensors.append(Tensor(_shape(shape), _BY_TYPE[kind]))
        elif shape == []:  # a number, a list of numbers, nothing
            tensors.append(None)
        else:
            raise OperandsError("a tensor of no known type")
    return Call(tuple(tensors), lists, tuple(_checked(value, str) for value in values))


def _list(text: str) -> list[object]:
    if len(text) > MOST_TEXT:
        raise OperandsError("too long")
    try:
        return _checked(orjson.loads(text), list)
    except orjson.JSONDecodeError as error:
        raise OperandsError("no JSON") from error


def _checked(value: object, kind: type[T]) -> T:
    if not isinstance(value, kind):
        raise OperandsError(f"no {kind.__name__}")
    return value


def _shape(value: object) -> Shape:
    dims = _checked(value, list)
    if len(dims) > MOST_DIMS:
        raise OperandsError("too many dimensions")
    if not all(type(n) is int and 0 <= n <= MOST_ELEMENTS for n in dims):
        raise OperandsError("no shape")
    if math.prod(dims) > MOST_ELEMENTS:
        raise OperandsError("more elements than can be")
    return tuple(dims)


def _integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise OperandsError("no integer")
    return int(text)


def _flag(text: str) -> bool:
    if text not in ("True", "False"):
        raise OperandsError("no truth value")
    return text == "True"
