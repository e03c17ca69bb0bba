"""Optuna's samplers as search algorithms: TPE, NSGA-II and Gaussian processes on conditional, constrained spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from nasq.search.algorithms.assist import Assist
from nasq.search.algorithms.generational import Generational
from nasq.search.algorithms.optuna_model import OptunaModel
from nasq.search.feasible import descend
from nasq.search.objectives import Constraint, Objective, Rows, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["OptunaSearch"]

# Rounds of repairing a suggestion that breaks a constraint.
_REPAIRS = 12


class OptunaSearch(Generational):
    """Suggestions of an Optuna sampler; feasibility is decided before anything is asked for.

    A suggestion that breaks a constraint is moved to a feasible one near by; a known one is suggested anew. What
    becomes a trial is the subnet that was evaluated. Every generation has a sampler with a seed of its own, so that
    a search resumes exactly.

    Args:
        space: What to search.
        objectives: At least one.
        constraints: What every proposal keeps.
        population: Random subnets to begin with; also the population of the genetic sampler.
        seed: A non-negative integer.
        initial: Subnets to evaluate first.
        batch: Suggestions at a time; ``None``: one, and a population for the genetic sampler.
        assist: Chooses among more suggestions than are needed.
        sampler: ``"tpe"`` (multivariate, grouped by condition), ``"nsga2"`` or ``"gp"`` (which models the choices that
            all subnets have, and draws the others independently).

    Raises:
        InputError: The sampler is unknown.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        population: int = 10,
        seed: int = 0,
        initial: Sequence[Subnet] = (),
        batch: int | None = None,
        assist: Assist | None = None,
        sampler: str = "tpe",
    ) -> None:
        self.sampler = sampler
        super().__init__(
            space,
            objectives,
            constraints,
            population=population,
            seed=seed,
            initial=initial,
            batch=batch,
            assist=assist,
        )

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
