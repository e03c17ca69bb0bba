"""The values that choices may take, and numbers made of them."""

from __future__ import annotations

from collections.abc import Iterable
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError

__all__ = ["Number", "Option", "Value", "as_literal", "as_number", "as_option", "checked_options", "exact", "factorise"]

Option = str | int | float | bool
Number = int | float
Value = Option | NDArray[Any]


def as_option(value: object, what: str) -> Option:
    """``value`` as a plain Python option: NumPy scalars become Python's, -0.0 becomes 0.0.

    Args:
        value: What the user gave.
        what: Where it was given, for the message.

    Raises:
        InputError: It is no str, int, float or bool, or not finite.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if type(value) is float:
        if not isfinite(value):
            raise InputError(f"{what} is {value}, which is not a finite number. Give a finite one.")
        return value + 0.0
    if type(value) in (str, int, bool):
        return value  # type: ignore[return-value]
    raise InputError(f"{what} is {value!r} of type {type(value).__name__}. Allowed: str, int, float, bool.")


def exact(option: Option) -> tuple[str, Option]:
    """A key that tells 1, 1.0 and True apart, which Python's ``==`` does not."""
    return type(option).__name__, option


def checked_options(name: str, options: Iterable[Option]) -> tuple[Option, ...]:
    """The options of a choice as plain ones; a set is sorted.

    Raises:
        InputError: There is none, one repeats or equals another in Python, or one is no option.
    """
    if isinstance(options, str) or not isinstance(options, Iterable):
        raise InputError(f"the options of choice {name!r} are {options!r}. Give a tuple of options, such as (3, 5).")
    plain = [as_option(option, f"an option of choice {name!r}") for option in options]
    if isinstance(options, set | frozenset):
        plain.sort(key=lambda option: (isinstance(option, str), option))  # a set's own order changes from run to run
    if not plain:
        raise InputError(f"choice {name!r} has no options. Give at least one.")
    seen: dict[Option, Option] = {}
    for option in plain:
        if option in seen:
            twice = f"{option!r} twice" if exact(option) == exact(seen[option]) else f"{seen[option]!r} and {option!r}"
            raise InputError(
                f"choice {name!r} has the options {twice}, which are equal in Python. Give each option once."
            )
        seen[option] = option
    return tuple(plain)


def as_number(value: Any) -> Number:
    """A Python number from a Python or NumPy scalar; bools count as 0 and 1."""
    plain = value.item() if isinstance(value, np.generic) else value
    return int(plain) if isinstance(plain, bool) else plain


def as_literal(value: object, what: str) -> Number:
    """``value`` as a number: a bool counts as one.

    Raises:
        InputError: It is text, or not finite.
    """
    plain = as_option(value, what)
    if isinstance(plain, str):
        raise InputError(f"{what} is {plain!r}. Give a number.")
    return as_number(plain)


def factorise(column: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
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
