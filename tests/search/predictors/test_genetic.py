from __future__ import annotations

import numpy as np
import pytest

from nasq import Choice
from nasq.errors import InfeasibleError, InputError
from nasq.search import Constraint
from nasq.search.predictors import predictor_search
from nasq.space import SearchSpace

SPACE = SearchSpace([Choice(f"layer{index}.bits", tuple(range(2, 9))) for index in range(12)])


def average(rows: np.ndarray) -> np.ndarray:
    return rows.mean(1) + 2.0


WINDOW = [Constraint("average", "bits", average, lower=2.5, upper=3.0)]


def test_a_predictor_of_mean_bits_ends_at_the_upper_edge_of_the_window() -> None:
    """Property 13 of EQ-Net."""
    rows, scores = predictor_search(SPACE, average, WINDOW, np.random.default_rng(0), 40, 30)
    assert ((average(rows) > 2.5 - 1e-9) & (average(rows) <= 3.0)).all()
    assert scores[0] == pytest.approx(3.0) and np.array_equal(scores, np.sort(scores)[::-1])
    assert len(np.unique(rows, axis=0)) == len(rows) <= 40


def test_the_best_never_gets_worse_and_beats_random_search() -> None:
    weights = np.random.default_rng(5).normal(size=12)

    def score(rows: np.ndarray) -> np.ndarray:
        return rows @ weights

    best = []
    for generations in (0, 1, 3, 10, 40):
        rows, scores = predictor_search(SPACE, score, WINDOW, np.random.default_rng(0), 40, generations)
        np.testing.assert_allclose(scores, score(rows))
        best.append(scores[0])
    assert best == sorted(best) and best[-1] > best[0]
    drawn = SPACE.sample_batch(4000, np.random.default_rng(1))
    kept = drawn[(average(drawn) <= 3.0) & (average(drawn) >= 2.5)]
    assert best[-1] > score(kept).max(initial=-np.inf)


def test_it_begins_with_what_is_given_where_that_is_feasible() -> None:
    good = np.full((1, 12), 1, np.int16)
    bad = np.full((1, 12), 6, np.int16)

    def likes_the_given(rows: np.ndarray) -> np.ndarray:
        return (rows == 1).sum(1).astype(float)

    rows, scores = predictor_search(
        SPACE, likes_the_given, WINDOW, np.random.default_rng(0), 20, 2, initial=np.concatenate([good, bad])
    )
    assert np.array_equal(rows[0], good[0]) and scores[0] == 12


def test_refusals() -> None:
    with pytest.raises(InputError, match="population of 3 and 1 generations; it needs 4 and 0 or more"):
        predictor_search(SPACE, average, WINDOW, np.random.default_rng(0), 3, 1)
    nothing = [Constraint("average", "bits", average, upper=1.0)]
    with pytest.raises(InfeasibleError, match="no feasible subnet was found"):
        predictor_search(SPACE, average, nothing, np.random.default_rng(0), 8, 1)
