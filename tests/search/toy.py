"""A small joint space (architecture and bits, with conditions), its costs, and a smooth made-up accuracy."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from nasq.search import Constraint, Measure, Objective, measures
from nasq.space import Choice, SearchSpace, Subnet

UNITS = {"bytes": "B", "bitops": ""}


def joint_space(blocks: int = 4, name: str = "toy") -> SearchSpace:
    """``blocks`` blocks, the later half optional by depth; widths, kernels, an operator and bits in each."""
    first = blocks // 2
    choices = [Choice("depth", tuple(range(first, blocks + 1)))]
    conditions = {}
    for block in range(blocks):
        own = [
            Choice(f"b{block}.op", ("conv", "pool"), ordered=False),
            Choice(f"b{block}.width", (8, 16, 24, 32)),
            Choice(f"b{block}.weight_bits", tuple(range(2, 9))),
            Choice(f"b{block}.activation_bits", tuple(range(2, 9))),
        ]
        use = () if block < first else (("depth", frozenset(range(block + 1, blocks + 1))),)
        for choice in own:
            inside = (*use, (f"b{block}.op", frozenset(["conv"]))) if choice.name.endswith("weight_bits") else use
            if inside:
                conditions[choice.name] = (inside,)
        choices += own
    return SearchSpace(choices, conditions, name=name)


def table(space: SearchSpace, rows: NDArray[np.int16], part: str) -> NDArray[np.float64]:
    """Option values [n, blocks] of one part of every block, 0 where it is inactive."""
    columns = [index for index, name in enumerate(space.names) if name.endswith(f".{part}")]
    active = space.active(rows)[:, columns]
    values = [np.array(space.choices[c].options, dtype=float)[rows[:, c]] for c in columns]
    return np.where(active, np.stack(values, axis=1), 0.0)


class Costs:
    """Counts its calls and rows, so that tests can say how much work was done."""

    def __init__(self, space: SearchSpace) -> None:
        self.space = space
        self.calls = 0
        self.rows = 0

    def __call__(self, rows: NDArray[np.int16]) -> dict[str, NDArray[np.float64]]:
        self.calls += 1
        self.rows += len(rows)
        width, weight, activation = (
            table(self.space, rows, part) for part in ("width", "weight_bits", "activation_bits")
        )
        return {
            "bytes": (width**2 * weight / 8 + width).sum(axis=1),
            "bitops": (64 * width**2 * weight * activation + 64 * width).sum(axis=1),
        }

    def measures(self) -> dict[str, Measure]:
        return measures(self, UNITS)


def accuracy(subnet: Subnet) -> float:
    """In per cent; more of everything helps, with diminishing returns and a term that couples neighbours."""
    total, before = 0.0, 0.0
    for block in range(int(subnet["depth"])):
        width = int(subnet[f"b{block}.width"])
        bits = int(subnet.get(f"b{block}.weight_bits", 2))
        capacity = (
            math.log(width)
            * (1 - math.exp(-0.6 * bits))
            * (1 - math.exp(-0.5 * int(subnet[f"b{block}.activation_bits"])))
        )
        total += capacity + 0.3 * math.sqrt(max(0.0, before * capacity))
        before = capacity
    return 100.0 * (1 - math.exp(-0.06 * total))


ACCURACY = Objective("accuracy", "%", "maximize", accuracy)


def objective(costs: Costs, name: str = "bitops") -> Objective:
    return Objective(name, UNITS[name], "minimize", costs.measures()[name].function, on="rows")


def limit(costs: Costs, name: str, upper: float | None = None, lower: float | None = None) -> Constraint:
    return Constraint(name, UNITS[name], costs.measures()[name].function, lower, upper)
