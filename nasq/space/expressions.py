"""Sizes that depend on choices: rounding, tables, any function with a declared maximum, and how to evaluate them.

Wherever a layer takes a size it takes an int, a :class:`Choice` or an expression of choices. The scalar form
(:func:`value_of`) and the array form (:func:`values_of`) give equal values.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.arithmetic import Binary, Expression, Reader, as_numeric, as_operand
from nasq.space.choice import Choice
from nasq.space.function import Function
from nasq.space.options import Number, Option, Value, as_literal, as_number, as_option, exact, factorise

if TYPE_CHECKING:
    from nasq.space.space import SearchSpace

__all__ = [
    "Expression",
    "Function",
    "Lookup",
    "RoundTo",
    "Size",
    "choices_of",
    "maximum_of",
    "maximum_of_size",
    "minimum_of",
    "round_to",
    "value_of",
    "values_of",
]

Size = int | Expression


def round_to(size: Expression | Number, divisor: int) -> Size:
    """``size`` rounded to the nearest multiple of ``divisor`` (halves up), by the rule of MobileNet.

    The result is never below ``divisor``, and where rounding down would lose more than 10 % the next multiple is
    taken: ``round_to(11, 8)`` is 16. (Sandler et al. 2018, the channel rule of the released MobileNetV2 code.)

    Args:
        size: A number or an expression of choices, not necessarily whole.
        divisor: At least 1.

    Returns:
        An int where ``size`` is a number, else an expression.
    """
    plain = as_option(divisor, "the divisor of round_to")
    if not isinstance(plain, int) or isinstance(plain, bool) or plain < 1:
        raise InputError(f"the divisor of round_to is {divisor!r}. Give a whole number of at least 1.")
    operand = as_operand(size, "the size in round_to")
    return RoundTo(operand, plain) if isinstance(operand, Expression) else int(_round(operand, plain))


def maximum_of(left: Size, right: Size) -> Size:
    """The larger of two sizes; an int where both are."""
    return _extreme("max", left, right)


def minimum_of(left: Size, right: Size) -> Size:
    """The smaller of two sizes; an int where both are."""
    return _extreme("min", left, right)


def _extreme(kind: str, left: Size, right: Size) -> Size:
    a, b = (as_operand(side, f"a side of {kind}imum_of") for side in (left, right))
    if isinstance(a, Expression) or isinstance(b, Expression):
        return Binary(kind, a, b)
    return _whole(max(a, b) if kind == "max" else min(a, b), f"{kind}imum_of({left}, {right})")


def _round(value: Any, divisor: int) -> Any:
    nearest = np.maximum((value + divisor / 2) // divisor * divisor, divisor)
    return (nearest + divisor * (nearest < 0.9 * value)).astype(np.int64)


class RoundTo(Expression):
    """Another size rounded to multiples; made by :func:`round_to`, which says how."""

    size: Expression
    divisor: int

    def __init__(self, size: Expression, divisor: int) -> None:
        self._freeze(size, divisor, size=size, divisor=divisor)

    def __repr__(self) -> str:
        return f"RoundTo({self.size!r}, {self.divisor})"

    def __str__(self) -> str:
        return f"round_to({self.size}, {self.divisor})"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Those of the size it rounds."""
        return self.size.choices

    def evaluate(self, lookup: Reader) -> Value:
        """Rounds the value of its size."""
        value = as_numeric(self.size.evaluate(lookup))
        rounded: Value = _round(value, self.divisor)
        return rounded if isinstance(value, np.ndarray) else int(rounded)

    def bounds(self) -> tuple[Number, Number]:
        """Rounding is monotone: the rounded bounds of the size."""
        low, high = self.size.bounds()
        return (self.divisor if low == -inf else int(_round(low, self.divisor))), (
            inf if high == inf else int(_round(high, self.divisor))
        )


