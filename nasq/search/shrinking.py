"""LLM-QFA's search: which layers need their bits, then only among subnets that give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from nasq.errors import InfeasibleError, InputError, NasqError
from nasq.space import SearchSpace, Subnet
from nasq.training.balanced import Balanced

__all__ = ["Shrunk", "sensitivities", "shrinking_search"]

_POOL = 4096
"""Rows drawn for a stage, of which it takes as many as it may evaluate."""

Rows = NDArray[np.int16]


@dataclass(frozen=True)
class Shrunk:
    """What a search found.

    Attributes:
        subnet: The best one that is feasible.
        score: Its score.
        sensitivity: Correlation of the score with each choice's option in the first stage, by name.
        space: What was left of the space for the second stage.
        evaluated: Every subnet with its score, in order.
    """

    subnet: Subnet
    score: float
    sensitivity: Mapping[str, float]
    space: SearchSpace
    evaluated: Sequence[tuple[Subnet, float]]


def sensitivities(space: SearchSpace, names: Sequence[str], rows: Rows, scores: Sequence[float]) -> dict[str, float]:
    """Pearson's correlation between the scores ``[n]`` of ``rows`` and each choice's option; 0 where either is constant."""
    values = np.asarray(scores, dtype=np.float64)
    centred = values - values.mean()
    found = {}
    for name in names:
        option = space[name].array[rows[:, space.positions[name]]].astype(np.float64)
        option = option - option.mean()
        norm = float(np.sqrt((option**2).sum() * (centred**2).sum()))
        found[name] = float((option * centred).sum()) / norm if norm > 0 else 0.0
    return found


def shrinking_search(
    space: SearchSpace,
    score: Callable[[Subnet], float],
    feasible: Callable[[Rows], NDArray[np.bool_]],
    generator: torch.Generator,
    *,
    names: Sequence[str] | None = None,
    first: int = 100,
    second: int = 50,
    share: float = 0.5,
) -> Shrunk:
    """Searches a mixed-precision space in two stages (LLM-QFA, section 3.4).

    The first evaluates random subnets, feasible or not, and correlates their scores with each layer's bits. Then the
    ``share`` most sensitive layers lose their fewest bits, and random feasible subnets of what is left are evaluated; they
    are spread over all averages, or a low budget would hardly be met. The best feasible one of both stages wins. How much
    the space shrinks is our reading: the paper does not say.

    Args:
        space: Of the subnets.
        score: Larger is better.
        feasible: Which of canonical rows ``[n, choices]`` keep the budget, ``[n]``.
        generator: Draws the subnets.
        names: The layers' bits; ``None``: all choices whose names end in ``weight_bits``.
        first, second: Subnets evaluated in each stage.
        share: From 0 to 1.

    Raises:
        InfeasibleError: No subnet that was drawn is feasible.
        InputError: ``share`` is not in its range, or the first stage has fewer than two subnets.
        NasqError: A score is not finite; names the subnet.
    """
    if not 0 <= share <= 1 or first < 2:
        raise InputError(f"share is {share} and first is {first}; allowed: a share from 0 to 1, and 2 or more subnets")
    bits = Balanced(space, generator, names).names
    rows = space.sample_batch(first, generator)
    scores = [_scored(score, subnet) for subnet in space.to_subnets(rows)]
    sensitivity = sensitivities(space, bits, rows, scores)
    left = _shrunk(space, sensitivity, share)
    inside, added = _second(space, left, bits, feasible, generator, second, score)
    every, values = np.concatenate([rows, inside]), np.array([*scores, *added])
    allowed = np.asarray(feasible(every), dtype=bool)
    if not allowed.any():
        raise InfeasibleError(
            f"none of {len(every)} subnets evaluated keeps the budget, and none of {_POOL} drawn around all averages does. "
            "Loosen it."
        )
    subnets = space.to_subnets(every)
    best = int(np.argmax(np.where(allowed, values, -np.inf)))
    evaluated = list(zip(subnets, values.tolist(), strict=True))
    return Shrunk(subnets[best], float(values[best]), sensitivity, left, evaluated)


def _scored(score: Callable[[Subnet], float], subnet: Subnet) -> float:
    value = float(score(subnet))
    if not np.isfinite(value):
        raise NasqError(f"the score of {subnet.to_json()[:200]} is {value}; it must be finite.")
    return value


def _shrunk(space: SearchSpace, sensitivity: Mapping[str, float], share: float) -> SearchSpace:
    """Without the fewest bits of the most sensitive layers."""
    ranked = sorted(sensitivity, key=lambda name: -sensitivity[name])
    kept = {name: sorted(space[name].array.tolist())[1:] for name in ranked[: round(share * len(ranked))]}
    return space.restrict({name: options for name, options in kept.items() if options})


def _second(
    space: SearchSpace,
    left: SearchSpace,
    names: Sequence[str],
    feasible: Callable[[Rows], NDArray[np.bool_]],
    generator: torch.Generator,
    count: int,
    score: Callable[[Subnet], float],
) -> tuple[Rows, list[float]]:
    """Feasible subnets of what is left, of the whole space where nothing of it is; and their scores."""
    for where in (left, space):
        drawn = Balanced(where, generator, names).spread(_POOL)
        pool = np.unique(space.to_rows(where.to_subnets(drawn)), axis=0)
        pool = pool[np.asarray(feasible(pool), dtype=bool)]
        if len(pool):
            break
    order = torch.randperm(len(pool), generator=generator)[:count].numpy()
    rows = pool[order]
    return rows, [_scored(score, subnet) for subnet in space.to_subnets(rows)]
