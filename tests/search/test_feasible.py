from __future__ import annotations

import numpy as np
import pytest

from nasq.search.feasible import descend, keys, sample_feasible, spread, unseen
from nasq.search.objectives import violations

from .toy import Costs, joint_space, limit


def test_without_constraints_every_sample_is_accepted() -> None:
    space = joint_space()
    sampling = sample_feasible(space, [], 100, np.random.default_rng(0))
    assert len(sampling.rows) == 100
    assert (sampling.rate, sampling.repaired) == (1.0, 0)
    assert len(set(keys(sampling.rows))) == 100


def test_rejection_keeps_constraints_and_reports_its_rate() -> None:
    space = joint_space()
    costs = Costs(space)
    constraints = [limit(costs, "bytes", upper=900.0)]
    sampling = sample_feasible(space, constraints, 64, np.random.default_rng(0))
    assert len(sampling.rows) == 64
    assert (costs(sampling.rows)["bytes"] <= 900).all()
    share = (costs(space.sample_batch(20_000, np.random.default_rng(1)))["bytes"] <= 900).mean()
    assert sampling.rate == pytest.approx(share, abs=0.1)
    assert sampling.repaired == 0


def test_repair_finds_what_rejection_misses() -> None:
    space = joint_space(12)
    costs = Costs(space)
    constraints = [limit(costs, "bytes", upper=60.0), limit(costs, "bitops", upper=4e5)]
    assert (violations(constraints, space.sample_batch(20_000, np.random.default_rng(1))) > 0).all()
    sampling = sample_feasible(space, constraints, 24, np.random.default_rng(0))
    assert sampling.accepted == 0
    assert sampling.rate == 0.0
    assert sampling.repaired == len(sampling.rows) == 24
    assert (violations(constraints, sampling.rows) == 0).all()
    assert len(set(keys(sampling.rows))) == 24
    assert (space.canonical(sampling.rows) == sampling.rows).all()


def test_repair_satisfies_limits_from_both_sides() -> None:
    space = joint_space(8)
    costs = Costs(space)
    constraints = [limit(costs, "bytes", lower=6000.0), limit(costs, "bitops", upper=3.2e7)]
    rows = space.sample_batch(32, np.random.default_rng(3))
    assert (violations(constraints, rows) > 0).all()
    moved = descend(space, constraints, rows, np.random.default_rng(0))
    assert (violations(constraints, moved) == 0).mean() > 0.5


def test_descending_never_makes_a_row_worse_and_leaves_feasible_rows_alone() -> None:
    space = joint_space()
    costs = Costs(space)
    constraints = [limit(costs, "bytes", upper=600.0)]
    rows = space.sample_batch(100, np.random.default_rng(0))
    before = violations(constraints, rows)
    copy = rows.copy()
    moved = descend(space, constraints, rows, np.random.default_rng(1), rounds=3)
    assert (rows == copy).all()
    assert (violations(constraints, moved) <= before).all()
    assert (moved[before == 0] == rows[before == 0]).all()
    assert (moved[before > 0] != rows[before > 0]).any()


def test_impossible_constraints_cost_a_bounded_number_of_rows() -> None:
    space = joint_space(8)
    costs = Costs(space)
    sampling = sample_feasible(
        space, [limit(costs, "bytes", upper=1.0)], 16, np.random.default_rng(0), draws=1000, rounds=10
    )
    assert len(sampling.rows) == 0
    assert sampling.tried == 1000
    assert costs.rows <= 1000 + 34 * (10 * 12 + 2)


def test_seen_rows_are_not_returned_again() -> None:
    space = joint_space(2).restrict({"b0.width": [8], "b1.width": [8], "b0.op": ["pool"], "b1.op": ["pool"]})
    first = sample_feasible(space, [], 20, np.random.default_rng(0))
    seen = set(keys(first.rows))
    second = sample_feasible(space, [], 1000, np.random.default_rng(1), seen)
    assert seen.isdisjoint(keys(second.rows))
    assert len(first.rows) + len(second.rows) == space.size


def test_unseen_keeps_the_order_and_drops_repeats() -> None:
    rows = np.array([[3], [1], [3], [2], [1]], dtype=np.int16)
    assert unseen(rows, ()).ravel().tolist() == [3, 1, 2]
    assert unseen(rows, set(keys(rows[:1]))).ravel().tolist() == [1, 2]


def test_spread_reaches_sizes_that_uniform_samples_do_not() -> None:
    space = joint_space(12)
    costs = Costs(space)
    wide = costs(spread(space, 500, np.random.default_rng(0)))["bytes"]
    uniform = costs(space.sample_batch(500, np.random.default_rng(0)))["bytes"]
    assert wide.max() > uniform.max()
    assert wide.min() < uniform.min()
    rows = spread(space, 50, np.random.default_rng(0))
    assert (space.canonical(rows) == rows).all()
