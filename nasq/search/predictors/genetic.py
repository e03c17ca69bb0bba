"""The genetic search of EQ-Net: with a predictor for the score, thousands of subnets cost seconds.

Source: EQ-Net's released code. There a candidate is valid if its average bits lie in a window; here hard constraints on
any measure. The released mutation probability is 0.1, because the intended 0.3 is passed under a wrong name; 0.3 here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.search.explain import explain, infeasible
from nasq.search.feasible import keys, sample_feasible, unseen
from nasq.search.objectives import Constraint, Rows, feasible

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["predictor_search"]

_TRIES = 20
"""Rounds in which children that break a constraint are drawn anew."""


def predictor_search(
    space: SearchSpace,
    score: Callable[[Rows], NDArray[np.float64]],
    constraints: Sequence[Constraint],
    rng: np.random.Generator,
    population: int = 100,
    generations: int = 500,
    mutation: float = 0.3,
    initial: Rows | None = None,
) -> tuple[Rows, NDArray[np.float64]]:
    """The last population, best first: distinct canonical rows ``[m, choices]`` and their scores ``[m]``.

    Each generation keeps the best quarter and adds as many mutants and crossovers of it as half a population each. The
    best score never falls, and every member keeps every constraint.

    Args:
        space: Where to search.
        score: Rows to values ``[n]``, larger is better: a :class:`~nasq.search.predictors.CQAP`.
        constraints: All must hold for every member.
        rng: The only source of randomness.
        population: Members of a generation.
        generations: How many.
        mutation: Probability of redrawing each choice of a mutant.
        initial: Rows to begin with, such as those of a transition sampler; what breaks a constraint is left out.

    Raises:
        InputError: ``population`` is below 4, or ``generations`` is negative.
        InfeasibleError: No subnet keeps the constraints; the message says what each of them leaves.
    """
    if population < 4 or generations < 0:
        raise InputError(
            f"the search got a population of {population} and {generations} generations; it needs 4 and 0 or more."
        )
    drawn = np.zeros((0, len(space)), np.int16) if initial is None else unseen(space.canonical(initial), ())
    rows = drawn[feasible(constraints, drawn)] if len(drawn) else drawn
    if len(rows) < population:
        missing = population - len(rows)
        rows = np.concatenate([rows, sample_feasible(space, constraints, missing, rng, seen=set(keys(rows))).rows])
    if not len(rows):
        raise infeasible(explain(space, constraints, rng))
    rows, scores = _best(rows, score, population)
    for _ in range(generations):
        parents = rows[: max(population // 4, 1)]

        def picked(count: int, parents: Rows = parents) -> Rows:
            return parents[rng.integers(len(parents), size=count)]

        def mutants(count: int) -> Rows:
            return space.mutate(picked(count), rng, mutation)

        def crossed(count: int) -> Rows:
            return space.crossover(picked(count), picked(count), rng)

        children = [_children(make, constraints, population // 2) for make in (mutants, crossed)]
        rows, scores = _best(np.concatenate([parents, *children]), score, population)
    return rows, scores


def _children(make: Callable[[int], Rows], constraints: Sequence[Constraint], count: int) -> Rows:
    """Up to ``count`` children that keep the constraints, in a bounded number of rounds."""
    made = make(count)
    kept = [made[feasible(constraints, made)]]
    for _ in range(_TRIES):
        have = sum(map(len, kept))
        if have >= count:
            break
        made = make(count)
        kept.append(made[feasible(constraints, made)])
    return np.concatenate(kept)[:count]


def _best(rows: Rows, score: Callable[[Rows], NDArray[np.float64]], count: int) -> tuple[Rows, NDArray[np.float64]]:
    """The ``count`` best distinct rows, best first."""
    distinct = unseen(rows, ())
    scores = np.asarray(score(distinct), dtype=np.float64)
    order = np.argsort(-scores, kind="stable")[:count]
    return distinct[order], scores[order]
