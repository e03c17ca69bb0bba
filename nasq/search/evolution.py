"""NSGA-II on canonical rows under hard constraints, and random search with the same interface as its baseline.

Selection is DEAP's ``selNSGA2``. Crossover and mutation are the space's own, because they keep conditional choices
canonical and work on whole batches. The parents' tournament is written here: DEAP's ``selTournamentDCD`` and its
crossovers draw from Python's global random state, which a search that must resume exactly cannot use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError, require
from nasq.search.algorithm import Generational
from nasq.search.feasible import keys, sample_feasible, spread
from nasq.search.objectives import Constraint, Measure, Objective, Rows

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["NSGA2", "RandomSearch"]

# Rounds of making children before other sources are tried: in a small or tight space most children are known already.
_ROUNDS = 12
# Share of generation 0 that ranges over sizes. On a made-up joint space of 49 choices (bits, widths; 150 evaluations) a
# quarter gave more hypervolume than none or a half, and as good a best subnet under a limit as none.
_WIDE = 0.25
# Rows drawn for a generation 0 that ranges over sizes; only rows, so it costs milliseconds.
_DRAWS = 2048


class RandomSearch(Generational):
    """Feasible subnets, as uniform as the constraints allow (see :func:`~nasq.search.feasible.sample_feasible`)."""

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        population: int = 32,
        seed: int = 0,
        initial: Sequence[Subnet] = (),
    ) -> None:
        super().__init__(space, objectives, constraints, population=population, seed=seed, initial=initial)

    def _begin(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        return sample_feasible(self.space, self.constraints, count, rng, seen).rows

    def _next(self, rng: np.random.Generator) -> Rows:
        return self._begin(self.population, rng, self._seen())

    def _absorb(self, first: int) -> None:
        """Random search learns nothing."""

    def _own_state(self) -> dict[str, Any]:
        return {}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        """Random search has no state of its own."""


class _Fitness:
    """What DEAP's selection reads; all values are turned so that larger is better."""

    def __init__(self, values: tuple[float, ...]) -> None:
        self.values = self.wvalues = values
        self.crowding_dist = 0.0

    def dominates(self, other: _Fitness) -> bool:
        """Nowhere worse and somewhere better."""
        return self.values != other.values and all(a >= b for a, b in zip(self.values, other.values, strict=True))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Fitness) and self.values == other.values

    def __hash__(self) -> int:
        return hash(self.values)


@dataclass(eq=False)
class _Individual:
    """An evaluated subnet: its place in the archive and its fitness."""

    index: int
    fitness: _Fitness


