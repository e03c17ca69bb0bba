from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nasq import Choice
from nasq.errors import InputError
from nasq.search import Measure
from nasq.search.predictors import TransitionSampler, TransitionTable, generate_pairs
from nasq.space import SearchSpace, SpaceRules

SIZES = np.array([1, 2, 3, 4, 5, 6])
NAMES = [f"layer{index}.weight_bits" for index in range(6)]
SPACE = SearchSpace(
    [
        *(Choice(name, tuple(range(2, 9))) for name in NAMES),
        Choice("a.activation_bits", (2, 4, 8)),
        Choice("form", ("tensor", "channel"), ordered=False),
    ]
)


def average(rows: np.ndarray) -> np.ndarray:
    columns = [SPACE.positions[name] for name in NAMES]
    return ((rows[:, columns] + 2) * SIZES).sum(1) / SIZES.sum()


def activations(rows: np.ndarray) -> np.ndarray:
    return np.array([2.0, 4.0, 8.0])[rows[:, SPACE.positions["a.activation_bits"]]]


WEIGHTS, ACTIVATIONS = Measure("average", "bits", average), Measure("activations", "bits", activations)


def table(measure: Measure = WEIGHTS, seed: int = 0, draws: int = 40_000) -> TransitionTable:
    return TransitionTable(SPACE, measure, np.random.default_rng(seed), draws=draws)


def test_the_table_is_for_the_choices_that_matter() -> None:
    assert {SPACE.names[column] for column in table().columns} == set(NAMES)
    assert [SPACE.names[column] for column in table(ACTIVATIONS).columns] == ["a.activation_bits"]


@pytest.mark.parametrize("target", [2.6, 3.0, 4.0, 5.0, 6.4, 7.4])
def test_samples_are_near_the_target(target: float) -> None:
    sampler = TransitionSampler([table(), table(ACTIVATIONS)], np.random.default_rng(1))
    rows = sampler.draw([target, 4.0], 400)
    assert abs(average(rows).mean() - target) < 0.25
    assert set(activations(rows)) == {4.0}
    assert 120 < rows[:, SPACE.positions["form"]].sum() < 280


def test_every_row_of_the_table_is_a_distribution_and_leans_with_the_target() -> None:
    made = table()
    means = []
    for target in (3.0, 5.0, 7.0):
        found = made.probabilities(target)
        assert set(found) == set(NAMES)
        for chances in found.values():
            assert chances.shape == (7,) and chances.min() >= 0 and chances.sum() == pytest.approx(1)
        means.append(float(found[NAMES[-1]] @ np.arange(2, 9)))
    assert means == sorted(means) and means[-1] - means[0] > 2


def test_the_frequencies_are_the_conditional_ones() -> None:
    """Against the exact conditional distribution of two choices, by enumeration."""
    space = SearchSpace([Choice("a", (2, 3, 4), ordered=False), Choice("b", (2, 3, 4), ordered=False)])
    total = Measure("total", "", lambda rows: (rows + 2).sum(1).astype(float))
    made = TransitionTable(space, total, np.random.default_rng(0), draws=30_000, width=1.0)
    found = made.probabilities(5.0)  # 2+3 or 3+2
    np.testing.assert_allclose(found["a"], [0.5, 0.5, 0.0], atol=0.02)
    np.testing.assert_allclose(made.probabilities(6.0)["b"], [1 / 3] * 3, atol=0.02)


def test_the_seed_decides_and_targets_beyond_take_the_nearest_bucket() -> None:
    one, other = table(seed=3), table(seed=3)
    assert np.array_equal(one.counts, other.counts)
    far, last = one.probabilities(99.0), one.probabilities(float(one.buckets[-1]) * 0.2)
    assert all(np.array_equal(far[name], last[name]) for name in NAMES)


def test_spread_covers_the_range() -> None:
    sampler = TransitionSampler([table()], np.random.default_rng(2))
    values = average(sampler.spread(2.4, 7.6, 300))
    assert values.min() < 3.2 and values.max() > 6.8 and len(np.unique(np.floor(values))) >= 5


def test_refusals() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match=r"got 0 draws and width 0\.2; both must be above 0"):
        TransitionTable(SPACE, WEIGHTS, rng, draws=0)
    with pytest.raises(InputError, match="'constant' depends on no choice of the space"):
        TransitionTable(SPACE, Measure("constant", "", lambda rows: np.ones(len(rows))), rng)
    with pytest.raises(InputError, match="is in two transition tables"):
        TransitionSampler([table(), table()], rng)
    with pytest.raises(InputError, match="at least one table"):
        TransitionSampler([], rng)
    with pytest.raises(InputError, match="got 1 targets for 2 transition tables"):
        TransitionSampler([table(), table(ACTIVATIONS)], rng).draw([3.0])


class Ascending(SpaceRules):
    """Bits may not fall from layer to layer."""

    def __init__(self) -> None:
        self.choices = tuple(Choice(name, tuple(range(2, 9))) for name in NAMES[:3])
        self.name, self.size = "ascending", 84  # 7 + 2 over 3

    def valid(self, rows: np.ndarray) -> np.ndarray:
        return (np.diff(rows, axis=1) >= 0).all(axis=1)


def test_nothing_that_rules_refuse_is_drawn(tmp_path: Path) -> None:
    space = SearchSpace([*Ascending().choices, Choice("free", (1, 2))], rules=Ascending())
    assert space.size == 2 * 84
    measure = Measure("bits", "bits", lambda rows: rows[:, :3].mean(1) + 2.0)
    made = TransitionTable(space, measure, np.random.default_rng(0), draws=4000)
    assert {space.names[column] for column in made.columns} == set(NAMES[:3])
    sampler = TransitionSampler([made], np.random.default_rng(1))
    means = []
    for target in (3.0, 7.0):
        rows = sampler.draw([target], 200)
        assert space.settle(rows)[1].all() and np.array_equal(space.canonical(rows), rows)
        means.append(measure(rows).mean())
    assert means[0] < 3.8 and means[1] > 6.2
    pairs = generate_pairs(space, rows[:5], lambda subnet: float(subnet["free"]), tmp_path / "pairs.jsonl")
    assert np.array_equal(pairs.rows, rows[:5])
    with pytest.raises(InputError, match="not valid by the rules 'ascending'"):
        generate_pairs(space, np.array([[3, 2, 1, 0]], np.int16), lambda subnet: 0.0, tmp_path / "pairs.jsonl")
