"""The arithmetic on decisions: an expression is a size that depends on choices.

It is data (operators are named, nothing is a lambda), so it can be pickled and deep-copied with the module that holds it,
and it computes the same on scalars and on NumPy arrays.
"""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import cached_property
from math import inf, isfinite, prod
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from nasq.errors import InputError
from nasq.space.options import Number, Value, as_number, as_option, exact

if TYPE_CHECKING:
    from nasq.space.choice import Choice

__all__ = ["LARGEST", "Binary", "Expression", "Reader", "as_numeric", "as_operand", "collect_choices"]

Reader = Callable[["Choice"], Value]
"""Gives a choice's option, or an array of options ``[n]``."""

ENUMERABLE = 100_000  # combinations of options up to which a maximum is found by trying them all
LARGEST = 2**53
"""Integers above it are not exact in float64, and products of them would overflow int64."""


class Expression(ABC):
    """A value that depends on choices; ``+``, ``-``, ``*`` and ``//`` with numbers and expressions make new ones."""

    __array_ufunc__ = None  # NumPy scalars leave `np.int64(8) * width` to us instead of making object arrays

    _identity: tuple[object, ...]

    def _freeze(self, *identity: object, **fields: object) -> None:
        vars(self).update(fields, _identity=(type(self).__name__, *identity))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} {str(self)!r} is immutable; make a new one.")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} {str(self)!r} is immutable; make a new one.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Expression):
            return NotImplemented
        return self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)

    def __bool__(self) -> NoReturn:
        raise InputError(
            f"{str(self)!r} has no value while a network is built, so Python cannot decide by it. Let elastic.OneOf or "
            "elastic.Repeat hold what depends on it, and space.Lookup map its options to sizes."
        )

    def __copy__(self) -> Expression:
        return self

    def __deepcopy__(self, memo: object) -> Expression:
        return self

    @property
    @abstractmethod
    def choices(self) -> tuple[Choice, ...]:
        """The choices it depends on, each once, in order of appearance."""

    @abstractmethod
    def evaluate(self, lookup: Reader) -> Value:
        """Its value where ``lookup(choice)`` is the choice's option, or an array of options ``[n]``."""

    @abstractmethod
    def bounds(self) -> tuple[Number, Number]:
        """An interval that holds every value; infinite where nothing is known.

        Raises:
            InputError: It is not a number.
        """

    @cached_property
    def maximum(self) -> Number:
        """The largest value over all options: exact up to 100,000 combinations of them, else an upper bound.

        Raises:
            InputError: It is not a number, or too many combinations and no bound.
        """
        _, high = self.bounds()
        if prod(len(choice.options) for choice in self.choices) <= ENUMERABLE:
            return as_number(np.max(as_numeric(self.evaluate(_grid(self.choices)))))
        if high == inf:
            raise InputError(
                f"the size {self} has too many combinations of options to try (more than {ENUMERABLE}) and no known "
                "bound. Wrap it in Function(..., maximum=...), which declares one."
            )
        return high

    def __add__(self, other: object) -> Binary:
        return _binary("+", self, other)

    def __radd__(self, other: object) -> Binary:
        return _binary("+", other, self)

    def __sub__(self, other: object) -> Binary:
        return _binary("-", self, other)

    def __rsub__(self, other: object) -> Binary:
        return _binary("-", other, self)

    def __mul__(self, other: object) -> Binary:
        return _binary("*", self, other)

    def __rmul__(self, other: object) -> Binary:
        return _binary("*", other, self)

    def __floordiv__(self, other: object) -> Binary:
        return _binary("//", self, other)

    def __rfloordiv__(self, other: object) -> Binary:
        return _binary("//", other, self)


