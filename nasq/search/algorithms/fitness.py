"""One number per evaluated subnet, for algorithms that compare: the objective itself, or the place among the fronts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from nasq.search.objectives import Values
from nasq.search.pareto import front

__all__ = ["crowding", "fitness", "front_numbers"]


def fitness(values: Sequence[Sequence[float]] | Values) -> Values:
    """Fitness ``[n]`` of values ``[n, objectives]`` that are turned so that larger is better.

    One objective is its own fitness. Several are ordered as NSGA-II does (Deb et al., IEEE TEVC 6(2), 2002): first by
    the number of the front, from 0 down, then by the crowding distance, squeezed into 0..1/2. It says who is better
    within ``values`` only.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.shape[1] == 1 or not len(array):
        return array[:, 0]
    numbers = front_numbers(array)
    result = -numbers.astype(np.float64)
    for number in range(int(numbers.max()) + 1):
        members = np.flatnonzero(numbers == number)
        distance = crowding(array[members])
        # d / (1 + d) keeps the order of distances and sends an infinite one to 1.
        result[members] += 0.5 * (1.0 - 1.0 / (1.0 + distance))
    return result


def front_numbers(values: Values) -> NDArray[np.int64]:
    """The front ``[n]`` that each point belongs to, best first; equal points share one."""
    numbers = np.full(len(values), -1, dtype=np.int64)
    left = np.arange(len(values))
    number = 0
    while len(left):
        best = front(values[left], ["maximize"] * values.shape[1])
        numbers[left[best]] = number
        left = left[~best]
        number += 1
    return numbers


def crowding(values: Values) -> Values:
    """The crowding distance ``[n]`` of the points of one front; infinite at its ends (Deb et al., section III-B)."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance
