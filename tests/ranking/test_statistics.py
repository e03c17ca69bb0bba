from __future__ import annotations

import itertools
from math import isnan, nan, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from nasq.errors import InputError
from nasq.ranking.statistics import (
    COEFFICIENTS,
    Estimate,
    bootstrap,
    estimate,
    kendall,
    pearson,
    precision_at_top,
    spearman,
    top_k_regret,
)

Floats = NDArray[np.float64]
VALUES = st.lists(st.integers(-3, 3), min_size=2, max_size=12)


def naive_kendall(x: Floats, y: Floats) -> float:
    """Tau-b from its definition, pair by pair."""
    pairs = list(itertools.combinations(range(len(x)), 2))
    signs = [(np.sign(x[i] - x[j]), np.sign(y[i] - y[j])) for i, j in pairs]
    left, right = (sum(pair[side] != 0 for pair in signs) for side in (0, 1))
    return float(sum(a * b for a, b in signs)) / sqrt(left * right) if left * right else nan


def naive_ranks(x: Floats) -> Floats:
    return np.array([np.mean([rank for rank, value in enumerate(sorted(x), 1) if value == own]) for own in x])


def same(a: float, b: float) -> bool:
    return (isnan(a) and isnan(b)) or abs(a - b) < 1e-12


@given(VALUES, st.integers(0, 2**32 - 1))
@settings(max_examples=60, deadline=None)
def test_coefficients_equal_their_definitions_with_ties(values: list[int], seed: int) -> None:
    x = np.array(values, float)
    y = np.random.default_rng(seed).integers(-3, 4, len(x)).astype(float)
    assert same(kendall(x, y), naive_kendall(x, y))
    varied = len(set(x)) > 1 and len(set(y)) > 1
    assert same(pearson(x, y), float(np.corrcoef(x, y)[0, 1]) if varied else nan)
    assert same(spearman(x, y), float(np.corrcoef(naive_ranks(x), naive_ranks(y))[0, 1]) if varied else nan)


def test_coefficients_equal_scipy_on_a_large_sample() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=3000).round(2)
    y = x + rng.normal(size=3000).round(1)
    assert kendall(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)


def test_ranks_do_not_mind_infinities_and_huge_values() -> None:
    x, y = np.array([-np.inf, 1e-300, 1e200, 1e300]), np.array([1.0, 2, 3, 4])
    assert kendall(x, y) == pytest.approx(1) and spearman(x, y) == pytest.approx(1) and isnan(pearson(x, y))
    assert 0 < pearson(x[1:], y[1:]) < 1


def test_a_constant_has_no_coefficient_and_lengths_have_to_agree() -> None:
    for function in COEFFICIENTS.values():
        assert isnan(function(np.ones(4), np.arange(4.0)))
        with pytest.raises(InputError, match=r"3 scores were given for 4 true values\. Give one score for each"):
            function(np.ones(3), np.arange(4.0))


def orders(scores: Floats) -> list[list[int]]:
    """Every order of the subnets that sorts their scores from the best, ties in every way."""
    return [
        list(order)
        for order in itertools.permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in itertools.pairwise(order))
    ]


@given(st.lists(st.integers(0, 2), min_size=1, max_size=5), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_regret_and_precision_are_averages_over_all_orders_of_ties(values: list[int], seed: int) -> None:
    scores = np.array(values, float)
    truth = np.random.default_rng(seed).integers(0, 3, len(scores)).astype(float)
    for k in range(1, len(scores) + 1):
        found = orders(scores)
        regret = np.mean([truth.max() - truth[order[:k]].max() for order in found])
        assert top_k_regret(scores, truth, k) == pytest.approx(regret, abs=1e-12)
        shares = [len(set(a[:k]) & set(b[:k])) / k for a in found for b in orders(truth)]
        assert precision_at_top(scores, truth, k / len(scores)) == pytest.approx(np.mean(shares), abs=1e-12)


def test_a_perfect_score_has_no_regret_and_full_precision() -> None:
    truth = np.random.default_rng(0).permutation(500).astype(float)
    assert [top_k_regret(truth, truth, k) for k in (1, 10, 500)] == [0, 0, 0]
    assert [precision_at_top(truth, truth, share) for share in (0.001, 0.01, 0.1, 1)] == [1, 1, 1, 1]
    assert top_k_regret(-truth, truth, 1) == 499 and precision_at_top(-truth, truth, 0.1) == 0


def test_bootstrap_intervals_cover_the_truth() -> None:
    """Of a normal sample with correlation r, Kendall is 2/pi asin(r): 95 % intervals hold it about 57 times of 60."""
    r, covered = 0.6, 0
    wanted = 2 / np.pi * np.arcsin(r)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        x, y = rng.multivariate_normal([0, 0], [[1, r], [r, 1]], size=80).T
        found = bootstrap({"x": x}, y, rng, 60, ("kendall",))
        interval = estimate(kendall(x, y), found["x"]["kendall"])
        assert interval.low < interval.value < interval.high
        covered += interval.low <= wanted <= interval.high
    # The binomial chance of 51 or fewer of 60 at 95 % is 0.3 %; few resamples cost a little coverage.
    assert 51 <= covered <= 60


def test_resamples_are_shared_and_reproducible() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=60), rng.normal(size=60)
    found = bootstrap({"a": x, "b": 3 * x + 1}, y, np.random.default_rng(1), 20)
    again = bootstrap({"a": x}, y, np.random.default_rng(1), 20)
    for name in COEFFICIENTS:
        assert np.allclose(found["a"][name], found["b"][name])
        assert np.array_equal(found["a"][name], again["a"][name])
    assert len(np.unique(found["a"]["kendall"])) > 10


def test_resamples_leave_out_what_is_nan() -> None:
    x, y = np.array([1.0, 2, nan, 4, 5]), np.array([1.0, 2, 100, 4, 5])
    found = bootstrap({"x": x}, y, np.random.default_rng(0), 50)["x"]["kendall"]
    assert np.isnan(found).sum() < 10
    assert np.nanmin(found) == pytest.approx(1)


def test_intervals_are_undefined_where_resamples_are() -> None:
    assert estimate(0.5, np.linspace(0, 1, 1001)) == Estimate(0.5, pytest.approx(0.025), pytest.approx(0.975))
    half = np.where(np.arange(100) < 50, nan, 0.5)
    assert isnan(estimate(0.5, half).low) and isnan(estimate(nan, np.ones(10)).high)
    assert estimate(nan, np.ones(10)).to_json() == {"value": None, "low": None, "high": None}
    assert Estimate(0.2, 0.1, 0.3).separated and Estimate(-0.2, -0.3, -0.1).separated
    assert not Estimate(0.1, -0.1, 0.3).separated and not Estimate(nan, nan, nan).separated


def test_numbers_outside_their_range_are_refused() -> None:
    x = np.arange(4.0)
    for k in (0, 5):
        with pytest.raises(InputError, match=f"the best {k} of 4 subnets are asked for. Allowed: 1 to 4"):
            top_k_regret(x, x, k)
    for share in (0.0, 1.1, -1, nan):
        with pytest.raises(InputError, match="Give a number above 0 and at most 1"):
            precision_at_top(x, x, share)
    with pytest.raises(InputError, match=r"the confidence is 95\. Give a number between 0 and 1"):
        estimate(0.5, x, 95)
