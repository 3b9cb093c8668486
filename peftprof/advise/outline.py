"""Fake tensors, made quickly: what an operator makes of operands like these is remembered.

FakeTensorMode remembers too, but looks at twenty properties of each operand, for symbols,
subclasses and devices that no blueprint has. Here shape, strides and dtype tell operands
apart. What has been made once, by FakeTensorMode, is made again from its recipe: a new
tensor, a view of an operand, an operand itself, or a plain value.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorMode,
    in_kernel_invocation_manager,
)

CPU, META = torch.device("cpu"), torch.device("meta")
NEW, VIEW, SAME, VALUE, SEVERAL = range(5)
Recipe = tuple[Any, ...]
# What the shape of operands does not say the result of.
_ASKED: Final = (torch.ops.prim.device.default, torch.ops.aten._local_scalar_dense.default)


class Outlines(FakeTensorMode):
    """A FakeTensorMode on a CPU that remembers by little."""

    recipes: Final[dict[tuple[Any, ...], Recipe | None]] = {}

    def dispatch(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As FakeTensorMode's, which is asked once for each kind of operands."""
        operands: list[FakeTensor] = []
        key: list[Any] = [func]
        kwargs = kwargs or {}
        named = [part for pair in kwargs.items() for part in pair]
        if func in _ASKED or not _describe([*args, *named], key, operands):
            return super().dispatch(func, types, args, kwargs)
        known = tuple(key)
        recipe = self.recipes.get(known)
        if recipe is not None:
            with in_kernel_invocation_manager(self):
                return self._make(recipe, operands)
        made = super().dispatch(func, types, args, kwargs)
        if known not in self.recipes:
            self.recipes[known] = _recipe(made, operands)
        return made

    def _make(self, recipe: Recipe, operands: list[FakeTensor]) -> Any:
        kind, what = recipe[:2]
        if kind == NEW:
            shape, stride, dtype = what
            empty = torch.empty_strided(shape, stride, dtype=dtype, device=META)
            return FakeTensor(self, empty, CPU)
        if kind == VIEW:
            number, shape, stride, offset = what
            of = operands[number]
            return FakeTensor(
                self, of.as_strided(shape, stride, of.storage_offset() + offset), CPU
            )
        if kind == SAME:
            return operands[what]
        return tuple(self._make(one, operands) for one in what) if kind == SEVERAL else what


def _describe(values: Sequence[Any], key: list[Any], operands: list[FakeTensor]) -> bool:
    """Add to `key` what tells `values` from others, and tensors to `operands`; False: it cannot."""
    for value in values:
        if isinstance(value, torch.Tensor):
            if not isinstance(value, FakeTensor) or value.constant is not None:
                return False
            operands.append(value)
            key.append((value.shape, value.stride(), value.dtype))
        elif isinstance(value, (list, tuple)):
            key.append(len(value))
            if not _describe(value, key, operands):
                return False
        else:  # with its type, for 1, 1.0 and True are one key
            key.append((type(value), value))
    return True


def _recipe(made: Any, operands: list[FakeTensor]) -> Recipe | None:
    """How to make it again; None where that is not known."""
    if isinstance(made, (list, tuple)):
        parts = [_recipe(one, operands) for one in made]
        return None if None in parts else (SEVERAL, parts)
    if not isinstance(made, torch.Tensor):
        return VALUE, made
    if not isinstance(made, FakeTensor) or made.fake_device != CPU or made.constant is not None:
        return None
    shape, stride, storage = tuple(made.shape), made.stride(), made.untyped_storage()
    for number, operand in enumerate(operands):
        if made is operand:
            return SAME, number
        if operand.untyped_storage()._cdata == storage._cdata:
            if operand.dtype != made.dtype:
                return None
            offset = made.storage_offset() - operand.storage_offset()
            return VIEW, (number, shape, stride, offset)
    whole = storage.nbytes() == made.numel() * made.element_size() and not made.storage_offset()
    return (NEW, (shape, stride, made.dtype)) if whole else None
