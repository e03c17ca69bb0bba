"""A decision: a name and its options. It is the simplest expression, so sizes can be computed from it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.arithmetic import LARGEST, Expression, Reader
from nasq.space.options import Number, Option, Value, as_number, as_option, checked_options, exact

__all__ = ["Choice"]


class Choice(Expression):
    """One decision: a name and the options it may take. Two modules that hold choices of one name are tied.

    Args:
        name: Unique in its space, such as ``"stage1.block0.kernel"``.
        options: At least one, all different; a set is sorted. ``ordered`` options go from the smallest network to the
            largest (``(3, 5, 7)`` for kernels, ``(2, 1)`` for strides).
        default: The option where nobody decides; without it, the last option if all are numbers and ordered, else
            the first.
        ordered: Whether neighbouring options are similar.

    Raises:
        InputError: The name is empty, an option repeats or is no str, int, float or bool, or two options are equal in
            Python (``1`` and ``True``), or the default is no option.
    """

    name: str
    options: tuple[Option, ...]
    default: Option
    ordered: bool

    def __init__(
        self, name: str, options: Iterable[Option], default: Option | None = None, ordered: bool = True
    ) -> None:
        if not isinstance(name, str) or not name or name != name.strip() or not name.isprintable():
            raise InputError(f"a choice's name is {name!r}. Give a printable text without spaces around it.")
        plain = checked_options(name, options)
        numeric = all(isinstance(option, int | float) and not isinstance(option, bool) for option in plain)
        positions = {exact(option): index for index, option in enumerate(plain)}
        if default is None:
            default = plain[-1] if numeric and ordered else plain[0]
        else:
            default = as_option(default, f"the default of choice {name!r}")
        if exact(default) not in positions:
            raise InputError(f"the default {default!r} of choice {name!r} is not one of its options {list(plain)}.")
        self._freeze(
            name, tuple(positions), exact(default), bool(ordered),
            name=name, options=plain, default=default, ordered=bool(ordered), _positions=positions, _numeric=numeric,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"Choice({self.name!r}, {self.options!r}, default={self.default!r}, ordered={self.ordered})"

    def __str__(self) -> str:
        return self.name

    @property
    def is_size(self) -> bool:
        """Whether every option is an int or a float (not a bool)."""
        return bool(vars(self)["_numeric"])

    def index(self, option: object) -> int:
        """The position of ``option``; types count, so ``True`` and ``1.0`` are not ``1``.

        Raises:
            InputError: It is not an option.
        """
        plain = as_option(option, f"the option given for choice {self.name!r}")
        position: int | None = vars(self)["_positions"].get(exact(plain))
        if position is None:
            listed = ", ".join(map(repr, self.options))
            raise InputError(f"choice {self.name!r} has no option {plain!r}. Allowed: {listed}.")
        return position

    def __contains__(self, option: object) -> bool:
        plain = option.item() if isinstance(option, np.generic) else option
        return isinstance(plain, str | int | float) and exact(plain) in vars(self)["_positions"]

    @property
    def choices(self) -> tuple[Choice, ...]:
        """Itself."""
        return (self,)

    def evaluate(self, lookup: Reader) -> Value:
        """What ``lookup`` gives."""
        return lookup(self)

    def bounds(self) -> tuple[Number, Number]:
        """Smallest and largest option."""
        if any(isinstance(option, str) for option in self.options):
            raise InputError(
                f"choice {self.name!r} has the options {list(self.options)}, which are not all numbers, so it cannot "
                "be used as a size. Map its options to numbers with Lookup."
            )
        numbers = [as_number(option) for option in self.options]
        return min(numbers), max(numbers)

    @cached_property
    def array(self) -> NDArray[Any]:
        """The options as an array ``[options]``: int64, float64 or bool where all are of one type, else objects."""
        kinds = {type(option) for option in self.options}
        dtype: Any = {int: np.int64, float: np.float64, bool: np.bool_}.get(kinds.pop(), object)
        if kinds or any(isinstance(option, int) and abs(option) > LARGEST for option in self.options):
            dtype = object
        array = np.array(self.options, dtype=dtype)
        array.setflags(write=False)
        return array
