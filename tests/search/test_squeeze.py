from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from nasq.search import Constraint, squeeze, squeezed_rows, uniform_bits, uniform_starts
from nasq.space import Choice, SearchSpace


def _space() -> SearchSpace:
    return SearchSpace(
        [
            Choice("width", (8, 16, 32, 64, 128)),
            Choice("kernel", (3, 5)),
            Choice("op", ("conv", "skip")),
            Choice("conv.weight_bits", (2, 4, 8)),
            Choice("conv.activation_bits", (4, 8)),
            Choice("skip.activation_bits", (4, 6, 8)),
        ],
        {
            "conv.weight_bits": [(("op", frozenset({"conv"})),)],
            "conv.activation_bits": [(("op", frozenset({"conv"})),)],
        },
    )


def _cost(rows: np.ndarray) -> np.ndarray:
    """width * kernel * bits, by the options' own numbers."""
    space = _space()
    subnets = space.to_subnets(rows)
    return np.array([s["width"] * s["kernel"] * s.get("conv.weight_bits", 8) for s in subnets], dtype=np.float64)


def _limit(upper: float) -> list[Constraint]:
    return [Constraint("cost", "", _cost, None, upper)]


def test_sizes_shrink_together_from_the_largest_to_the_smallest() -> None:
    space = _space()
    fixed = uniform_bits(space, 4, 8)
    rows = squeezed_rows(space, fixed)
    sizes = [(s["width"], s["kernel"]) for s in space.to_subnets(rows)]
    assert sizes[0] == (128, 5) and sizes[-1] == (8, 3)
    assert len(set(sizes)) == len(sizes) == 6  # four steps of the width and one of the kernel
    assert all(a[0] >= b[0] and a[1] >= b[1] for a, b in pairwise(sizes))
    halfway = sizes.index(next(size for size in sizes if size[1] == 3))
    assert 0 < halfway < 5  # the kernel goes neither first nor last
    for subnet in space.to_subnets(rows):
        assert all(subnet[name] == option for name, option in fixed.items())
    assert (np.diff(_cost(rows)) < 0).all()


def test_uniform_bits_leave_out_choices_that_lack_them() -> None:
    assert uniform_bits(_space(), 2, 6) == {"conv.weight_bits": 2, "skip.activation_bits": 6}


def test_the_first_that_fits_is_taken() -> None:
    space = _space()
    fixed = uniform_bits(space, 4, 8)
    rows = squeezed_rows(space, fixed)
    for limit in (1e9, 700, 200, 96):
        found = squeeze(space, fixed, _limit(limit))
        assert found is not None
        fitting = [float(cost) for cost in _cost(rows) if cost <= limit]
        assert _cost(space.to_rows([found]))[0] == max(fitting)
    assert squeeze(space, fixed, _limit(95)) is None


def test_starts_are_feasible_distinct_and_uniform() -> None:
    space = _space()
    constraints = _limit(500)
    starts = uniform_starts(space, constraints)
    assert len({start.id for start in starts}) == len(starts) > 3
    assert (_cost(space.to_rows(starts)) <= 500).all()
    assert {start["conv.weight_bits"] for start in starts} == {2, 4, 8}
    assert uniform_starts(space, _limit(1)) == []


def test_a_space_without_bits_starts_from_its_largest_feasible_subnet() -> None:
    space = SearchSpace([Choice("width", (1, 2, 3))])
    limit = [Constraint("width", "", lambda rows: rows[:, 0] + 1.0, None, 2.0)]
    (only,) = uniform_starts(space, limit)
    assert only["width"] == pytest.approx(2)
