from __future__ import annotations

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nasq.errors import InputError
from nasq.training.splitting.partition import balanced_partition, group_sizes


def _random(count: int, seed: int) -> np.ndarray:
    upper = np.triu(np.random.default_rng(seed).uniform(0, 2, (count, count)), 1)
    return upper + upper.T


def _brute(distance: np.ndarray, groups: int) -> float:
    """The least distance within over all orders of the options, cut into the sizes."""
    ends = np.cumsum([0, *group_sizes(len(distance), groups)])
    return min(
        sum(distance[np.ix_(order[a:b], order[a:b])].sum() / 2 for a, b in pairwise(ends))
        for order in map(list, permutations(range(len(distance))))
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 10_000), st.data())
def test_the_partition_is_the_best_of_all(count: int, seed: int, data: st.DataObject) -> None:
    groups = data.draw(st.integers(2, count))
    distance = _random(count, seed)
    found = balanced_partition(distance, groups)
    assert found.within == pytest.approx(_brute(distance, groups))
    assert found.within + found.cross == pytest.approx(np.triu(distance).sum())
    assert sorted(index for group in found.groups for index in group) == list(range(count))
    assert sorted(map(len, found.groups)) == group_sizes(count, groups)
    assert found.groups == tuple(sorted(found.groups))


@pytest.mark.parametrize(("count", "groups"), [(5, 2), (8, 2), (12, 3), (16, 2)])
def test_clear_clusters_are_found_whatever_the_labels(count: int, groups: int) -> None:
    label = np.repeat(np.arange(groups), group_sizes(count, groups))
    clear = np.where(label[:, None] == label[None], 0.1, 1.0) + 0.01 * _random(count, 1)
    np.fill_diagonal(clear, 0)
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(count)
        found = balanced_partition(clear[np.ix_(order, order)], groups)
        clusters = {frozenset(label[order[list(group)]].tolist()) for group in found.groups}
        assert clusters == {frozenset({index}) for index in range(groups)}
        assert found.separation > 0.9


def test_many_options_are_refined_to_where_no_exchange_helps() -> None:
    distance = _random(12, 5)
    found = balanced_partition(distance, 2)
    one, other = found.groups
    for a in one:
        for b in other:
            swapped = [[b if i == a else i for i in one], [a if i == b else i for i in other]]
            within = sum(distance[np.ix_(group, group)].sum() / 2 for group in swapped)
            assert within >= found.within - 1e-9


def test_ties_go_to_the_first_partition() -> None:
    assert balanced_partition(1.0 - np.eye(4), 2).groups == ((0, 1), (2, 3))


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="1 option cannot be split into 2 groups"):
        balanced_partition(np.zeros((1, 1)), 2)
    with pytest.raises(InputError, match="3 options cannot be split into 4 groups; allowed: 2 to 3 groups"):
        balanced_partition(_random(3, 0), 4)
    with pytest.raises(InputError, match=r"square, finite and symmetric; got shape \(2, 3\)"):
        balanced_partition(np.zeros((2, 3)), 2)
