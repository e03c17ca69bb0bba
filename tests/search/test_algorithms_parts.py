"""What the algorithms are made of: fitness, selection, schedules, models and predictors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.search import Objective
from nasq.search.algorithms import FullFidelity, Hyperband, PredictorGuided, RandomSearch, Reinforce, fitness
from nasq.search.algorithms.fitness import crowding, front_numbers
from nasq.search.algorithms.optuna_model import OptunaModel
from nasq.search.algorithms.selection import lent_numpy_random
from nasq.search.predictors.ensembles import PREDICTORS, Codes, Forest, MLPEnsemble, _gradients
from nasq.space import Choice, SearchSpace, Subnet

GRID = SearchSpace([Choice(name, tuple(range(5))) for name in "abcd"], name="grid")
TOTAL = Objective("total", "", "maximize", lambda subnet: float(sum(subnet.values())))


def told(algorithm: Any, count: int) -> list[Subnet]:
    found: list[Subnet] = []
    while len(found) < count:
        for subnet in algorithm.ask():
            algorithm.tell(subnet, {"total": TOTAL.evaluate(subnet)})
            found.append(subnet)
    return found


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=12))
@settings(max_examples=40)
def test_front_numbers_count_the_longest_chain_of_dominators(points: list[tuple[int, int]]) -> None:
    def beats(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return a != b and a[0] >= b[0] and a[1] >= b[1]

    def depth(point: tuple[int, int]) -> int:
        return max((1 + depth(other) for other in set(points) if beats(other, point)), default=0)

    array = np.array(points, dtype=float)
    assert front_numbers(array).tolist() == [depth(point) for point in points]
    merit = fitness(array)
    assert all(merit[i] > merit[j] for i, a in enumerate(points) for j, b in enumerate(points) if depth(a) < depth(b))


def test_crowding_is_that_of_the_paper() -> None:
    front = np.array([[0.0, 4.0], [1.0, 2.0], [3.0, 1.0], [4.0, 0.0]])
    assert crowding(front).tolist() == [np.inf, 3 / 4 + 3 / 4, 3 / 4 + 2 / 4, np.inf]
    assert fitness([(3.0,), (1.0,)]).tolist() == [3.0, 1.0]


def test_numpys_global_stream_is_lent_and_given_back() -> None:
    np.random.seed(7)
    wanted = np.random.random(3)
    np.random.seed(7)
    drawn = []
    for _ in range(2):
        with lent_numpy_random(np.random.default_rng(3)):
            drawn.append(np.random.random())
    assert drawn[0] == drawn[1] and np.random.random(3).tolist() == wanted.tolist()


def test_hyperband_has_the_rungs_of_the_paper() -> None:
    algorithm = Hyperband(GRID, [TOTAL], population=9, seed=0, eta=3, lowest=1 / 9)
    rungs, firsts = [], []
    for _ in range(7):
        fidelity, asked = algorithm.fidelity, algorithm.ask()
        rungs.append((len(asked), round(fidelity, 6)))
        firsts.append(asked)
        for subnet in asked:
            algorithm.tell(subnet, {"total": TOTAL.evaluate(subnet)})
    # Li et al., table 1 with R = 9 and eta = 3: 9, 3, 1; 5, 1; 3; and from the start.
    assert rungs == [(9, 0.111111), (3, 0.333333), (1, 1.0), (5, 0.333333), (1, 1.0), (3, 1.0), (9, 0.111111)]
    order = sorted(firsts[0], key=TOTAL.evaluate, reverse=True)
    assert sorted(map(TOTAL.evaluate, firsts[1]), reverse=True) == [TOTAL.evaluate(one) for one in order[:3]]
    assert algorithm.cost() == pytest.approx(9 / 9 + 3 / 3 + 1 + 5 / 3 + 1 + 3 + 9 / 9)
    full = [one for asked, (_, fidelity) in zip(firsts, rungs, strict=True) if fidelity == 1 for one in asked]
    assert TOTAL.evaluate(algorithm.best()) == max(map(TOTAL.evaluate, full))


def test_full_fidelity_evaluates_the_lower_rungs_itself() -> None:
    seen: list[float] = []

    def partial(subnet: Subnet, fidelity: float) -> dict[str, float]:
        seen.append(fidelity)
        return {"total": TOTAL.evaluate(subnet)}

    wrapped = FullFidelity(Hyperband(GRID, [TOTAL], population=9, seed=0), partial)
    assert len(wrapped.ask()) == 1 and wrapped.ask() == []
    assert seen == [pytest.approx(1 / 9)] * 9 + [pytest.approx(1 / 3)] * 3


def test_reinforce_moves_its_policy_to_what_is_better() -> None:
    algorithm = Reinforce(GRID, [TOTAL], population=8, seed=0)
    told(algorithm, 120)
    policy = algorithm.probabilities()
    assert policy.sum(axis=1) == pytest.approx(np.ones(4))
    assert (policy[:, 4] > 2 * policy[:, 0]).all()


def test_an_optuna_model_leaves_nothing_behind_and_learns() -> None:
    model = OptunaModel(GRID, 1, "tpe", startup=5)
    rows = GRID.sample_batch(60, np.random.default_rng(0))
    model.add(rows, [(float(row.sum()),) for row in rows])
    first = model.propose(8, 1)
    assert np.array_equal(model.propose(8, 1), first) and not np.array_equal(model.propose(8, 2), first)
    assert len(model) == 60 and first.sum(axis=1).mean() > rows.sum(axis=1).mean() + 2


@pytest.mark.parametrize("name", ["forest", "mlp", "boosted"])
def test_predictors_rank_what_they_have_not_seen(name: str) -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    rows, others = GRID.sample_batch(120, rng), GRID.sample_batch(300, rng)
    values, wanted = (one[:, 0] * 10.0 - one[:, 1] * one[:, 2] for one in (rows, others))
    model = PREDICTORS[name](GRID, lambda one: one.sum(axis=1, keepdims=True).astype(float))
    with pytest.raises(InputError, match="learned nothing yet"):
        model(rows)
    model.fit(rows, values, 3)
    mean, std = model(others)
    assert spearmanr(mean, wanted).statistic > 0.9 and (std >= 0).all() and std.mean() > 0
    again = PREDICTORS[name](GRID, lambda one: one.sum(axis=1, keepdims=True).astype(float))
    again.fit(rows, values, 3)
    assert np.array_equal(again(others)[0], mean)


def test_the_perceptrons_gradients_are_those_of_differences() -> None:
    rng = np.random.default_rng(0)
    model = MLPEnsemble(Codes(GRID), members=2, hidden=4)
    weights: Any = [one.astype(np.float64) for one in model._start(3, rng)]
    x, wanted, importance = rng.random((5, 3)), rng.random((1, 5, 1)), rng.random((2, 5, 1))

    def loss() -> float:
        value = np.maximum(np.maximum(x @ weights[0] + weights[1], 0) @ weights[2] + weights[3], 0)
        return float((0.5 * importance * (value @ weights[4] + weights[5] - wanted) ** 2).sum())

    for weight, gradient in zip(weights, _gradients(weights, x, wanted, importance), strict=True):
        place = tuple(rng.integers(0, size) for size in weight.shape)
        before = weight[place]
        weight[place] = before + 1e-6
        up = loss()
        weight[place] = before - 1e-6
        down = loss()
        weight[place] = before
        assert gradient[place] == pytest.approx((up - down) / 2e-6, abs=1e-6)


def test_guidance_finds_better_subnets_than_random_search() -> None:
    def best(algorithm: Any) -> float:
        return max(map(TOTAL.evaluate, told(algorithm, 40)))

    pairs = []
    for seed in range(3):
        model = Forest(Codes(GRID), 20)
        guided = PredictorGuided(GRID, [TOTAL], population=8, batch=8, seed=seed, candidates=100, predictor=model)
        pairs.append((best(guided), best(RandomSearch(GRID, [TOTAL], population=8, seed=seed))))
        assert TOTAL.evaluate(guided.best()) >= pairs[-1][0] - 1
    assert np.mean([ours for ours, _ in pairs]) > np.mean([random for _, random in pairs])
