"""Local search: from the best known subnet to better neighbours, and from a local optimum to a random restart."""

from __future__ import annotations

import numpy as np

from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Generational
from nasq.search.algorithms.proposing import fresh
from nasq.search.objectives import Rows
from nasq.search.pareto import front

__all__ = ["LocalSearch"]


class LocalSearch(Generational):
    """Climbs by neighbours that differ in one choice (White et al., "Local search is state of the art for NAS", 2020).

    Neighbours of the climb's best subnet are evaluated in random order, a batch at a time, and the climb goes on from
    a better one at once (the paper evaluates the whole neighbourhood first: a batch as large as that does the same).
    Where all are known, a new climb begins at random subnets. With several objectives a climb goes on from the members
    of its front, the most isolated first, until all their neighbours are known (Pareto local search).

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        population: Random subnets to begin with; the best is where the first climb starts.
        batch: Neighbours between two looks at their values, and starts of a later climb; ``None``: one.
        assist: Orders the neighbours, and chooses among random starts.
    """

    _POPULATION = 10

    def _default_batch(self, population: int) -> int:
        return 1

    def _reset(self) -> None:
        super()._reset()
        self._climb = 0
        self._moves = self._rows[:0]

    def _absorb(self, first: int) -> None:
        values = np.array(self._values[self._climb :])
        merit = np.where(front(values, ["maximize"] * values.shape[1]), fitness(values), -np.inf)
        for index in np.argsort(-merit, kind="stable")[: int(np.isfinite(merit).sum())]:
            self._moves = self._neighbours(self._climb + int(index))
            if len(self._moves):
                return
        self._climb = len(self._values)

    def _neighbours(self, index: int) -> Rows:
        """New feasible neighbours of a row of the archive."""
        found = list(self.space.neighbours(self.space.to_subnet(self._rows[index])))
        return fresh(self.constraints, self.space.to_rows(found), self._known) if found else self._rows[:0]

    def _next(self, rng: np.random.Generator) -> Rows:
        if self._climb == len(self._values):
            return self._begin(self.batch, rng, self._seen())
        moves = self._moves[rng.permutation(len(self._moves))]
        return moves[: self.batch] if self.assist is None else self.assist.best(moves, self.batch)
