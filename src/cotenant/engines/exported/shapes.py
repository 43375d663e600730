"""Sizes of a program's axes: numbers, names, and formulas of names.

Formulas stand in the file as source text, such as ``Mul(Integer(2), Symbol('s77'))``. PyTorch
evaluates that text; here it is parsed, and only sums, products and the like are known.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Final

from cotenant.domain.errors import ModelError
from cotenant.engines.exported.schema import Range, TensorValue, Union, one

LONGEST: Final = 2000
"""Characters of a formula that are read."""
SPECIAL: Final = 2
"""Programs are exported as if 0 and 1 were no sizes, so that a least size up to this says
nothing. PyTorch allows them when it executes one, too."""
_FUNCTIONS: Final[dict[str, Callable[[Sequence[int]], int]]] = {
    "Add": sum,
    "Mul": prod,
    "FloorDiv": lambda of: of[0] // of[1],
    "Mod": lambda of: of[0] % of[1],
    "PythonMod": lambda of: of[0] % of[1],
    "Max": max,
    "Min": min,
}

Axis = int | str | ast.expr
"""A size, a name of one, or a formula."""


def axes(value: TensorValue) -> tuple[Axis, ...]:
    """Of a tensor; raises ModelError."""
    return tuple(_axis(size) for size in value.sizes)


def fixed(sizes: Sequence[Union]) -> tuple[int, ...]:
    """Sizes that are numbers; raises ModelError."""
    found = [_axis(size) for size in sizes]
    if not all(isinstance(size, int) and size >= 0 for size in found):
        raise ModelError("a weight has a size that is no number")
    return tuple(size for size in found if isinstance(size, int))


def _axis(size: Union) -> Axis:
    kind, value = one(size)
    if kind == "as_int" and isinstance(value, int):
        return value
    if kind != "as_expr" or not isinstance(value, dict):
        raise ModelError(f"the program has a size of the kind {kind}, which is not served")
    tree = _parsed(str(value.get("expr_str", "")))
    match tree:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return name
    return tree


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text[:LONGEST], mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ModelError(f"the program has a size that cannot be read: {text[:80]!r}") from error


def value_of(axis: Axis, sizes: Mapping[str, int]) -> int | None:
    """The size of an axis where those of others are known; None if they do not tell it."""
    if isinstance(axis, int):
        return axis
    if isinstance(axis, str):
        return sizes.get(axis)
    match axis:
        case ast.Call(func=ast.Name(id="Symbol"), args=[ast.Constant(value=str(name))]):
            return sizes.get(name)
        case ast.Call(func=ast.Name(id="Integer"), args=[number]):
            try:
                return int(ast.literal_eval(number))
            except (ValueError, TypeError):
                return None
        case ast.Call(func=ast.Name(id=function), args=parts) if function in _FUNCTIONS:
            values = [value_of(part, sizes) for part in parts]
            known = [value for value in values if value is not None]
            if len(known) < max(len(values), 1):
                return None
            try:
                return _FUNCTIONS[function](known)
            except (ZeroDivisionError, IndexError):
                return None
    return None


class Shapes:
    """What sizes the inputs of a program may have."""

    def __init__(self, inputs: Mapping[str, tuple[Axis, ...]], ranges: Mapping[str, Range]) -> None:
        self._inputs = inputs
        self._ranges = ranges

    def check(self, given: Mapping[str, tuple[int, ...]]) -> None:
        """Raises ModelError that says which size is wrong, and what would be right."""
        sizes: dict[str, int] = {}
        source: dict[str, str] = {}
        for name, shape in self._inputs.items():
            have = given[name]
            if len(have) != len(shape):
                raise ModelError(f"input {name!r} has {len(have)} axes, it takes {len(shape)}")
            for number, (axis, size) in enumerate(zip(shape, have, strict=True)):
                if not isinstance(axis, str):
                    continue
                here = f"input {name!r} has {size} along axis {number}"
                if sizes.setdefault(axis, size) != size:
                    raise ModelError(f"{here}, but {source[axis]}; the two must be equal")
                source.setdefault(axis, here)
                self._within(axis, size, here)
        for name, shape in self._inputs.items():
            for number, (axis, size) in enumerate(zip(shape, given[name], strict=True)):
                wanted = value_of(axis, sizes)
                if wanted not in (None, size):
                    raise ModelError(
                        f"input {name!r} has {size} along axis {number}; it takes {wanted} there"
                        + ("" if isinstance(axis, int) else " beside the other sizes")
                    )

    def _within(self, axis: str, size: int, here: str) -> None:
        bounds = self._ranges.get(axis)
        if bounds is None:
            return
        least, most = bounds.min_val or 0, bounds.max_val
        too_small = least > SPECIAL and size < least
        if too_small or (most is not None and size > most):
            wanted = f"{least} or more" if most is None else f"{least} to {most}"
            raise ModelError(f"{here}; it takes {wanted} there")
