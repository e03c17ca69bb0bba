"""What DEAP's selection works on, and the tournament of parents.

The tournament is written here: DEAP's ``selTournamentDCD`` draws from Python's global random state, which a search that
must resume exactly cannot use. ``selNSGA3`` shuffles with NumPy's; it is lent a stream of the search's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Fitness", "Individual", "lent_numpy_random", "tournament"]


class Fitness:
    """What DEAP's selection reads; all values are turned so that larger is better."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = self.wvalues = values
        self.crowding_dist = 0.0

    def dominates(self, other: Fitness) -> bool:
        """Nowhere worse and somewhere better."""
        return self.values != other.values and all(a >= b for a, b in zip(self.values, other.values, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Fitness) and self.values == other.values

    def __gt__(self, other: Fitness) -> bool:
        return self.values > other.values

    def __hash__(self) -> int:
        return hash(self.values)


@dataclass(eq=False)
class Individual:
    """An evaluated subnet: its place in the archive and its fitness."""

    index: int
    fitness: Fitness


def tournament(parents: Sequence[Individual], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` binary tournaments: the dominating parent wins, else the less crowded one, else either (Deb, III-B)."""
    pairs = rng.integers(0, len(parents), (count, 2))
    return np.array([_winner(parents[a], parents[b]).index for a, b in pairs.tolist()], dtype=np.int64)


def _winner(a: Individual, b: Individual) -> Individual:
    if b.fitness.dominates(a.fitness):
        return b
    if a.fitness.dominates(b.fitness):
        return a
    # A tie goes to the first: which of the two is first was random.
    return b if b.fitness.crowding_dist > a.fitness.crowding_dist else a


@contextmanager
def lent_numpy_random(rng: np.random.Generator) -> Iterator[None]:
    """Inside, NumPy's global random functions draw from a stream that ``rng`` decides; the global one is left as it was."""
    before = np.random.get_state()
    np.random.seed(int(rng.integers(2**32)))
    try:
        yield
    finally:
        np.random.set_state(before)
