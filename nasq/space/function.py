"""A size that any pure function computes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.arithmetic import Expression, Reader, collect_choices
from nasq.space.choice import Choice
from nasq.space.options import Number, Option, Value, as_literal, as_option, exact, factorise

__all__ = ["Function"]


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
        high, low = as_literal(maximum, f"the maximum of {label}"), as_literal(minimum, f"the minimum of {label}")
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
        code, firsts = factorise(columns[0])
        for column in columns[1:]:
            further, distinct = factorise(column)
            code, firsts = factorise(code * len(distinct) + further)
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
        result = as_literal(raw, f"the size {shown}")
        low, high = self.bounds()
        if not low <= result <= high:
            side, word = (f"maximum={high}", "above") if result > high else (f"minimum={low}", "below")
            raise InputError(f"the size {shown} is {result}, {word} its declared {side}. Declare a wider range.")
        return result


def _column(value: Value) -> NDArray[Any]:
    return value if isinstance(value, np.ndarray) else np.array([value])


def _plain(value: Any) -> Option:
    return value.item() if isinstance(value, np.generic) else value  # type: ignore[no-any-return]
