"""Sizes that depend on choices: rounding, tables, any function with a declared maximum, and how to evaluate them.

Wherever a layer takes a size it takes an int, a :class:`Choice` or an expression of choices. The scalar form
(:func:`value_of`) and the array form (:func:`values_of`) give equal values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from math import inf
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.choice import (
    Binary,
    Choice,
    Expression,
    Number,
    Option,
    Reader,
    Value,
    as_number,
    as_numeric,
    as_operand,
    as_option,
    collect_choices,
    exact,
)

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
            _literal(given[index], f"the value of {option!r} in Lookup({choice.name!r})")
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
        codes, firsts = _factorise(option)
        positions = np.array([self.choice.index(option.flat[first]) for first in firsts], dtype=np.int64)
        values: NDArray[Any] = vars(self)["_array"][positions[codes]]
        return values

    def bounds(self) -> tuple[Number, Number]:
        """Smallest and largest number of the table."""
        return min(self.table.values()), max(self.table.values())


class Function(Expression):
    """Any pure function of sizes and options whose range is declared.

    Args:
        function: Called with scalars; equal arguments must give equal results. A module-level function can be pickled,
            a lambda cannot.
        arguments: Choices (of any options), expressions, or plain options.
        maximum: The largest value it may return; allocates the shared weights where trying all options is too much.
        minimum: The smallest value it may return.

    Raises:
        InputError: On evaluation, when the function fails, or returns no number, or one outside the declared range.
    """

    function: Callable[..., Number]
    arguments: tuple[Expression | Option, ...]

    def __init__(
        self, function: Callable[..., Number], *arguments: Expression | Option, maximum: int, minimum: int = 0
    ) -> None:
        if not callable(function):
            raise InputError(f"Function was given {function!r}, which cannot be called.")
        label = str(getattr(function, "__name__", function))
        high, low = _literal(maximum, f"the maximum of {label}"), _literal(minimum, f"the minimum of {label}")
        if low > high:
            raise InputError(f"the function {label} has the minimum {low} above its maximum {high}.")
        plain = tuple(
            part if isinstance(part, Expression) else as_option(part, f"an argument of {label}") for part in arguments
        )
        parts = tuple(part if isinstance(part, Expression) else exact(part) for part in plain)
        self._freeze(function, parts, low, high, function=function, arguments=plain, _range=(low, high), _label=label)
        _ = self.choices

    def __repr__(self) -> str:
        low, high = self.bounds()
        parts = ", ".join(map(repr, self.arguments))
        return f"Function({vars(self)['_label']}, {parts}, maximum={high}, minimum={low})"

    def __str__(self) -> str:
        return f"{vars(self)['_label']}({', '.join(map(str, self.arguments))})"

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Those of all arguments."""
        return collect_choices(self.arguments)

    def bounds(self) -> tuple[Number, Number]:
        """The declared range."""
        declared: tuple[Number, Number] = vars(self)["_range"]
        return declared

    def evaluate(self, lookup: Reader) -> Value:
        """Calls the function, on arrays once per distinct combination of arguments."""
        values = [part.evaluate(lookup) if isinstance(part, Expression) else part for part in self.arguments]
        if not any(isinstance(value, np.ndarray) for value in values):
            return self._call(values)
        columns = np.broadcast_arrays(*[_column(value) for value in values])
        code, firsts = _factorise(columns[0])
        for column in columns[1:]:
            further, distinct = _factorise(column)
            code, firsts = _factorise(code * len(distinct) + further)
        results = [self._call([_plain(column[first]) for column in columns]) for first in firsts]
        dtype = np.int64 if all(isinstance(result, int) for result in results) else object
        table: NDArray[Any] = np.array(results, dtype=dtype)
        return table[code]

    def _call(self, values: list[Any]) -> Number:
        shown = f"{vars(self)['_label']}({', '.join(map(repr, values))})"
        try:
            raw = self.function(*values)
        except Exception as error:
            raise InputError(f"the size {shown} failed: {type(error).__name__}: {error}.") from error
        result = _literal(raw, f"the size {shown}")
        low, high = self.bounds()
        if not low <= result <= high:
            side, word = (f"maximum={high}", "above") if result > high else (f"minimum={low}", "below")
            raise InputError(f"the size {shown} is {result}, {word} its declared {side}. Declare a wider range.")
        return result


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


def _literal(value: object, what: str) -> Number:
    plain = as_option(value, what)
    if isinstance(plain, str):
        raise InputError(f"{what} is {plain!r}. Give a number.")
    return as_number(plain)


def _column(value: Value) -> NDArray[Any]:
    return value if isinstance(value, np.ndarray) else np.array([value])


def _plain(value: Any) -> Option:
    return value.item() if isinstance(value, np.generic) else value  # type: ignore[no-any-return]


def _factorise(column: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Codes ``[n]`` of equal entries and, per code, the position of its first entry. Types count in object arrays."""
    if column.dtype != object:
        _, firsts, codes = np.unique(column, return_index=True, return_inverse=True)
        return codes.reshape(-1), firsts
    seen: dict[tuple[str, Option], int] = {}
    firsts_list: list[int] = []
    codes = np.empty(len(column), dtype=np.int64)
    for position, value in enumerate(column):
        code = seen.setdefault(exact(value), len(seen))
        if code == len(firsts_list):
            firsts_list.append(position)
        codes[position] = code
    return codes, np.array(firsts_list, dtype=np.int64)