class Lookup(Expression):
    """A number per option of one choice.

    Args:
        choice: The decision.
        table: One finite number for each of its options.

    Raises:
        InputError: The table misses an option or has one too many, or a value is no number.
    """

    choice: Choice
    table: Mapping[Option, Number]

    def __init__(self, choice: Choice, table: Mapping[Option, Number]) -> None:
        if not isinstance(choice, Choice):
            raise InputError(f"Lookup was given {choice!r}. Give a Choice and a table from its options to numbers.")
        given = {choice.index(option): table[option] for option in table}
        missing = [option for index, option in enumerate(choice.options) if index not in given]
        if missing:
            raise InputError(f"the table of Lookup({choice.name!r}) has no value for {missing}. Give one per option.")
        values = tuple(
            as_literal(given[index], f"the value of {option!r} in Lookup({choice.name!r})")
            for index, option in enumerate(choice.options)
        )
        array = np.array(values, dtype=np.int64 if all(isinstance(value, int) for value in values) else object)
        plain = dict(zip(choice.options, values, strict=True))
        self._freeze(choice, tuple(map(exact, values)), choice=choice, table=plain, _array=array)

    def __repr__(self) -> str:
        return f"Lookup({self.choice!r}, {self.table!r})"

    def __str__(self) -> str:
        return f"lookup({self.choice})"

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Its choice."""
        return (self.choice,)

    def evaluate(self, lookup: Reader) -> Value:
        """The number that belongs to the option."""
        option = lookup(self.choice)
        if not isinstance(option, np.ndarray):
            return self.table[self.choice.options[self.choice.index(option)]]
        codes, firsts = factorise(option)
        positions = np.array([self.choice.index(option.flat[first]) for first in firsts], dtype=np.int64)
        values: NDArray[Any] = vars(self)["_array"][positions[codes]]
        return values

    def bounds(self) -> tuple[Number, Number]:
        """Smallest and largest number of the table."""
        return min(self.table.values()), max(self.table.values())


def value_of(size: Size, active: Mapping[str, Option]) -> int:
    """The value of ``size`` where the choices have the options in ``active``.

    Args:
        size: An int or an expression.
        active: Choice name to option; a choice that is missing has its default.

    Raises:
        InputError: An option is not allowed, or the value is not whole.
    """
    if not isinstance(size, Expression):
        return _whole(size, "the size")

    def lookup(choice: Choice) -> Option:
        return choice.options[choice.index(active[choice.name])] if choice.name in active else choice.default

    return _whole(size.evaluate(lookup), f"the size {size}")


def values_of(size: Size, space: SearchSpace, rows: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
    """The values of ``size`` for many subnets at once; equal to :func:`value_of` of each.

    Args:
        size: An int or an expression.
        space: The space whose rows these are; a choice it lacks has its default.
        rows: Option indices ``[n, len(space)]``.

    Returns:
        ``[n]``. Where a choice is inactive its row holds the default's index, so does its value.

    Raises:
        InputError: The space has options that a choice of the size lacks, or a value is not whole.
    """
    if not isinstance(size, Expression):
        return np.full(len(rows), _whole(size, "the size"), dtype=np.int64)

    def lookup(choice: Choice) -> Value:
        if choice.name not in space.positions:
            return choice.default
        position = space.positions[choice.name]
        known = space.choices[position]
        if known.options != choice.options:
            for option in known.options:
                choice.index(option)
        column: NDArray[Any] = known.array[rows[:, position]]
        return column

    values = np.broadcast_to(np.asarray(as_numeric(size.evaluate(lookup))), (len(rows),))
    whole = values.astype(np.int64)
    if values.dtype != np.int64 and np.any(whole != values):
        _whole(as_number(values[np.flatnonzero(whole != values)[0]]), f"the size {size}")
    return whole


def maximum_of_size(size: Size) -> int:
    """The largest value of an int or an expression: what its shared weights are allocated for.

    Raises:
        InputError: It is not whole, or has no known bound.
    """
    if not isinstance(size, Expression):
        return _whole(size, "the size")
    return _whole(size.maximum, f"the maximum of the size {size}")


def choices_of(size: Size) -> tuple[Choice, ...]:
    """The choices that an int (none) or an expression depends on."""
    return size.choices if isinstance(size, Expression) else ()


def _whole(value: object, what: str) -> int:
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    raise InputError(f"{what} is {value!r}, which is not a whole number. Use // or round_to(size, divisor).")
