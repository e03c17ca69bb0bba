"""Bounded sampling under hard constraints: rejection first, then repair by moves that lower the violation.

Nothing here loops until it succeeds. Every step has a budget, and the result says what was tried and what came of it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from nasq.search.objectives import Constraint, Rows, Values, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace

__all__ = ["Sampling", "descend", "extremes", "keys", "sample_feasible", "spread", "unseen"]

_BATCH = 512
# Rounds without a better proposal after which a row is given up.
_PATIENCE = 6


@dataclass(frozen=True)
class Sampling:
    """What :func:`sample_feasible` found and what it cost.

    Attributes:
        rows: Distinct, canonical, feasible rows ``[m, choices]``; ``m`` may be less than what was asked for.
        tried: Uniform samples drawn.
        accepted: How many of them kept every constraint.
        repaired: How many of ``rows`` come from repair; these lie near the constraints and are not uniform.
    """

    rows: Rows
    tried: int
    accepted: int
    repaired: int

    @property
    def rate(self) -> float:
        """The share of uniform samples that are feasible."""
        return self.accepted / self.tried if self.tried else 0.0


def keys(rows: Rows) -> list[bytes]:
    """A hashable key of each canonical row; equal exactly where the subnets are equal."""
    return [row.tobytes() for row in np.ascontiguousarray(rows, dtype=np.int16)]


def unseen(rows: Rows, seen: Collection[bytes]) -> Rows:
    """The rows that are not in ``seen``, each once, in their order."""
    fresh: dict[bytes, int] = {}
    for index, key in enumerate(keys(rows)):
        if key not in seen:
            fresh.setdefault(key, index)
    return rows[list(fresh.values())]


def sample_feasible(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    count: int,
    rng: np.random.Generator,
    seen: Collection[bytes] = (),
    draws: int = 4096,
    rounds: int = 40,
) -> Sampling:
    """Up to ``count`` distinct feasible rows: uniform ones by rejection, the rest by repairing the nearest misses.

    Args:
        space: What to sample from.
        constraints: All must hold; none means every sample is accepted.
        count: How many rows to look for.
        rng: The only source of randomness.
        seen: Keys (see :func:`keys`) of rows not to return again.
        draws: Most uniform samples to draw.
        rounds: Most rounds of repair; see :func:`descend`.
    """
    taken = set(seen)
    found: list[Rows] = []
    misses = _Nearest(limit=2 * count)
    tried = accepted = have = 0
    while have < count and tried < draws:
        rows = space.sample_batch(min(max(_BATCH, count), draws - tried), rng)
        excess = violations(constraints, rows)
        good = unseen(rows[excess == 0.0], taken)[: count - have]
        taken.update(keys(good))
        found.append(good)
        misses.add(rows, excess)
        tried, accepted, have = tried + len(rows), accepted + int((excess == 0.0).sum()), have + len(good)
    repaired = _repair(space, constraints, misses, count - have, rng, taken, rounds) if have < count else None
    if repaired is not None:
        found.append(repaired)
    rows = np.concatenate(found) if found else space.sample_batch(0, rng)
    return Sampling(rows, tried, accepted, 0 if repaired is None else len(repaired))


def extremes(space: SearchSpace) -> Rows:
    """The smallest and the largest subnet ``[2, choices]``: constraints that hold anywhere often hold there."""
    return space.to_rows([space.smallest(), space.largest()])


class _Nearest:
    """Keeps the ``limit`` least violating of the rows it was given."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.rows: Rows | None = None
        self._excess: Values = np.zeros(0)

    def add(self, rows: Rows, excess: Values) -> None:
        rows, excess = rows[excess > 0], excess[excess > 0]
        if self.rows is not None:
            rows, excess = np.concatenate([self.rows, rows]), np.concatenate([self._excess, excess])
        order = np.argsort(excess, kind="stable")[: self._limit]
        self.rows, self._excess = rows[order], excess[order]


def _repair(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    misses: _Nearest,
    count: int,
    rng: np.random.Generator,
    taken: set[bytes],
    rounds: int,
) -> Rows | None:
    if misses.rows is None or not len(misses.rows):
        return None
    rows = descend(space, constraints, np.concatenate([extremes(space), misses.rows]), rng, rounds)
    return unseen(rows[violations(constraints, rows) == 0.0], taken)[:count]


