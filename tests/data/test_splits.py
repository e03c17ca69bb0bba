from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nasq.data.splits import split_size, stratified_split
from nasq.errors import InputError


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.floats(0.01, 0.99), st.integers(0, 100))
def test_parts_are_disjoint_complete_exact_and_stratified(sizes: list[int], share: float, seed: int) -> None:
    labels = torch.cat([torch.full((size,), label * 2) for label, size in enumerate(sizes)])  # odd labels are absent
    labels = labels[torch.randperm(len(labels), generator=_generator(seed))]
    count = round(share * len(labels))
    assume(0 < count <= len(labels) - len(sizes))
    part, rest = stratified_split(labels, count, _generator(seed))
    assert sorted(part.tolist() + rest.tolist()) == list(range(len(labels)))
    assert len(part) == count
    assert part.tolist() == sorted(part.tolist())
    capped = any(share * size > size - 1 for size in sizes)
    for label, size in enumerate(sizes):
        got = int((labels[part] == label * 2).sum())
        assert got <= size - 1
        if not capped:
            assert abs(got - count * size / len(labels)) < 1


def test_the_seed_decides_and_every_member_can_be_chosen() -> None:
    labels = torch.arange(100) % 5
    draws = [stratified_split(labels, 20, _generator(seed))[0].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    chosen = torch.zeros(100)
    for seed in range(200):
        chosen[stratified_split(labels, 20, _generator(seed))[0]] += 1
    # Each is in with probability 1/5: 40 of 200, standard deviation 5.7.
    assert chosen.min() > 15
    assert chosen.max() < 70


def test_sizes() -> None:
    assert split_size(0.1, 50_000) == 5_000
    assert split_size(5_000, 50_000) == 5_000
    assert split_size(1, 2) == 1


@pytest.mark.parametrize("size", [0, 0.0, 1.0, 1.5, -0.1, -3, 10, 0.01, 0.99, True, float("nan")])
def test_a_size_that_takes_nothing_or_all_is_named(size: float) -> None:
    with pytest.raises(InputError, match=r"validation is .*; allowed: a share between 0 and 1, .* 1 to 9, of the 10"):
        split_size(size, 10)


def test_one_of_every_class_must_stay() -> None:
    with pytest.raises(InputError, match="part of 3 images does not leave one image of each of 2 classes among 4"):
        stratified_split(torch.tensor([0, 0, 1, 1]), 3, _generator())
