"""Genetic algorithms on canonical rows under hard constraints: one objective, several, many; and regularized evolution.

Selection is DEAP's ``selBest``, ``selNSGA2`` and ``selNSGA3``. Crossover and mutation are the space's own, because they
keep conditional choices canonical and work on whole batches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from math import comb
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from nasq.errors import InputError, require
from nasq.search.algorithms.fitness import fitness
from nasq.search.algorithms.generational import Common, Generational
from nasq.search.algorithms.proposing import fresh
from nasq.search.algorithms.selection import Fitness, Individual, lent_numpy_random, tournament
from nasq.search.feasible import keys, spread
from nasq.search.objectives import Constraint, Measure, Objective, Rows
from nasq.search.pareto import front
from nasq.search.squeeze import are_bits

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["NSGA2", "NSGA3", "GeneticAlgorithm", "RegularizedEvolution"]

# Share of generation 0 that ranges over sizes. On a made-up joint space of 49 choices (bits, widths; 150 evaluations) a
# quarter gave more hypervolume than none or a half, and as good a best subnet under a limit as none.
_WIDE = 0.25
# Rows drawn for a generation 0 that ranges over sizes; only rows, so it costs milliseconds.
_DRAWS = 2048
# The same where sizes and bits have levels of their own: few combinations of the two are within two limits.
_JOINT_DRAWS = 8192
# Largest mutation rate by default. In small spaces three changes in each child are too many: on NAS-Bench-201 (6 choices)
# NSGA-II found 96.2 % of the front's hypervolume with a rate of 0.5, and 98.7 % with single changes (500 evaluations).
_MUTATION = 0.1
# Sets NSGA-III's shuffles apart from what makes the children.
_NICHES = 2**32 + 1


class _Settings(Common, total=False):
    crossover_rate: float
    mutation_rate: float | None
    spread_starts: bool


class _Genetic(Generational):
    """Survivors, tournaments among them, crossover and mutation; see :class:`NSGA2`."""

    _POPULATION = 24

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        crossover_rate: float = 0.9,
        mutation_rate: float | None = None,
        spread_starts: bool = False,
        **common: Unpack[Common],
    ) -> None:
        for name, rate in (("crossover_rate", crossover_rate), ("mutation_rate", mutation_rate)):
            if rate is not None and not 0.0 <= rate <= 1.0:
                raise InputError(f"{name} is {rate}; it must lie between 0 and 1.")
        self.crossover_rate = crossover_rate
        self.mutation_rate = min(_MUTATION, 3.0 / len(space)) if mutation_rate is None else mutation_rate
        self.spread_starts = spread_starts
        super().__init__(space, objectives, constraints, **common)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "crossover_rate": self.crossover_rate,
            "mutation_rate": self.mutation_rate,
            "spread_starts": self.spread_starts,
        }

    def _reset(self) -> None:
        super()._reset()
        self._parents: list[int] = []

    def _begin(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        if self.spread_starts:
            wide = self._wide(count, self._two_levels(rng), seen)
        else:
            wide = self._wide(round(_WIDE * count), spread(self.space, _DRAWS, rng), seen)
        seen = seen | set(keys(wide))
        return np.concatenate([wide, super()._begin(count - len(wide), rng, seen)])

    def _two_levels(self, rng: np.random.Generator) -> Rows:
        """Rows that range over sizes, and over bit-widths on their own: large with few bits, small with many."""
        sizes, bits = (spread(self.space, _JOINT_DRAWS, rng) for _ in range(2))
        rows, member = self.space.settle(np.where(are_bits(self.space), bits, sizes))
        return rows[member]

    def _wide(self, count: int, rows: Rows, seen: set[bytes]) -> Rows:
        """Up to ``count`` of ``rows``, feasible ones, evenly spaced in the first cheap number that this search knows."""
        rows = fresh(self.constraints, rows, seen)
        measure = self._cheap()
        if measure is not None and len(rows) > count:
            rows = rows[np.argsort(measure(rows), kind="stable")]
            rows = rows[np.unique(np.linspace(0, len(rows) - 1, max(count, 1)).round().astype(int))]
        return rows[:count]

    def _cheap(self) -> Measure | None:
        cheap = [objective.measure for objective in self.objectives if objective.on == "rows"]
        return next(iter([*cheap, *(constraint.measure for constraint in self.constraints)]), None)

    def _absorb(self, first: int) -> None:
        pool = [*self._parents, *range(first, len(self._values))]
        self._parents = [individual.index for individual in self._survivors(pool)]

    def _survivors(self, pool: Sequence[int]) -> list[Individual]:
        """Those of ``pool`` (indices into the archive) that stay, ready for tournaments: at most ``population``."""
        return self._selected(pool, self.population)

    def _selected(self, pool: Sequence[int], count: int) -> list[Individual]:
        individuals = [Individual(index, Fitness(self._values[index])) for index in pool]
        return self._select(individuals, min(count, len(pool)))

    @abstractmethod
    def _select(self, individuals: list[Individual], count: int) -> list[Individual]:
        """The ``count`` best."""

    def _next(self, rng: np.random.Generator) -> Rows:
        parents = self._survivors(self._parents)  # once more, for crowding distances among the survivors alone
        return self._propose(lambda: self._children(parents, rng), rng)

    def _children(self, parents: Sequence[Individual], rng: np.random.Generator) -> Rows:
        first, second = (self._rows[tournament(parents, self.brood, rng)] for _ in range(2))
        crossed = self.space.crossover(first, second, rng)
        both = rng.random(len(first)) < self.crossover_rate
        return self.space.mutate(np.where(both[:, None], crossed, first), rng, self.mutation_rate)


class GeneticAlgorithm(_Genetic):
    """The elitist genetic algorithm for one objective: the best of parents and children survive.

    Several objectives are ordered by front and crowding (see :func:`~nasq.search.algorithms.fitness.fitness`); there
    :class:`NSGA2` is the usual choice. Arguments and errors are those of :class:`NSGA2`.
    """

    def _survivors(self, pool: Sequence[int]) -> list[Individual]:
        merit = fitness([self._values[index] for index in pool])
        individuals = [Individual(index, Fitness((float(one),))) for index, one in zip(pool, merit, strict=True)]
        return self._select(individuals, min(self.population, len(pool)))

    def _select(self, individuals: list[Individual], count: int) -> list[Individual]:
        chosen: list[Individual] = require("deap.tools").selBest(individuals, count)
        return chosen


class NSGA2(_Genetic):
    """The elitist genetic algorithm for several objectives (Deb et al., IEEE TEVC 6(2), 2002); fine for one as well.

    Children are made from parents by uniform crossover and mutation, and kept only if they are feasible and new, so no
    subnet is evaluated twice. A quarter of the first generation ranges from the smallest to the largest feasible
    subnets (see :func:`~nasq.search.feasible.spread`), the rest is uniform.

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        population: Subnets in the first generation, and survivors.
        batch: Subnets in each later generation; ``None``: as many as survive. A small one is a steady-state search: it
            learns from every few subnets.
        assist: Chooses among more children than are needed.
        crossover_rate: Share of children with two parents; the others are mutated copies.
        mutation_rate: Chance of each choice to change, one at least does; ``None`` is three over the number of choices,
            and 0.1 at most; 0 is one change.
        spread_starts: Whether all of the first generation ranges evenly from few to much of the first cheap objective (or
            constraint), with bit-widths around another level than sizes: for joint spaces and few evaluations.
        keep_front: Whether the front survives as a whole where it is larger than the population. That helps in small
            spaces with two objectives; in large ones nearly everything is soon a parent, and selection ends.

    Raises:
        InputError: A rate is outside 0..1.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        keep_front: bool = False,
        **settings: Unpack[_Settings],
    ) -> None:
        self.keep_front = keep_front
        super().__init__(space, objectives, constraints, **settings)

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "keep_front": self.keep_front}

    def _survivors(self, pool: Sequence[int]) -> list[Individual]:
        count = self.population
        if self.keep_front and len(pool) > count:
            values = np.array([self._values[index] for index in pool])
            count = max(count, int(front(values, ["maximize"] * values.shape[1]).sum()))
        return self._selected(pool, count)

    def _select(self, individuals: list[Individual], count: int) -> list[Individual]:
        chosen: list[Individual] = require("deap.tools").selNSGA2(individuals, count)
        return chosen