def descend(
    space: SearchSpace,
    constraints: Sequence[Constraint],
    rows: Rows,
    rng: np.random.Generator,
    rounds: int = 40,
    proposals: int = 12,
) -> Rows:
    """Lowers the violation of each row greedily; rows that are feasible already are returned as they are.

    Each round proposes moves of 1, 2, 4, ... choices to the next smaller option (to a larger one where a lower limit
    is what is broken) and some mutations, and takes the best. Of several feasible proposals the smallest move wins, so
    that a repaired subnet stays as large as the constraints allow.

    Args:
        space: Where the rows come from.
        constraints: What to satisfy.
        rows: Canonical rows ``[n, choices]``; not changed.
        rng: The only source of randomness.
        rounds: Most rounds; it costs at most ``rounds * proposals`` evaluations of the constraints per row.
        proposals: Moves tried for each row and round.
    """
    rows = rows.copy()
    down, up = _broken(constraints, rows)
    stale = np.zeros(len(rows), dtype=np.int64)
    for _ in range(rounds):
        left = np.flatnonzero((down + up > 0) & (stale < _PATIENCE))
        if not len(left):
            break
        moved = _propose(space, rows[left], down[left] / (down + up)[left], rng, proposals)
        new_down, new_up = _broken(constraints, moved)
        total = (new_down + new_up).reshape(len(left), proposals)
        best = np.argmin(total, axis=1)
        better = total[np.arange(len(left)), best] < (down + up)[left]
        chosen = (np.arange(len(left)) * proposals + best)[better]
        stale[left] = np.where(better, 0, stale[left] + 1)
        rows[left[better]] = moved[chosen]
        down[left[better]], up[left[better]] = new_down[chosen], new_up[chosen]
    return rows


def _broken(constraints: Sequence[Constraint], rows: Rows) -> tuple[Values, Values]:
    """Summed relative violation ``[n]`` of the upper and of the lower limits."""
    down, up = np.zeros(len(rows)), np.zeros(len(rows))
    for constraint in constraints:
        values = constraint.measure(rows)
        excess = constraint.bound.violation(values)
        over = np.zeros(len(rows), bool) if constraint.upper is None else values > constraint.upper
        down += np.where(over, excess, 0.0)
        up += np.where(over, 0.0, excess)
    return down, up


def _propose(space: SearchSpace, rows: Rows, downward: Values, rng: np.random.Generator, proposals: int) -> Rows:
    """Canonical moves ``[n * proposals, choices]`` away from ``rows`` ``[n, choices]``, small moves first."""
    n, width = rows.shape
    counts = space.sizes
    moved = np.repeat(rows, proposals, axis=0).astype(np.int64)
    sizes = _sizes(width, proposals)
    # A random order of the choices of each proposal; the first `size` of them move.
    order = rng.random(moved.shape).argsort(axis=1)
    touched = order < np.tile(sizes, n)[:, None]
    down = rng.random(moved.shape) < np.repeat(downward, proposals)[:, None]
    moved = np.where(touched, np.clip(moved + np.where(down, -1, 1), 0, counts - 1), moved)
    # Options without an order have no smaller neighbour: any other option will do.
    free = touched & ~np.array([choice.ordered for choice in space.choices], dtype=bool)
    moved = np.where(free, rng.integers(0, counts, moved.shape), moved)
    settled, member = space.settle(moved.astype(np.int16))
    # What the space's rules refuse stays where it was.
    return np.where(member[:, None], settled, np.repeat(rows, proposals, axis=0))


def _sizes(width: int, proposals: int) -> NDArray[np.int64]:
    """How many choices each proposal moves: powers of two up to all of them, ascending."""
    powers = 2 ** np.arange(int(np.log2(width)) + 1) if width > 1 else np.array([1])
    return np.sort(np.resize(powers, proposals))


def spread(space: SearchSpace, count: int, rng: np.random.Generator, noise: float = 0.3) -> Rows:
    """Canonical rows ``[count, choices]`` that range from the smallest subnets to the largest.

    Uniform samples of many choices all have nearly the same size (sums concentrate), so a search that starts from them
    sees neither cheap nor accurate subnets. Here each row has a level between 0 and 1, and each of its ordered choices
    takes an option about that far along its list; unordered choices stay uniform.

    Args:
        space: What to sample from.
        count: Number of rows; duplicates are possible.
        rng: The only source of randomness.
        noise: Standard deviation of an option's position around its row's level.
    """
    rows = space.sample_batch(count, rng)
    counts = space.sizes
    level = rng.random((count, 1)) + noise * rng.standard_normal(rows.shape)
    tilted = np.clip(np.floor(level * counts), 0, counts - 1).astype(np.int16)
    ordered = np.array([choice.ordered for choice in space.choices], dtype=bool)
    settled, member = space.settle(np.where(ordered, tilted, rows))
    return np.where(member[:, None], settled, rows)  # a row that the space's rules refuse stays as it was drawn
