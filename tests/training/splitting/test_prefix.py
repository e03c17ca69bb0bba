from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from nasq.search_spaces.nas_bench_macro import nas_bench_macro
from torch import Tensor, nn
from torch.nn import functional as F

from nasq import Choice, Subnet, Supernet, elastic
from nasq.training.splitting import matching
from nasq.training.splitting.prefix import Prefix


class Counted(nn.Module):
    """Counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * self.weight


def _layer(index: int) -> nn.Module:
    choice = Choice(f"layer{index}", ("one", "three", "skip"), ordered=False)
    return elastic.OneOf(choice, one=nn.Conv2d(3, 3, 1), three=nn.Conv2d(3, 3, 3, padding=1), skip=nn.Identity())


def _chain() -> tuple[Supernet, list[Counted]]:
    """Four layers with a choice each, a counter before each of them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        parts: list[nn.Module] = []
        for index in range(4):
            parts += [nn.Sequential(Counted(), nn.BatchNorm2d(3)), _layer(index)]
        network = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Supernet(network), [part for part in network.modules() if isinstance(part, Counted)]


def test_what_comes_before_a_choice_is_computed_once() -> None:
    supernet, counters = _chain()
    x = torch.randn(4, 3, 6, 6)
    prefix, context = Prefix(supernet), Subnet({f"layer{index}": "one" for index in range(4)})
    with prefix.record(), supernet.activate(context):
        whole = supernet(x)
    for index in range(4):
        before = [counter.calls for counter in counters]
        variant = Subnet({**context, f"layer{index}": "skip"})
        with supernet.activate(variant):
            with prefix.reuse({f"layer{index}"}) as saved:
                found = supernet(x)
            wanted = supernet(x)
        again = [counter.calls - old - 1 for counter, old in zip(counters, before, strict=True)]
        assert again == [0] * (index + 1) + [1] * (3 - index)
        assert saved == 2 * index + 1  # the pairs before, each with its layer, and the pair just before the choice
        assert torch.equal(found, wanted) and not torch.equal(found, whole)
    assert all("forward" not in vars(module) for module in supernet.modules())


def test_a_choice_that_was_not_met_saves_nothing() -> None:
    supernet, _ = _chain()
    prefix = Prefix(supernet)
    with prefix.record(), supernet.activate(supernet.space.default()):
        supernet(torch.randn(2, 3, 6, 6))
    assert prefix.done({"elsewhere"}) == [] and prefix.done(set()) == []
    assert prefix.done({"elsewhere", "layer0"}) == prefix.done({"layer0"})


def test_what_is_changed_in_place_or_used_twice_is_computed_again() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.twice, self.last = Counted(), Counted(), _layer(0)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu_(self.first(x))
            return self.last(self.twice(self.twice(x))).mean((2, 3))

    supernet = Supernet(Net())
    prefix = Prefix(supernet)
    with prefix.record(), supernet.activate(supernet.space.default()):
        supernet(torch.randn(2, 3, 4, 4))
    assert [type(module).__name__ for module in prefix.done({"layer0"})] == []


@pytest.mark.parametrize("kind", ["chain", "macro"])
def test_distances_are_those_of_separate_passes(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if kind == "chain":
        supernet = _chain()[0]
        images, classes = torch.randn(6, 3, 6, 6), 3
    else:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            supernet = Supernet(nas_bench_macro(width=0.125))
        images, classes = torch.randn(6, 3, 16, 16), 10
    generator = torch.Generator().manual_seed(1)
    contexts = [supernet.space.sample(generator) for _ in range(2)]
    batch = (images, torch.arange(6) % classes)
    names = supernet.space.names[-3:]

    def distances(own: Supernet) -> Any:
        return matching.gradient_distances(own, lambda r: batch, lambda r: contexts[r], names, repetitions=2)

    found = distances(copy.deepcopy(supernet))
    state = {name: value.clone() for name, value in supernet.state_dict().items()}
    monkeypatch.setattr(Prefix, "done", lambda self, changed: [])
    wanted = distances(supernet)
    assert found.passes == wanted.passes
    for name in names:
        torch.testing.assert_close(found.distances[name], wanted.distances[name], rtol=0, atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in supernet.state_dict().items())
