"""Assistance: a cheap score of subnets, such as a zero-cost proxy, that chooses among an algorithm's own proposals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from nasq.errors import InputError
from nasq.search.objectives import Measure, Rows, Values

__all__ = ["Assist"]


@dataclass(frozen=True)
class Assist:
    """Makes an algorithm propose several times as many subnets as it needs, and evaluates those of the best score.

    Source: the GradSign-assisted searches of Zhang and Jia (ICLR 2022), there for random search, regularized evolution,
    REINFORCE and BOHB: the score filters what a random search draws, warms up a population, and ranks offspring. Any
    score will do, and the one to compare with is the number of parameters.

    Attributes:
        name: Of the score, for states and messages: a search goes on only with the same.
        score: Canonical rows ``[n, choices]`` to values ``[n]``, larger is better.
        starts: Proposals for each subnet of the first generation.
        offspring: Proposals for each subnet of the later ones; 1 leaves them as they are.
    """

    name: str
    score: Callable[[Rows], Values]
    starts: int = 10
    offspring: int = 4

    def __post_init__(self) -> None:
        if self.starts < 1 or self.offspring < 1:
            raise InputError(
                f"assistance by {self.name!r} got {self.starts} proposals per start and {self.offspring} per child; both "
                "must be at least 1."
            )

    def best(self, rows: Rows, count: int) -> Rows:
        """The ``count`` rows of the largest score, best first; the first of equal ones.

        Raises:
            NasqError: The score gave another shape, or a value that is not finite.
        """
        if len(rows) <= count:
            return rows
        values = Measure(self.name, "", self.score)(rows)
        return rows[np.argsort(-values, kind="stable")[:count]]
