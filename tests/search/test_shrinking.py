"""LLM-QFA's two-stage search on scores whose sensitive layers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from nasq.errors import InfeasibleError, InputError, NasqError
from nasq.search.shrinking import sensitivities, shrinking_search
from nasq.space import Choice, SearchSpace, Subnet

LAYERS = 12
SENSITIVE = (1, 4, 7, 10)
NAMES = [f"layer{index}.weight_bits" for index in range(LAYERS)]


def space() -> SearchSpace:
    return SearchSpace([Choice(name, (2, 3, 4)) for name in NAMES])


def separable(subnet: Subnet) -> float:
    return sum((5.0 if index in SENSITIVE else 0.5) * float(subnet[name]) for index, name in enumerate(NAMES))


def at_most(budget: float):
    def feasible(rows: np.ndarray) -> np.ndarray:
        return (rows + 2).mean(1) <= budget + 1e-9

    return feasible


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("budget", [2.25, 2.5, 3.0])
def test_the_sensitive_layers_are_found_and_get_the_bits(budget: float) -> None:
    found = shrinking_search(space(), separable, at_most(budget), generator(0), share=len(SENSITIVE) / LAYERS)
    ranked = sorted(found.sensitivity, key=lambda name: -found.sensitivity[name])
    assert set(ranked[: len(SENSITIVE)]) == {NAMES[index] for index in SENSITIVE}
    if budget >= 2.5:
        assert all(found.space[NAMES[index]].options == (3, 4) for index in SENSITIVE)
    bits = [found.subnet[name] for name in NAMES]
    assert np.mean(bits) <= budget
    assert np.mean([bits[index] for index in SENSITIVE]) > np.mean(bits) + 0.3
    assert found.score == separable(found.subnet)


def test_it_beats_random_search_of_the_same_size() -> None:
    ours, random = [], []
    for seed in range(5):
        ours.append(shrinking_search(space(), separable, at_most(2.5), generator(seed), share=1 / 3).score)
        rows = space().sample_batch(150, generator(100 + seed))
        rows = rows[at_most(2.5)(rows)]
        random.append(max(separable(subnet) for subnet in space().to_subnets(rows)))
    assert np.mean(ours) > np.mean(random)


def test_it_evaluates_what_it_may_and_returns_the_best_feasible() -> None:
    found = shrinking_search(space(), separable, at_most(3.0), generator(1), first=40, second=20)
    assert len(found.evaluated) == 60
    allowed = [value for subnet, value in found.evaluated if np.mean([float(subnet[name]) for name in NAMES]) <= 3.0]
    assert found.score == max(allowed)


def test_it_falls_back_where_the_shrunk_space_is_too_large_for_the_budget() -> None:
    found = shrinking_search(space(), separable, at_most(2.1), generator(2), share=1.0)
    assert np.mean([float(found.subnet[name]) for name in NAMES]) <= 2.1


def test_sensitivity_is_pearsons_correlation() -> None:
    rows = space().sample_batch(30, generator(3))
    scores = [separable(subnet) for subnet in space().to_subnets(rows)]
    found = sensitivities(space(), NAMES, rows, scores)
    for index, name in enumerate(NAMES):
        assert found[name] == pytest.approx(np.corrcoef(rows[:, index], scores)[0, 1])
    assert sensitivities(space(), NAMES, rows, [1.0] * 30) == dict.fromkeys(NAMES, 0.0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"feasible": at_most(1.0)}, InfeasibleError, "none of 100 subnets evaluated keeps the budget"),
        ({"share": 1.5}, InputError, "share is 1.5 and first is 100; allowed"),
        ({"score": lambda subnet: float("nan")}, NasqError, "is nan; it must be finite"),
    ],
)
def test_what_cannot_be_is_named(arguments, error, message: str) -> None:
    given = {"score": separable, "feasible": at_most(3.0), "generator": generator(0), **arguments}
    with pytest.raises(error, match=message):
        shrinking_search(space(), **given)