class NSGA2(Generational):
    """The elitist genetic algorithm for several objectives (Deb et al., IEEE TEVC 6(2), 2002); fine for one as well.

    Children are made from parents by uniform crossover and mutation, and kept only if they are feasible and new, so no
    subnet is evaluated twice. A quarter of the first generation ranges from the smallest to the largest feasible
    subnets (see :func:`~nasq.search.feasible.spread`), the rest is uniform.

    Args:
        space: What to search.
        objectives: At least one.
        constraints: What every proposal keeps.
        population: Subnets in a generation, and survivors.
        seed: A non-negative integer.
        initial: Subnets to evaluate first.
        crossover_rate: Share of children with two parents; the others are mutated copies.
        mutation_rate: Chance of each choice to change; ``None`` is three over the number of choices.

    Raises:
        InputError: A rate is outside 0..1.
    """

    def __init__(
        self,
        space: SearchSpace,
        objectives: Sequence[Objective],
        constraints: Sequence[Constraint] = (),
        *,
        population: int = 24,
        seed: int = 0,
        initial: Sequence[Subnet] = (),
        crossover_rate: float = 0.9,
        mutation_rate: float | None = None,
    ) -> None:
        for name, rate in (("crossover_rate", crossover_rate), ("mutation_rate", mutation_rate)):
            if rate is not None and not 0.0 <= rate <= 1.0:
                raise InputError(f"{name} is {rate}; it must lie between 0 and 1.")
        self.crossover_rate = crossover_rate
        self.mutation_rate = min(1.0, 3.0 / len(space)) if mutation_rate is None else mutation_rate
        super().__init__(space, objectives, constraints, population=population, seed=seed, initial=initial)

    def _settings(self) -> dict[str, Any]:
        return {
            **super()._settings(),
            "crossover_rate": self.crossover_rate,
            "mutation_rate": self.mutation_rate,
        }

    def _reset(self) -> None:
        super()._reset()
        self._parents: list[int] = []

    def _own_state(self) -> dict[str, Any]:
        return {"parents": list(self._parents)}

    def _load_own(self, state: Mapping[str, Any]) -> None:
        self._parents = [int(index) for index in state["parents"]]
        if not all(0 <= index < len(self._values) for index in self._parents):
            raise ValueError("a parent is not in the archive")

    def _begin(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        wide = self._wide(round(_WIDE * count), rng, seen)
        seen = seen | set(keys(wide))
        uniform = sample_feasible(self.space, self.constraints, count - len(wide), rng, seen).rows
        return np.concatenate([wide, uniform])

    def _wide(self, count: int, rng: np.random.Generator, seen: set[bytes]) -> Rows:
        """Up to ``count`` feasible rows, evenly spaced in the first cheap number that this search knows."""
        rows = self._fresh(spread(self.space, _DRAWS, rng), seen)
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
        self._parents = [individual.index for individual in self._select(pool)]

    def _select(self, pool: Sequence[int]) -> list[_Individual]:
        """The survivors of ``pool`` (indices into the archive), best fronts first, crowding distances set."""
        individuals = [_Individual(index, _Fitness(self._values[index])) for index in pool]
        chosen: list[_Individual] = require("deap.tools").selNSGA2(individuals, min(self.population, len(pool)))
        return chosen

    def _next(self, rng: np.random.Generator) -> Rows:
        seen = self._seen()
        parents = self._select(self._parents)
        found: list[Rows] = []
        have = 0
        for _ in range(_ROUNDS):
            rows = self._fresh(self._children(parents, rng), seen)[: self.population - have]
            found.append(rows)
            seen.update(keys(rows))
            have += len(rows)
            if have == self.population:
                break
        if have < self.population:
            found.append(self._other(self.population - have, parents, rng, seen))
        return np.concatenate(found)

    def _children(self, parents: Sequence[_Individual], rng: np.random.Generator) -> Rows:
        first, second = (self._rows[_tournament(parents, self.population, rng)] for _ in range(2))
        crossed = self.space.crossover(first, second, rng)
        both = rng.random(len(first)) < self.crossover_rate
        return self.space.mutate(np.where(both[:, None], crossed, first), rng, self.mutation_rate)

    def _other(self, count: int, parents: Sequence[_Individual], rng: np.random.Generator, seen: set[bytes]) -> Rows:
        """What fills a generation when children are all known: neighbours of the best, then random subnets."""
        best = self.space.to_subnets(self._rows[[parent.index for parent in parents[: max(4, count)]]])
        near = [neighbour for subnet in best for neighbour in self.space.neighbours(subnet)]
        rows = self._fresh(self.space.to_rows(near), seen) if near else self._rows[:0]
        rows = rows[rng.permutation(len(rows))[:count]]
        seen.update(keys(rows))
        more = sample_feasible(self.space, self.constraints, count - len(rows), rng, seen).rows
        return np.concatenate([rows, more])


def _tournament(parents: Sequence[_Individual], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """``count`` binary tournaments: the dominating parent wins, else the less crowded one, else either (Deb, III-B)."""
    pairs = rng.integers(0, len(parents), (count, 2))
    return np.array([_winner(parents[a], parents[b]).index for a, b in pairs], dtype=np.int64)


def _winner(a: _Individual, b: _Individual) -> _Individual:
    if b.fitness.dominates(a.fitness):
        return b
    if a.fitness.dominates(b.fitness):
        return a
    # A tie goes to the first: which of the two is first was random.
    return b if b.fitness.crowding_dist > a.fitness.crowding_dist else a
