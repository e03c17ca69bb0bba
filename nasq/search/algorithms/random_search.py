"""Random search: the baseline of every other algorithm."""

from __future__ import annotations

import numpy as np

from nasq.search.algorithms.generational import Generational
from nasq.search.objectives import Rows

__all__ = ["RandomSearch"]


class RandomSearch(Generational):
    """Feasible subnets, as uniform as the constraints allow (see :func:`~nasq.search.feasible.sample_feasible`).

    With an assistant, each generation is the best of ``assist.starts`` times as many.
    """

    def _next(self, rng: np.random.Generator) -> Rows:
        return self._begin(self.batch, rng, self._seen())
