"""Changing subnets, many at once: mutation, crossover and neighbours on rows of option indices."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.errors import InputError
from nasq.space.rejection import redraw

if TYPE_CHECKING:
    from nasq.space.space import SearchSpace

__all__ = ["crossover_rows", "mutate_rows", "neighbour_rows"]

Rows = NDArray[np.int16]


def mutate_rows(space: SearchSpace, rows: Rows, rng: np.random.Generator, rate: float) -> Rows:
    """Redraws active choices among their other options; see :meth:`SearchSpace.mutate`."""
    if not 0.0 <= rate <= 1.0:
        raise InputError(f"the mutation rate is {rate}. Give a probability from 0 to 1.")
    if space.rules is None:
        return space.canonical(_mutated(space, rows, rng, rate))
    return redraw(space.settle, lambda which: _mutated(space, rows[which], rng, rate), rows, differ=True)


def _mutated(space: SearchSpace, rows: Rows, rng: np.random.Generator, rate: float) -> Rows:
    sizes = space.sizes
    active = space.active(rows)
    movable = active & (sizes > 1)
    changed = movable & (rng.random(rows.shape) < rate)
    # Where chance changes nothing, the movable choice with the largest draw is changed: each with equal probability.
    draws = np.where(movable, rng.random(rows.shape), -1.0)
    idle = np.flatnonzero(movable.any(axis=1) & ~changed.any(axis=1))
    if len(idle):
        changed[idle, draws[idle].argmax(axis=1)] = True
    steps = rng.integers(1, np.maximum(sizes, 2), size=rows.shape)
    fresh = rng.integers(0, sizes, size=rows.shape)  # what a choice has that was inactive and becomes active
    moved = np.where(changed, (rows + steps) % sizes, np.where(active, rows, fresh))
    return moved.astype(np.int16)


def crossover_rows(space: SearchSpace, first: Rows, second: Rows, rng: np.random.Generator) -> Rows:
    """Takes every option from one of two parents; see :meth:`SearchSpace.crossover`."""
    if first.shape != second.shape:
        raise InputError(
            f"crossover was given {len(first)} and {len(second)} subnets. Give two lists of equal length: pairs."
        )
    if space.rules is None:
        return space.canonical(_crossed(space, first, second, rng))
    return redraw(space.settle, lambda which: _crossed(space, first[which], second[which], rng), first, differ=False)


def _crossed(space: SearchSpace, first: Rows, second: Rows, rng: np.random.Generator) -> Rows:
    active_first, active_second = space.active(first), space.active(second)
    coin = rng.random(first.shape) < 0.5
    take_first = np.where(active_first == active_second, coin, active_first)
    return np.asarray(np.where(take_first, first, second))


def neighbour_rows(space: SearchSpace, row: Rows) -> Rows:
    """Canonical rows ``[m, choices]`` that differ from the canonical ``row`` ``[choices]`` in one active choice."""
    movable = np.flatnonzero(space.active(row[None])[0])
    moves = [(index, option) for index in movable for option in range(space.sizes[index]) if option != row[index]]
    rows = np.repeat(row[None], len(moves), axis=0)
    for number, (index, option) in enumerate(moves):
        rows[number, index] = option
    canonical, member = space.settle(rows)
    # A move may lead outside, or back to the row itself by another name.
    found: Rows = canonical[member & (canonical != row).any(axis=1)]
    _, firsts = np.unique(found, axis=0, return_index=True) if found.size else (None, np.arange(len(found)))
    ordered: Rows = found[np.sort(firsts)]
    return ordered
