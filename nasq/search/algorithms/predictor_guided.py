"""Predictor-guided search: an ensemble learns from what was evaluated, and says which new subnets are worth it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nasq.errors import InputError
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Common, Generational
from nasq.search.algorithms.proposing import fresh, remaining
from nasq.search.feasible import keys
from nasq.search.objectives import Constraint, Objective, Rows, Values

if TYPE_CHECKING:
    from nasq.search.predictors.ensembles import Features, Predictor
    from nasq.space import SearchSpace

__all__ = ["PredictorGuided"]

# Random subnets among the candidates: mutants of the best alone would never leave their surroundings.
_RANDOM = 0.3


class PredictorGuided(Generational):
    """BANANAS (White et al., AAAI 2021): fit an ensemble, sample its prediction of many candidates, evaluate the best.

    Candidates are mutants and crossovers of the best subnets, and random ones. Each gets one independent draw from its
    predicted distribution (Thompson sampling without correlation). Objectives on rows are not predicted but computed;
    with several objectives, candidates are ordered among the front's members by front and crowding. Predicted
    values are learned as ranks, mapped to a normal distribution, so that neither the unit nor a few subnets that fail
    altogether decide the fit.

    :meth:`best` trusts the mean of prediction and observation: a noisy value that the model did not expect counts half.

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        population: Random subnets to begin with.
        batch: Subnets between two fits; ``None``: a fifth of the population, at least one.
        assist: Chooses among more random starts than are needed; here candidates are the predictor's to choose.
        predictor: A name of :data:`~nasq.search.predictors.PREDICTORS`, or a predictor.
        features: Rows to ``[n, features]``, further numbers for the predictor: costs, proxies.
        candidates: How many are scored for a generation.
        parents: How many of the best have mutants.

    Raises:
        InputError: The predictor is unknown, or a number is below 1.
    """

    _POPULATION = 20

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        predictor: str | Predictor = "forest",
        features: Features | None = None,
        candidates: int = 400,
        parents: int = 10,
        **common: Unpack[Common],
    ) -> None:
        if candidates < 1 or parents < 1:
            raise InputError(f"got {candidates} candidates and {parents} parents; both must be at least 1.")
        self.predictor, self.candidates, self.parents = predictor, candidates, parents
        self._features = features
        super().__init__(space, objectives, constraints, **common)
        self._model = self._make() if isinstance(predictor, str) else predictor

    def _make(self) -> Predictor:
        from nasq.search.predictors.ensembles import predictor  # the package loads torch

        assert isinstance(self.predictor, str)
        return predictor(self.predictor, self.space, self._features)

    def _default_batch(self, population: int) -> int:
        return max(1, population // 5)

    def _settings(self) -> dict[str, Any]:
        name = self.predictor if isinstance(self.predictor, str) else type(self.predictor).__name__
        return {**super()._settings(), "predictor": name, "candidates": self.candidates, "parents": self.parents}

    def _next(self, rng: np.random.Generator) -> Rows:
        pool = self._pool(rng)
        if len(pool) <= self.batch:
            return pool
        drawn = np.stack([self._draw(column, pool, rng) for column in range(len(self.objectives))], axis=1)
        if len(self.objectives) == 1:
            return pool[np.argsort(-drawn[:, 0], kind="stable")[: self.batch]]
        best = np.argsort(-fitness(self._values), kind="stable")[: self.population]
        known = np.stack([self._learned(column)[best] for column in range(len(self.objectives))], axis=1)
        merit = fitness(np.concatenate([drawn, known]))[: len(pool)]
        return pool[np.argsort(-merit, kind="stable")[: self.batch]]

    def _pool(self, rng: np.random.Generator) -> Rows:
        """New feasible candidates, in random order."""
        best = self._rows[np.argsort(-fitness(self._values), kind="stable")[: self.parents]]
        seen = self._seen()
        count = round((1 - _RANDOM) * self.candidates)
        first, second = (best[rng.integers(0, len(best), count)] for _ in range(2))
        crossed = np.where(rng.random((count, 1)) < 0.5, self.space.crossover(first, second, rng), first)
        near = fresh(self.constraints, self.space.mutate(crossed, rng, 1.0 / len(self.space)), seen)
        seen.update(keys(near))
        others = remaining(self.space, self.constraints, max(self.candidates - len(near), self.batch), rng, seen)
        return np.concatenate([near, others])

    def _learned(self, column: int) -> Values:
        """What is learned of one objective, ``[evaluated]``: ranks as quantiles of a normal distribution."""
        values = np.array([one[column] for one in self._values])
        if self.objectives[column].on == "rows":
            return values
        from scipy.special import ndtri
        from scipy.stats import rankdata

        return np.asarray(ndtri((rankdata(values) - 0.5) / len(values)), dtype=np.float64)

    def _draw(self, column: int, pool: Rows, rng: np.random.Generator) -> Values:
        objective = self.objectives[column]
        if objective.on == "rows":
            return objective.sign * objective.measure(pool)
        self._model.fit(self._rows, self._learned(column), int(rng.integers(2**31)))
        mean, std = self._model(pool)
        return mean + std * rng.standard_normal(len(pool))

    def _merit(self) -> Values:
        if len(self.objectives) > 1 or self.objectives[0].on == "rows":
            return super()._merit()
        learned = self._learned(0)
        self._model.fit(self._rows, learned, self.seed)
        return 0.5 * (learned + self._model(self._rows)[0])
