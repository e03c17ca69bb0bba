"""Squeezing: the largest subnet with its sizes lowered together until constraints hold.

It is what people do without a search, so it is both the baseline that a search has to beat and a good place to start one:
uniform bit-widths with everything else as large as the limits allow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.search.objectives import Constraint, Rows, feasible

if TYPE_CHECKING:
    from nasq.space import Option, SearchSpace, Subnet

__all__ = ["BITS", "are_bits", "squeeze", "squeezed_rows", "uniform_bits", "uniform_starts"]

BITS = ("weight_bits", "activation_bits")
"""The last parts of the names of choices that are bit-widths (see :func:`nasq.quant.quantize`)."""


def _kind(name: str) -> str:
    return name.rpartition(".")[2]


def are_bits(space: SearchSpace) -> NDArray[np.bool_]:
    """Which choices of a space are bit-widths, ``[choices]``."""
    return np.array([_kind(name) in BITS for name in space.names], dtype=bool)


def uniform_bits(space: SearchSpace, weight: Option, activation: Option) -> dict[str, Option]:
    """``weight`` and ``activation`` bits for every choice of bits that has them; the others are left out."""
    wanted = dict(zip(BITS, (weight, activation), strict=True))
    return {
        choice.name: wanted[_kind(choice.name)]
        for choice in space.choices
        if wanted.get(_kind(choice.name)) in choice.options
    }


def squeezed_rows(space: SearchSpace, fixed: Mapping[str, Option]) -> Rows:
    """The largest subnet with ``fixed`` options, then the same with one size lowered by one option, and so on.

    The size to lower is the one that has most of its options left, relative to their number (of several, the last in
    the space's order), so that all shrink together. Rows ``[n, choices]`` are canonical and distinct.
    """
    names = {choice.name: column for column, choice in enumerate(space.choices)}
    row = space.to_rows([{**space.largest(), **{name: option for name, option in fixed.items()}}])[0]
    sizes = [
        (column, len(choice.options) - 1)
        for name, column in names.items()
        if (choice := space.choices[column]).ordered
        and choice.is_size
        and name not in fixed
        and len(choice.options) > 1
    ]
    levels = {column: last for column, last in sizes}
    path = [row.copy()]
    while any(levels.values()):
        column = max(reversed(list(levels)), key=lambda each: levels[each] / dict(sizes)[each])
        levels[column] -= 1
        row[column] = min(row[column], levels[column])
        path.append(row.copy())
    rows, member = space.settle(np.stack(path))
    _, first = np.unique(rows[member], axis=0, return_index=True)
    return rows[member][np.sort(first)]


def squeeze(space: SearchSpace, fixed: Mapping[str, Option], constraints: Sequence[Constraint]) -> Subnet | None:
    """The first of :func:`squeezed_rows` that keeps every constraint; ``None`` where none does."""
    rows = squeezed_rows(space, fixed)
    kept = np.flatnonzero(feasible(constraints, rows))
    return space.to_subnet(rows[kept[0]]) if len(kept) else None


def uniform_starts(space: SearchSpace, constraints: Sequence[Constraint]) -> list[Subnet]:
    """For every pair of weight and activation bits, the largest feasible subnet that has them everywhere.

    A space without choices of bits gives the largest feasible subnet alone. Each subnet is there once.
    """
    options = [
        sorted(
            {option for choice in space.choices if _kind(choice.name) == kind for option in choice.options}, key=float
        )
        or [0]
        for kind in BITS
    ]
    found: dict[str, Subnet] = {}
    for weight, activation in product(*options):
        subnet = squeeze(space, uniform_bits(space, weight, activation), constraints)
        if subnet is not None:
            found.setdefault(subnet.id, subnet)
    return list(found.values())
