"""Non-dominated fronts, hypervolume and knee point, on arrays of objective values."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from nasq.errors import InputError, choose_from
from nasq.search.objectives import Direction, Values

__all__ = ["front", "hypervolume", "knee"]

_SIGNS = {"minimize": 1.0, "maximize": -1.0}


def _minimized(values: ArrayLike, directions: Sequence[Direction]) -> Values:
    """``values`` ``[n, m]`` in a form where smaller is better."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 2 or array.shape[1] != len(directions):
        raise InputError(f"values of shape {array.shape} do not fit {len(directions)} directions: [n, objectives].")
    for direction in directions:
        if direction not in _SIGNS:
            raise choose_from("direction", direction, _SIGNS)
    if np.isnan(array).any():
        raise InputError(f"objective values hold NaN, first in row {int(np.argwhere(np.isnan(array))[0][0])}.")
    signed: Values = array * np.array([_SIGNS[direction] for direction in directions])
    return signed


def _efficient(points: Values) -> NDArray[np.bool_]:
    """Which points ``[n, m]`` no other one dominates (smaller is better); equal points stay together.

    In lexicographic order a point can only be dominated by one before it, so each kept point removes what lies behind.
    """
    order = np.lexsort(points.T[::-1])
    ordered = points[order]
    alive = np.ones(len(points), dtype=bool)
    for index in range(len(ordered)):
        if alive[index]:
            behind = ordered[index + 1 :]
            worse = (behind >= ordered[index]).all(axis=1) & (behind > ordered[index]).any(axis=1)
            alive[index + 1 :] &= ~worse
    mask = np.empty(len(points), dtype=bool)
    mask[order] = alive
    return mask


def front(values: ArrayLike, directions: Sequence[Direction]) -> NDArray[np.bool_]:
    """Which of the points is not dominated by any other.

    Args:
        values: ``[n, m]`` objective values.
        directions: ``"maximize"`` or ``"minimize"`` for each of the ``m`` objectives.

    Returns:
        A mask ``[n]``. Points with equal values dominate neither each other nor themselves: all of them stay.
    """
    return _efficient(_minimized(values, directions))


def _sweep(points: Values, reference: Values) -> float:
    """Exact area dominated by mutually non-dominated points in two dimensions."""
    points = points[np.lexsort((points[:, 1], points[:, 0]))]
    heights = np.concatenate(([reference[1]], np.minimum.accumulate(points[:, 1])))
    return float(np.sum((reference[0] - points[:, 0]) * (heights[:-1] - heights[1:])))


def _slices(points: Values, reference: Values) -> float:
    """Volume by slicing along the last objective: between two of its levels the cross-section is constant."""
    if points.shape[1] == 1:
        return float(reference[0] - points.min())
    if points.shape[1] == 2:
        return _sweep(points, reference)
    points = points[np.argsort(points[:, -1], kind="stable")]
    levels = np.append(points[:, -1], reference[-1])
    total = 0.0
    section = points[:0, :-1]
    for index, depth in enumerate(np.diff(levels)):
        section = np.vstack([section, points[index, :-1]])
        section = section[_efficient(section)]
        if depth > 0:
            total += float(depth) * _slices(section, reference[:-1])
    return total


def hypervolume(values: ArrayLike, reference: ArrayLike, directions: Sequence[Direction]) -> float:
    """The volume that the points dominate, bounded by a reference point; exact in every dimension.

    Two objectives are swept; more are sliced objective by objective (hypervolume by slicing objectives, While et al.,
    "A faster algorithm for calculating hypervolume", IEEE TEVC 10(1), 2006), which is meant for up to four.

    Args:
        values: ``[n, m]`` objective values.
        reference: ``[m]``, the worst corner; points that are not better in every objective add nothing.
        directions: One for each objective.
    """
    points = _minimized(values, directions)
    corner = _minimized(np.asarray(reference, dtype=np.float64)[None], directions)[0]
    points = points[(points < corner).all(axis=1)]
    if not len(points):
        return 0.0
    return _slices(np.unique(points[_efficient(points)], axis=0), corner)


def knee(values: ArrayLike, directions: Sequence[Direction]) -> int:
    """The index of the front's knee: where giving a little of one objective buys no more much of another.

    It is the non-dominated point farthest from the line (plane) through the front's extremes, towards the ideal point,
    after every objective is scaled to 0..1 over the front (Das, "On characterizing the knee of the Pareto curve",
    Structural Optimization 18, 1999). The first of equal points is taken; one objective gives its best point.
    """
    points = _minimized(values, directions)
    if not len(points):
        raise InputError("there is no knee of an empty front.")
    best = np.flatnonzero(_efficient(points))
    low, high = points[best].min(axis=0), points[best].max(axis=0)
    scaled = (points[best] - low) / np.where(high > low, high - low, 1.0)
    return int(best[np.argmin(scaled.sum(axis=1))])
