"""Searching a space with rules: nothing that they refuse is ever proposed."""

from __future__ import annotations

from typing import Any

import numpy as np

from nasq.search import Constraint
from nasq.search.feasible import descend, sample_feasible, spread
from nasq.space import Choice, SearchSpace, SpaceRules


class Increasing(SpaceRules):
    """Widths must not fall, and the first is not the last."""

    def __init__(self, count: int = 4) -> None:
        self.choices = tuple(Choice(f"width{index}", (1, 2, 3, 4)) for index in range(count))
        self.name, self.size = f"increasing({count})", 35 - 4

    def valid(self, rows: Any) -> Any:
        return (np.diff(rows, axis=1) >= 0).all(axis=1) & (rows[:, 0] < rows[:, -1])


SPACE = SearchSpace([*Increasing().choices, Choice("kernel", (3, 5))], rules=Increasing())


def total(rows: Any) -> Any:
    return rows[:, :4].sum(axis=1).astype(np.float64) + 4


def members(rows: Any) -> bool:
    return all(SPACE.contains(subnet) for subnet in SPACE.to_subnets(rows)) if len(rows) else False


def test_the_rules_count_as_they_should() -> None:
    rows = np.stack(np.meshgrid(*[np.arange(4)] * 4, indexing="ij"), -1).reshape(-1, 4)
    assert int(Increasing().valid(rows).sum()) == Increasing().size and SPACE.size == 62


def test_starts_and_repairs_stay_inside() -> None:
    rng = np.random.default_rng(0)
    rows = spread(SPACE, 200, rng)
    assert members(rows) and len(np.unique(rows, axis=0)) > 20
    tight = Constraint("total", "", total, upper=6)
    lowered = descend(SPACE, [tight], rows, rng)
    assert members(lowered) and (total(lowered) <= 6).mean() > 0.5
    found = sample_feasible(SPACE, [tight], 5, rng).rows
    assert members(found) and (total(found) <= 6).all() and len(found) == 5
