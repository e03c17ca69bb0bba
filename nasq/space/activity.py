"""Which choices are active in many subnets at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nasq.space.conditions import ALWAYS, Uses

__all__ = ["Activity"]


class Activity:
    """Evaluates conditions on rows of option indices; equal conditions (all choices of a block) are evaluated once.

    Args:
        sizes: Number of options of each choice, parents first.
        uses: Conditions of each choice; their parents come earlier.
    """

    def __init__(self, sizes: Sequence[int], uses: Sequence[Uses]) -> None:
        self._uses = tuple(uses)
        parts = {part for own in uses for use in own for part in use}
        self._tables: dict[tuple[int, frozenset[int]], NDArray[np.bool_]] = {}
        for parent, allowed in parts:
            table = np.zeros(sizes[parent], dtype=np.bool_)
            table[list(allowed)] = True
            self._tables[parent, allowed] = table

    def __call__(self, rows: NDArray[np.int16]) -> NDArray[np.bool_]:
        """Whether each choice is active, ``[n, choices]``, for option indices ``[n, choices]``."""
        active = np.ones((len(self._uses), len(rows)), dtype=np.bool_)
        columns = rows.T
        parts: dict[tuple[int, frozenset[int]], NDArray[np.bool_]] = {}
        known: dict[Uses, NDArray[np.bool_]] = {}
        for index, own in enumerate(self._uses):
            if own == ALWAYS:
                continue
            if own not in known:
                holds = np.zeros(len(rows), dtype=np.bool_)
                for use in own:
                    path = np.ones(len(rows), dtype=np.bool_)
                    for part in use:
                        if part not in parts:
                            parts[part] = self._tables[part][columns[part[0]]] & active[part[0]]
                        path &= parts[part]
                    holds |= path
                known[own] = holds
            active[index] = known[own]
        return np.ascontiguousarray(active.T)