class Binary(Expression):
    """``left operator right``; made by the operators of :class:`Expression` and by ``maximum_of``, ``minimum_of``."""

    operator: str
    left: Expression | Number
    right: Expression | Number

    def __init__(self, operator: str, left: Expression | Number, right: Expression | Number) -> None:
        sides = [side if isinstance(side, Expression) else exact(side) for side in (left, right)]
        self._freeze(operator, *sides, operator=operator, left=left, right=right)
        low, high = self.bounds()
        reach = max(abs(low), abs(high))
        if LARGEST < reach < inf:
            raise InputError(f"the size {self} may reach {reach}, more than 2^53, where integers stop being exact.")
        _ = self.choices

    def __repr__(self) -> str:
        return f"Binary({self.operator!r}, {self.left!r}, {self.right!r})"

    def __str__(self) -> str:
        if self.operator in ("max", "min"):
            return f"{self.operator}({self.left}, {self.right})"
        return f"({self.left} {self.operator} {self.right})"

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Those of both sides."""
        return collect_choices((self.left, self.right))

    def evaluate(self, lookup: Reader) -> Value:
        """Applies the operator to the values of both sides."""
        left, right = (
            as_numeric(side.evaluate(lookup)) if isinstance(side, Expression) else side
            for side in (self.left, self.right)
        )
        if self.operator == "//" and np.any(np.equal(right, 0)):
            raise InputError(f"the size {self} divides by zero for some options. Remove the option that makes it 0.")
        result: Value = _OPERATORS[self.operator](left, right)
        return result

    def bounds(self) -> tuple[Number, Number]:
        """Interval arithmetic on the bounds of both sides."""
        (a, b), (c, d) = (
            side.bounds() if isinstance(side, Expression) else (side, side) for side in (self.left, self.right)
        )
        function = _OPERATORS[self.operator]
        divides_by_zero = self.operator == "//" and c <= 0 <= d
        if divides_by_zero or not all(map(isfinite, (a, b, c, d))):
            return -inf, inf
        # Each operator is monotone in each side (// where the divisor keeps its sign), so a corner is extreme.
        corners = [function(x, y) for x in (a, b) for y in (c, d)]
        return min(corners), max(corners)


def _larger(left: Any, right: Any) -> Any:
    return np.maximum(left, right) if _is_array(left, right) else max(left, right)


def _smaller(left: Any, right: Any) -> Any:
    return np.minimum(left, right) if _is_array(left, right) else min(left, right)


def _is_array(*values: object) -> bool:
    return any(isinstance(value, np.ndarray) for value in values)


_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "max": _larger,
    "min": _smaller,
}


def collect_choices(parts: Iterable[object]) -> tuple[Choice, ...]:
    """The choices of several expressions, each name once; refuses one name with two meanings."""
    found: dict[str, Choice] = {}
    for part in parts:
        for choice in part.choices if isinstance(part, Expression) else ():
            known = found.setdefault(choice.name, choice)
            if known != choice:
                raise InputError(
                    f"one size uses two different choices named {choice.name!r}: {known!r} and {choice!r}. Choices of "
                    "one name are tied: make them equal, or rename one."
                )
    return tuple(found.values())


def as_operand(value: object, what: str) -> Expression | Number:
    """``value`` as a side of an expression: an expression of numbers or a finite number.

    Raises:
        InputError: It is neither.
    """
    if isinstance(value, Expression):
        value.bounds()
        return value
    plain = as_option(value, what)
    if isinstance(plain, str | bool):
        raise InputError(f"{what} is {plain!r}. Give a number or an expression of choices.")
    return plain


def _binary(symbol: str, left: object, right: object) -> Binary:
    sides = []
    for side in (left, right):
        if not isinstance(side, Expression | int | float | np.integer | np.floating):
            return NotImplemented  # type: ignore[no-any-return]
        sides.append(as_operand(side, f"a side of {symbol!r}"))
    return Binary(symbol, *sides)


def as_numeric(value: Value) -> Any:
    """``value`` ready for arithmetic: NumPy's ``+`` on bools is a logical or, so bools become integers."""
    if isinstance(value, np.ndarray):
        return value.astype(np.int64) if value.dtype == np.bool_ else value
    return as_number(value)


def _grid(choices: tuple[Choice, ...]) -> Reader:
    """A lookup that gives every combination of the options of ``choices``, as arrays."""
    sizes = [len(choice.options) for choice in choices]
    indices = np.unravel_index(np.arange(prod(sizes)), sizes) if sizes else ()
    columns = {choice.name: choice.array[index] for choice, index in zip(choices, indices, strict=True)}
    return lambda choice: columns[choice.name]
