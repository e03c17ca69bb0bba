from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from nasq import Choice, Supernet, elastic
from nasq.errors import InputError
from nasq.training import PathSampler, stream
from nasq.training.fairness import StrictFairness
from nasq.training.region import Region


def _space(**options: tuple[object, ...]):
    net = nn.ModuleDict()
    for name, values in options.items():
        net[name] = elastic.OneOf(Choice(name, values), {value: nn.Identity() for value in values})
    return Supernet(net).space


def test_every_option_is_dealt_equally_often_in_every_step() -> None:
    space = _space(a=("x", "y", "z"), b=("x", "y", "z"), c=("u", "v"))
    sampler = StrictFairness(space, stream(0, "paths"))
    assert isinstance(sampler, PathSampler)
    for _ in range(20):
        subnets = [path.subnet for path in sampler.step()]
        assert len(subnets) == 6
        for name, count in (("a", 2), ("b", 2), ("c", 3)):
            assert set(Counter(subnet[name] for subnet in subnets).values()) == {count}


def test_every_step_draws_afresh_and_all_pairs_occur() -> None:
    space = _space(a=("x", "y", "z"), b=("x", "y", "z"))
    sampler = StrictFairness(space, stream(0, "paths"))
    pairs = Counter((p.subnet["a"], p.subnet["b"]) for _ in range(300) for p in sampler.step())
    # Chi-square, 8 degrees of freedom: above 26 in 1 of 1,000 (fewer here: each step is stratified).
    assert len(pairs) == 9 and sum((count - 100) ** 2 / 100 for count in pairs.values()) < 26


def test_a_leaf_deals_the_options_that_are_left() -> None:
    space = _space(a=("x", "y", "z"), b=("u", "v"))
    region = Region(space, {"a": ("x", "z")})
    for path in StrictFairness(region, stream(0, "paths")).step():
        assert region.contains(path.subnet)


def test_the_state_goes_on_where_it_was() -> None:
    space = _space(a=("x", "y", "z"))
    sampler, other = (StrictFairness(space, stream(seed, "paths")) for seed in (0, 1))
    sampler.step()
    other.load_state_dict(sampler.state_dict())
    assert [other.step() for _ in range(3)] == [sampler.step() for _ in range(3)]


def test_too_many_paths_are_refused() -> None:
    space = _space(a=tuple("abcdefg"), b=tuple("abcde"), c=tuple("abc"))
    with pytest.raises(InputError, match=r"choices with \[3, 5, 7\] options needs 105 paths per step; allowed are 64"):
        StrictFairness(space, torch.Generator())
