from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.space import Choice, SearchSpace

from .spaces import nest, search_spaces

SEEDS = st.integers(0, 2**32)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(search_spaces(), SEEDS, st.sampled_from((0.0, 0.1, 0.5, 1.0)))
def test_mutants_are_canonical_and_change_an_active_choice(space: SearchSpace, seed, rate):
    rows = space.sample_batch(9, rng(seed))
    mutants = space.mutate(rows, rng(seed + 1), rate)
    assert mutants.dtype == np.int16 and np.array_equal(space.canonical(mutants), mutants)
    both = space.active(rows) & space.active(mutants)
    movable = (space.active(rows) & (space.sizes > 1)).any(axis=1)
    changed = ((rows != mutants) & both).sum(axis=1)
    assert np.array_equal(changed > 0, movable)
    if rate == 0.0:
        # One choice was redrawn; the active ones that stay active are otherwise untouched.
        assert (changed <= 1).all()


@given(search_spaces(), SEEDS)
def test_the_forms_agree(space: SearchSpace, seed):
    a, b = space.sample(rng(seed)), space.sample(rng(seed + 1))
    rows_a, rows_b = space.to_rows([a]), space.to_rows([b])
    assert space.mutate(a, rng(3), 0.3) == space.to_subnets(space.mutate(rows_a, rng(3), 0.3))[0]
    assert space.crossover(a, b, rng(4)) == space.to_subnets(space.crossover(rows_a, rows_b, rng(4)))[0]
    assert np.array_equal(rows_a, space.to_rows([a]))


@given(search_spaces(), SEEDS)
def test_children_take_every_option_from_a_parent(space: SearchSpace, seed):
    a, b = space.sample(rng(seed)), space.sample(rng(seed + 1))
    child = space.crossover(a, b, rng(seed + 2))
    space.validate(child)
    for name, option in child.items():
        parents = [parent[name] for parent in (a, b) if name in parent]
        assert option in (parents or [space[name].default])
    assert space.crossover(a, a, rng(seed)) == a


@given(search_spaces(), SEEDS)
def test_neighbours_differ_in_one_active_choice(space: SearchSpace, seed):
    subnet = space.sample(rng(seed))
    found = list(space.neighbours(subnet))
    expected = set()
    for name, own in subnet.items():
        for option in space[name].options:
            if option != own:
                everything = {choice.name: choice.default for choice in space.choices}
                expected.add(space.canonical({**everything, **subnet, name: option}))
    assert len(found) == len(set(found)) and set(found) == expected and subnet not in found


def test_neighbours_of_an_unconditional_space_are_counted():
    space = SearchSpace([Choice(f"c{i}", range(i + 1)) for i in range(6)])
    assert len(list(space.neighbours(space.default()))) == sum(range(6))


def test_mutation_has_the_asked_rate_and_redraws_uniformly_among_the_others():
    space = SearchSpace([Choice(f"c{i}", range(4)) for i in range(10)])
    rows = np.full((20_000, 10), 2, dtype=np.int16)
    changed = space.mutate(rows, rng(5), 0.3)
    # 200,000 draws; without the rows where nothing would change (0.7^10 = 2.8 %, one change each) the rate is 0.3.
    rate = 0.3 + 0.7**10 / 10
    assert abs((changed != 2).mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / 200_000)
    counts = np.bincount(changed[changed != 2], minlength=4)
    assert counts[2] == 0
    expected = counts.sum() / 3
    assert np.abs(counts[[0, 1, 3]] - expected).max() < 5 * np.sqrt(expected)


def test_the_one_forced_change_is_uniform_over_active_choices():
    space = SearchSpace([Choice("fixed", (1,)), *(Choice(f"c{i}", range(i + 2)) for i in range(4))])
    rows = space.sample_batch(20_000, rng(1))
    where = (space.mutate(rows, rng(2), 0.0) != rows).sum(axis=0)
    assert where[0] == 0 and where.sum() == 20_000
    assert np.abs(where[1:] - 5_000).max() < 5 * np.sqrt(5_000)


def test_what_becomes_active_by_mutation_is_drawn_uniformly():
    gate, inner = Choice("gate", (False, True)), Choice("inner", (1, 2, 3, 4))
    space = SearchSpace([gate, inner], {"inner": [(("gate", frozenset({True})),)]})
    rows = np.tile(space.to_rows([{"gate": False}]), (8_000, 1))
    counts = np.bincount(space.mutate(rows, rng(0), 0.0)[:, 1], minlength=4)
    assert counts.sum() == 8_000 and np.abs(counts - 2_000).max() < 5 * np.sqrt(2_000)


def test_crossover_takes_either_parent_with_equal_probability():
    space = SearchSpace([Choice(f"c{i}", (0, 1)) for i in range(5)])
    zeros, ones = np.zeros((8_000, 5), dtype=np.int16), np.ones((8_000, 5), dtype=np.int16)
    child = space.crossover(zeros, ones, rng(0))
    assert np.abs(child.mean(axis=0) - 0.5).max() < 5 * 0.5 / np.sqrt(8_000)
    assert len(np.unique(child, axis=0)) == 32


def test_a_big_nest_stays_inside():
    space = nest()
    rows = space.sample_batch(200, rng(0))
    child = space.crossover(space.mutate(rows, rng(1)), rows[::-1], rng(2))
    for subnet in space.to_subnets(child)[:20]:
        space.validate(subnet)
    assert np.array_equal(space.canonical(child), child)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_rate_is_a_probability(rate):
    space = SearchSpace([Choice("a", (0, 1))])
    with pytest.raises(InputError, match=r"mutation rate is .* from 0 to 1"):
        space.mutate(space.default(), rng(), rate)


def test_crossover_takes_pairs():
    space = SearchSpace([Choice("a", (0, 1))])
    rows = space.sample_batch(3, rng())
    with pytest.raises(InputError, match="given 3 and 2 subnets"):
        space.crossover(rows, rows[:2], rng())
