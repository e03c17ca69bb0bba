from __future__ import annotations

from collections import Counter

import pytest
import torch
from fake_supernet import FakeSpace, FakeSubnet

from nasq.errors import InputError
from nasq.training import PathSampler, Sandwich, Uniform, stream


def test_sandwich_is_largest_then_random_then_smallest() -> None:
    sampler = Sandwich(FakeSpace(), stream(0, "paths"), random=3)
    for _ in range(5):
        paths = sampler.step()
        assert [path.role for path in paths] == ["largest", "random", "random", "random", "smallest"]
        assert paths[0].subnet == FakeSubnet(8, "conv")
        assert paths[-1].subnet == FakeSubnet(2, "skip")


def test_sandwich_without_random_paths() -> None:
    assert [path.role for path in Sandwich(FakeSpace(), stream(0, "p"), random=0).step()] == ["largest", "smallest"]


def test_uniform_draws_what_the_space_samples() -> None:
    space, own = FakeSpace(), stream(3, "paths")
    expected = [space.sample(own) for _ in range(6)]
    sampler = Uniform(space, stream(3, "paths"), paths=2)
    drawn = [path for _ in range(3) for path in sampler.step()]
    assert [path.subnet for path in drawn] == expected
    assert {path.role for path in drawn} == {"random"}


def test_uniform_visits_every_subnet_about_equally() -> None:
    sampler = Uniform(FakeSpace(), stream(0, "paths"), paths=6)
    seen = Counter(path.subnet for _ in range(200) for path in sampler.step())
    # Chi-square, 5 degrees of freedom: above 20.5 in 1 of 1,000 fair draws.
    assert len(seen) == 6
    assert sum((count - 200) ** 2 / 200 for count in seen.values()) < 20.5


@pytest.mark.parametrize("make", [lambda g: Uniform(FakeSpace(), g, 2), lambda g: Sandwich(FakeSpace(), g, 2)])
def test_state_goes_on_where_it_was(make) -> None:
    sampler = make(stream(0, "paths"))
    assert isinstance(sampler, PathSampler)
    sampler.step()
    state = sampler.state_dict()
    after = [sampler.step() for _ in range(4)]
    other = make(stream(99, "paths"))
    other.load_state_dict(state)
    assert [other.step() for _ in range(4)] == after


def test_hooks_of_the_plain_samplers_change_nothing() -> None:
    sampler, plain = (Sandwich(FakeSpace(), stream(0, "paths")) for _ in range(2))
    path = sampler.step()[0]
    plain.step()
    sampler.observe(path, torch.tensor(1.0), torch.nn.Identity())
    sampler.on_epoch(1)
    sampler.on_phase("kernel")
    assert sampler.step() == plain.step()


def test_streams_are_independent_and_repeatable() -> None:
    draws = {purpose: torch.rand(4, generator=stream(0, purpose)).tolist() for purpose in ("paths", "data", "x")}
    assert len({tuple(value) for value in draws.values()}) == 3
    assert torch.rand(4, generator=stream(0, "paths")).tolist() == draws["paths"]
    assert torch.rand(4, generator=stream(1, "paths")).tolist() != draws["paths"]


def test_bad_counts_are_named() -> None:
    with pytest.raises(InputError, match="paths is 0; allowed: 1 or more"):
        Uniform(FakeSpace(), stream(0, "p"), paths=0)
    with pytest.raises(InputError, match="random is -1; allowed: 0 or more"):
        Sandwich(FakeSpace(), stream(0, "p"), random=-1)
