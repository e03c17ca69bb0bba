"""Optuna's samplers as search algorithms: TPE, NSGA-II and Gaussian processes on conditional, constrained spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nasq.search.algorithms.generational import Common, Generational
from nasq.search.algorithms.optuna_model import OptunaModel
from nasq.search.feasible import descend
from nasq.search.objectives import Constraint, Objective, Rows, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["OptunaSearch"]

# Rounds of repairing a suggestion that breaks a constraint.
_REPAIRS = 12


class OptunaSearch(Generational):
    """Suggestions of an Optuna sampler; feasibility is decided before anything is asked for.

    A suggestion that breaks a constraint is moved to a feasible one near by; a known one is suggested anew. What
    becomes a trial is the subnet that was evaluated. Every generation has a sampler with a seed of its own, so that
    a search resumes exactly.

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        population: Random subnets to begin with; also the population of the genetic sampler.
        batch: Suggestions at a time; ``None``: one, and a population for the genetic sampler.
        assist: Chooses among more suggestions than are needed.
        sampler: ``"tpe"`` (multivariate, grouped by condition), ``"nsga2"`` or ``"gp"`` (which models the choices that
            all subnets have, and draws the others independently).

    Raises:
        InputError: The sampler is unknown.
    """

    _POPULATION = 10

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        sampler: str = "tpe",
        **common: Unpack[Common],
    ) -> None:
        self.sampler = sampler
        super().__init__(space, objectives, constraints, **common)

    def _default_batch(self, population: int) -> int:
        return population if self.sampler == "nsga2" else 1

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "sampler": self.sampler}

    def _reset(self) -> None:
        super()._reset()
        # Random until the first generation is known.
        self._model = OptunaModel(self.space, len(self.objectives), self.sampler, self.population, startup=1)

    def _absorb(self, first: int) -> None:
        self._model.add(self._rows[first:], self._values[first:])

    def _next(self, rng: np.random.Generator) -> Rows:
        def suggestions() -> Rows:
            rows = self._model.propose(self.brood, int(rng.integers(2**31)))
            if len(rows) and violations(self.constraints, rows).any():
                rows = descend(self.space, self.constraints, rows, rng, _REPAIRS)
            return rows

        return self._propose(suggestions, rng)
