"""Sizes made of segments: what is concatenated is sliced inside each segment, not as one prefix."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from math import inf

import torch
from torch import Tensor

from nasq.errors import InputError
from nasq.space import Choice, Expression, Size, choices_of, maximum_of_size
from nasq.space.arithmetic import Reader
from nasq.space.options import Number, Value

__all__ = ["Segments", "active_part", "write_part"]


class Segments(Expression):
    """The size of a concatenation: the sum of its segments' sizes.

    Where ``torch.cat([a, b], 1)`` joins tensors whose widths are choices, channel ``c`` of ``b`` has to meet the same
    weights whatever the width of ``a``. A layer with ``in_channels=Segments(width_a, width_b)`` keeps room for the largest
    form of each segment and takes the first channels *inside each*; a plain sum takes the first of all. Also for sizes of
    outputs: ``q | k | v`` in one linear layer.

    Args:
        parts: Sizes: ints, choices, expressions, or further segments (which are joined with these).

    Raises:
        InputError: There is no part.
    """

    parts: tuple[Size, ...]

    def __init__(self, *parts: Size) -> None:
        flat = tuple(inner for part in parts for inner in (part.parts if isinstance(part, Segments) else (part,)))
        if not flat:
            raise InputError("Segments() was given no sizes. Give one per tensor that is concatenated.")
        self._freeze(*flat, parts=flat)
        _ = self.maximum

    def __repr__(self) -> str:
        return f"Segments({', '.join(map(repr, self.parts))})"

    def __str__(self) -> str:
        return f"segments({', '.join(map(str, self.parts))})"

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """Those of all parts."""
        return tuple(dict.fromkeys(choice for part in self.parts for choice in choices_of(part)))

    def evaluate(self, lookup: Reader) -> Value:
        """The sum of the parts' values."""
        first, *rest = (part.evaluate(lookup) if isinstance(part, Expression) else part for part in self.parts)
        total = first
        for value in rest:
            total = total + value  # type: ignore[operator]
        return total

    def bounds(self) -> tuple[Number, Number]:
        """The sums of the parts' bounds."""
        pairs = [part.bounds() if isinstance(part, Expression) else (part, part) for part in self.parts]
        return sum(low for low, _ in pairs), sum(high for _, high in pairs)

    @cached_property
    def maximum(self) -> Number:
        """The sum of the parts' maxima: each segment has room for its own largest form."""
        total = sum(maximum_of_size(part) for part in self.parts)
        assert total < inf
        return total


def _pieces(size: Size, value: Callable[[Size], int]) -> Iterator[tuple[int, int]]:
    """Where the active entries lie in the largest form: starts and lengths, neighbours joined, empty ones left out."""
    parts = size.parts if isinstance(size, Segments) else (size,)
    start = offset = length = 0
    for part in parts:
        active = value(part)
        if start + length != offset and active:
            if length:
                yield start, length
            start, length = offset, 0
        length += active
        offset += maximum_of_size(part)
    if length:
        yield start, length


def active_part(tensor: Tensor, dim: int, size: Size, value: Callable[[Size], int]) -> Tensor:
    """The active entries of a shared ``tensor`` along ``dim``: a view where they are neighbours, else a copy.

    Args:
        tensor: Of the largest form.
        dim: The dimension that ``size`` belongs to.
        size: An int, a choice, an expression or :class:`Segments`.
        value: Gives a size under the active options.
    """
    if not isinstance(size, Segments):
        return tensor.narrow(dim, 0, value(size))
    pieces = [tensor.narrow(dim, start, length) for start, length in _pieces(size, value)]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim) if pieces else tensor.narrow(dim, 0, 0)


@torch.no_grad()
def write_part(tensor: Tensor, values: Tensor, size: Size, value: Callable[[Size], int]) -> None:
    """Writes ``values`` into the active entries of the one-dimensional ``tensor``; the inverse of :func:`active_part`."""
    done = 0
    for start, length in _pieces(size, value):
        tensor[start : start + length].copy_(values[done : done + length])
        done += length