class NSGA3(_Genetic):
    """NSGA-II's successor for many objectives (Deb and Jain, IEEE TEVC 18(4), 2014): reference points keep the spread.

    There are as many reference points as fit into the population. Arguments and errors are those of :class:`NSGA2`, and:

    Raises:
        InputError: There is only one objective, or the population is smaller than the number of objectives.
    """

    def __init__(self, space: SearchSpace, objectives: Sequence[Objective], *args: Any, **settings: Any) -> None:
        super().__init__(space, objectives, *args, **settings)
        count = len(self.objectives)
        if count < 2 or self.population < count:
            raise InputError(
                f"NSGA-III got {count} objective(s) and a population of {self.population}; it needs two or more, and at "
                "least as many subnets. Take nsga2 or genetic for one objective."
            )
        parts = 1
        while comb(count + parts, parts + 1) <= self.population:
            parts += 1
        self._points = require("deap.tools").uniform_reference_points(count, parts)

    def _select(self, individuals: list[Individual], count: int) -> list[Individual]:
        if len(individuals) <= count:
            return individuals
        rng = np.random.default_rng([self.seed, self.generation, _NICHES])
        with lent_numpy_random(rng):
            chosen: list[Individual] = require("deap.tools").selNSGA3(individuals, count, self._points)
        return chosen


class RegularizedEvolution(Generational):
    """Regularized (aging) evolution: mutate the best of a few, forget the oldest (Real et al., AAAI 2019).

    The population is what was evaluated last. A child differs from its parent in one choice (and in what that switches
    on or off); one that is known or infeasible is replaced by another.

    Further arguments are those of :class:`~nasq.search.algorithms.generational.Generational`.

    Args:
        objectives: At least one; several are ordered by front and crowding within the population.
        population: Subnets that are remembered, and in the first generation.
        batch: Children between two looks at their values; ``None``: one, as published.
        assist: Chooses among more starts and children than are needed.
        sample: Competitors in a tournament, drawn with replacement.

    Raises:
        InputError: ``sample`` is below 1.
    """

    _POPULATION = 20

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        sample: int = 10,
        **common: Unpack[Common],
    ) -> None:
        if sample < 1:
            raise InputError(f"a tournament has {sample} competitors; it must have at least 1.")
        self.sample = sample
        super().__init__(space, objectives, constraints, **common)

    def _default_batch(self, population: int) -> int:
        return 1

    def _settings(self) -> dict[str, Any]:
        return {**super()._settings(), "sample": self.sample}

    def _next(self, rng: np.random.Generator) -> Rows:
        living = slice(-self.population, None)
        merit, rows = fitness(self._values[living]), self._rows[living]

        def children() -> Rows:
            drawn = rng.integers(0, len(rows), (self.brood, self.sample))
            parents = drawn[np.arange(len(drawn)), merit[drawn].argmax(axis=1)]
            changed: Rows = self.space.mutate(rows[parents], rng, 0.0)  # a rate of 0 still changes one choice
            return changed

        return self._propose(children, rng)
