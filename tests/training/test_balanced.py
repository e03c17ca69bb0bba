"""The triangular scheduler: its mean, its ends, its flatness, against uniform sampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.space import Choice, SearchSpace
from nasq.training import Balanced, PathSampler, Uniform, stream

LAYERS = 32


def space_of(options=(2, 3, 4), layers: int = LAYERS) -> SearchSpace:
    return SearchSpace([*(Choice(f"layer{i}.weight_bits", options) for i in range(layers)), Choice("width", (8, 16))])


def averages(sampler: Uniform, steps: int) -> np.ndarray:
    names = [name for name in sampler.space.names if name.endswith("weight_bits")]
    subnets = [sampler.step()[0].subnet for _ in range(steps)]
    return np.array([np.mean([float(subnet[name]) for name in names]) for subnet in subnets])


def test_the_wave_starts_high_is_low_after_half_a_period_and_returns() -> None:
    sampler = Balanced(space_of(), stream(0, "paths"), period=100)
    assert [sampler.target(time) for time in (0, 25, 50, 75, 100, 150)] == [4.0, 3.0, 2.0, 3.0, 4.0, 2.0]
    found = averages(sampler, 151)
    assert found[0] == found[100] == 4.0
    assert found[50] == found[150] == 2.0


def test_the_average_follows_the_wave() -> None:
    sampler = Balanced(space_of(), stream(1, "paths"), period=250)
    wanted = np.array([sampler.target(time) for time in range(600)])
    error = averages(sampler, 600) - wanted
    # One layer's bits deviate by at most 1 from their mean: an average of 32 by 0.18 at most, in mean over a step.
    assert abs(error.mean()) < 0.02
    assert np.sqrt((error**2).mean()) < np.sqrt(2 / 3 / LAYERS)
    assert np.abs(error).max() < 5 * np.sqrt(2 / 3 / LAYERS)


def test_averages_of_a_period_are_flat_and_uniform_sampling_is_not() -> None:
    edges = np.linspace(2, 4, 6)
    balanced = averages(Balanced(space_of(), stream(2, "paths"), period=500), 500)
    shares = np.histogram(balanced, edges)[0] / 500
    assert shares.min() > 0.14 and shares.max() < 0.25
    uniform = averages(Uniform(space_of(), stream(2, "paths")), 1000)
    assert abs(uniform.std() - np.sqrt(2 / 3 / LAYERS)) < 0.01  # 0.144
    assert np.histogram(uniform, edges)[0][[0, 4]].sum() == 0


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sets(st.integers(1, 16), min_size=1, max_size=5), min_size=1, max_size=6), st.floats(0, 1))
def test_probabilities_have_the_mean_and_one_steepness(options, share: float) -> None:
    choices = [Choice(f"c{i}", sorted(some)) for i, some in enumerate(options)]
    sampler = Balanced(SearchSpace(choices), stream(0, "p"), [choice.name for choice in choices])
    mean = sampler.low + share * (sampler.high - sampler.low)
    probabilities = sampler.probabilities(mean)
    np.testing.assert_allclose(probabilities.sum(1), 1)
    found = [
        sum(p * b for p, b in zip(row, c.options, strict=False)) for row, c in zip(probabilities, choices, strict=True)
    ]
    assert np.mean(found) == pytest.approx(mean, abs=1e-6)
    steepness = set()
    for row, choice in zip(probabilities, choices, strict=True):
        for (p, b), (q, c) in zip(
            zip(row, choice.options, strict=False), zip(row[1:], choice.options[1:], strict=False), strict=False
        ):
            if min(p, q) > 1e-9:
                steepness.add(round((np.log(q) - np.log(p)) / (float(c) - float(b)), 4))
    assert max(steepness, default=0) - min(steepness, default=0) < 1e-3


def test_other_choices_are_drawn_uniformly() -> None:
    sampler = Balanced(space_of(), stream(3, "paths"), period=10)
    wide = sum(sampler.step()[0].subnet["width"] == 16 for _ in range(400))
    assert 150 < wide < 250


def test_choices_with_other_options_and_paths() -> None:
    space = SearchSpace([Choice("a", (2, 8)), Choice("b", (3, 4, 6)), Choice("c", ("x", "y"))])
    sampler = Balanced(space, stream(0, "p"), ["a", "b"], period=8, paths=3)
    assert (sampler.low, sampler.high) == (2.5, 7.0)
    first = sampler.step()
    assert len(first) == 3
    assert {(path.subnet["a"], path.subnet["b"], path.role) for path in first} == {(8, 6, "random")}


def test_inactive_choices_are_left_out_of_the_subnet() -> None:
    space = SearchSpace(
        [Choice("depth", (1, 2)), Choice("a", (2, 4)), Choice("b", (2, 4))], {"b": [(("depth", frozenset({2})),)]}
    )
    sampler = Balanced(space, stream(0, "p"), ["a", "b"], period=4)
    assert all(space.contains(path.subnet) for _ in range(40) for path in sampler.step())


def test_state_goes_on_where_it_was() -> None:
    sampler = Balanced(space_of(layers=4), stream(0, "paths"), period=10)
    assert isinstance(sampler, PathSampler)
    for _ in range(3):
        sampler.step()
    state = sampler.state_dict()
    after = [sampler.step() for _ in range(6)]
    other = Balanced(space_of(layers=4), stream(9, "paths"), period=10)
    other.load_state_dict(state)
    assert [other.step() for _ in range(6)] == after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"period": 1}, "the period is 1 steps; allowed: 2 or more"),
        ({"choices": []}, "no choice to balance"),
        ({"choices": ["layer0.bits"]}, "unknown choice 'layer0.bits'"),
        ({"choices": ["kind"]}, "whose average means nothing"),
        ({"paths": 0}, "paths is 0; allowed: 1 or more"),
    ],
)
def test_what_cannot_be_is_named(arguments, message: str) -> None:
    space = SearchSpace([Choice("layer0.weight_bits", (2, 4)), Choice("kind", ("a", "b"))])
    with pytest.raises(InputError, match=message):
        Balanced(space, torch.Generator(), **arguments)


def test_a_mean_out_of_reach_is_named() -> None:
    with pytest.raises(InputError, match=r"an average of 5 cannot be had; allowed: 2 to 4"):
        Balanced(space_of(), stream(0, "p")).probabilities(5.0)


def test_spread_rows_cover_every_average() -> None:
    space = space_of()
    rows = Balanced(space, stream(0, "p")).spread(2000)
    assert rows.shape == (2000, LAYERS + 1)
    found = (rows[:, :LAYERS] + 2).mean(1)
    shares = np.histogram(found, np.linspace(2, 4, 6))[0] / 2000
    assert shares.min() > 0.15 and shares.max() < 0.25
    np.testing.assert_array_equal(space.canonical(rows), rows)
