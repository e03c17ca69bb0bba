from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from nasq.errors import InfeasibleError, InputError
from nasq.search import explain, infeasible, wilson
from nasq.space import Subnet

from .toy import Costs, joint_space, limit


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 4000), (4000, 4000)])
def test_wilson_equals_scipy(successes: int, trials: int) -> None:
    wanted = binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson(successes, trials) == pytest.approx((wanted.low, wanted.high), abs=1e-12)


def test_wilson_refuses_impossible_counts() -> None:
    for successes, trials in ((0, 0), (3, 2), (-1, 2)):
        with pytest.raises(InputError, match=f"got {successes} of {trials}"):
            wilson(successes, trials)


def test_shares_equal_counting_the_same_samples() -> None:
    space = joint_space()
    costs = Costs(space)
    constraints = [limit(costs, "bytes", upper=900.0), limit(costs, "bitops", upper=3e6)]
    explanation = explain(space, constraints, np.random.default_rng(5), samples=1000)
    values = costs(space.sample_batch(1000, np.random.default_rng(5)))
    kept = [values["bytes"] <= 900, values["bitops"] <= 3e6]
    assert [line.survivors for line in explanation.constraints] == [mask.sum() for mask in kept]
    assert explanation.together.survivors == (kept[0] & kept[1]).sum()
    assert explanation.constraints[0].smallest == values["bytes"].min()
    assert explanation.constraints[0].largest == values["bytes"].max()
    assert explanation.constraints[0].low < explanation.constraints[0].share < explanation.constraints[0].high
    assert explanation.feasible
    assert all(example.violation == 0 for example in explanation.closest)
    json.dumps(explanation.to_json(), allow_nan=False)


def test_nothing_in_the_samples_but_something_nearby() -> None:
    space = joint_space(12)
    costs = Costs(space)
    explanation = explain(space, [limit(costs, "bytes", upper=60.0)], np.random.default_rng(0))
    assert explanation.together.survivors == 0
    assert explanation.feasible
    assert explanation.constraints[0].reached is not None
    assert explanation.constraints[0].reached <= 60.0
    assert "feasible subnets:" in explanation.text()


def test_nothing_at_all_lists_the_closest() -> None:
    space = joint_space(8)
    costs = Costs(space)
    constraints = [limit(costs, "bytes", upper=10.0), limit(costs, "bitops", upper=1e9)]
    explanation = explain(space, constraints, np.random.default_rng(0), samples=2000)
    assert not explanation.feasible
    assert explanation.constraints[1].share == 1.0
    # The least possible: the smallest depth (4), all of them pools of width 8.
    assert explanation.constraints[0].reached == 32.0
    example = explanation.closest[0]
    assert example.violation == pytest.approx(32 / 10 - 1)
    assert Subnet.from_json(example.subnet).id == example.id
    assert example.values == {"bytes <= 10 B": 32.0, "bitops <= 1G": pytest.approx(64 * 8 * 4)}
    text = explanation.text()
    assert "bytes <= 10 B: 0 % survive (95 % interval 0 % to 0.192 %)" in text
    assert "nearest found by descending: 32 B" in text
    assert "all together: 0 % survive" in text
    assert "the closest subnets:" in text
    assert f"{example.id}  violation 220 %" in text
    assert costs.rows < 20_000


def test_the_smallest_subnet_is_found_where_it_alone_is_feasible() -> None:
    space = joint_space(12).restrict({f"b{block}.op": ["conv"] for block in range(12)})
    costs = Costs(space)
    least = float(costs(space.to_rows([space.smallest()]))["bytes"][0])
    explanation = explain(space, [limit(costs, "bytes", upper=least)], np.random.default_rng(0), samples=200)
    assert explanation.together.survivors == 0
    assert explanation.closest[0].violation == 0
    assert explanation.closest[0].values == {f"bytes <= {least:.4g} B": least}


def test_the_error_holds_the_explanation() -> None:
    space = joint_space()
    explanation = explain(space, [limit(Costs(space), "bytes", upper=1.0)], np.random.default_rng(0), samples=500)
    error = infeasible(explanation)
    assert isinstance(error, InfeasibleError)
    assert explanation.text() in str(error)
    assert "loosen the constraint" in str(error)


def test_nothing_to_explain_is_refused() -> None:
    with pytest.raises(InputError, match="needs a constraint and a sample"):
        explain(joint_space(), [], np.random.default_rng(0))
