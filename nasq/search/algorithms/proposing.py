"""Collecting proposals that are new and feasible, in a bounded number of rounds, and what is left where they run out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nasq.errors import InputError
from nasq.search.feasible import keys, sample_feasible, unseen
from nasq.search.objectives import Constraint, Rows, violations

if TYPE_CHECKING:
    from nasq.space import SearchSpace, Subnet

__all__ = ["collect", "fresh", "initial_rows", "remaining"]

# Rounds of making children before other sources are tried: in a small or tight space most children are known already.
_ROUNDS = 12
# Spaces of at most so many combinations of options are listed when sampling finds nothing new.
_LISTED = 2**16


def fresh(constraints: Sequence[Constraint], rows: Rows, seen: set[bytes]) -> Rows:
    """Those of canonical ``rows`` that are new and keep every constraint, each once."""
    rows = unseen(rows, seen)
    return rows[violations(constraints, rows) == 0.0] if len(rows) else rows


def collect(
    constraints: Sequence[Constraint],
    make: Callable[[], Rows],
    count: int,
    seen: set[bytes],
    rounds: int = _ROUNDS,
) -> list[Rows]:
    """Up to ``count`` new, feasible rows of what ``make`` gives, in at most ``rounds`` calls; ``seen`` grows by them."""
    found: list[Rows] = []
    have = 0
    for _ in range(rounds):
        if have >= count:
            break
        rows = fresh(constraints, make(), seen)[: count - have]
        seen.update(keys(rows))
        found.append(rows)
        have += len(rows)
    return found


def remaining(
    space: SearchSpace, constraints: Sequence[Constraint], count: int, rng: np.random.Generator, seen: set[bytes]
) -> Rows:
    """Up to ``count`` random feasible rows outside ``seen``.

    They are sampled (see :func:`~nasq.search.feasible.sample_feasible`). Where that finds too few in a small space, its
    members are listed, so that nothing is left over; a large space with few feasible subnets may keep some unseen.
    """
    rows = sample_feasible(space, constraints, count, rng, seen).rows
    if len(rows) == count or np.prod(space.sizes.astype(float)) > _LISTED:
        return rows
    listed = np.indices(tuple(space.sizes)).reshape(len(space), -1).T.astype(np.int16)
    settled, member = space.settle(listed)
    more = fresh(constraints, settled[member], seen | set(keys(rows)))
    return np.concatenate([rows, more[rng.permutation(len(more))[: count - len(rows)]]])


def initial_rows(space: SearchSpace, constraints: Sequence[Constraint], subnets: Sequence[Subnet]) -> Rows:
    """The canonical rows of what a search is to begin with, each once.

    Raises:
        InputError: One breaks a constraint; says which, and by what value.
    """
    rows = unseen(space.canonical(space.to_rows(list(subnets))), ())
    if not len(rows):
        return rows
    for constraint in constraints:
        broken = np.flatnonzero(constraint.violation(rows))
        if len(broken):
            value = constraint.measure(rows)[broken[0]]
            raise InputError(
                f"the initial subnet {space.to_subnets(rows[broken[:1]])[0].id} breaks {constraint}: it has {value:.6g}. "
                "Leave it out."
            )
    return rows
